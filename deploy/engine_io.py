"""What every engine checks of the pictures it is given and gives, and what it says when a library fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploy.engines import EngineRunError
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def check_input(lr: np.ndarray) -> None:
    """Refuse what is not a batch of float32 RGB images."""
    if lr.ndim != 4 or lr.shape[1] != 3 or str(lr.dtype) != "float32" or 0 in lr.shape:
        raise SrkdError(
            f"an engine needs float32 (N, 3, h, w) in [0, 1], got {lr.dtype} {tuple(lr.shape)}."
        )


def check_output(sr: np.ndarray, lr: np.ndarray, scale: int, file: Path) -> None:
    """Refuse what is not (N, 3, scale*h, scale*w) for `lr` (N, 3, h, w)."""
    n, _, h, w = lr.shape
    expected = (n, 3, scale * h, scale * w)
    if sr.shape != expected:
        raise EngineRunError(
            f"{file.name} makes {tuple(sr.shape)} of {tuple(lr.shape)}, not {expected} as its record says; "
            "export it again."
        )


def first_line(error: Exception) -> str:
    """What a library says first, without the stack it appends."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def one_by_one(
    run: Callable[[np.ndarray], np.ndarray], lr: np.ndarray, size: tuple[int, int], file: Path
) -> np.ndarray:
    """A batch on a graph of one `size` (h, w), which takes one picture at a time; other sizes are refused.

    Refused here, because some runtimes would run them and give a wrong picture.
    """
    h, w = lr.shape[2:]
    if (h, w) != size:
        raise EngineRunError(
            f"{file.name} takes pictures of {size[0]}x{size[1]} alone, and got {h}x{w}; cut it into tiles "
            "(scripts/upscale.py does), or export for any size: without --static."
        )
    return np.concatenate([run(picture[None]) for picture in lr])
