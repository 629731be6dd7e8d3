"""PISR: both losses by hand, what the teacher is given, where gradients go, the student's start, refusals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_pair import images, student_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods import check_teachers, make, make_first_stage, plan
from srkd.methods.pisr import Pisr, PisrConfig, spread, surprise, teacher_terms
from srkd.networks.privileged import PrivilegedTeacher
from srkd.types import Batch, Pass, Step

if TYPE_CHECKING:
    from srkd.methods.base import Method


def teacher(seed: int = 1, channels: int = 4) -> PrivilegedTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = PrivilegedTeacher(student_of("edsr", seed, channels=channels))
    return made.eval().requires_grad_(False)


def column(*channels: float) -> Tensor:
    return torch.tensor(channels, dtype=torch.float32).view(1, -1, 1, 1)


def set_layers(layers: nn.Module, *weights: float) -> None:
    """A diagonal of this value in each of the two convolutions, no bias."""
    convolutions = [m for m in layers.modules() if isinstance(m, nn.Conv2d)]
    for convolution, weight in zip(convolutions, weights, strict=True):
        channels = convolution.out_channels
        convolution.weight.data.copy_((torch.eye(channels) * weight)[..., None, None])
        assert convolution.bias is not None
        convolution.bias.data.zero_()


def step_of(f_s: Tensor, f_t: Tensor) -> Step:
    """A step with these features; student 0.5 and HR 0.25 everywhere."""

    def a_pass(sr: float, feature: Tensor) -> Pass:
        return Pass(nn.Identity(), torch.full((1, 3, 2, 2), sr), taps={"body": feature})

    batch = Batch(torch.zeros(1, 3, 1, 1), torch.full((1, 3, 2, 2), 0.25))
    return Step(batch, a_pass(0.5, f_s), (a_pass(9.0, f_t),))


def pisr(channels: int = 2, **config: object) -> Pisr:
    student = student_of("edsr", channels=channels, blocks=1)
    return Pisr(PisrConfig(**config), student, ())  # type: ignore[arg-type]


# -- the equations ---------------------------------------------------------------------------------


def test_teacher_terms_by_hand() -> None:
    # |0.5 - 0.25| = 0.25; |0.75 - 0.25| = 0.5 times 0.01.
    sr, hr = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), 0.25)
    imitated, lr = torch.full((1, 3, 2, 2), 0.75), torch.full((1, 3, 2, 2), 0.25)
    terms = teacher_terms(sr, hr, imitated, lr, 0.01)
    assert terms["pixel"].item() == 0.25
    assert terms["imitation"].item() == pytest.approx(0.005)


def test_spread_by_hand() -> None:
    # 0.1 log(1 + e^0) and 0.1 * 30; a very small v leaves the least.
    expected = torch.tensor([0.1 * math.log(2) + 1e-8, 3.0, 1e-8])
    torch.testing.assert_close(spread(torch.tensor([0.0, 30.0, -90.0])), expected)
    assert spread(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


def test_surprise_by_hand() -> None:
    # |1 - 0| / 0.5 + log 1 and |3 - 1| / 2 + log 4, over two channels.
    value = surprise(column(1, 3), column(0, 1), column(0.5, 2))
    assert value.item() == pytest.approx((2 + 1 + math.log(4)) / 2)
    # A good guess with a small spread is below 0.
    assert surprise(column(1), column(1), column(0.25)).item() == pytest.approx(-math.log(2))
    # 257 is no bfloat16 number: 256 + 1 would be lost.
    wide = surprise(column(256).bfloat16(), column(-1).bfloat16(), column(1))
    assert wide.item() == pytest.approx(257 + math.log(2))


def test_terms_by_hand() -> None:
    # m doubles twice: (4, 8). v of F_S: PReLU keeps (1, 2), zeroed by the second: b = 0.1 log 2 + 1e-8.
    method = pisr(pixel_weight=2.0, weight=3.0, feature_norm="none")
    set_layers(method.mean, 2, 2)
    set_layers(method.spread, 1, 0)
    terms = method.loss(step_of(column(1, 2), column(4, 6)))
    assert set(terms) == {"pixel", "information"}
    assert terms["pixel"].item() == 0.5
    b = 0.1 * math.log(2) + 1e-8
    assert terms["information"].item() == pytest.approx(3 * (1 / b + math.log(2 * b)))
    # The slope of PReLU is 0.25: m(-1) = 2 * 0.25 * -2 = -1.
    value = method.loss(step_of(column(-1, -1), column(-1, -1)))["information"].item()
    assert value == pytest.approx(3 * math.log(2 * b))


def test_both_features_are_divided_by_the_rms_of_the_teacher() -> None:
    # The target (1, 7) has mean square 25, RMS 5: m = v = F_S / 5 = (2, -1) / 5 -> PReLU (0.4, -0.05).
    method = pisr(weight=1.0)
    set_layers(method.mean, 1, 1)
    set_layers(method.spread, 1, 1)
    value = method.loss(step_of(column(2, -1), column(1, 7)))["information"].item()
    b = [0.1 * math.log1p(math.exp(v)) + 1e-8 for v in (0.4, -0.05)]
    gaps = [abs(0.4 - 0.2), abs(-0.05 - 1.4)]
    expected = sum(g / s + math.log(2 * s) for g, s in zip(gaps, b, strict=True)) / 2
    assert value == pytest.approx(expected, rel=1e-5)
    # What was measured belongs to the training's state.
    again = pisr(weight=1.0)
    again.load_state_dict(method.state_dict())
    assert again.norm is not None and again.norm.count.item() == 1


# -- what each sees, and where gradients go --------------------------------------------------------


def test_the_first_stage_is_given_hr_and_trains_all_of_the_teacher() -> None:
    network = teacher().requires_grad_(True).train()
    method = make_first_stage(plan("pisr", {"imitation_weight": 0.5}), network, ())
    lr, hr = images()
    batch = Batch(lr, hr)
    assert not method.needs_teacher_pass
    assert method.student_input(batch, ()) is hr
    step = Step(batch, network.run(hr, method.student_taps))
    terms = method.loss(step)
    assert terms["pixel"].item() == pytest.approx((network(hr) - hr).abs().mean().item())
    imitation = (network.encoder(hr) - lr).abs().mean().item() / 2
    assert terms["imitation"].item() == pytest.approx(imitation)
    # The decoder has no part in the imitation, the encoder in both.
    terms["imitation"].backward(retain_graph=True)
    assert all(p.grad is None for p in network.decoder.parameters())
    network.zero_grad()
    terms["pixel"].backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def second_stage(method: Method, student: nn.Module, taught: PrivilegedTeacher) -> Step:
    lr, hr = images()
    batch = Batch(lr, hr)
    shown = method.teacher_input(batch)
    assert shown is hr
    return Step(
        batch, student.run(lr, method.student_taps), (taught.run(shown, method.teacher_taps),)
    )


def test_gradients_reach_student_and_layers_and_never_the_teacher() -> None:
    student, taught = student_of("edsr"), teacher()
    # Open on purpose: the loss itself must not reach into the teacher.
    taught.requires_grad_(True)
    method = make(plan("pisr", {"weight": 1.0, "pixel_weight": 0.0}), student, (taught,))
    torch.stack(list(method.loss(second_stage(method, student, taught)).values())).sum().backward()
    reached = [*student.head.named_parameters(), *student.groups.named_parameters()]
    for name, p in [*reached, *method.named_parameters()]:
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert all(p.grad is None or not p.grad.any() for p in student.tail.parameters())
    assert all(p.grad is None for p in taught.parameters())


def test_the_student_starts_with_the_weights_of_the_decoder() -> None:
    student, taught = student_of("edsr"), teacher()
    method = make(plan("pisr", {}), student, (taught,))
    method.start(student, (taught,))
    for own, given in zip(student.parameters(), taught.decoder.parameters(), strict=True):
        assert torch.equal(own, given) and own.data_ptr() != given.data_ptr()
        assert own.requires_grad
    # With the imitated LR image as its input it is the teacher.
    _, hr = images()
    torch.testing.assert_close(student(taught.encoder(hr)), taught(hr))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pisr+logits", "scratch+pisr", "mtkd+pisr", "fitnet+pisr"])
def test_no_composition(name: str) -> None:
    with pytest.raises(SrkdError, match=r"cannot be combined: 'pisr' trains a teacher of its own"):
        plan(name, {})


def test_a_given_teacher_is_refused() -> None:
    chosen = plan("pisr", {})
    check_teachers(chosen, [])
    with pytest.raises(SrkdError, match="'pisr' trains its own teacher, but 1 were given; drop"):
        check_teachers(chosen, [True])
