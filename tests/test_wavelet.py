"""Wavelet transform: PyWavelets' bands, energy, gradients, precision, refusals."""

from __future__ import annotations

import pytest
import pywt
import torch
from torch import Tensor

from srkd.errors import SrkdError
from srkd.wavelet import largest_level, wavedec2, wavelet_filters


def image(h: int, w: int, n: int = 2, c: int = 3) -> Tensor:
    return torch.rand(n, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "levels"),
    [("haar", 1), ("haar", 6), ("db1", 2), ("db4", 3), ("sym7", 2), ("coif2", 2)],
)
@pytest.mark.parametrize("size", [(64, 64), (65, 67), (64, 71), (97, 64)])
def test_bands_are_those_of_pywavelets(name: str, levels: int, size: tuple[int, int]) -> None:
    exact = image(*size)
    low, details = wavedec2(exact, wavelet_filters(name), levels)
    rounded_low, rounded_details = wavedec2(exact.float(), wavelet_filters(name), levels)
    expected = pywt.wavedec2(exact.numpy(), name, mode="zero", level=levels)
    assert len(details) == levels
    flat = [low, *(b for level in details for b in level)]
    rounded = [rounded_low, *(b for level in rounded_details for b in level)]
    theirs = [expected[0], *(b for level in expected[1:] for b in level)]
    for ours, single, numpy in zip(flat, rounded, theirs, strict=True):
        wanted = torch.from_numpy(numpy)
        assert ours.dtype == torch.float64 and single.dtype == torch.float32
        assert ours.shape == single.shape == wanted.shape
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
        # Of the range of the approximation, which every band of the next level is made of.
        torch.testing.assert_close(single.double(), wanted, rtol=0, atol=1e-6 * 2 ** (levels - 1))


def test_the_longest_filters() -> None:
    for name in ("dmey", "db38"):
        exact = image(160, 151, 1, 1)
        low, ((lh, hl, hh),) = wavedec2(exact, wavelet_filters(name), 1)
        wanted, details = pywt.dwt2(exact.numpy(), name, mode="zero")
        for ours, numpy in zip((low, lh, hl, hh), (wanted, *details), strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(numpy), rtol=0, atol=1e-12)


def test_haar_by_hand() -> None:
    square = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]])
    low, ((lh, hl, hh),) = wavedec2(square, wavelet_filters("haar"), 1)
    by_hand = [5.5, -2.5, -1.5, 0.5]  # (a+b+c+d)/2, (a+b-c-d)/2, (a-b+c-d)/2, (a-b-c+d)/2
    assert [b.item() for b in (low, lh, hl, hh)] == pytest.approx(by_hand)


def test_energy_is_kept() -> None:
    even = image(32, 48)
    low, details = wavedec2(even, wavelet_filters("haar"), 4)
    energy = sum(b.square().sum() for b in (low, *(b for level in details for b in level)))
    torch.testing.assert_close(energy, even.square().sum())


def test_channels_and_images_do_not_mix() -> None:
    alone = torch.zeros(2, 3, 16, 16)
    alone[1, 2] = image(16, 16, 1, 1).float()[0, 0]
    low, details = wavedec2(alone, wavelet_filters("db2"), 2)
    for band in (low, *(b for level in details for b in level)):
        filled = band.abs().sum(dim=(2, 3)) > 0
        assert filled.nonzero().tolist() == [[1, 2]]


def test_memory_layout_does_not_matter() -> None:
    plain = image(16, 20).float()
    last = plain.contiguous(memory_format=torch.channels_last)
    filters = wavelet_filters("db2")
    torch.testing.assert_close(wavedec2(last, filters, 2), wavedec2(plain, filters, 2))


@pytest.mark.parametrize(("name", "size"), [("haar", (4, 6)), ("db2", (7, 6))])
def test_gradient(name: str, size: tuple[int, int]) -> None:
    filters = wavelet_filters(name)

    def bands(x: Tensor) -> tuple[Tensor, ...]:
        low, details = wavedec2(x, filters, 1)
        return (low, *details[0])

    assert torch.autograd.gradcheck(bands, image(*size, 1, 2).requires_grad_())


def test_autocast_computes_in_float32() -> None:
    plain, filters = image(32, 32).float(), wavelet_filters("db3")
    expected = wavedec2(plain, filters, 2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wavedec2(plain, filters, 2), expected, rtol=0, atol=0)
        halved = wavedec2(plain.bfloat16(), filters, 2)
    assert halved[0].dtype == torch.float32
    again = wavedec2(plain.bfloat16().float(), filters, 2)
    torch.testing.assert_close(halved, again, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["haar", "db3", "sym5", "coif17", "dmey"])
def test_largest_level(name: str) -> None:
    taps = wavelet_filters(name).shape[1]
    for side in (1, 2, 3, 7, 15, 16, 31, 64, 100, 101, 102, 192, 255, 256):
        assert largest_level(side, taps) == pywt.dwt_max_level(side, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("harr", "wavelet 'harr' is not one of the orthogonal .* did you mean 'haar'"),
        ("db39", r"did you mean 'db\d+'"),
        ("Haar", "did you mean 'haar'"),
        ("bior4.4", r"'bior4\.4' is not one of the orthogonal .* Valid: coif1, "),
    ],
)
def test_refused_wavelets(name: str, message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        wavelet_filters(name)


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [
        ("haar", 5, "5 wavelet levels of a filter with 2 taps do not fit .* 24 px; use 1 to 4"),
        ("haar", 0, "0 wavelet levels .* use 1 to 4"),
        ("db4", 2, "8 taps do not fit an image of 24 px; use 1 to 1"),
        ("db20", 1, "40 taps do not fit an image of 24 px; use a shorter wavelet"),
    ],
)
def test_refused_levels(name: str, levels: int, message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        wavedec2(torch.zeros(1, 3, 24, 30), wavelet_filters(name), levels)
