"""The metrics against hand-worked numbers, a plain NumPy version and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from srkd.errors import SrkdError
from srkd.metrics import (
    PAPER_Y,
    RGB,
    Protocol,
    _plane,
    find_protocol,
    levels,
    luma,
    psnr,
    psnr_ssim,
    ssim,
)

ONE_LEVEL_DB = 20 * math.log10(255)  # 48.1308 dB: every sample off by one level


def constant(value: float, height: int = 20, width: int = 24) -> torch.Tensor:
    """(1, 3, height, width) uint8 of one level."""
    return torch.full((1, 3, height, width), value, dtype=torch.uint8)


def noisy_pair(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth colour picture with noise, uint8 (2, 3, H, W), and a float SR that leaves [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 255, height * width).view(1, 1, height, width).expand(2, 3, -1, -1)
    noise = 40 * torch.randn(2, 3, height, width, generator=generator)
    hr = (ramp + noise).clamp(0, 255).to(torch.uint8)
    sr = hr.float() / 255 + 0.08 * torch.randn(hr.shape, generator=generator)
    assert sr.min() < 0 and sr.max() > 1
    return sr, hr


# -- PSNR ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rgb", "y"),
    [
        ((0, 0, 0), 16.0),
        ((255, 255, 255), 235.0),
        ((255, 0, 0), 81.481),
        ((0, 255, 0), 144.553),
        ((0, 0, 255), 40.966),
        ((100, 150, 200), 136.8794117647059),  # 16 + (6548.1 + 19282.95 + 4993.2) / 255
    ],
)
def test_luma_of_known_colours(rgb: tuple[int, int, int], y: float) -> None:
    pixel = torch.tensor(rgb, dtype=torch.uint8).view(1, 3, 1, 1)
    assert luma(pixel).item() == pytest.approx(y, abs=1e-12)


def test_luma_leaves_its_input_alone() -> None:
    pixel = torch.full((1, 3, 1, 1), 100.0, dtype=torch.float64)
    luma(pixel)
    assert torch.equal(pixel, torch.full((1, 3, 1, 1), 100.0, dtype=torch.float64))


def test_psnr_of_one_level() -> None:
    sr, hr = constant(101), constant(100)
    assert psnr(sr, hr, 2, RGB).item() == pytest.approx(ONE_LEVEL_DB, abs=1e-9)
    # One level of grey is 219/255 of a level of Y.
    in_y = ONE_LEVEL_DB + 20 * math.log10(255 / 219)
    assert psnr(sr, hr, 2).item() == pytest.approx(in_y, abs=1e-9)
    # One level of red alone: 65.481/255 of Y; a third of the samples in RGB.
    red = hr.clone()
    red[:, 0] += 1
    in_y = ONE_LEVEL_DB + 20 * math.log10(255 / 65.481)
    assert psnr(red, hr, 2).item() == pytest.approx(in_y, abs=1e-9)
    in_rgb = ONE_LEVEL_DB + 10 * math.log10(3)
    assert psnr(red, hr, 2, RGB).item() == pytest.approx(in_rgb, abs=1e-9)


@pytest.mark.parametrize(
    ("error", "expected"), [(0.4, math.inf), (0.6, ONE_LEVEL_DB), (1.4, ONE_LEVEL_DB)]
)
def test_the_output_is_rounded_to_8_bits(error: float, expected: float) -> None:
    hr = constant(100)
    sr = hr.float() / 255 + error / 255
    assert psnr(sr, hr, 2, RGB).item() == pytest.approx(expected, abs=1e-9)


def test_the_output_is_clamped() -> None:
    assert psnr(torch.full((1, 3, 9, 9), 1.7), constant(255, 9, 9), 2).item() == math.inf
    assert psnr(torch.full((1, 3, 9, 9), -0.3), constant(0, 9, 9), 2).item() == math.inf


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_scale_pixels_are_cropped_on_every_side(scale: int) -> None:
    hr = constant(100, 30, 40)
    framed = hr.clone()
    framed[..., :scale, :] = framed[..., -scale:, :] = 0
    framed[..., :, :scale] = framed[..., :, -scale:] = 0
    assert psnr(framed, hr, scale).item() == math.inf
    # The first pixel inside counts: 10 levels off, one of the pixels that are left.
    for row, column in ((scale, scale), (30 - scale - 1, 40 - scale - 1)):
        dotted = framed.clone()
        dotted[..., row, column] = 110
        pixels = (30 - 2 * scale) * (40 - 2 * scale)
        expected = 10 * math.log10(255**2 * pixels / 100)
        assert psnr(dotted, hr, scale, RGB).item() == pytest.approx(expected, abs=1e-9)


def test_a_protocol_may_fix_the_border() -> None:
    uncropped = Protocol("whole", luma=False, crop=0, about="")
    hr = constant(100, 12, 12)
    corner = hr.clone()
    corner[..., 0, 0] = 110
    expected = 10 * math.log10(255**2 * 144 / 100)
    assert psnr(corner, hr, 4, uncropped).item() == pytest.approx(expected, abs=1e-9)


def test_scores_are_per_image() -> None:
    hr = torch.cat([constant(100)] * 3)
    sr = torch.cat([constant(100), constant(101), constant(102)])
    values = psnr(sr, hr, 2, RGB)
    assert values.dtype == torch.float64
    expected = [math.inf, ONE_LEVEL_DB, ONE_LEVEL_DB - 20 * math.log10(2)]
    assert values.tolist() == pytest.approx(expected, abs=1e-9)


# -- SSIM ---------------------------------------------------------------------------------------


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al., Eq. (13), window after window, for one (H, W) float64 channel in 0..255."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mu_a, mu_b = (window * a).sum(), (window * b).sum()
            var_a = (window * (a - mu_a) ** 2).sum()
            var_b = (window * (b - mu_b) ** 2).sum()
            covariance = (window * (a - mu_a) * (b - mu_b)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            above = (2 * mu_a * mu_b + c1) * (2 * covariance + c2)
            values.append(above / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def rounded(sr: torch.Tensor) -> np.ndarray:
    """In float32, the type of the network's output; in float64 other samples would sit on a tie."""
    return np.rint(np.clip(sr.numpy(), 0, 1) * np.float32(255)).astype(np.float64)


