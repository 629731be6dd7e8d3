"""ICKD: correlations and loss by hand, rows of zeros, the batch norm's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_pair import student_of, teacher_of
from torch import Tensor, nn

from srkd.errors import SrkdError
from srkd.methods import make, plan
from srkd.methods.ickd import Ickd, IckdConfig, correlation, correlation_gap
from srkd.types import Batch, Pass, Setting, Step

if TYPE_CHECKING:
    from srkd.networks.base import Network

TAPS = ("block1", "body")  # of a network with one block


def edsr(channels: int) -> Network:
    return student_of("edsr", channels=channels, blocks=1)


def ickd(student: int = 2, teacher: int = 2, **config: Any) -> Ickd:
    return Ickd(IckdConfig(**config), edsr(student), (edsr(teacher),))


def step_of(f_s: Tensor, f_t: Tensor) -> Step:
    """The same features at both positions; student 0.5, teacher 0.375, HR 0.25 everywhere."""

    def a_pass(sr: float, feature: Tensor) -> Pass:
        image = torch.full((1, 3, 2, 2), sr)
        return Pass(nn.Identity(), image, taps=dict.fromkeys(TAPS, feature))

    batch = Batch(torch.zeros(1, 3, 1, 1), torch.full((1, 3, 2, 2), 0.25))
    return Step(batch, a_pass(0.5, f_s), (a_pass(0.375, f_t),))


def channels(*rows: tuple[float, ...]) -> Tensor:
    """One sample: each channel's values at the places of one line."""
    return torch.tensor(rows, dtype=torch.float32).view(1, len(rows), 1, -1)


def layers_of(method: Ickd, kind: type[nn.Module]) -> list[Any]:
    return [m for m in method.modules() if isinstance(m, kind)]


def set_identity(method: Ickd) -> None:
    for conv in layers_of(method, nn.Conv2d):
        conv.weight.data.copy_(torch.eye(conv.out_channels).view_as(conv.weight))


# Inner products 9 + 0, 9 + 0; 9 + 0, 9 + 16: rows (9, 9) and (9, 25).
TWO_CHANNELS = channels((3, 0), (3, 4))
APART = channels((3, 0), (0, 4))  # rows (9, 0) and (0, 16)
SQRT2 = 2**0.5


def test_correlation_by_hand() -> None:
    expected = torch.tensor([[[1 / SQRT2, 1 / SQRT2], [9 / 706**0.5, 25 / 706**0.5]]])
    torch.testing.assert_close(correlation(TWO_CHANNELS), expected)


def test_correlation_is_per_sample() -> None:
    both = correlation(torch.cat([TWO_CHANNELS, APART]))
    torch.testing.assert_close(both[0], correlation(TWO_CHANNELS)[0])
    torch.testing.assert_close(both[1], torch.eye(2))


@pytest.mark.parametrize("scale", [1e-4, 255.0, 1e6, -2.0])
def test_correlation_has_no_scale(scale: float) -> None:
    f = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(correlation(scale * f), correlation(f))


