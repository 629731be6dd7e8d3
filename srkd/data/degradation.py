"""Bicubic down- and upscaling as MATLAB's imresize does it, in the two variants that papers mean.

Source: the public description of imresize (Keys, "Cubic convolution interpolation for digital image
processing", 1981, Eq. (15) with a = -0.5); methods.md 7.2.

    k(x) = 1.5|x|^3 - 2.5|x|^2 + 1             |x| <= 1                  (1)
         = -0.5|x|^3 + 2.5|x|^2 - 4|x| + 2     1 < |x| <= 2
    u_i  = i/f + 0.5 (1 - 1/f)                 i = 1..size_out           (2)
    w_ij = k(f' (u_i - j)),  f' = min(f, 1)    normalised over j to 1    (3)

    f     scale factor, output over input; below 1 the kernel is stretched (antialiasing)
    u_i   centre of output sample i in input samples, both counted from 1

Rows (height) first, then columns. The variants:

    uint8    rounded to 8 bit, half away from zero, after EACH pass: makes the official LR files bit
             for bit. numpy, `downscale_uint8` and `upscale_uint8`.
    double   never rounded. torch, differentiable, `downscale` and `upscale`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from torch import Tensor

Border = Literal["symmetric", "replicate"]
Image = TypeVar("Image", np.ndarray, torch.Tensor)

# Part of every cache key: raise it when the pixels that this file makes change.
DEGRADATION_VERSION = 1


def cubic(x: np.ndarray) -> np.ndarray:  # Eq. (1)
    """Keys' kernel with a = -0.5, support [-2, 2]."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, inner, np.where(x <= 2, outer, 0.0))