def test_ssim_is_that_of_the_plain_version() -> None:
    sr, hr = noisy_pair(31, 27)
    x, y = rounded(sr)[..., 3:-3, 3:-3], hr.double().numpy()[..., 3:-3, 3:-3]
    in_rgb = [[plain_ssim(x[n, c], y[n, c]) for c in range(3)] for n in range(2)]
    assert ssim(sr, hr, 3, RGB).tolist() == pytest.approx(np.mean(in_rgb, axis=1), abs=1e-12)

    weights = np.array([65.481, 128.553, 24.966])[:, None, None] / 255
    x_luma, y_luma = (x * weights).sum(1) + 16, (y * weights).sum(1) + 16
    in_y = [plain_ssim(x_luma[n], y_luma[n]) for n in range(2)]
    assert ssim(sr, hr, 3).tolist() == pytest.approx(in_y, abs=1e-12)


@pytest.mark.parametrize("size", [(15, 15), (300, 260), (401, 333)])
def test_rgb_protocol_is_that_of_scikit_image(size: tuple[int, int]) -> None:
    """Images of one window, and of several strips with a short last one."""
    sr, hr = noisy_pair(*size)
    in_db, similarity = psnr_ssim(sr, hr, 2, RGB)
    for n in range(2):
        x, y = rounded(sr)[n, :, 2:-2, 2:-2], hr[n, :, 2:-2, 2:-2].double().numpy()
        theirs = structural_similarity(
            x,
            y,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert similarity[n].item() == pytest.approx(theirs, abs=1e-12)
        mse = np.mean((x - y) ** 2)
        assert in_db[n].item() == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-9)


def test_ssim_of_constant_images() -> None:
    """Without variance only the means are left: (2ab + C1) / (a^2 + b^2 + C1)."""
    expected = (2 * 50 * 80 + 6.5025) / (50**2 + 80**2 + 6.5025)
    assert ssim(constant(50), constant(80), 2, RGB).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("protocol", [PAPER_Y, RGB])
