"""FAKD: affinities by hand, blocks against whole matrices, pooling, the long skip, memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_pair import images, student_of, teacher_of
from torch import Tensor

import srkd.methods.fakd
from srkd.errors import SrkdError
from srkd.methods.fakd import (
    Fakd,
    FakdConfig,
    _AffinityGap,
    affinity,
    affinity_gap,
    block_shape,
    unit,
)
from srkd.networks.base import Network
from srkd.types import Batch, Pass, Setting, Step


def fakd(student: int = 4, teacher: int = 4, **config: Any) -> Fakd:
    """With two positions: after the only block and after the body convolution."""
    networks = (student_of("edsr", channels=c, blocks=1) for c in (student, teacher))
    ours, theirs = networks
    return Fakd(FakdConfig(**config), ours, (theirs,))


def step_of(f_s: dict[str, Tensor], f_t: dict[str, Tensor], head: float = 0.0) -> Step:
    """Features by tap; student 0.5, teacher 0.375, HR 0.25 everywhere; heads of one value."""

    def a_pass(sr: float, taps: dict[str, Tensor]) -> Pass:
        long_skip = torch.full_like(taps["body"], head)
        return Pass(torch.nn.Identity(), torch.full((1, 3, 2, 2), sr), long_skip, taps)

    batch = Batch(torch.zeros(1, 3, 1, 1), torch.full((1, 3, 2, 2), 0.25))
    return Step(batch, a_pass(0.5, f_s), (a_pass(0.375, f_t),))


def both(feature: Tensor) -> dict[str, Tensor]:
    return {"block1": feature, "body": feature}


def two_places(first: tuple[float, float], second: tuple[float, float]) -> Tensor:
    """(1, 2, 1, 2): two channels, two places."""
    return torch.tensor([first, second]).T.reshape(1, 2, 1, 2)


# Unit vectors (0.6, 0.8) and (1, 0) have the cosine 0.6; (0, 1) and (1, 0) have 0.
SLANTED = two_places((3, 4), (2, 0))
SQUARE = two_places((0, 7), (2, 0))


def whole(u_s: Tensor, u_t: Tensor) -> Tensor:
    """Eq. (2) as it is printed."""
    return (affinity(u_s) - affinity(u_t)).abs().mean()


def test_affinity_by_hand() -> None:
    expected = torch.tensor([[[1, 0.6], [0.6, 1]]])
    torch.testing.assert_close(affinity(unit(SLANTED)), expected)


def test_unit_has_length_one_and_survives_an_empty_place() -> None:
    f = torch.rand(2, 5, 3, 3)
    f[0, :, 1, 1] = 0
    f.requires_grad_()
    u = unit(f)
    u.sum().backward()
    length = torch.ones(2, 9)
    length[0, 4] = 0
    torch.testing.assert_close(u.norm(dim=1), length)
    assert f.grad is not None and f.grad.isfinite().all()


def test_terms_by_hand() -> None:
    # Entries of A differ by 0, 0.6, 0.6, 0: mean 0.3 at each of two positions, times 10.
    # |0.5 - 0.25| = 0.25 times 2; |0.5 - 0.375| = 0.125 times 4.
    step = step_of(both(SLANTED), both(SQUARE))
    for weight, expected in ((10.0, 6.0), (1.0, 0.6)):
        terms = fakd(pixel_weight=2.0, logits_weight=4.0, weight=weight).loss(step)
        assert set(terms) == {"pixel", "logits", "affinity"}
        assert terms["pixel"].item() == 0.5 and terms["logits"].item() == 0.5
        assert terms["affinity"].item() == pytest.approx(expected)


def test_default_weight_is_that_of_the_public_code_for_images_in_one() -> None:
    # 0.5 pixel + 0.5 logits + 10 affinity with |.|_1 255 times ours: doubled and over 255.
    assert FakdConfig().weight == pytest.approx(10 / (0.5 * 255))
    assert FakdConfig().pixel_weight == FakdConfig().logits_weight == 1


def test_gradient_is_not_detached() -> None:
    f_s, f_t = torch.rand(2, 4, 4, 4).requires_grad_(), torch.rand(2, 6, 4, 4).requires_grad_()
    method = fakd(4, 6)
    method.loss(step_of(both(f_s), both(f_t)))["affinity"].backward()
    assert f_t.grad is None
    assert f_s.grad is not None and (f_s.grad.flatten(1).abs().sum(1) > 0).all()
    assert not list(method.parameters())


# Limits in bytes for 3 samples of 10 places, with blocks of 4 rows or more, and what fits:
# a row of one sample has 4 * 10 bytes.
BLOCKS = [
    (1, (1, 1)),  # never less than one row of one sample
    (120, (1, 3)),  # 3 rows
    (160, (1, 4)),
    (360, (2, 4)),  # 9 rows: two samples of 4
    (480, (3, 4)),
    (840, (3, 7)),  # 7 rows do not divide 10
    (10**6, (3, 10)),
]


@pytest.mark.parametrize(("limit", "block"), BLOCKS)
def test_blocks_give_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch, limit: int, block: tuple[int, int]
) -> None:
    monkeypatch.setattr(srkd.methods.fakd, "CPU_BLOCK_BYTES", limit)
    monkeypatch.setattr(srkd.methods.fakd, "LEAST_ROWS", 4)
    assert block_shape(3, 10, limit) == block
    used: list[tuple[int, int]] = []
    apply = _AffinityGap.apply
    monkeypatch.setattr(_AffinityGap, "apply", lambda *a: used.append(a[2:]) or apply(*a))

    random = torch.Generator().manual_seed(0)
    # Not of unit length: the diagonal then differs by more than rounding, whose sign is a coin's.
    u_s = torch.randn(3, 4, 10, generator=random, dtype=torch.float64, requires_grad=True)
    u_t = torch.randn(3, 6, 10, generator=random, dtype=torch.float64)
    gap, expected = affinity_gap(u_s, u_t), whole(u_s, u_t)
    assert used == [block]
    torch.testing.assert_close(gap, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * gap, u_s), torch.autograd.grad(3 * expected, u_s)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_to_the_features_is_that_of_the_whole_matrix(layout: torch.memory_format) -> None:
    random = torch.Generator().manual_seed(0)
    f_s = torch.randn(3, 5, 9, 11, generator=random).contiguous(memory_format=layout)
    f_t = torch.randn(3, 8, 9, 11, generator=random).contiguous(memory_format=layout)
    f_s.requires_grad_()
    gap, expected = affinity_gap(unit(f_s), unit(f_t)), whole(unit(f_s), unit(f_t))
    torch.testing.assert_close(gap, expected)
    torch.testing.assert_close(torch.autograd.grad(gap, f_s), torch.autograd.grad(expected, f_s))


def test_affinity_is_in_float32_under_autocast() -> None:
    f_s, f_t = torch.rand(2, 4, 4, 4), torch.rand(2, 4, 4, 4)
    exact = affinity_gap(unit(f_s), unit(f_t))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(affinity_gap(unit(f_s), unit(f_t)), exact)


def test_equal_networks_have_equal_affinities() -> None:
    student = student_of("edsr")
    teacher = copy.deepcopy(student)
    method = Fakd(FakdConfig(), student, (teacher,))
    lr, hr = images()
    step = Step(
        Batch(lr, hr), student.run(lr, method.student_taps), (teacher.run(lr, method.teacher_taps),)
    )
    assert method.loss(step)["affinity"].item() == 0


def test_pooling_averages_larger_maps_alone() -> None:
    f = torch.zeros(1, 2, 4, 4)
    f[0, :, 0, :2] = torch.tensor([[2.0, 4.0], [0.0, 8.0]])  # cell (0, 0): means 6/4 and 8/4
    u = unit(f, pool_px=2)
    assert u.shape == (1, 2, 4)
    torch.testing.assert_close(u[0, :, 0], torch.tensor([0.6, 0.8]))
    f = torch.rand(1, 2, 4, 4)
    for side in (4, 5):
        assert torch.equal(unit(f, pool_px=side), unit(f))


def test_pooled_term() -> None:
    f_s, f_t = torch.rand(1, 2, 6, 6), torch.rand(1, 2, 6, 6)
    term = fakd(2, 2, pool_px=3, weight=1.0).loss(step_of(both(f_s), both(f_t)))["affinity"]
    # Each cell of 2 x 2 places is averaged before.
    mean_s, mean_t = (f.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) for f in (f_s, f_t))
    torch.testing.assert_close(term, 2 * whole(unit(mean_s), unit(mean_t)))


def test_after_skip_adds_each_networks_head_to_its_last_feature_alone() -> None:
    # Features (2, 3), (1, -1) and a head of 1 everywhere make SLANTED after the skip.
    student = {"block1": SLANTED, "body": SLANTED - 1}
    teacher = {"block1": SQUARE, "body": SQUARE - 1}
    step = step_of(student, teacher, head=1.0)
    assert fakd(after_skip=True, weight=10.0).loss(step)["affinity"].item() == pytest.approx(6)
    # Before it the cosines are -1 / sqrt(26) = (2 * 1 - 3 * 1) / ... and (-1 * 1 - 6 * 1) / sqrt(37 * 2).
    cosines = -1 / 26**0.5, -7 / 74**0.5
    expected = 10 * (0.3 + abs(cosines[0] - cosines[1]) / 2)
    assert fakd(weight=10.0).loss(step)["affinity"].item() == pytest.approx(expected)


def test_after_skip_follows_the_tap_of_each_side() -> None:
    # The student's last feature beside a block of the teacher: that block gets no head.
    method = fakd(after_skip=True, weight=10.0, positions=("body:block1",))
    step = step_of({"body": SLANTED - 1}, {"block1": SQUARE, "body": SQUARE}, head=1.0)
    assert method.loss(step)["affinity"].item() == pytest.approx(3)


def setting(memory: int, patch_px: int = 48, batch: int = 16) -> Setting:
    return Setting(patch_px, batch, iterations=10, memory=memory)


# 48 * 48 = 2304 places of 16 samples, blocks of 64 MiB: 2**26 // (4 * 16 * 2304) = 455 rows of all
# samples, three blocks; at both positions three maps of 8 student and one of 6 teacher channels.
NEED = 3 * 4 * 16 * 455 * 2304 + 2 * 4 * 16 * 2304 * (3 * 8 + 6)


def test_memory_is_told_beforehand() -> None:
    # NEED = 210124800 = 200.4 MiB; one whole matrix 4 * 16 * 2304^2 = 339738624 = 324 MiB.
    (note,) = fakd(8, 6).check(setting(NEED))
    assert note == (
        "affinity of 2304 x 2304 places in 2 positions takes about 200 MiB "
        "(in blocks; one whole matrix of the batch would be 324 MiB)"
    )


def test_memory_follows_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(srkd.methods.fakd, "BLOCK_BYTES", 2**40)
    (note,) = fakd(8, 6).check(setting(2**40, batch=64))
    # Whole matrices: 4 * 64 * 2304^2 = 1296 MiB, three of them and 2 * 4 * 64 * 2304 * 30 = 34 MiB.
    assert "takes about 3.8 GiB" in note and "would be 1.3 GiB" in note


def test_too_little_memory_is_refused() -> None:
    message = (
        "2304 x 2304 places in each of 16 images and needs about 200 MiB, but 200 MiB are free; lower "
        "train.batch or data.patch, raise train.accumulate, or set method.fakd.pool_px=32"
    )
    with pytest.raises(SrkdError, match=message):
        fakd(8, 6).check(setting(NEED - 1))
    (note,) = fakd(8, 6, pool_px=12).check(setting(NEED - 1))
    assert note.startswith("affinity of 144 x 144 places")


@pytest.mark.parametrize(("pool_px", "places"), [(0, 576), (12, 144), (32, 576)])
def test_places_are_those_of_padded_and_pooled_maps(pool_px: int, places: int) -> None:
    # A patch of 21 px becomes a map of 24 px in windows of 4.
    student, teacher = student_of("swinir"), teacher_of("swinir")
    method = Fakd(FakdConfig(pool_px=pool_px), student, (teacher,))
    (note,) = method.check(setting(2**30, patch_px=21))
    assert note.startswith(f"affinity of {places} x {places} places in 3 positions")
    lr = torch.rand(1, 3, 21, 21)
    assert isinstance(student, Network)
    assert unit(student.run(lr, ("body",)).taps["body"], pool_px).shape[2] == places


def test_a_negative_side_is_refused() -> None:
    with pytest.raises(SrkdError, match=r"pool_px = -1, but 0 \(off\) or a side is needed"):
        fakd(pool_px=-1)