@lru_cache(maxsize=256)
def _taps(
    size_in: int, size_out: int, scale_factor: float, border: Border
) -> tuple[np.ndarray, np.ndarray]:  # Eq. (2), (3)
    """Indices from 0 and weights of the input samples of every output sample: two (size_out, taps)."""
    stretch = max(1.0 / scale_factor, 1.0)
    u = np.arange(1, size_out + 1) / scale_factor + 0.5 * (1 - 1 / scale_factor)
    first = np.floor(u - 2 * stretch)
    j = first[:, None] + np.arange(int(np.ceil(4 * stretch)) + 2)
    weights = cubic((u[:, None] - j) / stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    used = np.any(weights != 0, axis=0)
    indices = j[:, used].astype(np.int64) - 1
    if border == "symmetric":  # ... 1 0 | 0 1 ... n-1 | n-1 n-2 ..., as often as it takes
        folded = indices % (2 * size_in)
        indices = np.where(folded < size_in, folded, 2 * size_in - 1 - folded)
    else:
        indices = indices.clip(0, size_in - 1)
    weights = weights[:, used]
    indices.flags.writeable = weights.flags.writeable = False  # shared by every caller
    return indices, weights


def bicubic_matrix(
    size_in: int, size_out: int, scale_factor: float, border: Border = "symmetric"
) -> np.ndarray:
    """Weights of one pass as a dense float64 (size_out, size_in) matrix; every row sums to 1.

    `scale_factor` is output over input (0.25 shrinks by 4); below 1 the kernel antialiases.
    """
    indices, weights = _taps(size_in, size_out, scale_factor, border)
    matrix = np.zeros((size_out, size_in))
    # Near an edge several taps fold onto one sample, so add rather than assign.
    np.add.at(matrix, (np.arange(size_out)[:, None], indices), weights)
    return matrix


def crop_to_multiple(image: Image, scale: int) -> Image:
    """Cut right and bottom so that both sides are multiples of `scale`.

    An array is (H, W) or (H, W, C), a tensor (..., H, W). The result is a view.
    """
    rows, columns = (-2, -1) if isinstance(image, torch.Tensor) else (0, 1)
    height, width = image.shape[rows], image.shape[columns]
    if scale < 1 or height < scale or width < scale:
        raise SrkdError(
            f"an image of {width}x{height} px cannot be made smaller by {scale}; "
            f"both sides need at least {max(scale, 1)} px. Leave it out or choose another scale."
        )
    height, width = height - height % scale, width - width % scale
    if isinstance(image, torch.Tensor):
        return image[..., :height, :width]
    return image[:height, :width]


def downscale_uint8(hr: np.ndarray, scale: int, border: Border = "symmetric") -> np.ndarray:
    """The protocol's LR image: (H, W, C) uint8 -> (H//scale, W//scale, C) uint8, rounded per pass.

    `hr` is first cropped to multiples of `scale`. "symmetric" gives the files of the EDSR benchmark
    archive, "replicate" those of the RCAN package and SelfExSR.
    """
    hr = crop_to_multiple(hr, scale)
    return _two_passes(hr, 1 / scale, (hr.shape[0] // scale, hr.shape[1] // scale), border)


def upscale_uint8(lr: np.ndarray, scale: int) -> np.ndarray:
    """MATLAB's bicubic upscaling: (h, w, C) uint8 -> (scale*h, scale*w, C) uint8, rounded per pass."""
    return _two_passes(lr, float(scale), (lr.shape[0] * scale, lr.shape[1] * scale), "symmetric")


def _two_passes(
    image: np.ndarray, scale_factor: float, size: tuple[int, int], border: Border
) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3:
        raise SrkdError(
            f"8-bit bicubic scaling got {image.dtype} of shape {image.shape}, it needs uint8 "
            "(height, width, channels); use the tensor functions for other images."
        )
    rows = _pass_over_rows(image, scale_factor, size[0], border)
    columns = _pass_over_rows(rows.swapaxes(0, 1), scale_factor, size[1], border)
    return np.ascontiguousarray(columns.swapaxes(0, 1))


def _pass_over_rows(
    image: np.ndarray, scale_factor: float, size_out: int, border: Border
) -> np.ndarray:
    """One pass along axis 0 of uint8 (n, m, C) -> uint8 (size_out, m, C), half away from zero."""
    indices, weights = _taps(image.shape[0], size_out, scale_factor, border)
    flat = np.ascontiguousarray(image).reshape(image.shape[0], -1)
    out = np.empty((size_out, flat.shape[1]), np.uint8)
    # Blocks of rows keep the float64 sums in the processor's cache: three times as fast.
    block = max(1, 32_768 // flat.shape[1])
    for start in range(0, size_out, block):
        rows = slice(start, min(start + block, size_out))
        total = np.zeros((rows.stop - start, flat.shape[1]))
        # Tap after tap, because a matrix product would sum in an order that the machine chooses.
        for tap in range(indices.shape[1]):
            total += flat[indices[rows, tap]] * weights[rows, tap, None]
        total += 0.5
        np.floor(total, out=total)
        np.clip(total, 0, 255, out=total)
        out[rows] = total
    return out.reshape(size_out, *image.shape[1:])


def downscale(hr: Tensor, scale: int) -> Tensor:
    """Shrink without rounding: (N, C, H, W) -> (N, C, H//scale, W//scale), any float dtype and device.

    Computed in float64 (float32 on Apple's GPUs), returned in the dtype of `hr`,
    differentiable. Values may leave the range of `hr` a little (the kernel has negative lobes). `hr`
    is first cropped to multiples of `scale`.
    """
    return _resize(crop_to_multiple(hr, scale), 1 / scale, scale_up=1, scale_down=scale)


def upscale(lr: Tensor, scale: int) -> Tensor:
    """Enlarge without rounding: (N, C, h, w) -> (N, C, scale*h, scale*w); otherwise as `downscale`."""
    return _resize(lr, float(scale), scale_up=scale, scale_down=1)


def _resize(image: Tensor, scale_factor: float, scale_up: int, scale_down: int) -> Tensor:
    rows, columns = (
        _matrix_on(size, size * scale_up // scale_down, scale_factor, image.device)
        for size in image.shape[-2:]
    )
    # Autocast leaves float64 alone, but would halve the float32 of Apple's GPUs.
    with torch.autocast(image.device.type, enabled=False):
        return (rows @ image.to(rows.dtype) @ columns.T).to(image.dtype)


@lru_cache(maxsize=64)
def _matrix_on(size_in: int, size_out: int, scale_factor: float, device: torch.device) -> Tensor:
    # A matrix born in inference mode could never serve a backward pass later.
    with torch.inference_mode(False):
        matrix = torch.from_numpy(bicubic_matrix(size_in, size_out, scale_factor))
        # Apple's GPUs have no float64.
        return matrix.to(device, torch.float32 if device.type == "mps" else torch.float64)
