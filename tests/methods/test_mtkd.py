"""MTKD: the distances by hand and against a slow definition, the terms of both stages, the options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pywt
import torch
from tiny_pair import Nearest, images, step_at, student_of, teacher_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods import plan
from srkd.methods.base import l1
from srkd.methods.mtkd import (
    Aggregation,
    Mtkd,
    MtkdConfig,
    dct_distance,
    network_config,
    wavelet_distance,
)
from srkd.types import Batch, Pass, Setting, Step
from srkd.wavelet import wavelet_filters

HAAR = wavelet_filters("haar")
DISTANCES = ("wavelet", "l1", "dct", "high")


def mtkd(**options: Any) -> Mtkd:
    return Mtkd(MtkdConfig(**options), nn.Identity(), (nn.Identity(),))


def step_with(sr: Tensor, target: Tensor, hr: Tensor) -> Step:
    """A step of given images, (N, 3, 2h, 2w) each."""
    passes = [Pass(nn.Identity(), sr=image) for image in (sr, target)]
    return Step(Batch(hr[..., ::2, ::2], hr), passes[0], (passes[1],))


def random_step(px: int = 8) -> Step:
    _, hr = images(px=px, seed=0)
    _, sr = images(px=px, seed=1)
    _, target = images(px=px, seed=2)
    return step_with(sr.requires_grad_(), target.requires_grad_(), hr)


# -- the distances ----------------------------------------------------------------------------------


def test_one_level_by_hand() -> None:
    # The difference is (1 2; 3 6): LL 6, LH -3, HL -2, HH 1, each half of a sum of four.
    sr = torch.tensor([[[[1.5, 2.5], [3.5, 6.5]]]])
    target = torch.full_like(sr, 0.5)
    assert wavelet_distance(sr, target, HAAR, 1).item() == pytest.approx((6 + 3 + 2 + 1) / 4)
    assert wavelet_distance(sr, target, HAAR, 1, True).item() == pytest.approx((3 + 2 + 1) / 3)


def test_two_levels_by_hand() -> None:
    # One pixel of 8 in 4 x 4: level 1 has 4 in one of the four places of every band, level 2 has 2 in all.
    sr = torch.zeros(1, 1, 4, 4)
    sr[0, 0, 0, 0] = 8
    by_hand = (3 * 4 / 4 + 3 * 2 + 2) / 7  # LL of level 1, with a mean of 1, is not counted
    assert wavelet_distance(sr, torch.zeros_like(sr), HAAR, 2).item() == pytest.approx(by_hand)
    by_hand = (3 * 4 / 4 + 3 * 2) / 6
    high = wavelet_distance(sr, torch.zeros_like(sr), HAAR, 2, True)
    assert high.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_constant_offset_is_seen_by_the_last_approximation_alone(levels: int) -> None:
    # LL of level K is 2^K times the image, and one of 3K+1 bands.
    _, target = images(px=8)
    distance = wavelet_distance(target + 0.25, target, HAAR, levels)
    assert distance.item() == pytest.approx(0.25 * 2**levels / (3 * levels + 1), rel=1e-4)
    high = wavelet_distance(target + 0.25, target, HAAR, levels, True)
    assert high.item() == pytest.approx(0, abs=1e-6)


def test_wavelet_distance_is_that_of_pywavelets() -> None:
    _, sr = images(px=15, seed=1)
    _, target = images(px=15, seed=2)
    ours = wavelet_distance(sr, target, wavelet_filters("db2"), 3)
    one, other = (
        pywt.wavedec2(i.numpy(), "db2", mode="zero", level=3)
        for i in (sr.double(), target.double())
    )
    bands = [abs(one[0] - other[0]).mean()]
    for a, b in zip(one[1:], other[1:], strict=True):
        bands += [abs(x - y).mean() for x, y in zip(a, b, strict=True)]
    assert len(bands) == 10
    assert ours.item() == pytest.approx(sum(bands) / 10, rel=1e-6)


def slow_dct(image: Tensor) -> Tensor:
    """(N, C, H, W), every coefficient as the double sum of its definition."""
    out = torch.zeros_like(image)
    h, w = image.shape[-2:]
    for u in range(h):
        for v in range(w):
            a = (1 if u else 0.5) * (1 if v else 0.5) * 4 / (h * w)
            for i in range(h):
                for j in range(w):
                    rows = math.cos(math.pi * (2 * i + 1) * u / (2 * h))
                    columns = math.cos(math.pi * (2 * j + 1) * v / (2 * w))
                    out[..., u, v] += a**0.5 * rows * columns * image[..., i, j]
    return out


def test_dct_distance_is_that_of_the_definition() -> None:
    _, sr = images(px=4, seed=1)
    _, target = images(px=4, seed=2)
    sr, target = sr[..., :4, :6], target[..., :4, :6]
    expected = (slow_dct(sr.double()) - slow_dct(target.double())).abs().mean()
    assert dct_distance(sr, target).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dct_sees_an_offset_in_one_coefficient() -> None:
    # 0.5 everywhere is 0.5 * sqrt(4 * 8) in one of 4 * 8 coefficients.
    flat = torch.zeros(1, 3, 4, 8)
    expected = 0.5 / math.sqrt(4 * 8)
    assert dct_distance(flat + 0.5, flat).item() == pytest.approx(expected, rel=1e-5)


def test_a_matrix_made_in_inference_mode_serves_a_training_too() -> None:
    sr = torch.rand(1, 3, 22, 26)
    with torch.inference_mode():
        dct_distance(sr, sr)
    sr.requires_grad_()
    dct_distance(sr, torch.zeros_like(sr)).backward()
    assert sr.grad is not None and sr.grad.abs().sum() > 0


# -- the terms of stage 2 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "value"), [("wavelet", 2 * 0.25 / 4), ("l1", 0.25), ("dct", 0.25 / 4), ("high", 0)]
)
def test_terms_by_hand(distance: str, value: float) -> None:
    flat = torch.full((2, 3, 4, 4), 0.5)
    terms = mtkd(distance=distance).loss(step_with(flat, flat - 0.25, flat + 0.5))
    assert list(terms) == ["pixel", distance]
    assert terms["pixel"].item() == pytest.approx(0.1 * 0.5)  # alpha weights the ground truth
    assert terms[distance].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_student_equal_to_its_teacher_has_only_the_pixel_term(distance: str) -> None:
    lr, hr = images(px=8)
    same = Nearest()(lr)
    terms = mtkd(distance=distance).loss(step_with(same, same.clone(), hr))
    assert terms["pixel"].item() > 0 and terms[distance].item() == 0


def test_options_reach_the_distance() -> None:
    step = random_step(px=15)
    sr, target = step.student.sr, step.teacher.sr
    for distance in ("wavelet", "high"):
        method = mtkd(distance=distance, wavelet="db2", levels=2, pixel_weight=0.0)
        filters = wavelet_filters("db2")
        expected = wavelet_distance(sr, target, filters, 2, high_only=distance == "high")
        terms = method.loss(step)
        torch.testing.assert_close(terms[distance], expected)
        assert terms["pixel"].item() == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_reaches_the_student_alone(distance: str) -> None:
    student = student_of("edsr")
    teacher = teacher_of("rcan").requires_grad_(True)
    method = Mtkd(MtkdConfig(distance=distance, pixel_weight=0.0), student, (teacher,))
    assert not list(method.parameters()) and not method.state_dict()
    step = step_at(method, student, teacher)
    # With a graph, which the loop's teacher passes do not have, the teacher gets nothing either.
    step = Step(step.batch, step.student, (teacher.run(step.lr, ()),))
    torch.stack(list(method.loss(step).values())).sum().backward()
    for label, p in student.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, label
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("distance", DISTANCES)
def test_autocast_keeps_the_terms_in_float32(distance: str) -> None:
    method, step = mtkd(distance=distance), random_step()
    expected = method.loss(step)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.loss(step)
        halved = step_with(step.student.sr.bfloat16(), step.teacher.sr.bfloat16(), step.hr)
        from_halved = method.loss(halved)
    for name, value in terms.items():
        assert value.dtype == from_halved[name].dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
    rounded = step_with(halved.student.sr.float(), halved.teacher.sr.float(), step.hr)
    for name, value in method.loss(rounded).items():
        torch.testing.assert_close(from_halved[name], value, rtol=1e-6, atol=0)


# -- stage 1 ----------------------------------------------------------------------------------------


def test_the_aggregation_sees_the_teachers_in_their_order() -> None:
    lr, hr = images()
    method = Aggregation(MtkdConfig(), nn.Identity(), ())
    passes = tuple(Pass(nn.Identity(), sr=torch.full_like(hr, v)) for v in (0.25, 0.5, 0.75))
    seen = method.student_input(Batch(lr, hr), passes)
    assert seen.shape == (2, 9, 16, 16)
    assert seen[0, :, 0, 0].tolist() == [0.25] * 3 + [0.5] * 3 + [0.75] * 3


def test_the_aggregation_learns_from_the_ground_truth_alone() -> None:
    step = random_step()
    terms = Aggregation(MtkdConfig(), nn.Identity(), ()).loss(step)
    assert list(terms) == ["pixel"]
    assert terms["pixel"].item() == l1(step.student.sr, step.hr).item()  # alpha is of stage 2


def test_network_of_the_aggregation() -> None:
    options = {"channels": 8, "blocks": 3, "layers": 2, "heads": 2, "window": 4, "layer": "swin"}
    config = network_config(MtkdConfig(**options, image_skip="mean"), 2, 3)
    assert (config.teachers, config.scale, config.channels, config.depths) == (2, 3, 8, (2, 2, 2))
    assert (config.heads, config.window, config.layer) == (2, 4, "swin")
    assert (config.image_skip, config.tail) == ("mean", "one_step")
    other = network_config(MtkdConfig(mlp_ratio=3.0, drop_path=0.2, tail="classical"), 1, 2)
    assert (other.mlp_ratio, other.drop_path, other.tail) == (3.0, 0.2, "classical")


# -- options and refusals ---------------------------------------------------------------------------


def setting(patch_px: int) -> Setting:
    return Setting(patch_px=patch_px, batch=2, iterations=10, memory=2**30)


def test_levels_that_the_crop_does_not_have_are_refused_before_the_training() -> None:
    student = student_of("edsr")  # x2: crops of 8 LR px have 16 HR px, halved four times
    fits = Mtkd(MtkdConfig(levels=4), student, (nn.Identity(),))
    assert fits.check(setting(8)) == ()
    for distance in ("wavelet", "high"):
        method = Mtkd(MtkdConfig(levels=5, distance=distance), student, (nn.Identity(),))
        with pytest.raises(SrkdError, match=r"levels = 5, .* 16 px has 4 .*levels to 4 or less"):
            method.check(setting(8))
    without = Mtkd(MtkdConfig(levels=5, distance="l1"), student, (nn.Identity(),))
    assert without.check(setting(8)) == ()
    long = Mtkd(MtkdConfig(wavelet="db10"), student, (nn.Identity(),))
    with pytest.raises(
        SrkdError, match="has 0 levels of 'db10'; choose a shorter wavelet or raise"
    ):
        long.check(setting(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (({key: 0}), rf"method\.mtkd\.{key} = 0, but at least 1")
            for key in ("levels", "layers")
        ),
        *((({key: 0}), rf"method\.mtkd\.{key} = 0, but") for key in ("channels", "blocks")),
        *((({key: -1}), rf"method\.mtkd\.{key} = -1, but") for key in ("heads", "window")),
        ({"channels": 25}, r"channels = 25 cannot be split over 6 attention heads"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio = 0\.0, but a number above 0"),
        ({"drop_path": 1.0}, r"drop_path = 1\.0, .* below 1"),
        ({"distance": "wavelets"}, "did you mean 'wavelet'"),
        ({"layer": "dtc"}, "did you mean 'dct'"),
        ({"pixel_weight": -1.0}, "a finite number of 0 or above"),
        ({"wavelet": "bior2.2"}, r"'bior2\.2' is not one of the orthogonal wavelets"),
        ({"levels": 1.5}, "int is needed"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        plan("mtkd", options)


def test_paper_settings_are_the_default() -> None:
    config = plan("mtkd", {"preset": "paper"}).configs["mtkd"]
    assert config == MtkdConfig()
    assert (config.pixel_weight, config.distance, config.wavelet) == (0.1, "wavelet", "haar")
    assert (config.levels, config.channels, config.blocks, config.layers) == (1, 24, 4, 2)


def test_released_settings() -> None:
    config = plan("mtkd", {"preset": "released", "blocks": 3}, "edsr", 4).configs["mtkd"]
    assert config == MtkdConfig(
        preset="released",
        pixel_weight=0.1,
        distance="l1",
        channels=96,
        blocks=3,  # by hand
        layers=4,
        tail="classical",
    )
