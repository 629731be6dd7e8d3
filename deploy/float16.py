"""What a half (IEEE float16) holds."""

from __future__ import annotations

import numpy as np

HALF_MAX = 65504.0  # larger magnitudes become infinite
SMALLEST_NORMAL = 2.0**-14  # smaller ones lose bits
ROUNDS_TO_ZERO = 2.0**-25  # these and smaller ones lose all


def overflows(value: np.ndarray) -> bool:
    """Whether a finite number among these becomes infinite in float16."""
    with np.errstate(over="ignore"):
        return bool(np.any(np.isinf(value.astype(np.float16)) & np.isfinite(value)))