def test_correlation_is_in_float32_under_autocast() -> None:
    f = torch.randn(2, 5, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = correlation(f)
    assert torch.equal(inside, correlation(f))
    assert correlation(f.bfloat16()).dtype == torch.float32


def test_a_channel_of_zeros_has_a_row_of_zeros() -> None:
    f = channels((3, 0), (0, 0)).requires_grad_()
    rows = correlation(f, 0.5)
    assert rows[0].tolist() == [[1, 0], [0, 0]]
    # The second row is (3 * b, b^2) / 2 places / 0.5 in the first place of the second channel, b: 3 at b = 0.
    rows[0, 1].sum().backward()
    assert f.grad is not None and f.grad[0, 1].tolist() == [[3, 0]]


def test_short_rows_are_divided_by_the_floor() -> None:
    # Inner products / 2 places: (0.5, 0) and (0, 2); the first is shorter than 1.
    rows = correlation(channels((1, 0), (0, 2)), 1.0)
    assert rows[0].tolist() == [[0.5, 0], [0, 1]]


def test_gap_by_hand() -> None:
    # Rows (1, 1) / sqrt 2 twice against (1, 0) and (0, 1): (1 / sqrt 2 - 1)^2 + 1 / 2 = 2 - sqrt 2 each;
    # both over two channels.
    alike = channels((1, -1), (1, -1))
    assert correlation_gap(alike, APART).item() == pytest.approx(2 - SQRT2)
    # A second sample without a gap halves it.
    both = correlation_gap(torch.cat([alike, APART]), torch.cat([APART, APART]))
    assert both.item() == pytest.approx((2 - SQRT2) / 2)
    # Rows (1, -1) / sqrt 2 against (1, 1) / sqrt 2, and the like: (2 / sqrt 2)^2 = 2 each.
    mirrored = channels((1, 0), (-1, 0))
    assert correlation_gap(mirrored, channels((1, 0), (1, 0))).item() == pytest.approx(2)


def test_terms_by_hand() -> None:
    # The batch norm makes (1, -1) of both channels: the gap above, 2 - sqrt 2 at each of two positions, times
    # 3. |0.5 - 0.25| = 0.25 times 2; |0.5 - 0.375| = 0.125 times 4.
    method = ickd(pixel_weight=2.0, logits_weight=4.0, weight=3.0)
    set_identity(method)
    terms = method.loss(step_of(channels((7, 5), (2, -2)), APART))
    assert set(terms) == {"pixel", "logits", "correlation"}
    assert terms["pixel"].item() == 0.5 and terms["logits"].item() == 0.5
    assert terms["correlation"].item() == pytest.approx(6 * (2 - SQRT2), rel=1e-5)


def test_default_weight() -> None:
    assert IckdConfig().weight == 2.5


def test_equal_features_behind_the_identity_have_no_gap() -> None:
    # Mean 0 and mean square 1 already: the batch norm changes nothing. The channels do resemble each other.
    f = channels((1, -1, 1, -1), (2**0.5, -(2**0.5), 0, 0), (0.5, 0.5, 0.5, -1.5))
    f[0, 2] /= 0.75**0.5
    method = ickd(3, 3)
    set_identity(method)
    assert method.loss(step_of(f, f))["correlation"].item() == pytest.approx(0, abs=1e-9)
    assert method.loss(step_of(f, f.flip(1)))["correlation"].item() > 0.01


def test_extra_layers_map_the_student_to_the_teacher_and_are_trained() -> None:
    torch.manual_seed(0)
    method = ickd(student=3, teacher=5)
    convs = layers_of(method, nn.Conv2d)
    assert [(c.weight.shape, c.bias) for c in convs] == [((5, 3, 1, 1), None)] * 2
    f_s = torch.rand(2, 3, 4, 4).requires_grad_()
    f_t = torch.rand(2, 5, 4, 4).requires_grad_()
    method.loss(step_of(f_s, f_t))["correlation"].backward()
    assert f_t.grad is None
    assert f_s.grad is not None and (f_s.grad.flatten(1).abs().sum(1) > 0).all()
    for name, p in method.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_flat_features_have_a_finite_gradient() -> None:
    """A batch of one colour: the batch norm leaves rounding, whose direction would count for thousands."""
    torch.manual_seed(0)
    method = ickd(3, 3)
    f_s = torch.rand(1, 3, 1, 1).expand(2, 3, 4, 4).clone().requires_grad_()
    method.loss(step_of(f_s, torch.rand(2, 3, 4, 4)))["correlation"].backward()
    grads = [f_s.grad, *(p.grad for p in method.parameters())]
    assert all(g is not None and g.isfinite().all() and g.abs().max() < 1 for g in grads)


def test_running_statistics_belong_to_the_state() -> None:
    # Values 5 and 7 at four places: mean 6, of which a tenth is taken in; 2 steps: 0.6 + 0.1 * (6 - 0.6).
    method = ickd()
    set_identity(method)
    f = channels((7, 5, 7, 5), (7, 5, 7, 5))
    for _ in range(2):
        method.loss(step_of(f, f))
    again = ickd()
    again.load_state_dict(method.state_dict())
    for norm in layers_of(again, nn.BatchNorm2d):
        torch.testing.assert_close(norm.running_mean, torch.full((2,), 1.14))
        assert norm.num_batches_tracked == 2
    assert again.loss(step_of(f, f)) == method.loss(step_of(f, f))


def test_features_of_families_that_differ_train_in_half_precision() -> None:
    student, teacher = student_of("edsr"), teacher_of("swinir", channels=6)
    torch.manual_seed(0)
    method = make(plan("ickd", {}), student, (teacher,))
    lr = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        taught = teacher.run(lr, method.teacher_taps)
        step = Step(
            Batch(lr, torch.rand(2, 3, 16, 16)), student.run(lr, method.student_taps), (taught,)
        )
        term = method.loss(step)["ickd.correlation"]
    assert term.dtype == torch.float32 and 0 < term < 3 * 2.5 * 4
    term.backward()
    for name, p in [*student.head.named_parameters(), *method.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in teacher.parameters())


def test_maps_of_two_sizes_are_refused() -> None:
    windows = teacher_of("swinir", window=8, depths=(1,))
    method = Ickd(IckdConfig(), student_of("edsr"), (windows,))
    with pytest.raises(SrkdError, match=r"20 px wide and the teacher's 24.*multiple of 8\."):
        method.check(Setting(patch_px=20, batch=4, iterations=10, memory=2**30))
