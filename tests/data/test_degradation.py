"""The degradation against hand-worked numbers, and against the official LR files bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from srkd.data.degradation import (
    bicubic_matrix,
    crop_to_multiple,
    downscale,
    downscale_uint8,
    upscale,
    upscale_uint8,
)
from srkd.errors import SrkdError
from srkd.images import read_rgb8

if TYPE_CHECKING:
    from pathlib import Path

# Eq. (1) at 0.25, 0.75, 1.25, 1.75, divided by their sum over both sides: the x2 taps by hand.
X2_TAPS = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256


def bump(height: int, width: int, row: int, added: int) -> np.ndarray:
    """100 everywhere, and `added` more in one row."""
    image = np.full((height, width, 3), 100, np.uint8)
    image[row] += np.uint8(added)
    return image


def test_matrix_has_the_hand_worked_taps() -> None:
    matrix = bicubic_matrix(16, 8, 0.5)
    assert np.array_equal(matrix[4, 5:13], X2_TAPS)
    assert np.count_nonzero(matrix[4]) == 8


def test_symmetric_border_folds_taps_back() -> None:
    # Output 0 reads inputs -3..4; -1, -2, -3 are 0, 1, 2 again.
    first = np.array([111 + 29, 111 - 9, 29 - 3, -9, -3]) / 256
    assert np.array_equal(bicubic_matrix(16, 8, 0.5)[0, :5], first)
    # Replicated, all three are input 0.
    first = np.array([111 + 29 - 9 - 3, 111, 29, -9, -3]) / 256
    assert np.array_equal(bicubic_matrix(16, 8, 0.5, "replicate")[0, :5], first)


@pytest.mark.parametrize("border", ["symmetric", "replicate"])
@pytest.mark.parametrize(
    ("size_in", "scale_factor"), [(24, 0.5), (24, 1 / 3), (24, 0.25), (5, 4.0)]
)
def test_rows_of_the_matrix_sum_to_one(size_in: int, scale_factor: float, border) -> None:
    size_out = round(size_in * scale_factor)
    matrix = bicubic_matrix(size_in, size_out, scale_factor, border)
    assert matrix.shape == (size_out, size_in)
    assert np.allclose(matrix.sum(axis=1), 1, atol=1e-14)


def test_image_narrower_than_the_kernel_folds_more_than_once() -> None:
    # 4 px reach 8 px out at x4; a constant must stay the constant.
    assert np.all(downscale_uint8(np.full((4, 4, 3), 77, np.uint8), 4) == 77)


def test_uint8_rows_by_hand() -> None:
    lr = downscale_uint8(bump(8, 8, row=3, added=64), 2)
    # 100 + 64 * (-9, 111, 29, -3) / 256 = 97.75, 127.75, 107.25, 99.25
    assert lr[:, 1, 0].tolist() == [98, 128, 107, 99]
    assert np.all(lr == lr[:, :1, :1])


def test_uint8_rounds_half_away_from_zero() -> None:
    lr = downscale_uint8(bump(8, 8, row=3, added=128), 2)
    # 100 + 128 * (-9, 111, 29, -3) / 256 = 95.5, 155.5, 114.5, 98.5
    assert lr[:, 1, 0].tolist() == [96, 156, 115, 99]


def test_uint8_rounds_and_saturates_between_the_passes() -> None:
    hr = np.zeros((8, 8, 1), np.uint8)
    hr[3, 3] = 255
    # Rows first: 255 * (-9, 111, 29, -3) / 256 -> 0, 111, 29, 0; then 111 and 29 alike along columns.
    expected = np.array(
        [[0, 0, 0, 0], [0, 48, 13, 0], [0, 13, 3, 0], [0, 0, 0, 0]]
    )  # 111*111/256 = 48.1, 111*29/256 = 12.6, 29*111/256 = 12.6, 29*29/256 = 3.3
    assert np.array_equal(downscale_uint8(hr, 2)[..., 0], expected)


def test_hr_is_cropped_at_right_and_bottom() -> None:
    rng = np.random.default_rng(0)
    hr = rng.integers(0, 256, (31, 26, 3), dtype=np.uint8)
    assert np.array_equal(downscale_uint8(hr, 4), downscale_uint8(hr[:28, :24], 4))
    assert crop_to_multiple(torch.zeros(1, 3, 31, 26), 3).shape == (1, 3, 30, 24)


def test_borders_differ_in_the_outermost_two_pixels_alone() -> None:
    hr = np.random.default_rng(1).integers(0, 256, (96, 120, 3), dtype=np.uint8)
    for scale in (2, 3, 4):
        differs = downscale_uint8(hr, scale) != downscale_uint8(hr, scale, "replicate")
        assert not differs[2:-2, 2:-2].any()
        assert differs[0].any()
        assert differs[:, -1].any()


@pytest.mark.parametrize("name", ["Set5", "Set14", "BSD100"])
def test_official_lr_files_bit_for_bit(shared_data: Path, name: str) -> None:
    folder = shared_data / "benchmarks" / name
    differing, compared = {2: 0, 3: 0, 4: 0}, 0
    for path in sorted((folder / "HR").iterdir()):
        hr = read_rgb8(path)
        for scale in differing:
            official = read_rgb8(folder / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png")
            differing[scale] += int(np.count_nonzero(downscale_uint8(hr, scale) != official))
            compared += official.size
    assert compared > 700_000
    assert differing == {2: 0, 3: 0, 4: 0}


def test_bicubic_row_of_the_tables(shared_data: Path) -> None:
    """Set5 of the data folder's README, to the last printed digit: needs the uint8 variant."""
    from srkd.data.sets import open_set
    from srkd.metrics import psnr_ssim

    for scale, expected in {2: (33.673, 0.9303), 3: (30.403, 0.8689), 4: (28.429, 0.8111)}.items():
        scores = [
            torch.cat(psnr_ssim(_batch(upscale_uint8(image.lr, scale)), _batch(image.hr), scale))
            for image in open_set("Set5", scale)
        ]
        psnr, ssim = torch.stack(scores).mean(0).tolist()
        assert (round(psnr, 3), round(ssim, 4)) == expected


