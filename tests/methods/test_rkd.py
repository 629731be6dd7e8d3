"""RKD: distances and angles of a triangle by hand, equal images, the calibrated weight, refusals."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import student_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods.rkd import Rkd, RkdConfig, angles, distances, embed
from srkd.types import Batch, Pass, Setting, Step

if TYPE_CHECKING:
    from srkd.networks.base import Network

# Sides 3, 4 and 5, the right angle at the first point; and a triangle of equal sides.
RIGHT = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
EQUAL = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3**0.5]])


def edsr(channels: int = 2) -> Network:
    return student_of("edsr", channels=channels, blocks=1)


def rkd(**config: Any) -> Rkd:
    return Rkd(RkdConfig(**config), edsr(), (edsr(),))


def feature(points: Tensor) -> Tensor:
    """(N, C, 8, 8) whose embedding holds the points (N, C) and zeros."""
    f = torch.zeros(*points.shape, 8, 8)
    f[:, :, 3, 5] = points
    return f


def step_of(points_s: Tensor, points_t: Tensor, sr: float = 0.5, iteration: int = 0) -> Step:
    """The student's image is `sr` everywhere, the teacher's and the HR image 0."""
    hr = torch.zeros(len(points_s), 3, 2, 2)
    student = Pass(nn.Identity(), hr + sr, taps={"body": feature(points_s)})
    teacher = Pass(nn.Identity(), hr, taps={"body": feature(points_t)})
    batch = Batch(torch.zeros(len(points_s), 3, 1, 1), hr, iteration=iteration)
    return Step(batch, student, (teacher,))


def test_distances_by_hand() -> None:
    # Sides 3 (0-1), 4 (0-2), 5 (1-2) over their mean 4.
    expected = torch.tensor([[0, 0.75, 1], [0.75, 0, 1.25], [1, 1.25, 0]])
    torch.testing.assert_close(distances(RIGHT), expected)


def test_angles_by_hand() -> None:
    # Cosines: 0 at the right angle, 3/5 at the end of side 3, 4/5 at the end of side 4. A point seen
    # with itself has 1, and nothing is seen from itself.
    a = angles(RIGHT)
    expected = torch.zeros(3, 3, 3)
    for j, (i, k), cosine in ((0, (1, 2), 0.0), (1, (0, 2), 0.6), (2, (0, 1), 0.8)):
        expected[j, i, k] = expected[j, k, i] = cosine
        expected[j, i, i] = expected[j, k, k] = 1
    torch.testing.assert_close(a, expected)


def test_embedding_is_the_mean_of_each_of_8_by_8_cells() -> None:
    f = torch.zeros(1, 2, 16, 24)
    f[0, 1, 2:4, 3:6] = torch.arange(6.0).view(2, 3)  # cell (1, 1): mean 2.5
    e = embed(f.bfloat16())
    assert e.shape == (1, 128) and e.dtype == torch.float32
    assert e.nonzero().tolist() == [[0, 64 + 9]] and e.sum().item() == 2.5


def test_relations_by_hand() -> None:
    # Student RIGHT, teacher EQUAL (all distances 1, all cosines 0.5). Huber(x) = x^2 / 2.
    # Distances differ by 0.25 in 4 of 9 entries: 4 * 0.03125 / 9 = 0.125 / 9.
    # Angles differ by 0.5, 0.1, 0.3, each twice in 27 entries: 2 * (0.125 + 0.005 + 0.045) / 27 = 0.35 / 27.
    value = rkd().relations(step_of(RIGHT, EQUAL)).item()
    assert value == pytest.approx(25 * 0.125 / 9 + 50 * 0.35 / 27)
    weighted = rkd(distance_weight=9.0, angle_weight=0.0)
    assert weighted.relations(step_of(RIGHT, EQUAL)).item() == pytest.approx(0.125)
    weighted = rkd(distance_weight=0.0, angle_weight=27.0)
    assert weighted.relations(step_of(RIGHT, EQUAL)).item() == pytest.approx(0.35)


def test_relations_know_no_position_scale_or_rotation() -> None:
    turned = 255 * RIGHT @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) + 7
    assert rkd().relations(step_of(RIGHT, turned)).item() == pytest.approx(0, abs=1e-9)


def test_equal_networks_have_equal_relations() -> None:
    student = edsr()
    teacher = copy.deepcopy(student)
    method = Rkd(RkdConfig(), student, (teacher,))
    lr, hr = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 16, 16)
    step = Step(Batch(lr, hr), student.run(lr, ("body",)), (teacher.run(lr, ("body",)),))
    assert method.relations(step).item() == 0


def test_equal_images_have_a_small_gradient() -> None:
    # The teacher tells the two apart by rounding alone; a direction made of it must not be followed.
    student = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 5.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 1e-6], [0.0, 5.0]])
    rkd().relations(step_of(student, teacher)).backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e-3
    # All images equal: nothing to learn, and still no division by zero.
    same = torch.ones(3, 2, requires_grad=True)
    rkd().relations(step_of(same, RIGHT)).backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_gradient_is_that_of_the_equations() -> None:
    points = RIGHT.double().requires_grad_()
    assert torch.autograd.gradcheck(distances, (points,))
    assert torch.autograd.gradcheck(angles, (points,))


def test_relations_stay_in_float32_under_autocast() -> None:
    exact = rkd().relations(step_of(RIGHT, EQUAL))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rkd().relations(step_of(RIGHT, EQUAL))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, exact)


CALIBRATION = {"share": 0.5, "calibrate_from": 2, "calibrate_to": 4, "pixel_weight": 8.0}


def test_weight_is_measured_once() -> None:
    method = rkd(**CALIBRATION)
    relations = method.relations(step_of(RIGHT, EQUAL)).item()
    # Off before and during the window; sums are taken inside it alone, without the pixel weight.
    for iteration, sr in enumerate((9.0, 9.0, 0.25, 0.5)):
        terms = method.loss(step_of(RIGHT, EQUAL, sr, iteration))
        assert set(terms) == {"pixel", "logits", "relations"}
        assert terms["relations"].item() == 0
        assert terms["pixel"].item() == 8 * sr
    assert method.pixel_sum.item() == 0.75
    assert method.rkd_sum.item() == pytest.approx(2 * relations)
    # 0.5 * (0.75 / 2) / relations times the term itself: half of the mean pixel term.
    term = method.loss(step_of(RIGHT, EQUAL, 9.0, 4))["relations"]
    assert term.item() == pytest.approx(0.5 * 0.375)
    # Fixed after, whatever the pixel term does.
    sums = method.pixel_sum.item(), method.rkd_sum.item()
    later = method.loss(step_of(RIGHT, EQUAL, 5.0, 99))["relations"]
    assert torch.equal(later, term)
    assert (method.pixel_sum.item(), method.rkd_sum.item()) == sums


def test_share_scales_the_weight() -> None:
    values = []
    for share in (0.5, 1.5):
        method = rkd(**{**CALIBRATION, "share": share})
        for iteration in (2, 3):
            method.loss(step_of(RIGHT, EQUAL, 0.5, iteration))
        values.append(method.loss(step_of(RIGHT, EQUAL, 0.5, 4))["relations"].item())
    assert values == pytest.approx([0.25, 0.75])


def test_measured_sums_survive_a_resume_within_and_after_the_window() -> None:
    whole, parts = rkd(**CALIBRATION), rkd(**CALIBRATION)
    for iteration, sr in ((2, 0.25), (3, 0.5), (4, 0.5)):
        resumed = rkd(**CALIBRATION)
        resumed.load_state_dict(parts.state_dict())
        parts = resumed
        step = step_of(RIGHT, EQUAL, sr, iteration)
        assert torch.equal(whole.loss(step)["relations"], parts.loss(step)["relations"])
    assert parts.pixel_sum.item() == 0.75


def test_gradient_reaches_the_student_alone_and_only_after_the_window() -> None:
    method = rkd(**CALIBRATION)
    student, teacher = RIGHT.clone().requires_grad_(), EQUAL.clone().requires_grad_()
    for iteration in (0, 2, 3):
        assert not method.loss(step_of(student, teacher, 0.5, iteration))["relations"].requires_grad
    method.loss(step_of(student, teacher, 0.5, 4))["relations"].backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert not list(method.parameters())


def setting(batch: int = 16, iterations: int = 2000) -> Setting:
    return Setting(patch_px=20, batch=batch, iterations=iterations, memory=2**30)


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        ({}, setting(batch=2), "angles need three.*2 are run at once; raise train.batch"),
        ({}, setting(iterations=1000), "steps 900 to 1000 of 1000.*set method.rkd.calibrate_from"),
        ({"calibrate_from": 7, "calibrate_to": 7}, setting(), "steps 7 to 7"),
        ({"calibrate_from": -1}, setting(), "steps -1 to 1000"),
    ],
)
def test_refusals(config: dict[str, int], asked: Setting, message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        rkd(**config).check(asked)


def test_three_images_and_one_step_after_the_window_are_enough() -> None:
    assert rkd().check(setting(batch=3, iterations=1001)) == ()
