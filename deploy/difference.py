"""How far one picture is from another, in every number a parity verdict needs. Pure functions.

Pictures are float32 (N, 3, H, W), about [0, 1], before any clamp; x is the reference, y the candidate.

    d        = y - x
    max_abs  = max |d|,  mean_abs = mean |d|,  p999_abs = 99.9th percentile of |d|
    psnr_db  = -10 log10(mean d^2)                peak 1, fixed: a dark picture gets no easier gate
    bias     = mean d per channel                 drift of colour
    levels   = round(255 clamp(y)) - round(255 clamp(x))

If the error of an engine is independent of the error of the network, the engine costs
10 log10(1 + 10^((psnr_task - psnr_db) / 10)) dB of the task's PSNR: 90 dB of parity cost nothing at 40 dB.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Place:
    """Where the largest error is: input, image of the batch, channel, row, column (SR pixels)."""

    input: str
    image: int
    channel: int
    y: int
    x: int


@dataclass(frozen=True)
class Difference:
    """Numbers of one comparison, or of several (`worst_of`). `psnr_db` is inf for equal pictures."""

    values: int
    nonfinite: int
    max_abs: float
    mean_abs: float
    p999_abs: float
    psnr_db: float
    bias_rgb: tuple[float, float, float]
    max_levels: int
    changed_levels_share: float
    border_max_abs: float
    interior_max_abs: float
    worst: Place

    def to_json(self) -> dict[str, Any]:
        """Plain values. JSON has no infinity: equal pictures have psnr_db null, and so has NaN."""
        plain = {k: finite_or_none(v) for k, v in asdict(self).items()}
        return {**plain, "bias_rgb": [finite_or_none(v) for v in self.bias_rgb]}


def finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def difference(
    reference: np.ndarray, candidate: np.ndarray, name: str = "", border_px: int = 0
) -> Difference:
    """Compare two pictures of one shape (N, 3, H, W). `border_px` is the width of the border band.

    Values that are not finite in either picture are counted, make `max_abs` infinite and `psnr_db`
    minus infinity, and are left out of the means, so that the rest stays readable.
    """
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    bad = ~(np.isfinite(x) & np.isfinite(y))
    d = np.where(bad, 0.0, np.where(bad, 0.0, y) - np.where(bad, 0.0, x))
    size = np.where(bad, math.inf, np.abs(d))
    n, c, row, column = (int(i) for i in np.unravel_index(int(np.argmax(size)), size.shape))
    inside = np.zeros(d.shape[-2:], dtype=bool)
    inside[border_px : d.shape[-2] - border_px, border_px : d.shape[-1] - border_px] = True
    steps = np.abs(_levels(y) - _levels(x))
    mean_square = float(np.mean(d**2))
    nonfinite = int(bad.sum())
    return Difference(
        values=d.size,
        nonfinite=nonfinite,
        max_abs=float(size.max()),
        mean_abs=float(np.mean(np.abs(d))),
        p999_abs=float(np.quantile(size, 0.999, method="higher")),
        psnr_db=-math.inf if nonfinite else _psnr(mean_square),
        bias_rgb=tuple(float(v) for v in d.mean(axis=(0, 2, 3))),  # type: ignore[arg-type]
        max_levels=int(steps.max()),
        changed_levels_share=float(np.mean(steps > 0)),
        border_max_abs=float(size[..., ~inside].max(initial=0.0)),
        interior_max_abs=float(size[..., inside].max(initial=0.0)),
        worst=Place(name, n, c, row, column),
    )


def _psnr(mean_square: float) -> float:
    return math.inf if mean_square == 0 else -10 * math.log10(mean_square)


def _levels(picture: np.ndarray) -> np.ndarray:
    """8-bit levels as int16; what is not finite counts as black."""
    finite = np.nan_to_num(picture, nan=0.0, posinf=0.0, neginf=0.0)
    return np.rint(np.clip(finite, 0, 1) * 255).astype(np.int16)


def worst_of(parts: list[Difference]) -> Difference:
    """One record for several comparisons: the worst extreme, the mean over all values.

    `psnr_db` is the lowest of the parts, because a good photograph must not hide a bad one, and each
    `bias_rgb` the one farthest from zero.
    """
    values = sum(p.values for p in parts)
    worst = max(parts, key=lambda p: p.max_abs)
    return Difference(
        values=values,
        nonfinite=sum(p.nonfinite for p in parts),
        max_abs=worst.max_abs,
        mean_abs=sum(p.mean_abs * p.values for p in parts) / values,
        p999_abs=max(p.p999_abs for p in parts),
        psnr_db=min(p.psnr_db for p in parts),
        bias_rgb=tuple(max((p.bias_rgb[c] for p in parts), key=abs) for c in range(3)),  # type: ignore[arg-type]
        max_levels=max(p.max_levels for p in parts),
        changed_levels_share=sum(p.changed_levels_share * p.values for p in parts) / values,
        border_max_abs=max(p.border_max_abs for p in parts),
        interior_max_abs=max(p.interior_max_abs for p in parts),
        worst=worst.worst,
    )


def seam_score(whole: np.ndarray, tiled: np.ndarray) -> float:
    """How much a line of tile joints stands out: 0 for none, 1 for steps like the picture's own.

    The largest mean step of (tiled - whole) across one row or column line, over the mean step of the
    picture itself. It needs no knowledge of where the tiles lie. A flat picture with a seam gives inf.
    """
    d = tiled.astype(np.float64) - whole.astype(np.float64)
    lines = [
        np.abs(np.diff(d, axis=axis)).mean(axis=tuple(a for a in range(4) if a != axis))
        for axis in (2, 3)
    ]
    step = max(float(line.max(initial=0.0)) for line in lines)
    own = np.mean([np.abs(np.diff(whole.astype(np.float64), axis=a)).mean() for a in (2, 3)])
    if step == 0:
        return 0.0
    return math.inf if own == 0 else float(step / own)