def test_double_by_hand_and_unrounded() -> None:
    lr = downscale(_batch(bump(8, 8, row=3, added=64)).double(), 2)
    assert lr.shape == (1, 3, 4, 4)
    assert lr[0, 2, :, 1].tolist() == [97.75, 127.75, 107.25, 99.25]


def test_upscale_by_hand() -> None:
    # x2: output 4 lies 0.25 px before input 2: k(1.25), k(.25), k(.75), k(1.75) over inputs 1, 2, 3, 0.
    step = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    step[..., 2, :] = 1
    column = upscale(step, 2)[0, 0, :, 5]
    taps = [
        -0.0234375,
        -0.0703125,
        0.2265625,
        0.8671875,
        0.8671875,
        0.2265625,
        -0.0703125,
        -0.0234375,
    ]
    assert column[1:9].tolist() == taps
    up = upscale_uint8(bump(6, 6, row=2, added=100), 2)
    assert up[1:9, 5, 0].tolist() == [
        98,
        93,
        123,
        187,
        187,
        123,
        93,
        98,
    ]  # 97.66 92.97 122.66 186.72


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_double_keeps_the_dtype(dtype: torch.dtype) -> None:
    hr = torch.rand(2, 3, 12, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    lr = downscale(hr, 3)
    assert lr.dtype == dtype
    # The sum is float64, so the only error left is the final rounding to the dtype.
    assert torch.equal(lr, downscale(hr.double(), 3).to(dtype))


def test_double_is_differentiable_even_after_inference_mode() -> None:
    size = (1, 1, 4, 6)  # no other test uses it, so the matrices are made in inference mode
    with torch.inference_mode():
        downscale(torch.zeros(size, dtype=torch.float64), 2)
    hr = torch.rand(size, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 1, 2, 3, dtype=torch.float64)
    (downscale(hr, 2) * weight).sum().backward()
    # The map is A x B^T, so the gradient is A^T weight B.
    a, b = (torch.from_numpy(bicubic_matrix(n, n // 2, 0.5)) for n in size[2:])
    assert hr.grad is not None
    assert torch.allclose(hr.grad, a.T @ weight @ b, atol=1e-14)


def test_double_ignores_autocast() -> None:
    hr = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = downscale(hr, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(downscale(hr, 4), expected)


@pytest.mark.gpu
def test_double_is_the_same_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the same numbers there cannot be tested")
    hr = torch.rand(2, 3, 96, 60, generator=torch.Generator().manual_seed(0))
    # float64 sums in another order, then rounded to float32.
    assert torch.allclose(downscale(hr.cuda(), 3).cpu(), downscale(hr, 3), rtol=0, atol=1e-6)


def test_double_stays_close_to_the_files(shared_data: Path) -> None:
    """methods.md 7.2: against official files, 10 to 16 percent of samples differ, by few levels."""
    folder = shared_data / "benchmarks" / "Set5"
    official = read_rgb8(folder / "LR_bicubic" / "X4" / "babyx4.png").astype(int)
    lr = downscale(_batch(read_rgb8(folder / "HR" / "baby.png")).double(), 4)
    levels = lr.clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(levels - official).max() <= 2
    assert 0.05 < np.mean(levels != official) < 0.16


def test_too_small_is_one_sentence() -> None:
    with pytest.raises(SrkdError, match=r"image of 9x3 px .* by 4; both sides need at least 4 px"):
        downscale_uint8(np.zeros((3, 9, 3), np.uint8), 4)
    with pytest.raises(SrkdError, match="uint8"):
        upscale_uint8(np.zeros((3, 9, 3), np.float32), 4)


def _batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
