"""MiPKD: masks, mixers, the rests of both networks, schedules and switches."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import step_at, student_of, teacher_of
from torch import Tensor, nn

import srkd.methods.mipkd
from srkd.errors import SrkdError
from srkd.methods import check_teachers, plan
from srkd.methods.base import l1
from srkd.methods.features import rest_of
from srkd.methods.mipkd import Mipkd, MipkdConfig, Mixer, grid_mask, random_mask
from srkd.types import Batch, Pass, Step

if TYPE_CHECKING:
    from srkd.networks.base import Network


def mipkd(student: Network, teacher: Network, **options: Any) -> Mipkd:
    """The method alone, with the checks of a recipe and its own layers drawn from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Mipkd(plan("mipkd", options).configs["mipkd"], student, (teacher,))


def pair_of_edsr(**student: Any) -> tuple[Network, Network]:
    """The student has 4 channels and 4 blocks unless told otherwise, the teacher 6 and 6."""
    return student_of("edsr", **student), teacher_of("edsr", channels=6, blocks=6)


def force(monkeypatch: pytest.MonkeyPatch, active: list[bool], student: list[bool]) -> None:
    """Fix which positions' L_block acts and whose rest is run (True: R = 1, the student's)."""
    monkeypatch.setattr(Mipkd, "_draws", lambda *_: (active, student))


def mixer_of(method: Mipkd, k: int) -> Mixer:
    assert method.mixers is not None
    mixer = method.mixers[k]
    assert isinstance(mixer, Mixer)
    return mixer


# -- the mask ---------------------------------------------------------------------------------------


def test_a_mix_of_the_teacher_alone_is_its_autoencoder() -> None:
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher, mask_ratio=1.0)
    step = step_at(method, student, teacher)
    terms = method.loss(step)
    assert terms["feature"].item() == pytest.approx(terms["autoencoder"].item())
    terms["feature"].backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    method = mipkd(student, teacher, mask_ratio=0.0, feature_norm="none")
    step = step_at(method, student, teacher)
    expected = 0.0
    for k, (s, t) in enumerate(method.pairs):
        mixer = mixer_of(method, k)
        f_e = mixer.decode(mixer.encode_s(step.student.taps[s]))
        expected += l1(f_e, step.teacher.taps[t]).item()
    assert method.loss(step)["feature"].item() == pytest.approx(expected)


def masks_of(
    monkeypatch: pytest.MonkeyPatch, method: Mipkd, pair: tuple[Network, Network], at: int = 0
) -> list[Tensor]:
    """The masks that one step draws, one for each position."""
    drawn: list[Tensor] = []

    def recorded(*arguments: Any) -> Tensor:
        drawn.append(random_mask(*arguments))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(srkd.methods.mipkd, "random_mask", recorded)
        method.loss(step_at(method, *pair, iteration=at))
    return drawn


def test_random_mask_is_drawn_for_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of_edsr()
    method = mipkd(*pair, latent=1.0)
    masks = masks_of(monkeypatch, method, pair)
    assert [tuple(m.shape) for m in masks] == [(2, 6, 8, 8)] * 3
    first = masks[0]
    rows = first.flatten(0, 1).flatten(1)  # samples and channels: all differ
    assert len(torch.unique(rows, dim=0)) == 12
    places = first.permute(0, 2, 3, 1).flatten(0, 2)
    assert len(torch.unique(places, dim=0)) > 32  # of 64 possible ones
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert not torch.equal(first, masks_of(monkeypatch, method, pair, at=1)[0])
    torch.rand(7)  # somebody else's random numbers
    again = masks_of(monkeypatch, method, pair)
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


# -- mixers -----------------------------------------------------------------------------------------


