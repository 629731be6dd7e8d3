"""FitNet: the hint by hand, the regressors, the scale of the teacher's features."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import student_of
from torch import Tensor, nn

from srkd.methods.fitnet import Fitnet, FitnetConfig, hint
from srkd.types import Batch, Pass, Step

if TYPE_CHECKING:
    from srkd.networks.base import Network

TAPS = ("block1", "body")  # of a network with one block


def edsr(channels: int) -> Network:
    return student_of("edsr", channels=channels, blocks=1)


def fitnet(student: int = 1, teacher: int = 2, **config: Any) -> Fitnet:
    return Fitnet(FitnetConfig(**config), edsr(student), (edsr(teacher),))


def step_of(f_s: Tensor, f_t: Tensor) -> Step:
    """The same features at both positions; student 0.5, teacher 0.375, HR 0.25 everywhere."""

    def a_pass(sr: float, feature: Tensor) -> Pass:
        image = torch.full((1, 3, 2, 2), sr)
        return Pass(nn.Identity(), image, taps=dict.fromkeys(TAPS, feature))

    batch = Batch(torch.zeros(1, 3, 1, 1), torch.full((1, 3, 2, 2), 0.25))
    return Step(batch, a_pass(0.5, f_s), (a_pass(0.375, f_t),))


def column(*channels: float) -> Tensor:
    return torch.tensor(channels, dtype=torch.float32).view(1, -1, 1, 1)


def set_regressors(method: Fitnet, weight: tuple[float, ...], bias: tuple[float, ...]) -> None:
    for regressor in method.regressors:
        assert isinstance(regressor, nn.Conv2d) and regressor.bias is not None
        regressor.weight.data.copy_(torch.tensor(weight).view_as(regressor.weight))
        regressor.bias.data.copy_(torch.tensor(bias))


def test_hint_by_hand() -> None:
    # ((1 - 0)^2 + (3 - 1)^2) / 2 = 2.5; with RMS 2 both gaps are halved: 2.5 / 4.
    assert hint(column(1, 3), column(0, 1), 1.0).item() == 2.5
    assert hint(column(1, 3), column(0, 1), torch.tensor(2.0)).item() == 0.625


def test_hint_is_in_float32() -> None:
    # 257 is no bfloat16 number: 256 + 1 would be lost.
    value = hint(column(256).bfloat16(), column(-1).bfloat16(), 1.0)
    assert value.dtype == torch.float32 and value.item() == 257**2


def test_terms_by_hand() -> None:
    # R(1) = (2, 3) * 1 + (0, 1) = (2, 4); the target is (1, 2): (1 + 4) / 2 = 2.5 at each of two
    # positions, times 3. |0.5 - 0.25| = 0.25 times 2; |0.5 - 0.375| = 0.125 times 4.
    method = fitnet(pixel_weight=2.0, logits_weight=4.0, weight=3.0, feature_norm="none")
    set_regressors(method, (2, 3), (0, 1))
    terms = method.loss(step_of(column(1), column(1, 2)))
    assert {k: v.item() for k, v in terms.items()} == {"pixel": 0.5, "logits": 0.5, "hint": 15.0}


def test_running_rms_of_the_teacher_divides_both_sides() -> None:
    # Target (1, 7): RMS 5, squared 25. R(1) = (2, 4): ((1 + 9) / 2) / 25 = 0.2 at each position.
    method = fitnet()
    set_regressors(method, (2, 3), (0, 1))
    assert method.loss(step_of(column(1), column(1, 7)))["hint"].item() == pytest.approx(0.4)
    # Next target (0, 0): the mean square so far is 12.5. (4 + 16) / 2 / 12.5 = 0.8 at each.
    assert method.loss(step_of(column(1), column(0, 0)))["hint"].item() == pytest.approx(1.6)
    # What was measured belongs to the training's state.
    again = fitnet()
    again.load_state_dict(method.state_dict())
    # Third target (0, 0): 50 / 6. 10 / (50 / 6) = 1.2 at each.
    assert again.loss(step_of(column(1), column(0, 0)))["hint"].item() == pytest.approx(2.4)


def test_regressors_map_the_student_to_the_teacher_and_are_trained() -> None:
    method = fitnet(student=3, teacher=5)
    assert [p.shape for n, p in method.named_parameters() if "weight" in n] == [(5, 3, 1, 1)] * 2
    f_s = torch.rand(1, 3, 4, 4).requires_grad_()
    f_t = torch.rand(1, 5, 4, 4).requires_grad_()
    method.loss(step_of(f_s, f_t))["hint"].backward()
    assert f_t.grad is None
    assert f_s.grad is not None and f_s.grad.abs().sum() > 0
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_equal_networks_behind_the_identity_have_no_hint() -> None:
    student = edsr(2)
    teacher = copy.deepcopy(student)
    method = Fitnet(FitnetConfig(), student, (teacher,))
    set_regressors(method, (1, 0, 0, 1), (0, 0))
    lr = torch.rand(1, 3, 4, 4)
    step = Step(
        Batch(lr, torch.rand(1, 3, 8, 8)),
        student.run(lr, method.student_taps),
        (teacher.run(lr, method.teacher_taps),),
    )
    terms = method.loss(step)
    assert terms["hint"].item() == 0 and terms["logits"].item() == 0
    assert terms["pixel"].item() > 0
