"""Attention transfer: maps and loss by hand, and what the maps do not depend on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_pair import student_of
from torch import Tensor, nn

from srkd.methods.at import AtConfig, AttentionTransfer, attention_map
from srkd.types import Batch, Pass, Step

if TYPE_CHECKING:
    from srkd.networks.base import Network

TAPS = ("block1", "body")  # of a network with one block


def edsr(channels: int) -> Network:
    return student_of("edsr", channels=channels, blocks=1)


def step_of(f_s: Tensor, f_t: Tensor) -> Step:
    """The same features at both positions; student 0.5, teacher 0.375, HR 0.25 everywhere."""

    def a_pass(sr: float, feature: Tensor) -> Pass:
        image = torch.full((1, 3, 2, 2), sr)
        return Pass(nn.Identity(), image, taps=dict.fromkeys(TAPS, feature))

    batch = Batch(torch.zeros(1, 3, 1, 1), torch.full((1, 3, 2, 2), 0.25))
    return Step(batch, a_pass(0.5, f_s), (a_pass(0.375, f_t),))


# Two channels, two places: mean squares (4 + 4) / 2 = 4 and (1 + 5) / 2 = 3, and |(4, 3)| = 5.
TWO_PLACES = torch.tensor([[2.0, 1.0], [-2.0, 5**0.5]]).view(1, 2, 1, 2)


def test_attention_map_by_hand() -> None:
    torch.testing.assert_close(attention_map(TWO_PLACES), torch.tensor([[0.8, 0.6]]))


def test_attention_map_is_normalised_per_sample() -> None:
    both = torch.cat([TWO_PLACES, 7 * TWO_PLACES.flip(3)])
    torch.testing.assert_close(attention_map(both), torch.tensor([[0.8, 0.6], [0.6, 0.8]]))


@pytest.mark.parametrize("scale", [1e-3, 255.0, -2.0])
def test_attention_map_has_no_scale(scale: float) -> None:
    f = torch.rand(2, 5, 3, 4)
    torch.testing.assert_close(attention_map(scale * f), attention_map(f))


def test_terms_by_hand() -> None:
    # Student (0.8, 0.6); teacher, of three channels, (0, 1): (0.64 + 0.16) / 2 = 0.4 at each of two
    # positions, times 1000. |0.5 - 0.25| = 0.25 times 2; |0.5 - 0.375| = 0.125 times 4.
    f_t = torch.tensor([[0.0, 1.0]]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    for weight, expected in ((1000.0, 800.0), (1.0, 0.8)):
        config = AtConfig(pixel_weight=2.0, logits_weight=4.0, weight=weight)
        method = AttentionTransfer(config, edsr(2), (edsr(3),))
        terms = method.loss(step_of(TWO_PLACES, f_t))
        assert set(terms) == {"pixel", "logits", "attention"}
        assert terms["pixel"].item() == 0.5 and terms["logits"].item() == 0.5
        assert terms["attention"].item() == pytest.approx(expected)


def test_default_weight() -> None:
    assert AtConfig().weight == 1000


def test_gradient_reaches_the_student_alone() -> None:
    method = AttentionTransfer(AtConfig(), edsr(2), (edsr(3),))
    f_s, f_t = torch.rand(2, 2, 4, 4).requires_grad_(), torch.rand(2, 3, 4, 4).requires_grad_()
    method.loss(step_of(f_s, f_t))["attention"].backward()
    assert f_t.grad is None
    assert f_s.grad is not None and (f_s.grad.flatten(1).abs().sum(1) > 0).all()
    assert not list(method.parameters())


def test_equal_networks_have_equal_attention() -> None:
    student = edsr(2)
    teacher = copy.deepcopy(student)
    method = AttentionTransfer(AtConfig(), student, (teacher,))
    lr = torch.rand(1, 3, 4, 4)
    step = Step(
        Batch(lr, torch.rand(1, 3, 8, 8)),
        student.run(lr, method.student_taps),
        (teacher.run(lr, method.teacher_taps),),
    )
    terms = method.loss(step)
    assert terms["attention"].item() == 0 and terms["logits"].item() == 0
    assert terms["pixel"].item() > 0
