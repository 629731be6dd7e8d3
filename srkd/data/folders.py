"""Images in folders: which files there are, and which LR belongs to which HR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from srkd.data.degradation import crop_to_multiple, downscale_uint8
from srkd.errors import SrkdError
from srkd.images import SUFFIXES, picture_size, read_rgb8

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np

NAMED_AT_MOST = 5  # files listed in one message


@dataclass(frozen=True)
class TrainingImage:
    """One HR file with its LR file; without one, the LR image is made from HR."""

    name: str
    hr: Path
    lr: Path | None


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; hidden files and subfolders are passed over."""
    if not folder.is_dir():
        raise SrkdError(f"there is no folder {folder}; give a folder of images.")
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        kinds = " ".join(suffix[1:] for suffix in SUFFIXES)
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f" Its subfolders are {_listed(inside)}: give one of them?" if inside else ""
        raise SrkdError(f"{folder} holds no images ({kinds}); give a folder that does.{hint}")
    return sorted(found, key=lambda path: path.name)


def list_pairs(hr_folder: Path, lr_folder: Path | None, scale: int) -> tuple[TrainingImage, ...]:
    """All images of `hr_folder`, sorted by name, each with its LR file when `lr_folder` is given.

    The LR of 0001.png is 0001.* or 0001x4.* (scale 4) in `lr_folder`, or in its subfolder X4 where
    that exists. Sizes are compared from the file headers: HR, cut to multiples of `scale`, must be
    `scale` times LR.
    """
    images = _by_stem(list_images(hr_folder))
    if lr_folder is None:
        return tuple(TrainingImage(stem, path, None) for stem, path in images.items())
    inner = [lr_folder / f"X{scale}", lr_folder / f"x{scale}"]
    lr_folder = next((folder for folder in inner if folder.is_dir()), lr_folder)
    candidates = _by_stem(list_images(lr_folder))

    pairs: list[TrainingImage] = []
    missing: list[str] = []
    for stem, path in images.items():
        lr = candidates.get(f"{stem}x{scale}", candidates.get(stem))
        if lr is None:
            missing.append(path.name)
        pairs.append(TrainingImage(stem, path, lr))
    if missing:
        raise SrkdError(
            f"{lr_folder} lacks the LR image of {len(missing)} of {len(images)} HR images "
            f"({_listed(missing)}); NAME.png goes with NAMEx{scale}.png or NAME.png. "
            "Add them, or give HR alone: LR images are then made from it."
        )
    used = {pair.lr for pair in pairs}
    extra = [path.name for path in candidates.values() if path not in used]
    if extra:
        raise SrkdError(
            f"{lr_folder} has {len(extra)} images that belong to no HR image of {hr_folder} "
            f"({_listed(extra)}); remove them or give the folders of one dataset."
        )
    _check_sizes(pairs, scale)
    return tuple(pairs)


def read_pair(pair: TrainingImage, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode (hr, lr): uint8 (scale*h, scale*w, 3) and (h, w, 3), HR cropped, LR made if need be."""
    lr = read_rgb8(pair.lr) if pair.lr is not None else None
    return complete_pair(str(pair.hr), read_rgb8(pair.hr), lr, scale)


def complete_pair(
    name: str, hr: np.ndarray, lr: np.ndarray | None, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    """(hr, lr) with `hr` cropped to multiples of `scale` and `lr` made from it when there is none."""
    try:
        hr = crop_to_multiple(hr, scale)
    except SrkdError as error:
        raise SrkdError(f"{name}: {error}") from error
    if lr is None:
        return hr, downscale_uint8(hr, scale)
    if (lr.shape[0] * scale, lr.shape[1] * scale) != hr.shape[:2]:
        # The file headers agreed, so one of the two carries an EXIF rotation.
        raise SrkdError(
            f"{name} is {hr.shape[1]}x{hr.shape[0]} px upright and its LR image "
            f"{lr.shape[1]}x{lr.shape[0]}; HR must be {scale} times LR. Rotate one of the two files."
        )
    return hr, lr


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise SrkdError(
                f"{path.parent} has two images named '{path.stem}' ({other.name}, {path.name}); "
                "rename or remove one, because pairs are found by name."
            )
    return by_stem


def _check_sizes(pairs: list[TrainingImage], scale: int) -> None:
    wrong: list[str] = []
    for pair in pairs:
        if pair.lr is None:
            continue
        (height, width), (h, w) = picture_size(pair.hr), picture_size(pair.lr)
        if (height // scale, width // scale) != (h, w):
            wrong.append(f"{pair.name}: HR {width}x{height}, LR {w}x{h}")
    if wrong:
        raise SrkdError(
            f"{len(wrong)} of {len(pairs)} pairs are not x{scale} pairs ({_listed(wrong, '; ')}); "
            f"HR must be {scale} times LR. Give the LR folder of scale {scale}."
        )


def _listed(names: list[str], separator: str = ", ") -> str:
    more = len(names) - NAMED_AT_MOST
    return separator.join(names[:NAMED_AT_MOST]) + (f"{separator}{more} more" if more > 0 else "")
