"""Every number of a comparison against a hand-worked one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deploy.difference import difference, seam_score, worst_of


def zeros(h: int = 4, w: int = 5) -> np.ndarray:
    return np.zeros((1, 3, h, w), np.float32)


def test_equal_pictures() -> None:
    found = difference(zeros(), zeros(), "same")
    assert found.psnr_db == math.inf
    assert (found.max_abs, found.mean_abs, found.nonfinite, found.max_levels) == (0, 0, 0, 0)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["psnr_db"] is None


def test_one_changed_value() -> None:
    reference, candidate = zeros(), zeros()
    candidate[0, 1, 2, 3] = 0.5
    found = difference(reference, candidate, "one", border_px=1)
    assert found.max_abs == 0.5
    assert found.mean_abs == pytest.approx(0.5 / 60)
    assert found.psnr_db == pytest.approx(-10 * math.log10(0.25 / 60))  # 23.8 dB, peak 1
    assert found.bias_rgb == pytest.approx((0, 0.5 / 20, 0))
    assert found.max_levels == 128  # 127.5 rounds to even
    assert found.changed_levels_share == pytest.approx(1 / 60)
    assert (found.worst.channel, found.worst.y, found.worst.x) == (1, 2, 3)
    assert (found.border_max_abs, found.interior_max_abs) == (0, 0.5)


def test_border_band_is_told_from_the_interior() -> None:
    candidate = zeros()
    candidate[0, 0, 0, 2] = -0.25
    found = difference(zeros(), candidate, border_px=1)
    assert (found.border_max_abs, found.interior_max_abs) == (0.25, 0)
    assert found.bias_rgb[0] == pytest.approx(-0.25 / 20)


def test_psnr_has_a_fixed_peak() -> None:
    dark = np.full((1, 3, 8, 8), 0.01, np.float32)
    assert difference(dark, dark + np.float32(0.001)).psnr_db == pytest.approx(60, abs=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_values_that_are_not_finite(bad: float, side: str) -> None:
    reference, candidate = zeros(), zeros()
    (reference if side == "reference" else candidate)[0, 2, 1, 4] = bad
    found = difference(reference, candidate)
    assert found.nonfinite == 1
    assert found.max_abs == math.inf and found.psnr_db == -math.inf
    assert found.mean_abs == 0  # the rest stays readable
    assert (found.worst.channel, found.worst.y, found.worst.x) == (2, 1, 4)
    assert found.to_json()["max_abs"] is None


def test_levels_are_compared_after_clamping() -> None:
    found = difference(zeros() + 1.2, zeros() + 1.4)
    assert found.max_abs == pytest.approx(0.2)
    assert (found.max_levels, found.changed_levels_share) == (0, 0)


def test_worst_of_keeps_the_worst_and_does_not_average_it_away() -> None:
    good = difference(zeros(), zeros(), "good")
    off = zeros()
    off[0, 2, 3, 0] = -0.1
    bad = difference(zeros(), off, "bad")
    both = worst_of([good, bad, good])
    assert both.values == 180
    assert both.max_abs == bad.max_abs and both.psnr_db == bad.psnr_db
    assert both.mean_abs == pytest.approx(0.1 / 180)
    assert both.bias_rgb[2] == bad.bias_rgb[2] < 0
    assert both.worst.input == "bad"


def test_seam_score() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 11, dtype=np.float32), (1, 3, 11, 11)).copy()
    assert seam_score(ramp, ramp) == 0
    tiled = ramp.copy()
    tiled[..., 6:] += 0.05  # a vertical joint before column 6
    # mean step of the picture: 0.1 across columns, 0 across rows, so 0.05
    assert seam_score(ramp, tiled) == pytest.approx(1.0, abs=1e-5)
    speckled = ramp.copy()
    speckled[0, 0, 5, 5] += 0.05  # one pixel is no joint: it is averaged over the line
    assert seam_score(ramp, speckled) < 0.05
    assert seam_score(np.zeros_like(ramp), tiled - ramp) == math.inf
