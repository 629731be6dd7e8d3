"""Colours below transparent pixels. Nobody sees them, but a network does, and draws them into the visible ones beside.

They are replaced by visible colours before a picture is enlarged, so that an object goes on beyond its outline. The other
way, colours times alpha enlarged and divided by the enlarged alpha, is exact where one linear filter does both. A network
is none: it would see every object on black, which is no picture it was trained on, and draw an edge there that is not the
alpha's, enlarged on its own; the division then makes a rim of every difference between the two.
"""

from __future__ import annotations

import numpy as np

FAR = 1 << 30  # farther than any pixel of a picture
BAND_PX = 1 << 20  # that are worked on at a time


def fill_hidden(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`rgb` (h, w, 3) with the nearest visible colour of the row or the column wherever `alpha` (h, w) is 0.

    Where both are hidden throughout, that of the nearest pixel in the row that has got one. `rgb` itself is returned
    if nothing is hidden, or everything.
    """
    visible = alpha > 0
    if visible.all() or not visible.any():
        return rgb
    filled = rgb.copy()
    distance = np.full(alpha.shape, FAR // 2, np.int32)
    _along_rows(filled, distance, visible)
    _along_rows(filled.transpose(1, 0, 2), distance.T, visible.T)
    reached = distance < FAR // 2
    if not reached.all():  # now every row has a pixel that was reached, by its column
        _along_rows(filled, distance, reached)
    return filled


def _along_rows(colours: np.ndarray, distance: np.ndarray, known: np.ndarray) -> None:
    """Copy to each pixel the nearest `known` one of its row, if that is nearer than `distance`; both are changed in place."""
    width = known.shape[1]
    rows = max(1, BAND_PX // width)
    at = np.arange(width, dtype=np.int32)
    for top in range(0, len(known), rows):
        band = slice(top, top + rows)
        left = np.maximum.accumulate(np.where(known[band], at, -FAR), axis=1, dtype=np.int32)
        right = np.where(known[band], at, FAR)[:, ::-1]
        right = np.minimum.accumulate(right, axis=1, dtype=np.int32)[:, ::-1]
        nearest = np.where(at - left <= right - at, left, right)
        apart = np.minimum(at - left, right - at)
        nearer = apart < distance[band]
        row, column = np.nonzero(nearer)
        colours[band][row, column] = colours[band][row, nearest[row, column]]
        distance[band][row, column] = apart[row, column]
