"""MKD: every equation by hand, the kernels of each sample, positions, what the distance trains."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from tiny_pair import step_at, student_of, teacher_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods import plan
from srkd.methods.mkd import (
    KnowledgeNetwork,
    Mkd,
    MkdConfig,
    PlainKnowledge,
    absolute,
    by_rms,
    channel_correlation,
    charbonnier,
    convolve,
    generate_kernels,
    knowledge,
    knowledge_gap,
    quarters,
)
from srkd.networks import build, build_family

if TYPE_CHECKING:
    from srkd.networks.base import Network


def mkd(**config: Any) -> Mkd:
    """For RCANs of four groups, 4 channels and 6."""
    torch.manual_seed(2)
    return Mkd(MkdConfig(**config), student_of("rcan"), (teacher_of("rcan", channels=6),))


def network_of(**config: Any) -> KnowledgeNetwork:
    network = mkd(**config).networks[0]
    assert isinstance(network, KnowledgeNetwork)
    return network


def rows(*values: list[float]) -> Tensor:
    """One sample with these channels, each a row of pixels: (1, C, 1, w)."""
    return torch.tensor(values)[None, :, None, :]


def features(method: Mkd, seed: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    ours = {tap: torch.randn(2, 4, 6, 6, generator=random) for tap in method.student_taps}
    theirs = {tap: torch.randn(2, 6, 6, 6, generator=random) for tap in method.teacher_taps}
    return ours, theirs


# -- the equations ----------------------------------------------------------------------------------


def test_channel_correlation_by_hand() -> None:
    # Cosines of the teacher's channel (0, 2) with (3, 4) and (1, 0): 0.8 and 0.
    f_s, f_t = rows([3.0, 4.0], [1.0, 0.0]), rows([0.0, 2.0])
    got = channel_correlation(f_s, f_t, 0.1)
    torch.testing.assert_close(got, torch.tensor([[[8.0, 0.0]]]).softmax(2))
    # As printed: the products themselves, 8 and 0 too; and with the teacher's channel halved 4 and 0.
    printed = channel_correlation(f_s, f_t / 2, None)
    torch.testing.assert_close(printed, torch.tensor([[[4.0, 0.0]]]).softmax(2))


def test_kernels_are_tiles_in_reading_order_of_unit_length() -> None:
    # Tiles of 2 x 2: [[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [12, 13]], [[10, 11], [14, 15]].
    kernels = generate_kernels(torch.arange(16.0).view(1, 1, 4, 4), grid=2)
    assert kernels.shape == (1, 4, 1, 2, 2)
    second = torch.tensor([[2.0, 3.0], [6.0, 7.0]])
    torch.testing.assert_close(kernels[0, 1, 0], second / 98**0.5)
    third = torch.tensor([[8.0, 9.0], [12.0, 13.0]])
    torch.testing.assert_close(kernels[0, 2, 0], third / third.norm())


def test_a_filter_has_one_length_over_its_channels() -> None:
    # One tile of one pixel with the channels 3 and 4.
    kernels = generate_kernels(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), grid=1)
    torch.testing.assert_close(kernels.flatten(), torch.tensor([0.6, 0.8]))


def test_zero_tiles_have_finite_derivatives() -> None:
    tiles = torch.zeros(1, 1, 2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(generate_kernels(tiles, 2).sum(), tiles, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), tiles)
    assert slope.isfinite().all() and second.isfinite().all()


def test_every_sample_is_convolved_with_its_own_kernels() -> None:
    maps, kernels = torch.randn(3, 2, 5, 4), torch.randn(3, 7, 2, 3, 3)
    got = convolve(maps, kernels)
    one = [F.conv2d(m[None], k, padding=1) for m, k in zip(maps, kernels, strict=True)]
    torch.testing.assert_close(got, torch.cat(one))


def test_knowledge_by_hand() -> None:
    # 1x1 kernels: relu(2 * (1, -1)) = (2, 0), times -3.
    w1, w2 = torch.full((1, 1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1, 1), -3.0)
    assert knowledge(rows([1.0, -1.0]), w1, w2).flatten().tolist() == [-6.0, 0.0]


def test_the_gap_is_that_of_both_knowledge_maps() -> None:
    f_s, f_t = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    w1, w2 = torch.randn(2, 4, 3, 3, 3), torch.randn(2, 4, 4, 3, 3)
    both = knowledge(f_s, w1, w2) - knowledge(f_t, w1, w2)
    torch.testing.assert_close(knowledge_gap(f_s, f_t, w1, w2), both, rtol=1e-4, atol=1e-4)


def test_distances_by_hand() -> None:
    gap = rows([3.0, -1.0])
    assert absolute(gap).item() == 2
    # The RMS of (80, 0, 0, 0) is 40, a twentieth of it 2: (sqrt(9 + 4) + sqrt(1 + 4)) / 2.
    k_t = rows([80.0, 0.0, 0.0, 0.0]).requires_grad_()
    distance = charbonnier(gap.requires_grad_(), k_t)
    assert distance.item() == pytest.approx((13**0.5 + 5**0.5) / 2)
    distance.backward()
    assert k_t.grad is None


def test_features_are_divided_by_their_rms() -> None:
    # (1, 7): RMS 5. The gradient sees it: nothing is gained by scaling all.
    feature = rows([1.0, 7.0]).requires_grad_()
    scaled = by_rms(feature)
    torch.testing.assert_close(scaled.flatten(), torch.tensor([0.2, 1.4]))
    (slope,) = torch.autograd.grad((scaled * rows([2.0, 1.0])).sum(), feature)
    assert (slope * feature).sum().item() == pytest.approx(0, abs=1e-6)


# -- the knowledge network --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("channels_out", [4, 16, 64, 144])
def test_shapes_of_kernels(channels_out: int, size: tuple[int, int]) -> None:
    network = network_of(channels_out=channels_out)
    f_s, f_t = torch.randn(2, 4, *size), torch.randn(2, 6, *size)
    w1, w2 = network.kernels(f_s, f_t)
    assert w1.shape == (2, channels_out, 6, 3, 3)
    assert w2.shape == (2, channels_out, channels_out, 3, 3)
    for w in (w1, w2):
        torch.testing.assert_close(w.flatten(2).norm(dim=2), torch.ones(2, channels_out))
    assert knowledge(f_t, w1, w2).shape == (2, channels_out, *size)
    assert network(f_s, f_t, smooth=False).shape == ()


def test_kernels_are_those_of_the_order_in_the_paper() -> None:
    # Modulate, convolve, then take means of each tile's 3 x 3 parts: tiles of 6 x 6 pixels.
    network = network_of(channels_out=4)
    f_s, f_t = torch.randn(2, 4, 12, 12), torch.randn(2, 6, 12, 12)
    modulated = (channel_correlation(f_s, f_t, 0.1) @ f_s.flatten(2)).unflatten(2, (12, 12))
    for mix, got in zip((network.mix1, network.mix2), network.kernels(f_s, f_t), strict=True):
        mixed = mix(modulated)
        tile = F.adaptive_avg_pool2d(mixed[:, :, 6:, :6], 3)  # row 1, column 0: filter 2
        wanted = tile / tile.flatten(1).norm(dim=1)[:, None, None, None]
        torch.testing.assert_close(got[:, 2], wanted)


def test_kernels_of_a_sample_depend_on_it_alone() -> None:
    network = network_of(channels_out=4)
    f_s, f_t = torch.randn(2, 4, 6, 6), torch.randn(2, 6, 6, 6)
    both, first = network.kernels(f_s, f_t), network.kernels(f_s[:1], f_t[:1])
    for w, alone in zip(both, first, strict=True):
        assert (w[0] - w[1]).abs().max() > 0.01
        torch.testing.assert_close(w[:1], alone)


def test_dimension_matching_is_two_convolutions_around_a_relu() -> None:
    network = network_of(channels_out=4)
    first, relu, second = network.match
    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    assert isinstance(relu, nn.ReLU)
    assert (first.weight.shape, second.weight.shape) == ((6, 4, 1, 1), (6, 6, 1, 1))


def test_literal_correlation_has_no_temperature() -> None:
    f_s, f_t = torch.randn(1, 4, 6, 6), torch.randn(1, 6, 6, 6)
    warm, cold = (network_of(correlation="literal", temperature=t) for t in (1.0, 0.1))
    assert torch.equal(warm.kernels(f_s, f_t)[0], cold.kernels(f_s, f_t)[0])
    assert not torch.equal(warm.kernels(f_s, f_t)[0], network_of().kernels(f_s, f_t)[0])


# -- the method -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("rcan", ["group3", "group5", "group8", "group10"]),
        ("edsr", ["block8", "block16", "block24", "block32"]),
        ("rcan_a", ["group1", "group2", "group3", "group4"]),
        ("edsr_tiny", ["block1", "block2", "block3", "block4"]),
        ("rdn", ["block4", "block8", "block12", "block16"]),
        ("san", ["group5", "group10", "group15", "group20"]),
        ("han", ["group3", "group5", "group8", "group10"]),
    ],
)
def test_positions_are_those_of_the_paper(name: str, ends: list[str]) -> None:
    with torch.device("meta"):
        network = build(name, 4)
    assert quarters(network) == ends


def test_positions_of_few_units_are_pairs_of_their_own() -> None:
    # Both networks end their quarters after units 1, 1, 2, 2: two pairs.
    small = {"group_count": 2}
    method = Mkd(MkdConfig(), student_of("rcan", **small), (teacher_of("rcan", **small),))
    assert method.pairs == (("group1", "group1"), ("group2", "group2"))


def test_positions_by_hand() -> None:
    method = mkd(positions=("group1:group3", "body:group4"))
    assert method.student_taps == ("group1", "body") and len(method.networks) == 2


def test_the_distance_is_a_sum_over_positions() -> None:
    method = mkd(channels_out=4)
    ours, theirs = features(method)
    single = [
        network(by_rms(ours[s]), by_rms(theirs[t]), smooth=False)
        for (s, t), network in zip(method.pairs, method.networks, strict=True)
    ]
    assert len(single) == 4
    torch.testing.assert_close(method.distance(ours, theirs), torch.stack(single).sum())


def test_scale_of_features_counts_only_without_norm() -> None:
    for norm in ("rms", "none"):
        method = mkd(channels_out=4, feature_norm=norm)
        ours, theirs = features(method)
        louder = {tap: 100 * feature for tap, feature in theirs.items()}
        ratio = (method.distance(ours, louder) / method.distance(ours, theirs)).item()
        assert ratio == pytest.approx(1) if norm == "rms" else ratio > 30


def test_equal_features_behind_the_identity_have_no_distance() -> None:
    student = student_of("rcan")
    method = Mkd(MkdConfig(channels_out=4), student, (copy.deepcopy(student),))
    for network in method.networks:
        assert isinstance(network, KnowledgeNetwork)
        for layer in (network.match[0], network.match[2]):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
    positive = {tap: torch.rand(2, 4, 6, 6) for tap in method.student_taps}
    assert method.distance(positive, positive).item() == 0
    assert method.distance(positive, features(method)[0]).item() > 0


@pytest.mark.parametrize("case", ["1", "2", "3", "4"])
def test_distance_trains_student_and_networks_never_the_teacher(case: str) -> None:
    method = mkd(case=case, channels_out=4)
    ours, theirs = features(method)
    for feature in (*ours.values(), *theirs.values()):
        feature.requires_grad_()
    method.distance(ours, theirs).backward()
    assert all(f.grad is None for f in theirs.values())
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in ours.values())
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("case", "size"), [("1", 1), ("2", 3)])
def test_plain_cases_by_hand(case: str, size: int) -> None:
    # Case 1: |conv(F^s) - F^t|; case 2: a convolution of both, and the smooth distance.
    method = mkd(case=case, feature_norm="none", positions=("group1:group1",))
    ours, theirs = features(method)
    (network,) = method.networks
    assert isinstance(network, PlainKnowledge)
    f_s, k_t = ours["group1"], theirs["group1"]
    k_s = F.conv2d(f_s, network.student.weight, network.student.bias, padding=size // 2)
    if isinstance(network.teacher, nn.Conv2d):
        k_t = F.conv2d(k_t, network.teacher.weight, network.teacher.bias, padding=1)
    assert isinstance(network.teacher, nn.Conv2d) == (case == "2")
    wanted = absolute(k_s - k_t) if case == "1" else charbonnier(k_s - k_t, k_t)
    torch.testing.assert_close(method.distance(ours, theirs), wanted)


def test_charbonnier_is_of_the_teachers_knowledge() -> None:
    method = mkd(channels_out=4, distance="charbonnier", positions=("group1:group1",))
    ours, theirs = features(method)
    (network,) = method.networks
    assert isinstance(network, KnowledgeNetwork)
    f_s, f_t = by_rms(ours["group1"]), by_rms(theirs["group1"])
    w1, w2 = network.kernels(f_s, f_t)
    wanted = charbonnier(knowledge_gap(network.match(f_s), f_t, w1, w2), knowledge(f_t, w1, w2))
    torch.testing.assert_close(method.distance(ours, theirs), wanted)


def test_distance_is_in_float32_under_autocast() -> None:
    method = mkd(channels_out=4)
    ours, theirs = features(method)
    ours = {tap: f.bfloat16() for tap, f in ours.items()}
    with torch.autocast("cpu", torch.bfloat16):
        distance = method.distance(ours, theirs)
    assert distance.dtype == torch.float32
    wide = {tap: f.float() for tap, f in ours.items()}
    assert torch.equal(distance, method.distance(wide, theirs))


@pytest.mark.parametrize("family", ["edsr", "swinir"])
def test_other_families_and_pairs_of_families(family: str) -> None:
    student, teacher = student_of(family), teacher_of("rcan", channels=6)
    method = Mkd(MkdConfig(channels_out=4), student, (teacher,))
    lr = torch.rand(1, 3, 8, 8)
    distance = method.distance(
        student.features(lr, method.student_taps), teacher.features(lr, method.teacher_taps)
    )
    distance.backward()
    assert all(p.grad is not None for p in student.groups[0].parameters())


def test_the_step_of_the_loop_is_on_pixels_alone() -> None:
    student, teacher = student_of("rcan"), teacher_of("rcan", channels=6)
    method = Mkd(MkdConfig(pixel_weight=2.0), student, (teacher,))
    step = step_at(method, student, teacher)
    terms = method.loss(step)
    assert list(terms) == ["pixel"]
    torch.testing.assert_close(terms["pixel"], 2 * F.l1_loss(step.student.sr, step.hr))
    assert not method.needs_teacher_pass


@pytest.mark.parametrize(("case", "meta"), [("1", True), ("2", True), ("3", False), ("4", True)])
def test_plan_of_the_bilevel_step(case: str, meta: bool) -> None:
    plan = mkd(case=case, inner_steps=3, meta_every=5, meta_learning_rate=0.25).bilevel
    assert plan.meta == meta
    assert (plan.inner_steps, plan.meta_every, plan.meta_learning_rate) == (3, 5, 0.25)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels_out": 60}, "channels_out = 60, but every tile of a square grid"),
        ({"channels_out": 0}, "channels_out = 0, but every tile"),
        ({"kernel": 2}, "kernel = 2, but a kernel needs a middle"),
        ({"inner_steps": 0}, "inner_steps = 0, but 1 or more"),
        ({"meta_every": 0}, "meta_every = 0, but 1 or more"),
        ({"temperature": 0.0}, "temperature = 0, but it divides"),
        ({"case": "5"}, "method.mkd.case = '5'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SrkdError, match=words):
        plan("mkd", options)


@pytest.mark.parametrize("family", ["edsr", "swinir", "bsrn", "rdn", "san", "han"])
def test_features_are_those_of_the_whole_pass_without_the_tail(family: str) -> None:
    network = any_network(family)
    lr, taps = torch.rand(1, 3, 17, 16), network.tap_names
    whole = network.run(lr, taps).taps
    network.tail.register_forward_hook(refuse)
    got = network.features(lr, taps)
    assert tuple(got) == taps
    for tap in taps:
        assert torch.equal(got[tap], whole[tap]), tap


def test_groups_after_the_last_tap_are_not_run() -> None:
    network = student_of("rcan")
    network.groups[2].register_forward_hook(refuse)
    assert list(network.features(torch.rand(1, 3, 6, 6), ["group2", "group1"])) == [
        "group2",
        "group1",
    ]


def refuse(*_: Any) -> None:
    raise AssertionError("this part need not run")


def any_network(family: str) -> Network:
    """A small one with two units whose values are all other than those at the start."""
    sizes: dict[str, dict[str, Any]] = {
        "edsr": {"channels": 4, "blocks": 2},
        "swinir": {
            "channels": 4,
            "depths": (1, 1),
            "heads": 2,
            "window": 4,
            "drop_path": 0.0,
        },
        "bsrn": {"channels": 16, "blocks": 2},
        "rdn": {"channels": 4, "blocks": 2, "layers": 2, "growth": 4},
        "san": {"channels": 8, "blocks": 1, "group_count": 2, "reduction": 4},
        "han": {"channels": 4, "blocks": 1, "group_count": 2, "reduction": 2},
    }
    torch.manual_seed(0)
    network = build_family(family, {**sizes[family], "scale": 2})
    for p in network.parameters():
        if not p.any():  # a path that opens with training
            nn.init.uniform_(p.data, -0.5, 0.5)
    return network
