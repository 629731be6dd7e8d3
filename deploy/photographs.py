"""Real photographs for a parity check, as pairs of LR and HR."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from deploy.inputs import PHOTOGRAPHS, Photo
from deploy.records import BUILTIN
from srkd.data.builtin import training_photographs
from srkd.data.degradation import downscale_uint8
from srkd.data.sets import open_set

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIDE_PX = 192  # LR side beyond which a training photograph is cut before it is made smaller


def load_photographs(data: str | Path, scale: int) -> list[Photo]:
    """Up to `PHOTOGRAPHS` pairs from a folder or set, evenly spaced over it.

    The built-in set has four held-out photographs; it is filled up with the built-in training
    photographs (not with its drawn pictures): a parity check asks for real pictures, not for unseen ones.
    """
    found = open_set(str(data), scale)
    step = max(1.0, len(found) / PHOTOGRAPHS)
    chosen = [found.readers[int(i * step)]() for i in range(min(len(found), PHOTOGRAPHS))]
    photos = [Photo(image.name, _batch(image.lr), _batch(image.hr)) for image in chosen]
    if str(data).lower() == BUILTIN:
        photos += islice(_training_photographs(scale), PHOTOGRAPHS - len(photos))
    return photos


def _training_photographs(scale: int) -> Iterator[Photo]:
    for name, hr in training_photographs():
        h, w = (min(side // scale, SIDE_PX) * scale for side in hr.shape[:2])
        y, x = ((side - kept) // 2 for side, kept in zip(hr.shape[:2], (h, w), strict=True))
        cut = np.ascontiguousarray(hr[y : y + h, x : x + w])
        yield Photo(name, _batch(downscale_uint8(cut, scale)), _batch(cut))


def _batch(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [0, 1]."""
    return np.ascontiguousarray(rgb.transpose(2, 0, 1)[None].astype(np.float32) / 255)
