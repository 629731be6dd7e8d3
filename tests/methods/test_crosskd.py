"""CrossKD: halves by hand on networks of plain numbers, heads, gradients, adapters."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from tiny_pair import images, student_of, teacher_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods.base import l1
from srkd.methods.crosskd import CrossKd, CrossKdConfig
from srkd.networks.base import Network
from srkd.types import Batch, Facts, Setting, Step


@dataclass(frozen=True)
class NumberConfig:
    head: float
    group: float
    body: float
    scale: int = 1
    channels: int = 1


class Times(nn.Module):
    """Multiplies by one trained number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * self.number


class LongSkip(nn.Module):
    def forward(self, feature: Tensor, head: Tensor) -> Tensor:
        return (feature + head).expand(-1, 3, -1, -1)


class Numbers(Network):
    """head * x, then group, then body, then the long skip: one number each."""

    family = "numbers"
    config: NumberConfig

    def __init__(self, config: NumberConfig) -> None:
        super().__init__(config)
        self.head = Times(config.head)
        self.groups = nn.ModuleList([Times(config.group), Times(config.body)])
        self.tail = LongSkip()

    @property
    def facts(self) -> Facts:
        return Facts(scale=1, receptive_field_px=0, exact_tiling=True)


# On an image of ones:
#   student  head 1, S1 = 1 * 2 = 2,   S = 2 * 3 + 1 = 7
#   teacher  head 4, T1 = 4 * 5 = 20,  T = 20 * 7 + 4 = 144
STUDENT = NumberConfig(head=1.0, group=2.0, body=3.0)
TEACHER = NumberConfig(head=4.0, group=5.0, body=7.0)


def numbers(**config: float) -> tuple[CrossKd, Numbers, Numbers, Step]:
    """Method, student, frozen teacher, and a step on ones with HR images of 100."""
    student, teacher = Numbers(STUDENT), Numbers(TEACHER).eval().requires_grad_(False)
    method = CrossKd(CrossKdConfig(**config), student, (teacher,))
    batch = Batch(torch.ones(2, 3, 2, 2), torch.full((2, 3, 2, 2), 100.0))
    with torch.no_grad():
        taught = teacher.run(batch.lr, method.teacher_taps)
    return method, student, teacher, Step(batch, student.run(batch.lr, ("group1",)), (taught,))


def test_terms_by_hand() -> None:
    # T2(S1) = 2 * 7 + 4 = 18 with the teacher's head (15 with the student's);
    # S2(T1) = 20 * 3 + 1 = 61 with the student's head (64 with the teacher's).
    method, _, _, step = numbers()
    assert {k: v.item() for k, v in method.loss(step).items()} == {
        "pixel": 100 - 7,
        "student_half_pixel": 100 - 18,
        "student_half": 144 - 18,
        "teacher_half": 144 - 61,
    }


@pytest.mark.parametrize("term", ["pixel", "student_half_pixel", "student_half", "teacher_half"])
def test_each_weight_scales_its_term(term: str) -> None:
    method, _, _, step = numbers()
    usual = method.loss(step)
    method, _, _, step = numbers(**{f"{term}_weight": 2.5})
    for name, value in method.loss(step).items():
        assert value.item() == usual[name].item() * (2.5 if name == term else 1)


@pytest.mark.parametrize(
    ("term", "head", "group", "body"),
    [
        # T2(S1) = 7 * (head * group) + 4, below its target: the first half is taught through the frozen
        # rest of the teacher, -7 * group and -7 * head; the second half of the student has no part.
        ("student_half", -14.0, -7.0, None),
        ("student_half_pixel", -14.0, -7.0, None),
        # S2(T1) = 20 * body + head, below its target: the second half, and the head by the long skip.
        ("teacher_half", -1.0, None, -20.0),
    ],
)
def test_gradients_by_hand(term: str, head: float, group: float | None, body: float | None) -> None:
    method, student, teacher, step = numbers()
    method.loss(step)[term].backward()
    grads = [None if p.grad is None else p.grad.item() for p in student.parameters()]
    assert grads == [head, group, body]
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_equal_to_its_teacher() -> None:
    # T2(S1) = T and S2(T1) = T: what remains is the teacher's own error, and 0.
    student, lr, hr = student_of("edsr"), *images()
    teacher = copy.deepcopy(student).requires_grad_(False)
    method = CrossKd(CrossKdConfig(), student, (teacher,))
    step = Step(
        Batch(lr, hr), student.run(lr, method.student_taps), (teacher.run(lr, method.teacher_taps),)
    )
    terms = method.loss(step)
    assert torch.equal(terms["student_half_pixel"], l1(step.teacher.sr, hr))
    assert torch.equal(terms["pixel"], l1(step.teacher.sr, hr))
    assert terms["student_half"].item() == terms["teacher_half"].item() == 0


def test_equal_widths_need_no_adapter() -> None:
    method = CrossKd(CrossKdConfig(), student_of("edsr"), (teacher_of("edsr"),))
    assert isinstance(method.to_teacher, nn.Identity)
    assert isinstance(method.to_student, nn.Identity)


def test_adapters_between_widths_are_trained() -> None:
    student, teacher = student_of("edsr", channels=4), teacher_of("edsr", channels=6)
    method = CrossKd(CrossKdConfig(), student, (teacher,))
    shapes = {name: tuple(p.shape) for name, p in method.named_parameters() if "weight" in name}
    assert shapes == {"to_teacher.weight": (6, 4, 1, 1), "to_student.weight": (4, 6, 1, 1)}
    lr, hr = images()
    with torch.no_grad():
        taught = teacher.run(lr, method.teacher_taps)
    terms = method.loss(Step(Batch(lr, hr), student.run(lr, method.student_taps), (taught,)))
    for term, adapter in (
        ("student_half_pixel", "to_teacher"),
        ("student_half", "to_teacher"),
        ("teacher_half", "to_student"),
    ):
        method.zero_grad()
        terms[term].backward(retain_graph=True)
        reached = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {f"{adapter}.weight", f"{adapter}.bias"}


def test_the_cut_is_in_the_middle_of_each_body() -> None:
    method = CrossKd(CrossKdConfig(), student_of("edsr", blocks=4), (teacher_of("edsr", blocks=7),))
    assert method.pairs == (("block2", "block3"),)


def test_halves_of_window_networks_are_cropped_to_the_image() -> None:
    # 6 px are padded to 8 inside; the rests must return 12 px images like the networks themselves.
    student, teacher = student_of("swinir"), teacher_of("swinir", channels=6)
    method = CrossKd(CrossKdConfig(), student, (teacher,))
    lr, hr = images(px=6)
    taught = teacher.run(lr, method.teacher_taps)
    terms = method.loss(Step(Batch(lr, hr), student.run(lr, method.student_taps), (taught,)))
    assert all(value.isfinite() for value in terms.values())


def test_halves_of_different_sizes_are_refused() -> None:
    # The long skip of a rest adds its owner's head to the other network's feature.
    method = CrossKd(CrossKdConfig(), student_of("edsr"), (teacher_of("swinir"),))
    with pytest.raises(SrkdError, match=r"data.patch = 6.*features are 6 px.*teacher's 8"):
        method.check(Setting(patch_px=6, batch=2, iterations=10, memory=2**30))