def make_identity(layers: nn.Sequential) -> None:
    """relu(x) - relu(-x) = x, in the first channels of a latent space twice as wide."""
    first, last = layers[0], layers[2]
    assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
    c = min(first.in_channels, last.out_channels, first.out_channels // 2)
    with torch.no_grad():
        for p in layers.parameters():
            p.zero_()
        at = first.kernel_size[0] // 2
        for i in range(c):
            first.weight[i, i, at, at] = 1
            first.weight[c + i, i, at, at] = -1
            last.weight[i, i, at, at] = 1
            last.weight[i, c + i, at, at] = -1


@pytest.mark.parametrize("layers", ["conv", "mlp"])
@pytest.mark.parametrize("mix_mode", ["position", "chain"])
def test_mixers_that_change_nothing_mix_a_copy_into_its_teacher(layers: str, mix_mode: str) -> None:
    """F^E = F^T, so every term but the pixel term is 0 for every draw of mask, R and drop."""
    teacher = teacher_of("edsr")
    student = copy.deepcopy(teacher).requires_grad_(True)
    method = mipkd(student, teacher, layers=layers, mix_mode=mix_mode, latent=2.0)
    for k in range(3):
        mixer = mixer_of(method, k)
        for part in (mixer.encode_s, mixer.encode_t, mixer.decode):
            assert isinstance(part, nn.Sequential)
            make_identity(part)
    for iteration in range(8):
        terms = method.loss(step_at(method, student, teacher, iteration))
        assert terms.pop("pixel").item() > 0
        assert all(value.item() < 1e-6 for value in terms.values()), terms


def test_without_encoders_a_copy_is_mixed_into_its_teacher() -> None:
    teacher = teacher_of("rcan")
    student = copy.deepcopy(teacher).requires_grad_(True)
    method = mipkd(student, teacher, encoder="none")
    assert not list(method.parameters())
    for iteration in range(4):
        terms = method.loss(step_at(method, student, teacher, iteration))
        assert set(terms) == {"pixel", "logits", "feature", "block"}
        assert all(v.item() < 1e-6 for name, v in terms.items() if name != "pixel")


def test_width_adapters_are_nothing_for_equal_widths() -> None:
    same = mipkd(student_of("edsr"), teacher_of("edsr", blocks=6))
    other = mipkd(*pair_of_edsr())
    assert same.narrow is not None and other.narrow is not None
    assert all(isinstance(layer, nn.Identity) for layer in same.narrow)
    shapes = [(m.in_channels, m.out_channels) for m in other.narrow if isinstance(m, nn.Conv2d)]
    assert shapes == [(6, 4)] * 3


def test_teacher_features_are_detached() -> None:
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher)
    step = step_at(method, student, teacher)
    taught = {name: f.requires_grad_() for name, f in step.teacher.taps.items()}
    torch.stack(list(method.loss(step).values())).sum().backward()
    assert all(feature.grad is None for feature in taught.values())


# -- the rests of both networks ---------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2])
def test_block_term_by_hand(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Eq. (6) to (8), written out: the rest's groups, its own head, its own tail."""
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher, block_weight=2.0)
    step = step_at(method, student, teacher)
    active = [i == k for i in range(3)]
    mixer, (s, t) = mixer_of(method, k), method.pairs[k]
    random = step.batch.generator(f"mask {k}")
    z_s, z_t = mixer.encode_s(step.student.taps[s]), mixer.encode_t(step.teacher.taps[t])
    f_e = mixer.decode(torch.where(random_mask(z_t, 0.5, random), z_t, z_s))

    assert method.narrow is not None
    expected = {}
    for owner, feature, run, tap in (
        (True, method.narrow[k](f_e), step.student, s),
        (False, f_e, step.teacher, t),
    ):
        network = student if owner else teacher
        for group in list(network.groups)[network.tap_names.index(tap) + 1 :]:
            feature = group(feature)
        expected[owner] = 2 * l1(network.tail(feature, run.head), step.teacher.sr).item()
        force(monkeypatch, active, [owner] * 3)
        assert method.loss(step)["block"].item() == pytest.approx(expected[owner], rel=1e-5)
    assert expected[True] != pytest.approx(expected[False], rel=1e-3)


@pytest.mark.parametrize("feature_weight", [0.0, 1.0])
def test_gradient_reaches_the_student_through_the_rest_of_the_frozen_teacher(
    monkeypatch: pytest.MonkeyPatch, feature_weight: float
) -> None:
    student, teacher = pair_of_edsr()
    options = {"pixel_weight": 0.0, "logits_weight": 0.0, "feature_weight": feature_weight}
    method = mipkd(student, teacher, **options)
    force(monkeypatch, [True] * 3, [False] * 3)
    method.loss(step_at(method, student, teacher))["block"].backward()
    reached = [student.head, *student.groups]  # up to the last position, not the tail
    for module in reached:
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert all(p.grad is None for p in student.tail.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in (method.narrow or nn.ModuleList()).parameters())

    # Without a graph through the rest nothing would be trained.
    monkeypatch.setattr(srkd.methods.mipkd, "rest_of", torch.no_grad()(rest_of))
    assert not method.loss(step_at(method, student, teacher))["block"].requires_grad


