"""Decoded images in the memory of a device, where the crops of a step are gathered by index.

The same crops as `PatchSampler` gives, bit for bit: the same draws, the same symmetries. Nothing is copied to
the device in a step but five numbers for each sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from srkd.data.cache import gigabytes
from srkd.data.sampling import HFLIP, TRANSPOSE, VFLIP, Crops, draw
from srkd.errors import SrkdError
from srkd.tiling import memory_budget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srkd.data.sampling import PatchSampler


class ResidentSampler:
    """The batches of `sampler` from images that lie on `device`; the images are copied there at once."""

    def __init__(self, sampler: PatchSampler, device: torch.device) -> None:
        data = sampler.training_set
        self.sampler, self.device = sampler, device
        numbers = range(len(data))
        self._lr = _pixels([data.lr(i) for i in numbers], device)
        self._hr = _pixels([data.hr(i) for i in numbers], device)
        self._taught = [_pixels([t.sr(i) for i in numbers], device) for t in sampler.taught]
        areas = sampler.sizes[:, 0] * sampler.sizes[:, 1]
        self._starts = np.cumsum(areas) - areas  # first LR pixel of every image

    def batch(self, step: int) -> Crops:
        """The crops of this rank's share of `step`, on the device, in channels_last order."""
        s, scale = self.sampler, self.sampler.training_set.scale
        image, top, left, code = draw(s.seed, step, s.samples, s.sizes, s.patch, s.augment).T
        width, start = s.sizes[image, 1], self._starts[image]
        lr_first = start + top * width + left
        hr_first = scale**2 * start + scale * top * scale * width + scale * left
        table = torch.from_numpy(np.stack([lr_first, hr_first, width, scale * width, code]))
        if self.device.type == "cuda":
            table = table.pin_memory()  # else the copy would wait for the device
        small, large, w, W, codes = table.to(self.device, non_blocking=True)  # noqa: N806
        side = scale * s.patch
        return Crops(
            gather(self._lr, small, w, codes, s.patch),
            gather(self._hr, large, W, codes, side),
            tuple(gather(pixels, large, W, codes, side) for pixels in self._taught),
        )


def gather(pixels: Tensor, first: Tensor, width: Tensor, codes: Tensor, side: int) -> Tensor:
    """Square crops under symmetries: (N, 3, side, side).

    pixels  (P, 3), image after image, row after row
    first   (N,) index of a crop's top left pixel         width   (N,) of its image
    codes   (N,) symmetries of `srkd.data.sampling.apply_symmetry`
    """

    def has(bit: int) -> Tensor:
        return (codes & bit).bool()[:, None, None]

    along = torch.arange(side, device=pixels.device)
    down, across = along[None, :, None], along[None, None, :]
    # Backwards from a place in the result: the swap of axes was the last of the three.
    row, column = (
        torch.where(has(TRANSPOSE), across, down),
        torch.where(has(TRANSPOSE), down, across),
    )
    row = torch.where(has(VFLIP), side - 1 - row, row)
    column = torch.where(has(HFLIP), side - 1 - column, column)
    index = first[:, None, None] + row * width[:, None, None] + column
    return pixels[index].permute(0, 3, 1, 2)


def _pixels(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """(H, W, 3) images as (P, 3) on the device; the host holds a copy of one at a time."""
    areas = [image.shape[0] * image.shape[1] for image in images]
    dtype = torch.from_numpy(np.empty(0, images[0].dtype)).dtype
    pixels = torch.empty(sum(areas), 3, dtype=dtype, device=device)
    for part, image in zip(pixels.split(areas), images, strict=True):
        part.copy_(torch.from_numpy(image.reshape(-1, 3).copy()))
    return pixels


def placed(
    sampler: PatchSampler, device: torch.device, place: str
) -> tuple[PatchSampler | ResidentSampler, str]:
    """The sampler for `data.place` (auto, device, host), and where its images are with the reason.

    auto takes the device when it is a GPU and the images need at most half of the memory that is free on it. On a CPU
    it never does, and there is nothing to say: slices are cut forty times as fast as crops are gathered.
    """
    if place == "auto" and device.type == "cpu":
        return sampler, ""
    need, room = sampler.decoded_bytes, memory_budget(device)
    fits = f"{gigabytes(need)} of decoded images, {gigabytes(2 * room)} are free on {device}"
    if place == "host":
        return sampler, f"sliced from the mapped file: data.place = host ({fits})"
    if need > room:
        if place == "device":
            raise SrkdError(
                f"data.place = device, but there are {fits}, and half of that is kept for the training; use "
                "data.place=auto or fewer images."
            )
        return sampler, f"sliced from the mapped file: {fits}, half of it is kept for the training"
    return ResidentSampler(sampler, device), f"on {device}: {fits}"
