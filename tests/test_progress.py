"""What the line of a training says about waiting for data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srkd.progress import TrainingLine

if TYPE_CHECKING:
    import pytest


def test_the_wait_stands_in_every_line_with_advice_above_five_percent(
    capsys: pytest.CaptureFixture,
) -> None:
    line = TrainingLine("logits", 400)
    for step, wait in ((100, 0.4), (200, 0.004), (300, 0.05), (400, 0.06)):
        line.update(step, {"pixel": 0.1}, 10.0, wait)
    first, quiet, limit, slow = capsys.readouterr().err.splitlines()
    assert "· data 40 % ·" in first  # the first lap also waits for the first batch
    assert "· data 0 % ·" in quiet and "· data 5 % ·" in limit
    assert (
        "data 6 % (the step waits for crops: set data.cache" in slow and "data.place=device" in slow
    )