def test_rest_of_the_student_trains_the_student_and_the_mixer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher)
    force(monkeypatch, [False, True, False], [True] * 3)
    method.loss(step_at(method, student, teacher))["block"].backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert method.narrow is not None
    with_gradient = [all(p.grad is not None for p in m.parameters()) for m in method.narrow]
    assert with_gradient == [False, True, False]
    assert all(p.grad is not None for p in mixer_of(method, 1).parameters())
    assert all(p.grad is None for p in mixer_of(method, 0).parameters())


def draws_of(method: Mipkd, count: int) -> list[tuple[list[bool], list[bool]]]:
    empty = torch.zeros(1)
    student = Pass(nn.Identity(), empty)
    return [method._draws(Step(Batch(empty, empty, iteration=i), student)) for i in range(count)]


def test_positions_are_dropped_and_never_all() -> None:
    drawn = draws_of(mipkd(*pair_of_edsr()), 1000)
    active = torch.tensor([a for a, _ in drawn]).double()
    owner = torch.tensor([o for _, o in drawn]).double()
    assert active.any(1).all()
    # Kept by chance, or chosen of three when none is: 0.5 + 0.125 / 3.
    assert torch.allclose(active.mean(0), torch.tensor(0.5417).double(), atol=0.05)
    assert torch.allclose(owner.mean(0), torch.tensor(0.5).double(), atol=0.05)
    never = torch.tensor([a for a, _ in draws_of(mipkd(*pair_of_edsr(), drop=1.0), 300)])
    assert (never.sum(1) == 1).all() and never.any(0).all()
    always = [a for a, _ in draws_of(mipkd(*pair_of_edsr(), drop=0.0), 20)]
    assert always == [[True] * 3] * 20


def test_dropped_positions_lose_the_block_term_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher)
    step = step_at(method, student, teacher)
    terms = []
    for active in ([True, False, False], [False, True, False], [True, True, False]):
        force(monkeypatch, active, [False] * 3)
        terms.append({name: value.item() for name, value in method.loss(step).items()})
    for name in ("pixel", "logits", "feature", "autoencoder"):
        assert len({t[name] for t in terms}) == 1
    assert terms[2]["block"] == pytest.approx(terms[0]["block"] + terms[1]["block"], rel=1e-5)


def test_feature_term_trains_every_mixer_whatever_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher)
    assert method.mixers is not None
    force(monkeypatch, [True, False, False], [False] * 3)
    method.loss(step_at(method, student, teacher))["feature"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.mixers.parameters())


# -- the terms --------------------------------------------------------------------------------------


def test_autoencoder_acts_in_the_first_tenth_and_is_0_after() -> None:
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher, feature_norm="none")
    step = step_at(method, student, teacher)
    rebuilt = 0.0
    for k, (_, t) in enumerate(method.pairs):
        f_t, mixer = step.teacher.taps[t], mixer_of(method, k)
        rebuilt += l1(mixer.decode(mixer.encode_t(f_t)), f_t).item()
    values = [  # ten steps in all
        method.loss(step_at(method, student, teacher, i))["autoencoder"].item() for i in range(10)
    ]
    assert values == [pytest.approx(rebuilt, rel=1e-5)] + [0.0] * 9
    options = {"autoencoder_share": 0.3, "autoencoder_weight": 2.0, "feature_norm": "none"}
    longer = mipkd(student, teacher, **options)
    values = [
        longer.loss(step_at(longer, student, teacher, i))["autoencoder"].item() for i in range(5)
    ]
    assert values == [pytest.approx(2 * rebuilt, rel=1e-5)] * 3 + [0.0] * 2
    off = mipkd(student, teacher, autoencoder_weight=0.0)
    assert "autoencoder" not in off.loss(step_at(off, student, teacher))


def test_weights_scale_their_terms() -> None:
    pair = pair_of_edsr()
    weights = {"pixel": 2.0, "logits": 3.0, "feature": 4.0, "block": 5.0, "autoencoder": 6.0}
    ones = mipkd(*pair, **{f"{name}_weight": 1.0 for name in weights})
    many = mipkd(*pair, **{f"{name}_weight": w for name, w in weights.items()})
    plain, scaled = (m.loss(step_at(m, *pair)) for m in (ones, many))
    for name, w in weights.items():
        assert scaled[name].item() == pytest.approx(w * plain[name].item(), rel=1e-6)
        assert plain[name].item() > 0


def test_defaults_are_the_papers() -> None:
    c = MipkdConfig()
    assert (c.pixel_weight, c.logits_weight, c.feature_weight, c.block_weight) == (1, 1, 1, 0.1)
    assert (c.mask, c.encoder, c.layers, c.mix_mode) == ("random", "separate", "conv", "position")


