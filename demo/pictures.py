"""What a comparison starts from: the LR picture as a file, its truth, and the two pictures that need no network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from demo.jobs import BICUBIC, NEAREST
from demo.limits import ANY_NUMBER, TRUTH_NAME, fits, refused_truth
from demo.saying import in_words
from demo.scores import shown_name
from srkd.data.degradation import crop_to_multiple, downscale_uint8, upscale_uint8
from srkd.errors import SrkdError
from srkd.images import Picture, bicubic_rows, read_picture, to_8_bits, write_png
from srkd.transparency import fill_hidden

if TYPE_CHECKING:
    from pathlib import Path

    from demo.jobs import CompareRequest
    from demo.limits import Limits


@dataclass(frozen=True)
class Pictures:
    """Decoded and checked. `truth` is scale times the size of `lr`; `notes` are of the whole comparison."""

    lr: Picture
    truth: Picture | None
    scale: int
    name: str
    notes: tuple[str, ...]

    @property
    def sr_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.scale * self.lr.size[0], self.scale * self.lr.size[1]

    @property
    def opaque(self) -> bool:
        """Whether every pixel counts: what lies beneath transparent ones is not part of the picture."""
        return _opaque(self.lr) and (self.truth is None or _opaque(self.truth))

    @property
    def sr_bytes(self) -> int:
        """Bytes of one enlarged picture before compression."""
        height, width = self.sr_size
        return height * width * channels(self.lr).shape[2] * self.lr.bits // 8


def read_pictures(request: CompareRequest, scale: int, limits: Limits) -> Pictures:
    """Decode what a request names, by the rules for ground truths."""
    name = shown_name(request.name)
    given = _read(request.picture, name)
    if request.shrink:
        lr, truth, note = _shrunk(given, scale, name)
        notes = (*given.notes, note)
    else:
        lr, truth, notes = given, None, given.notes
    if request.truth is not None:
        read = _read(request.truth, TRUTH_NAME)
        truth, more = matched(read, lr.size, scale)
        notes = (*notes, *(f"{TRUTH_NAME}: {note}" for note in (*read.notes, *more)))
    limits.check_lr(lr.size, scale, name)
    return Pictures(lr, truth, scale, name, notes)


def matched(truth: Picture, lr_size: tuple[int, int], scale: int) -> tuple[Picture, list[str]]:
    """The truth, cropped at the right and bottom by less than `scale` px; any other size is refused."""
    if not fits(truth.size, lr_size, scale):
        raise refused_truth(truth.size, lr_size, scale)
    height, width = scale * lr_size[0], scale * lr_size[1]
    if truth.size == (height, width):
        return truth, []
    note = f"cropped from {truth.size[1]}x{truth.size[0]} to {width}x{height} px at the right and bottom"
    return _cropped(truth, height, width), [note]


def _shrunk(hr: Picture, scale: int, name: str) -> tuple[Picture, Picture, str]:
    """LR and truth from an HR picture, and what was done."""
    if hr.bits != 8 or not _opaque(hr):
        what = "16 bits a channel" if hr.bits != 8 else "transparent pixels"
        raise SrkdError(
            f"{name} has {what}, but only 8-bit opaque pictures are reduced, as the benchmarks do it; convert it "
            "first, or give the LR picture and the ground truth apart."
        )
    height, width = crop_to_multiple(hr.rgb, scale).shape[:2]
    truth = replace(_cropped(hr, height, width), alpha=None)
    lr = replace(truth, rgb=downscale_uint8(truth.rgb, scale), notes=())
    note = f"the LR picture is the ground truth reduced by {scale} (bicubic, 8 bits)"
    if truth.size != hr.size:
        note += f", which was cropped from {hr.size[1]}x{hr.size[0]} to {width}x{height} px"
    return lr, truth, note


def baseline(kind: str, lr: Picture, scale: int) -> tuple[np.ndarray, list[str]]:
    """NEAREST or BICUBIC: (H, W, channels) of the bits of `lr`, and notes.

    Bicubic is that of the protocol in 8 bits (rounded after each pass, mirrored at the edges). It is not defined for
    16 bits and alpha: these get the same kernel with repeated edges, rounded once, as networks' alpha does.
    """
    if kind == NEAREST:
        return channels(lr).repeat(scale, 0).repeat(scale, 1), []
    assert kind == BICUBIC
    rgb = lr.rgb if lr.alpha is None else fill_hidden(lr.rgb, lr.alpha)  # as for networks
    colour = rgb[..., :1] if lr.grey else rgb
    h, notes = lr.size[0], list[str]()
    if lr.bits == 8:
        enlarged = upscale_uint8(colour, scale)
    else:
        planes = [bicubic_rows(colour[..., c], 0, h, scale) for c in range(colour.shape[2])]
        enlarged = np.stack(planes, axis=2)
        notes.append("16 bits: the kernel of the protocol, with repeated edges and rounded once")
    if lr.alpha is not None:
        alpha = bicubic_rows(lr.alpha, 0, h, scale)
        enlarged = np.concatenate([enlarged, alpha[..., None]], axis=2)
    return enlarged, notes


def channels(picture: Picture) -> np.ndarray:
    """(h, w, 1 to 4): grey or RGB, then alpha, as a file of this picture holds them."""
    colour = picture.rgb[..., :1] if picture.grey else picture.rgb
    if picture.alpha is None:
        return colour
    return np.concatenate([colour, picture.alpha[..., None]], axis=2)


def save(path: Path, picture: Picture) -> None:
    """As PNG, without loss."""
    write_png(path, channels(picture), picture.icc)


def rgb8(picture: Picture) -> np.ndarray:
    """(h, w, 3) uint8, what is scored."""
    return to_8_bits(picture.rgb)


def _read(path: Path, name: str) -> Picture:
    with in_words({path: name}):
        return read_picture(path, ANY_NUMBER)


def _cropped(picture: Picture, height: int, width: int) -> Picture:
    alpha = None if picture.alpha is None else picture.alpha[:height, :width]
    return replace(picture, rgb=picture.rgb[:height, :width], alpha=alpha)


def _opaque(picture: Picture) -> bool:
    return picture.alpha is None or bool((picture.alpha == np.iinfo(picture.alpha.dtype).max).all())
