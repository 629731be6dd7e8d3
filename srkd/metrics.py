"""PSNR and SSIM as the papers of super-resolution print them, under named protocols.

    protocol   channels                      border     who prints it
    paper-y    BT.601 studio luma, float     scale px   EDSR, RCAN, SwinIR, MTKD, DUKD, MiPKD, MKD
    rgb        R, G, B                       scale px   BasicSR's model zoo

Both first clamp the image to [0, 1] and round it to 8 bit, because a picture is a file. The
reference is treated alike, which changes nothing for an 8-bit file.

    Y    = 16 + (65.481 R + 128.553 G + 24.966 B) / 255          R, G, B in 0..255, Y not rounded
    PSNR = 10 log10(255^2 / mean((sr - hr)^2))                   over all samples of one image

    SSIM = mean of  (2 mu_x mu_y + C1) (2 s_xy + C2)
                    ---------------------------------------      C1 = (0.01 * 255)^2
                    (mu_x^2 + mu_y^2 + C1) (s_xx + s_yy + C2)    C2 = (0.03 * 255)^2

SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
Similarity", IEEE TIP 2004, Eq. (13); 11x11 Gaussian window of sigma 1.5, positions inside the image
only, per channel, then the mean. Everything after the rounding is float64, per image: a set's score
is the mean over its images, whatever their sizes.

Identical images have PSNR inf. Nothing is capped: the mean of a set that holds such a pair is inf.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from srkd.errors import SrkdError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PEAK = 255.0
BAND = 2**22  # samples of an image that are held in float64
WINDOW_PX = 11
SIGMA_PX = 1.5
C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2

LUMA_OFFSET = 16.0
LUMA_WEIGHTS = (65.481 / PEAK, 128.553 / PEAK, 24.966 / PEAK)


@dataclass(frozen=True)
class Protocol:
    """How a pair of images becomes a number.

    `luma` compares Y instead of R, G, B; `crop` is the border left out on every side, in HR pixels.
    """

    name: str
    luma: bool
    crop: int | Literal["scale"]
    about: str

    @property
    def channels(self) -> str:
        return "Y" if self.luma else "RGB"

    def border_px(self, scale: int) -> int:
        return scale if self.crop == "scale" else self.crop


_SSIM_ABOUT = "SSIM window 11x11 Gaussian, sigma 1.5, valid; mean over images."
PAPER_Y = Protocol(
    "paper-y",
    luma=True,
    crop="scale",
    about="Y of BT.601 (16-235, not rounded) from the 8-bit rounded RGB output, "
    f"border of scale pixels cropped. {_SSIM_ABOUT}",
)
RGB = Protocol(
    "rgb",
    luma=False,
    crop="scale",
    about=f"R, G and B of the 8-bit rounded output, border of scale pixels cropped. {_SSIM_ABOUT}",
)
PROTOCOLS = {protocol.name: protocol for protocol in (PAPER_Y, RGB)}


def find_protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise SrkdError(f"there is no protocol '{name}'; {nearest(name, list(PROTOCOLS))}")
    return PROTOCOLS[name]


def psnr(sr: Tensor, hr: Tensor, scale: int, protocol: Protocol = PAPER_Y) -> Tensor:
    """PSNR in dB of each image, (N,) float64; inf where both are identical.

    `sr`, `hr` (N, 3, H, W), float in [0, 1] or uint8. The scale sets the border that is cropped.
    """
    with _one_thread():
        x, y = _inner(sr, hr, scale, protocol, smallest_px=1)
        # In float64 a picture takes eight times the memory of its file, so only a band of it is held at a time.
        rows = max(1, BAND // x[..., 0, :].numel())
        bands = zip(x.split(rows, dim=-2), y.split(rows, dim=-2), strict=True)
        error = [_squares(*(_plane(band, protocol) for band in pair)) for pair in bands]
        samples = x[0].numel() // (3 if protocol.luma else 1)
        return _decibels(torch.stack(error).sum(0) / samples)


def ssim(sr: Tensor, hr: Tensor, scale: int, protocol: Protocol = PAPER_Y) -> Tensor:
    """SSIM of each image, (N,) float64, 1 where both are identical. Arguments as for `psnr`."""
    with _one_thread():
        pair = _inner(sr, hr, scale, protocol, smallest_px=WINDOW_PX)
        return _ssim(*(_plane(image, protocol) for image in pair))


def psnr_ssim(
    sr: Tensor, hr: Tensor, scale: int, protocol: Protocol = PAPER_Y
) -> tuple[Tensor, Tensor]:
    """Both at the cost of one conversion. Arguments as for `psnr`."""
    with _one_thread():
        pair = _inner(sr, hr, scale, protocol, smallest_px=WINDOW_PX)
        x, y = (_plane(image, protocol) for image in pair)
        return _decibels(_squares(x, y) / x[0].numel()), _ssim(x, y)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Work that fits the cache of one core: handing each small piece to several costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def levels(image: Tensor) -> Tensor:
    """uint8 levels of an image: uint8 as it is, float in [0, 1] clamped and rounded.

    NaN and infinity are refused, because clamping would turn them into plausible pictures.
    """
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise SrkdError(
            f"an image of type {image.dtype} has no known range; give uint8 or float [0, 1]."
        )
    # Half precision cannot hold 255 times a value to within a rounding step.
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    if not wide.isfinite().all():
        raise SrkdError(
            f"the image holds {int((~wide.isfinite()).sum())} values that are NaN or infinite; the "
            "network has diverged, its file is damaged, or half precision overflows in it."
        )
    return wide.clamp(0, 1).mul_(PEAK).round_().to(torch.uint8)


def luma(rgb: Tensor) -> Tensor:
    """BT.601 studio luma, 16..235: levels (N, 3, H, W) in 0..255 -> (N, 1, H, W) float64."""
    y = rgb[:, 0:1].double() * LUMA_WEIGHTS[0]
    y.add_(rgb[:, 1:2], alpha=LUMA_WEIGHTS[1]).add_(rgb[:, 2:3], alpha=LUMA_WEIGHTS[2])
    return y.add_(LUMA_OFFSET)


def _inner(
    sr: Tensor, hr: Tensor, scale: int, protocol: Protocol, smallest_px: int
) -> tuple[Tensor, Tensor]:
    """Both images (N, 3, H', W') without their border, as they are."""
    if sr.shape != hr.shape or sr.ndim != 4 or sr.shape[1] != 3:
        raise SrkdError(
            f"cannot compare images of shapes {tuple(sr.shape)} and {tuple(hr.shape)}: both must be "
            "(N, 3, H, W) of one size. Check that the model's scale is the scale of the set."
        )
    border = protocol.border_px(scale)
    height, width = sr.shape[-2:]
    least = smallest_px + 2 * border
    if min(height, width) < least:
        raise SrkdError(
            f"an image of {width}x{height} px is too small for protocol {protocol.name}: with a border "
            f"of {border} px cropped it needs at least {least}x{least}. Leave it out of the set."
        )
    inner = (..., slice(border, height - border), slice(border, width - border))
    return sr[inner], hr[inner]


def _plane(image: Tensor, protocol: Protocol) -> Tensor:
    """What is compared, float64 in 0..255: (N, 3, h, w) -> (N, 1 or 3, h, w)."""
    rounded = levels(image.to(_float64_device(image.device)))
    return luma(rounded) if protocol.luma else rounded.double()


def _float64_device(device: torch.device) -> torch.device:
    """Apple's GPUs have no float64; their images are compared on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the squared errors of each image; exact for R, G, B, whose levels are whole numbers."""
    return (x - y).square_().sum((1, 2, 3))