def test_range_norm_divides_by_the_rms_of_the_teacher() -> None:
    pair = pair_of_edsr()
    options = {"positions": ["block2:block3"], "block_weight": 0.0}
    plain = mipkd(*pair, **options, feature_norm="none")
    normed = mipkd(*pair, **options, feature_norm="rms")
    step = step_at(plain, *pair)
    rms = step.teacher.taps["block3"].square().mean().sqrt().item()
    a, b = plain.loss(step), normed.loss(step)
    for name in ("feature", "autoencoder"):
        assert b[name].item() == pytest.approx(a[name].item() / rms, rel=1e-5)
    assert a["logits"].item() == b["logits"].item()
    assert set(normed.state_dict()) - set(plain.state_dict()) == {"norms.0.square", "norms.0.count"}


def test_range_norm_can_be_left_to_the_families() -> None:
    edsr, rcan = student_of("edsr"), teacher_of("rcan")
    for choice, other_family, same_family in (
        ("rms", True, True),
        ("auto", True, False),
        ("none", False, False),
    ):
        across = mipkd(edsr, rcan, feature_norm=choice)
        within = mipkd(edsr, teacher_of("edsr"), feature_norm=choice)
        assert (across.norms is not None, within.norms is not None) == (other_family, same_family)


# Rows of the paper's ablation tables, and our own switches.
SWITCHES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mask random": ({}, {"feature", "block", "autoencoder"}),
    "mask grid": ({"mask": "grid"}, {"feature", "block", "autoencoder"}),
    "mask cosine": ({"mask": "cosine"}, {"feature", "block", "autoencoder"}),
    "mask cka": ({"mask": "cka"}, {"feature", "block", "autoencoder"}),
    "encoder none": ({"encoder": "none"}, {"feature", "block"}),
    "encoder shared": ({"encoder": "shared"}, {"feature", "block", "autoencoder"}),
    "encoder, no block": ({"encoder": "none", "block_weight": 0.0}, {"feature"}),
    "mlp": ({"layers": "mlp"}, {"feature", "block", "autoencoder"}),
    "latent of the teacher's width": ({"latent": 1.0}, {"feature", "block", "autoencoder"}),
    "no autoencoder": ({"autoencoder_weight": 0.0}, {"feature", "block"}),
    "feature only": ({"block_weight": 0.0}, {"feature", "autoencoder"}),
    "block only": ({"feature_weight": 0.0}, {"block"}),
    "neither": ({"feature_weight": 0.0, "block_weight": 0.0}, set()),
    "weights": ({"feature_weight": 0.1, "block_weight": 1.0}, {"feature", "block", "autoencoder"}),
    "chain": ({"mix_mode": "chain"}, {"feature", "block", "autoencoder"}),
    "chain, grid": ({"mix_mode": "chain", "mask": "grid"}, {"feature", "block", "autoencoder"}),
    "range as it is": ({"feature_norm": "none"}, {"feature", "block", "autoencoder"}),
}


def train_all(method: Mipkd, student: Network, teacher: Network, steps: int = 10) -> set[str]:
    """Gradients of several draws; every parameter gets one but the teacher's. Returns the terms."""
    names: set[str] = set()
    for iteration in range(steps):
        terms = method.loss(step_at(method, student, teacher, iteration))
        assert not names or names == set(terms)
        names = set(terms)
        torch.stack(list(terms.values())).sum().backward()
    for label, p in [*student.named_parameters(), *method.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), label
    assert all(p.grad is None for p in teacher.parameters())
    return names


@pytest.mark.parametrize("row", list(SWITCHES))
def test_every_switch_trains_everything(row: str) -> None:
    options, expected = SWITCHES[row]
    pair = pair_of_edsr()
    assert train_all(mipkd(*pair, **options), *pair) == {"pixel", "logits"} | expected


PAIRS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "edsr depth": (("edsr", {}), ("edsr", {"blocks": 8})),
    "edsr width": (("edsr", {}), ("edsr", {"channels": 8})),
    "rcan 4 to 4": (("rcan", {}), ("rcan", {"channels": 8, "blocks": 2})),
    "rcan 10 to 5": (("rcan", {"group_count": 5}), ("rcan", {"group_count": 10})),
    "swinir 6 to 4": (("swinir", {}), ("swinir", {"channels": 8, "depths": (1,) * 6})),
    "edsr to swinir": (("swinir", {}), ("edsr", {})),
    "swinir to rcan": (("rcan", {}), ("swinir", {"channels": 8})),
}