def test_identical_images(protocol: Protocol) -> None:
    _, hr = noisy_pair(40, 50)
    in_db, similarity = psnr_ssim(hr, hr, 4, protocol)
    assert in_db.tolist() == [math.inf, math.inf]
    assert similarity.tolist() == pytest.approx([1, 1], abs=1e-13)


# -- input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [PAPER_Y, RGB])
def test_floats_and_bytes_and_both_functions_agree(protocol: Protocol) -> None:
    sr, hr = noisy_pair(64, 48)
    in_db, similarity = psnr_ssim(sr, hr, 4, protocol)
    assert torch.equal(in_db, psnr(sr, hr, 4, protocol))
    assert torch.equal(similarity, ssim(sr, hr, 4, protocol))
    again = psnr_ssim(levels(sr), hr.float() / 255, 4, protocol)
    assert torch.equal(again[0], in_db)
    assert torch.equal(again[1], similarity)


@pytest.mark.parametrize("protocol", [PAPER_Y, RGB])
def test_psnr_of_a_large_image_is_taken_in_bands(
    monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    sr, hr = (levels(image) for image in noisy_pair(300, 200))
    whole = psnr(sr, hr, 4, protocol)
    monkeypatch.setattr("srkd.metrics.BAND", 2**14)
    made: list[int] = []

    def plane(image: torch.Tensor, protocol: Protocol) -> torch.Tensor:
        made.append(image.numel())
        return _plane(image, protocol)

    monkeypatch.setattr("srkd.metrics._plane", plane)
    banded = psnr(sr, hr, 4, protocol)
    assert max(made) <= 2**14
    if protocol.luma:
        assert banded.tolist() == pytest.approx(whole.tolist(), rel=1e-14)
    else:
        assert torch.equal(banded, whole)  # sums of whole numbers


def test_every_byte_survives_the_float_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(levels((every.double() / 255).to(dtype)), every)


def test_an_image_of_one_window_is_the_smallest() -> None:
    hr = torch.randint(0, 256, (1, 3, 19, 19), dtype=torch.uint8)
    assert ssim(hr, hr, 4).item() == pytest.approx(1)
    with pytest.raises(SrkdError, match=r"19x18 px is too small .* at least 19x19"):
        ssim(hr[..., :18, :], hr[..., :18, :], 4)
    with pytest.raises(SrkdError, match="at least 9x9"):  # PSNR alone needs one pixel
        psnr(hr[..., :8], hr[..., :8], 4)


def test_images_that_cannot_be_compared_are_refused() -> None:
    hr = constant(100)
    with pytest.raises(SrkdError, match=r"\(1, 3, 20, 24\) and \(1, 3, 20, 23\).*one size"):
        psnr(hr, hr[..., :23], 2)
    with pytest.raises(SrkdError, match="must be"):
        psnr(hr[:, :1], hr[:, :1], 2)
    with pytest.raises(SrkdError, match=r"torch\.int64 has no known range"):
        psnr(hr.long(), hr, 2)
    broken = hr.float() / 255
    broken[0, 0, 5, 5], broken[0, 1, 6, 6] = math.nan, math.inf
    with pytest.raises(SrkdError, match="holds 2 values that are NaN or infinite"):
        psnr(broken, hr, 2)


def test_an_unknown_protocol_is_named() -> None:
    assert find_protocol("rgb") is RGB
    with pytest.raises(SrkdError, match="did you mean 'paper-y'"):
        find_protocol("papery")


@pytest.mark.gpu
def test_the_gpu_gives_the_same_numbers() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    sr, hr = noisy_pair(300, 260)
    for protocol in (PAPER_Y, RGB):
        here = torch.stack(psnr_ssim(sr, hr, 4, protocol))
        there = torch.stack(psnr_ssim(sr.cuda(), hr.cuda(), 4, protocol)).cpu()
        assert torch.allclose(here, there, rtol=0, atol=1e-9)