def _decibels(mean_square: Tensor) -> Tensor:
    return 10 * torch.log10(PEAK**2 / mean_square)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    # Strips of rows that stay in the cache: 1.5 times as fast as whole maps, and memory is bounded.
    height, width = x.shape[-2] - WINDOW_PX + 1, x.shape[-1] - WINDOW_PX + 1
    budget = 2**18 if x.device.type == "cpu" else 2**26  # float64 samples of the four maps
    rows = max(1, budget // (4 * x[..., 0, :].numel()))
    total = x.new_zeros(x.shape[0])
    for top in range(0, height, rows):
        strip = slice(top, top + rows + WINDOW_PX - 1)
        total += _ssim_map(x[..., strip, :], y[..., strip, :]).sum((1, 2, 3))
    return total / (x.shape[1] * height * width)


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of every window position: (N, C, H, W) -> (N, C, H-10, W-10)."""
    # s_xx and s_yy occur only as a sum, so four maps are blurred, not five.
    maps = torch.stack((x, y, x * x + y * y, x * y))
    mu_x, mu_y, squares, product = _blur(_blur(maps, -2), -1)
    mu_xy, mu_squares = mu_x * mu_y, mu_x * mu_x + mu_y * mu_y
    above = (2 * mu_xy + C1) * (2 * (product - mu_xy) + C2)
    return above / ((mu_squares + C1) * (squares - mu_squares + C2))


def _window() -> list[float]:
    """The Gaussian window of one axis; its outer product with itself is the 11x11 window, sum 1."""
    middle = WINDOW_PX // 2
    weights = [math.exp(-((i - middle) ** 2) / (2 * SIGMA_PX**2)) for i in range(WINDOW_PX)]
    return [weight / sum(weights) for weight in weights]


def _blur(maps: Tensor, axis: int) -> Tensor:
    """Gaussian along one axis, valid positions only.

    Shifted multiply-adds: a convolution of one channel runs four to five times slower on CPUs.
    """
    size = maps.shape[axis] - WINDOW_PX + 1
    first, *others = _window()
    blurred = maps.narrow(axis, 0, size) * first
    for shift, weight in enumerate(others, start=1):
        blurred.add_(maps.narrow(axis, shift, size), alpha=weight)
    return blurred
