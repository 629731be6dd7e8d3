"""Discrete wavelet transform of images on several levels, for orthogonal wavelets, with zeros outside.

Source: Mallat, "A Theory for Multiresolution Signal Decomposition", 1989; filters, signs and sizes are
those of PyWavelets with mode="zero".

    low(x)[k]  = sum_t lo[t] x[2k+1-t]      high(x)[k] = sum_t hi[t] x[2k+1-t]
    LL_0 = image;   LL_k, LH_k, HL_k, HH_k = the four pairs of both along the height and the width of LL_{k-1}

    LL_k             low, low      about 2^k times the image
    LH_k, HL_k, HH_k pywt's cH, cV, cD: high along the height, along the width, along both
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srkd.errors import SrkdError, nearest

# LH, HL, HH of one level.
Details = tuple[Tensor, Tensor, Tensor]


def wavelet_filters(name: str) -> Tensor:
    """lo and hi of an orthogonal wavelet that PyWavelets names, reversed in t: (2, taps), float64."""
    pywt: Any = import_module("pywt")  # its public names come from a compiled module
    orthogonal = [w for w in pywt.wavelist(kind="discrete") if pywt.Wavelet(w).orthogonal]
    if name not in orthogonal:
        raise SrkdError(
            f"wavelet '{name}' is not one of the orthogonal wavelets; {nearest(name, orthogonal)}"
        )
    wavelet = pywt.Wavelet(name)
    return torch.tensor([wavelet.dec_lo, wavelet.dec_hi], dtype=torch.float64).flip(1)


def largest_level(side: int, taps: int) -> int:
    """Most levels for which the filter is not longer than what it acts on (pywt.dwt_max_level)."""
    return max((side // (taps - 1)).bit_length() - 1, 0)


def wavedec2(image: Tensor, filters: Tensor, levels: int) -> tuple[Tensor, list[Details]]:
    """LL of the last level, and the details of each level from the last to the first.

    image    (N, C, H, W); the bands of level k are (N, C, h_k, w_k) with h_k = floor((h_{k-1} + taps - 1) / 2)
    filters  (2, taps) of `wavelet_filters`

    Differentiable. float64 stays, everything else becomes float32, also under autocast and without TF32.
    """
    side = min(image.shape[-2:])
    most = largest_level(side, filters.shape[1])
    if not 1 <= levels <= most:
        raise SrkdError(
            f"{levels} wavelet levels of a filter with {filters.shape[1]} taps do not fit an image of {side} px; "
            + (f"use 1 to {most}." if most else "use a shorter wavelet or larger images.")
        )
    n, c = image.shape[:2]
    dtype = torch.promote_types(image.dtype, torch.float32)
    filters = filters.to(image.device, dtype)
    low, details = image.to(dtype).flatten(0, 1).unsqueeze(1), []
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.autocast(image.device.type, enabled=False), exact:
        for _ in range(levels):
            bands = _one_level(low, filters).unflatten(0, (n, c))
            low = bands[:, :, 0].flatten(0, 1).unsqueeze(1)
            details.append((bands[:, :, 2], bands[:, :, 1], bands[:, :, 3]))
    return low.squeeze(1).unflatten(0, (n, c)), details[::-1]


def _one_level(image: Tensor, filters: Tensor) -> Tensor:
    """(M, 1, H, W) -> (M, 4, h, w): low or high along the height, and for each low or high along the width.

    Two passes: one 2-D kernel is a little faster for the two taps of Haar and many times slower from
    sixteen taps on.
    """
    taps = filters.shape[1]
    h, w = image.shape[-2:]
    if h % 2 or w % 2:  # the sum that reaches one place past an odd side
        image = F.pad(image, (0, w % 2, 0, h % 2))
    rows = F.conv2d(image, filters[:, None, :, None], stride=(2, 1), padding=(taps - 2, 0))
    # Both filters on each of the two; on a CPU faster than two groups.
    pairs = torch.block_diag(filters, filters).reshape(4, 2, 1, taps)
    return F.conv2d(rows, pairs, stride=(1, 2), padding=(0, taps - 2))
