"""What the demo accepts, and the check of it on headers alone, before anything is decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo.jobs import MOST_CHOICES
from demo.saying import in_words
from demo.scores import shown_name
from srkd.errors import SrkdError
from srkd.images import picture_size
from srkd.tiling import SMALLEST_TILE_PX

if TYPE_CHECKING:
    from demo.jobs import CompareRequest

ANY_NUMBER = 2**63  # of pixels: this module says itself what is too large
# Each tile brings its halo along: thousands of small ones would be many times the work of the picture.
MOST_TILES = 1024
# What the server may keep on its disk: what it made, and what was sent to it.
MOST_RESULT_BYTES = 2 * 1024**3
MOST_UPLOAD_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Limits:
    """Of one request to a public server without a GPU; pixels of the whole picture, bytes of one file."""

    max_bytes: int = 20_000_000
    max_lr_px: int = 2_000_000
    max_sr_px: int = 32_000_000
    max_files: int = 20
    max_choices: int = MOST_CHOICES

    def lr_px(self, scale: int) -> int:
        """The largest LR picture at this scale, by both limits."""
        return min(self.max_lr_px, self.max_sr_px // scale**2)

    def sentence(self, scale: int) -> str:
        """For the page, before an upload."""
        lr, side = self.lr_px(scale), math.isqrt(self.lr_px(scale))
        return (
            f"PNG, JPEG, WebP, BMP or TIFF up to {self.max_bytes / 1e6:.3g} MB and {lr / 1e6:.3g} megapixels "
            f"(for example {side}x{side}), which become {scale**2 * lr / 1e6:.3g} megapixels at x{scale}."
        )

    def check_lr(self, size: tuple[int, int], scale: int, name: str) -> None:
        """Refuse an LR picture of `size` (h, w) that is too large, or whose enlargement is."""
        h, w = size
        if h * w > self.lr_px(scale):
            raise SrkdError(
                f"{name} is {w}x{h} px ({h * w / 1e6:.3g} megapixels), which would become {scale * w}x{scale * h} at "
                f"x{scale}, but at most {self.lr_px(scale) / 1e6:.3g} megapixels are taken; crop it or make it smaller."
            )

    def header_size(self, path: Path, name: str) -> tuple[int, int]:
        """(h, w) of a picture as its header says, before any rotation; files that are too large are refused."""
        with in_words({path: name}):
            if path.is_file() and path.stat().st_size > self.max_bytes:
                raise SrkdError(
                    f"{name} has {path.stat().st_size / 1e6:.1f} MB, but at most {self.max_bytes / 1e6:.3g} MB are "
                    "taken; make it smaller or save it in another format."
                )
            return picture_size(path, ANY_NUMBER)


def check_pictures(request: CompareRequest, scale: int, limits: Limits) -> None:
    """Refuse by the headers: too large, too small to shrink, a truth of another size, tiles that are too many."""
    name = shown_name(request.name)
    if request.shrink and request.truth is not None:
        raise SrkdError(
            "A ground truth was given, and the picture is said to be one itself; leave one of the two out."
        )
    h, w = limits.header_size(request.picture, name)
    if request.shrink:
        if min(h, w) < scale:
            raise SrkdError(
                f"{name} is {w}x{h} px, too small to be reduced by {scale}; give a larger picture."
            )
        h, w = h // scale, w // scale
    size = (h, w)
    limits.check_lr(size, scale, name)
    check_tile(request.tile, size)
    if request.truth is not None:
        found = limits.header_size(request.truth, TRUTH_NAME)
        # A camera's pictures may lie on their side until they are decoded.
        if not (fits(found, size, scale) or fits(found, (w, h), scale)):
            raise refused_truth(found, size, scale)


TRUTH_NAME = "the ground truth"


def fits(truth: tuple[int, int], lr: tuple[int, int], scale: int) -> bool:
    """Whether `truth` (H, W) is scale times `lr` (h, w), or less than `scale` more, which is cropped."""
    return all(0 <= large - scale * small < scale for large, small in zip(truth, lr, strict=True))


def refused_truth(truth: tuple[int, int], lr: tuple[int, int], scale: int) -> SrkdError:
    (height, width), (h, w) = truth, lr
    return SrkdError(
        f"The ground truth is {width}x{height} px, but x{scale} of the picture's {w}x{h} px is {scale * w}x{scale * h} px "
        f"(up to {scale - 1} px more at the right and bottom are cropped); give the picture that this LR was made "
        "from. It is never resized."
    )


def check_tile(tile: object, size: tuple[int, int]) -> None:
    """Refuse a tile (side in LR pixels, or "auto") that is none, or makes too many of a picture of `size` (h, w)."""
    if tile == "auto":
        return
    least = SMALLEST_TILE_PX
    if not isinstance(tile, int) or isinstance(tile, bool) or tile < least:
        raise SrkdError(f"A tile of {tile!r:.20} px was asked for; give {least} or more, or auto.")
    tiles = math.ceil(size[0] / tile) * math.ceil(size[1] / tile)
    if tiles > MOST_TILES:
        raise SrkdError(
            f"Tiles of {tile} px would be {tiles:,} for this picture, but at most {MOST_TILES:,} are cut; choose a "
            "larger tile, or auto."
        )
