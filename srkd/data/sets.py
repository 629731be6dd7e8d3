"""Evaluation sets: the field's benchmarks, the built-in photographs, or a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from srkd.data.folders import complete_pair, list_pairs, read_pair
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

BUILTIN = "builtin"
OFFICIAL = "official files"
MADE = "made by MATLAB-compatible bicubic (uint8, symmetric border)"

# What people type, in lower case -> folder below $SRKD_DATA/benchmarks.
BENCHMARKS = {
    "set5": "Set5",
    "set14": "Set14",
    "bsd100": "BSD100",
    "b100": "BSD100",
    "urban100": "Urban100",
    "div2k_valid": "DIV2K_valid",
}


@dataclass(frozen=True)
class EvaluationImage:
    """One image of a set; grey files have three equal channels.

    lr  (h, w, 3) uint8
    hr  (scale*h, scale*w, 3) uint8, the reference, cropped to that size
    """

    name: str
    lr: np.ndarray
    hr: np.ndarray


@dataclass(frozen=True)
class EvaluationSet:
    """Images in order of name. Iterating decodes one after the other and keeps none.

    `lr_origin` says where the LR images come from, to be printed beside every score.
    """

    name: str
    scale: int
    lr_origin: str
    readers: tuple[Callable[[], EvaluationImage], ...]

    def __len__(self) -> int:
        return len(self.readers)

    def __iter__(self) -> Iterator[EvaluationImage]:
        for read in self.readers:
            yield read()


def given_hr(evaluation_set: EvaluationSet) -> EvaluationSet:
    """The set with the HR image in place of the LR image: what a teacher that is given HR is scored on."""

    def read(original: Callable[[], EvaluationImage]) -> EvaluationImage:
        image = original()
        return replace(image, lr=image.hr)

    readers = tuple(partial(read, original) for original in evaluation_set.readers)
    return replace(evaluation_set, lr_origin="the HR image itself", readers=readers)


def open_set(spec: str | Path, scale: int) -> EvaluationSet:
    """The set that `spec` means: a benchmark's name, "builtin", or a folder.

    A folder holds HR images, or HR/ and LR_bicubic/X{scale}/ as the benchmarks do. LR images that
    are not there are made from HR.
    """
    text = str(spec)
    if scale < 2:
        raise SrkdError(f"scale {scale} enlarges nothing; choose 2, 3 or 4.")
    if text.lower() == BUILTIN:
        return _builtin(scale)
    if text.lower() in BENCHMARKS:
        name = BENCHMARKS[text.lower()]
        return _from_folder(_benchmark_folder(name), scale, name, OFFICIAL)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise SrkdError(
            f"'{text}' is neither a folder nor a set that is known; give a folder of HR images, "
            f"'{BUILTIN}', or one of {', '.join(dict.fromkeys(BENCHMARKS.values()))}."
        )
    return _from_folder(folder, scale, folder.resolve().name, f"files in LR_bicubic/X{scale}")


def _benchmark_folder(name: str) -> Path:
    root = os.environ.get("SRKD_DATA")
    need = f"{name} is looked for in $SRKD_DATA/benchmarks/{name} (folders HR and LR_bicubic/X2, X3, X4)"
    instead = f"Without it, use --data {BUILTIN} or a folder of HR images."
    if not root:
        raise SrkdError(f"{need}, but SRKD_DATA is not set; set it to the data folder. {instead}")
    folder = Path(root).expanduser() / "benchmarks" / name
    if not folder.is_dir():
        raise SrkdError(f"{need}, but there is no {folder}; put it there. {instead}")
    return folder


def _from_folder(folder: Path, scale: int, name: str, origin: str) -> EvaluationSet:
    inner = folder / "HR"
    hr_folder = inner if inner.is_dir() else folder
    lr_folder = folder / "LR_bicubic" / f"X{scale}"
    has_lr = hr_folder is inner and lr_folder.is_dir()
    pairs = list_pairs(hr_folder, lr_folder if has_lr else None, scale)

    def read(index: int) -> EvaluationImage:
        hr, lr = read_pair(pairs[index], scale)
        return EvaluationImage(pairs[index].name, lr, hr)

    readers = tuple(partial(read, index) for index in range(len(pairs)))
    return EvaluationSet(name, scale, origin if has_lr else MADE, readers)


def _builtin(scale: int) -> EvaluationSet:
    from srkd.data.builtin import held_out_images

    def read(name: str, image: np.ndarray) -> EvaluationImage:
        hr, lr = complete_pair(name, image, None, scale)
        return EvaluationImage(name, lr, hr)

    readers = tuple(partial(read, name, image) for name, image in held_out_images())
    return EvaluationSet(BUILTIN, scale, MADE, readers)