@pytest.mark.parametrize("mix_mode", ["position", "chain"])
@pytest.mark.parametrize("pair", list(PAIRS))
def test_pairs_of_networks(pair: str, mix_mode: str) -> None:
    (family_s, sizes_s), (family_t, sizes_t) = PAIRS[pair]
    student, teacher = student_of(family_s, **sizes_s), teacher_of(family_t, **sizes_t)
    method = mipkd(student, teacher, mix_mode=mix_mode)
    assert len(method.pairs) == 3
    train_all(method, student, teacher)


def test_block_alone_through_the_own_rest_is_the_own_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R = 1 without mixers: the student's feature in the student's rest, so |S(x) - T(x)|_1 each time."""
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher, feature_weight=0.0, block_weight=1.0)
    assert method.narrow is None and method.mixers is None
    assert method.widen is not None and len(method.widen) == 3
    force(monkeypatch, [True] * 3, [True] * 3)
    terms = method.loss(step_at(method, student, teacher))
    assert terms["block"].item() == pytest.approx(3 * terms["logits"].item(), rel=1e-5)


def test_chain_of_one_owner_is_that_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixers that give the teacher's side alone: a chain of the teacher ends in the teacher's image."""
    student, teacher = pair_of_edsr()
    method = mipkd(student, teacher, mix_mode="chain", encoder="none", mask_ratio=1.0)
    force(monkeypatch, [True] * 3, [False] * 3)
    assert method.loss(step_at(method, student, teacher))["block"].item() < 1e-6
    # With the student's side alone and the student's segments it is the student, but for the widths.
    twin = teacher_of("edsr", blocks=6)
    method = mipkd(student, twin, mix_mode="chain", encoder="none", mask_ratio=0.0)
    force(monkeypatch, [True] * 3, [True] * 3)
    terms = method.loss(step_at(method, student, twin))
    assert terms["block"].item() == pytest.approx(0.1 * terms["logits"].item(), rel=1e-4)


@pytest.mark.parametrize("owners", list(itertools.product((False, True), repeat=3)))
def test_chain_by_hand(monkeypatch: pytest.MonkeyPatch, owners: tuple[bool, ...]) -> None:
    """What a segment gives takes the place of its network's own feature in the next mix."""
    student, teacher = student_of("edsr"), teacher_of("edsr", blocks=6)
    method = mipkd(student, teacher, mix_mode="chain", encoder="none", mask="grid")
    force(monkeypatch, [True] * 3, list(owners))
    step = step_at(method, student, teacher)
    assert method.pairs == (("block1", "block2"), ("block3", "block4"), ("body", "body"))
    f_s, f_t = ([p.taps[t] for t in p.taps] for p in (step.student, step.teacher))
    cuts = {True: (1, 3, 5), False: (2, 4, 7)}  # groups before each position
    for k, own in enumerate(owners[:2]):
        path = torch.where(grid_mask(f_s[k]), f_t[k], f_s[k])
        for group in list((student if own else teacher).groups)[cuts[own][k] : cuts[own][k + 1]]:
            path = group(path)
        (f_s if own else f_t)[k + 1] = path
    mixed = torch.where(grid_mask(f_s[2]), f_t[2], f_s[2])
    network, run = (student, step.student) if owners[2] else (teacher, step.teacher)
    expected = 0.1 * l1(network.tail(mixed, run.head), step.teacher.sr)
    assert method.loss(step)["block"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.5}, r"mask_ratio = 1\.5, but a share lies in 0\.\.1"),
        ({"drop": 2}, r"drop = 2\.0"),
        ({"autoencoder_share": 1.1}, "autoencoder_share"),
        ({"latent": 0.0}, "must be above 0"),
        ({"mix_mode": "chain", "block_weight": 0.0}, "needs feature_weight and block_weight"),
        ({"mask": "gird"}, "did you mean 'grid'"),
        ({"positions": ["block2"]}, "write student:teacher"),
        ({"positions": ["block9:block2"]}, "has no tap 'block9'"),
        (
            {"mix_mode": "chain", "positions": ["block1:block4", "block3:block2"]},
            "block3:block2 comes after block1:block4 .* list them in order",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        mipkd(*pair_of_edsr(), **options)


def test_a_foreign_teacher_is_refused_with_the_methods_that_work() -> None:
    with pytest.raises(SrkdError, match=r"outputs only.*work: .*dukd"):
        check_teachers(plan("mipkd", {}), [False])
