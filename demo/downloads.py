"""Pictures as users take them home: in the format they came in or as PNG, under a safe name that says what made them."""

from __future__ import annotations

import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from demo.jobs import TRUTH
from demo.saying import in_words
from srkd.errors import SrkdError
from srkd.files import replacing
from srkd.images import SUFFIXES, flatten_on_white, picture_size, read_picture, write_held
from srkd.infer import MAX_HELD_PIXELS, NO_ALPHA, check_output_size, fit

if TYPE_CHECKING:
    from demo.jobs import Pane

Wanted = Literal["original", "png"]

LONGEST = 60  # characters of a stem
LONGEST_BYTES = 120  # in UTF-8: most file systems end at 255 for the whole name
FALLBACK = "picture"
DISK = "the server's disk"
_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in range(10)
}
_SAMPLES = 1 << 20  # that are compared at a time


@dataclass(frozen=True)
class Saved:
    """A file that is ready, and what was lost on the way into it, a sentence each."""

    file: Path
    notes: tuple[str, ...] = ()


# --- names --------------------------------------------------------------------------------------


def safe_stem(name: str) -> str:
    """What a user called a picture as a part of a file name, on any system.

    No folder, no known suffix, no control or format characters; letters, marks and digits of any script stay, all else
    becomes "_". At most 60 characters, never empty, never a device of Windows, never led by "-" or ".".
    """
    last = re.split(r"[/\\]", name)[-1]
    stem = Path(last).stem if Path(last).suffix.lower() in SUFFIXES else last
    # Composed, so that the same name typed on a Mac and on Windows is the same.
    plain = unicodedata.normalize("NFC", stem)
    kept = "".join(c if c in "-." or unicodedata.category(c)[0] in "LMN" else "_" for c in plain)
    tidy = re.sub(r"[_.]*_[_.]*|\.\.+", "_", kept).lstrip("-_.")
    while tidy and unicodedata.category(tidy[0])[0] == "M":  # a mark needs a letter to sit on
        tidy = tidy[1:].lstrip("-_.")
    cut = tidy[:LONGEST].encode()[:LONGEST_BYTES].decode(errors="ignore").rstrip("-_.")
    # Windows looks at the part before the first dot, whatever form its digits have.
    device = unicodedata.normalize("NFKC", cut).casefold().split(".")[0]
    return f"{FALLBACK}_{cut}"[:LONGEST] if device in _DEVICES else cut or FALLBACK


def download_name(name: str, scale: int, pane: Pane, suffix: str) -> str:
    """`photo_x4_rcan_a-distilled_ort-fp16.png` from the user's name of the picture; the truth has no scale."""
    if pane.role == "truth":
        return f"{safe_stem(name)}_{TRUTH}{suffix}"
    n = pane.numbers
    engine = "-".join(part for part in (n.engine, n.precision) if part)
    # A network that is shown on several engines has them in its key already.
    key = safe_stem(pane.key.removesuffix(f"-{engine}"))
    return f"{safe_stem(name)}_x{scale}_{'_'.join(filter(None, (key, engine)))}{suffix}"


# --- files --------------------------------------------------------------------------------------


def converts(original: str, wanted: Wanted) -> bool:
    """Whether `save_as` encodes pictures anew, which takes seconds for a large one; else it copies files."""
    return wanted == "original" and original != "png"


def save_as(
    pane: Pane, name: str, scale: int, original: str, wanted: Wanted, folder: Path
) -> Saved:
    """A finished pane as a file in `folder`, complete or absent.

    name      what the user called the picture
    original  its format, as `srkd.images.picture_format` tells: png, jpg, webp, bmp, tif
    wanted    "png" copies the pane's file byte for byte; "original" writes what that format can hold
    """
    if wanted not in ("original", "png"):
        raise SrkdError(f"a download as '{wanted}' was asked for; choose original or png.")
    suffix = ".png" if wanted == "png" else f".{original}"
    if suffix not in SUFFIXES:
        raise SrkdError(f"'{original}' is no format that can be written; choose png.")
    target = folder / download_name(name, scale, pane, suffix)
    with in_words({folder: DISK, pane.file: pane.label}):
        if suffix != ".png":
            return _convert(pane.file, target)
        with replacing(target) as temporary:
            shutil.copyfile(pane.file, temporary)
    return Saved(target)


def _convert(source: Path, target: Path) -> Saved:
    """Write a PNG again in the format that `target` names, by the rules of `srkd.infer.upscale_file`."""
    suffix = target.suffix
    height, width = picture_size(source, MAX_HELD_PIXELS)
    try:
        check_output_size(Path(target.name), height, width)
    except SrkdError as error:
        raise SrkdError(f"{error} The PNG of this picture can be downloaded.") from error
    notes: list[str] = []
    picture = fit(read_picture(source, MAX_HELD_PIXELS), suffix, notes)
    colour, alpha = picture.rgb[..., :1] if picture.grey else picture.rgb, picture.alpha
    if alpha is not None and suffix in NO_ALPHA:
        colour, alpha = flatten_on_white(np.dstack([colour, alpha])), None
    with replacing(target) as temporary:
        write_held(temporary, colour if alpha is None else np.dstack([colour, alpha]), picture.icc)
        again = read_picture(temporary, MAX_HELD_PIXELS)
        changed = _largest_change(colour, again.rgb)
        if alpha is not None:
            # Encoders leave out an alpha that is opaque everywhere.
            opaque = np.full_like(alpha, np.iinfo(alpha.dtype).max)
            changed = max(
                changed, _largest_change(alpha, opaque if again.alpha is None else again.alpha)
            )
        if suffix == ".jpg":
            notes.append(
                f"JPEG of quality 95 is lossy: samples differ from the picture shown by up to {changed} of 255; "
                "choose png for its exact pixels"
            )
        elif changed:
            raise SrkdError(
                f"{target.name} did not keep its pixels when it was read back; choose png."
            )
    return Saved(target, tuple(notes))


def _largest_change(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference of a sample; one channel of `a` is compared with all of `b`."""
    step = max(1, _SAMPLES // b[0].size)
    bands = (slice(top, top + step) for top in range(0, len(a), step))
    return max(int(np.abs(a[rows].astype(np.int32) - b[rows]).max()) for rows in bands)
