"""The plan of islands names the blocks that break in float16, and no others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from small_graph import FACTS, Residual

from deploy.emulation import HalfEmulation
from deploy.half import check_half, to_half
from deploy.inputs import Input
from deploy.island_search import Plan, plan_islands, trace
from deploy.verdict import read_gates
from srkd.errors import CheckFailedError, SrkdError

if TYPE_CHECKING:
    import onnx

GATE = read_gates()["E2"]


def pictures(*peaks: float) -> list[Input]:
    """Ramps from 0 to a peak; an original differs by 0.02 up and down in turn."""
    rows = np.indices((8, 8)).sum(0) % 2
    made = []
    for peak in peaks:
        ramp = np.linspace(0, peak, 192, dtype=np.float32).reshape(1, 3, 8, 8)
        hr = (ramp + np.where(rows, 0.02, -0.02)).astype(np.float32)
        made.append(Input(f"to {peak}", "photograph", ramp, hr))
    return made


def plan(graph: onnx.ModelProto, *peaks: float) -> Plan:
    """The plan for ramps, which must do what it promises."""
    inputs = pictures(*peaks)
    found = plan_islands(graph, FACTS, inputs, GATE, threads=1)
    half = HalfEmulation(to_half(graph, found.islands), 1, threads=1)
    e2 = check_half(HalfEmulation(graph, 1, threads=1), half, FACTS, inputs, GATE)
    assert e2.status == "PASS" and e2.numbers is not None
    assert e2.numbers.psnr_db == pytest.approx(found.psnr_after)
    return found


def test_nothing_to_do() -> None:
    found = plan(Residual().model(), 1.0)
    assert found.islands == found.rows == () and found.psnr_before == found.psnr_after
    assert found.overflow is None


def test_the_block_that_overflows_is_named() -> None:
    found = plan(Residual(blocks=4, gain={2: 1000}).model(), 1.0)
    assert found.islands == ("groups.2",) and found.overflow == "groups.2"
    assert found.psnr_before == -math.inf and found.psnr_after > 60
    rows = {row.block: row for row in found.rows}
    assert list(rows) == ["head", "groups.0", "groups.1", "groups.2", "groups.3", "tail"]
    # 255 * 1.5 * 1.5 enters the block and is multiplied by 1000.
    assert rows["groups.2"].largest == pytest.approx(573_750, rel=1e-3)
    assert rows["groups.1"].largest == pytest.approx(255 * 1.5**2, rel=1e-3)
    assert rows["groups.2"].nonfinite == rows["groups.3"].nonfinite > 0
    assert rows["groups.1"].nonfinite == 0
    assert (
        0 < rows["groups.1"].relative_error < 1e-3 and rows["groups.3"].relative_error == math.inf
    )
    assert {b: r.bought_db for b, r in rows.items() if r.bought_db} == {"groups.2": math.inf}


def test_two_blocks_overflow() -> None:
    found = plan(Residual(blocks=4, gain={0: 2000, 3: 1000}).model(), 1.0)
    assert found.islands == ("groups.0", "groups.3") and found.overflow == "groups.0"


def test_loss_without_overflow_is_found_too() -> None:
    """At 30000 float16 counts in steps of 16: rounding has an rms of 16 / sqrt(12) = 4.62. Halved by conv2,
    times 1.5 in the last block, over 255 * 1.5^5 that is 1.79e-3 of the picture, 54.9 dB."""
    found = plan(Residual(blocks=5, bias={3: 30000}).model(), 1.0)
    assert found.islands == ("groups.3",) and found.overflow is None
    assert found.psnr_before == pytest.approx(54.9, abs=0.5) and found.psnr_after > 60
    (row,) = [r for r in found.rows if r.bought_db is not None]
    assert row.bought_db == pytest.approx(found.psnr_after - found.psnr_before)


def test_weights_that_do_not_fit_are_islands_from_the_start() -> None:
    found = plan(Residual(gain={1: 7e4}).model(), 0.1)
    assert found.islands == ("groups.1",) and found.psnr_after > 60
    both = plan(Residual(gain={0: 7e4, 2: 2000}).model(), 1.0)
    assert both.islands == ("groups.0", "groups.2")
    assert {r.block: r.bought_db for r in both.rows if r.bought_db} == dict.fromkeys(
        both.islands, math.inf
    )


def test_inputs_that_the_search_did_not_see_are_searched_next() -> None:
    """Red overflows one block and blue another; the search begins with three red pictures."""
    graph = Residual(gain={0: (1000, 1, 1), 2: (1, 1, 1000)}).model()
    inputs = pictures(0.7, 0.8, 0.9, 1.0)
    for item, channel in zip(inputs, (0, 0, 0, 2), strict=True):
        item.lr[:] = 0.01
        item.lr[:, channel] = 0.9
    found = plan_islands(graph, FACTS, inputs, GATE, threads=1)
    assert found.islands == ("groups.0", "groups.2") and found.psnr_after > 60


def test_patterns_that_overflow_are_mended_too() -> None:
    """No photograph is bright enough, three patterns are."""
    graph = Residual(gain={0: 1000}).model()
    patterns = [replace(i, kind="pattern", hr=None) for i in pictures(0.9, 0.95, 1.0)]
    inputs = [*pictures(0.1, 0.2), *patterns]
    found = plan_islands(graph, FACTS, inputs, GATE, threads=1)
    assert found.islands == ("groups.0",) and found.psnr_before == -math.inf
    assert found.psnr_after > 60
    with pytest.raises(SrkdError, match="needs photographs; choose a set"):
        plan_islands(Residual().model(), FACTS, patterns, GATE, threads=1)


def test_where_float32_fails_there_is_no_plan() -> None:
    graph = Residual(1, bias={0: math.nan}).model()
    with pytest.raises(CheckFailedError, match="even with every block in float32"):
        plan_islands(graph, FACTS, pictures(1.0), GATE, threads=1)


def test_trace_of_a_sound_graph() -> None:
    """Errors grow from block to block, by about half a step of float16 each."""
    graph = Residual(3).model()
    rows = trace(graph, to_half(graph), [i.lr for i in pictures(1.0)], threads=1)
    errors = [row.relative_error for row in rows]
    assert all(1e-5 < e < 1e-3 for e in errors[1:-1]) and errors[3] > errors[1]
