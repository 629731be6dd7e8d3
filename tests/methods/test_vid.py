"""VID: variance and loss by hand, the sign of the term, what the extra layers learn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import student_of, teacher_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods import make, plan
from srkd.methods.vid import Gaussian, Vid, VidConfig, surprise, variance
from srkd.types import Batch, Pass, Setting, Step

if TYPE_CHECKING:
    from srkd.networks.base import Network

TAPS = ("block1", "body")  # of a network with one block


def edsr(channels: int) -> Network:
    return student_of("edsr", channels=channels, blocks=1)


def vid(student: int = 1, teacher: int = 2, **config: Any) -> Vid:
    return Vid(VidConfig(**config), edsr(student), (edsr(teacher),))


def step_of(f_s: Tensor, f_t: Tensor) -> Step:
    """The same features at both positions; student 0.5, teacher 0.375, HR 0.25 everywhere."""

    def a_pass(sr: float, feature: Tensor) -> Pass:
        image = torch.full((1, 3, 2, 2), sr)
        return Pass(nn.Identity(), image, taps=dict.fromkeys(TAPS, feature))

    batch = Batch(torch.zeros(1, 3, 1, 1), torch.full((1, 3, 2, 2), 0.25))
    return Step(batch, a_pass(0.5, f_s), (a_pass(0.375, f_t),))


def column(*channels: float) -> Tensor:
    return torch.tensor(channels, dtype=torch.float32).view(1, -1, 1, 1)


def gaussians_of(method: Vid) -> list[Gaussian]:
    return [g for g in method.gaussians if isinstance(g, Gaussian)]


def set_layers(method: Vid, *rows: tuple[float, ...]) -> None:
    """The weight of each of the three convolutions, at every position."""
    for gaussian in gaussians_of(method):
        layers = [m for m in gaussian.mean if isinstance(m, nn.Conv2d)]
        for layer, row in zip(layers, rows, strict=True):
            layer.weight.data.copy_(torch.tensor(row).view_as(layer.weight))


IDENTITY = (1.0, 0.0, 0.0, 1.0)


def test_variance_by_hand() -> None:
    # log(1 + e^0) = log 2, and log(1 + e^a) = a for a large a.
    expected = torch.tensor([math.log(2) + 1e-5, 30.00001, 1e-5])
    torch.testing.assert_close(variance(torch.tensor([0.0, 30.0, -90.0])), expected)


def test_first_variance_is_five() -> None:
    _, v = Gaussian(1, 3)(column(1))
    torch.testing.assert_close(v, torch.full((3,), 5.0), rtol=2e-7, atol=0)


def test_surprise_by_hand() -> None:
    # Gaps 1 and 2, variances 1 and 4: (1 / 1 + log 1 + 4 / 4 + log 4) / 2 channels / 2.
    v = torch.tensor([1.0, 4.0])
    expected = (2 + math.log(4)) / 4
    assert surprise(column(1, 3), column(0, 1), v, 1.0).item() == pytest.approx(expected)
    # With RMS 2 the gaps are halved: 1 / 4 and 1 / 4.
    expected = (0.5 + math.log(4)) / 4
    rms = torch.tensor(2.0)
    assert surprise(column(1, 3), column(0, 1), v, rms).item() == pytest.approx(expected)


def test_variance_belongs_to_the_channel_not_to_the_place() -> None:
    # Two channels, two places; gap 2 in the first channel alone: (4 / 4 + 4 / 4 + 2 log 4 + 0) / 4 / 2.
    f_s = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    value = surprise(f_s, torch.zeros(1, 2, 1, 2), torch.tensor([4.0, 1.0]), 1.0)
    assert value.item() == pytest.approx((2 + 2 * math.log(4)) / 8)


def test_a_good_guess_with_a_small_variance_is_below_zero() -> None:
    value = surprise(column(1, 3), column(1, 3), torch.tensor([0.25, 0.25]), 1.0)
    assert value.item() == pytest.approx(-math.log(4) / 2)


def test_surprise_is_in_float32() -> None:
    # 257 is no bfloat16 number: 256 + 1 would be lost.
    value = surprise(column(256).bfloat16(), column(-1).bfloat16(), torch.ones(1), 1.0)
    assert value.dtype == torch.float32 and value.item() == 257**2 / 2


def test_terms_by_hand() -> None:
    # m: (2, -1) * 1, ReLU: (2, 0); (2 + 0, 2 * 2) = (2, 4), ReLU; halved and swapped: (2, 1). The target is
    # (4, 2): (4 / 5 + 1 / 5) / 2 / 2 + log 5 / 2 at each of two positions, times 3.
    # |0.5 - 0.25| = 0.25 times 2; |0.5 - 0.375| = 0.125 times 4.
    method = vid(pixel_weight=2.0, logits_weight=4.0, weight=3.0, feature_norm="none")
    set_layers(method, (2, -1), (1, 7, 2, 7), (0, 0.5, 0.5, 0))
    terms = method.loss(step_of(column(1), column(4, 2)))
    assert set(terms) == {"pixel", "logits", "information"}
    assert terms["pixel"].item() == 0.5 and terms["logits"].item() == 0.5
    expected = 3 * 2 * (0.25 + math.log(5) / 2)
    assert terms["information"].item() == pytest.approx(expected)


def test_running_rms_of_the_teacher_divides_both_sides() -> None:
    # Target (1, 7): mean square 25. m = (2, 4): ((1 + 9) / 25) / 5 / 2 / 2 = 0.02 at each of two positions.
    method = vid()
    set_layers(method, (2, 4), IDENTITY, IDENTITY)
    value = method.loss(step_of(column(1), column(1, 7)))["information"].item()
    assert value - math.log(5) == pytest.approx(0.04, abs=1e-6)
    # What was measured belongs to the training's state. Target (0, 0): the mean square so far is 12.5, and
    # ((4 + 16) / 12.5) / 5 / 2 / 2 = 0.08 at each.
    again = vid()
    again.load_state_dict(method.state_dict())
    value = again.loss(step_of(column(1), column(0, 0)))["information"].item()
    assert value - math.log(5) == pytest.approx(0.16, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 255.0])
def test_divided_by_the_rms_the_term_has_no_scale(scale: float) -> None:
    method = vid(student=3, teacher=5)
    f_s, f_t = torch.rand(1, 3, 4, 4), torch.rand(1, 5, 4, 4)
    plain, scaled = vid(student=3, teacher=5), vid(student=3, teacher=5)
    for other in (plain, scaled):
        other.load_state_dict(method.state_dict())
    expected = plain.loss(step_of(f_s, f_t))["information"]
    actual = scaled.loss(step_of(scale * f_s, scale * f_t))["information"]
    torch.testing.assert_close(actual, expected)
    assert expected - math.log(5) > 1e-3  # more than the variances


def test_a_perfect_guess_leaves_the_variances() -> None:
    # Layers of the identity, features above 0: log 5 / 2 at each of two positions.
    method = vid(student=2)
    set_layers(method, IDENTITY, IDENTITY, IDENTITY)
    f = torch.rand(1, 2, 4, 4)
    assert method.loss(step_of(f, f))["information"].item() == pytest.approx(math.log(5))


def test_the_best_variance_is_the_mean_square_of_the_gap() -> None:
    # Gap sqrt(5) in the first channel, where v = 5 is right; none in the second, where v is too large.
    method = vid(feature_norm="none")
    set_layers(method, (0, 1), IDENTITY, IDENTITY)
    method.loss(step_of(column(1), column(5**0.5, 1)))["information"].backward()
    for gaussian in gaussians_of(method):
        assert gaussian.a.grad is not None
        assert gaussian.a.grad[0].item() == pytest.approx(0, abs=1e-6)
        # d(log v / 2) / 2 channels = 1 / (4 v) times softplus' = 1 - e^-(v - 1e-5).
        expected = (1 - math.exp(-5)) / 20
        assert gaussian.a.grad[1].item() == pytest.approx(expected, rel=1e-4)


def test_extra_layers_map_the_student_to_the_teacher_and_are_trained() -> None:
    torch.manual_seed(0)
    method = vid(student=3, teacher=5)
    shapes = [p.shape for p in gaussians_of(method)[0].parameters()]
    assert shapes == [(5,), (5, 3, 1, 1), (5, 5, 1, 1), (5, 5, 1, 1)]
    f_s = torch.rand(1, 3, 4, 4).requires_grad_()
    f_t = torch.rand(1, 5, 4, 4).requires_grad_()
    method.loss(step_of(f_s, f_t))["information"].backward()
    assert f_t.grad is None
    assert f_s.grad is not None and f_s.grad.abs().sum() > 0
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_features_of_families_that_differ_train_in_half_precision() -> None:
    student, teacher = student_of("edsr"), teacher_of("swinir", channels=6)
    torch.manual_seed(0)
    method = make(plan("vid", {}), student, (teacher,))
    lr = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        taught = teacher.run(lr, method.teacher_taps)
        step = Step(
            Batch(lr, torch.rand(2, 3, 16, 16)), student.run(lr, method.student_taps), (taught,)
        )
        term = method.loss(step)["vid.information"]
    assert term.dtype == torch.float32 and term.isfinite()
    term.backward()
    for name, p in [*student.head.named_parameters(), *method.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in teacher.parameters())


def test_maps_of_two_sizes_are_refused() -> None:
    windows = teacher_of("swinir", window=8, depths=(1,))
    method = Vid(VidConfig(), student_of("edsr"), (windows,))
    with pytest.raises(SrkdError, match=r"20 px wide and the teacher's 24.*multiple of 8\."):
        method.check(Setting(patch_px=20, batch=4, iterations=10, memory=2**30))
