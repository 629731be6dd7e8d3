"""benchmarks/tail.py takes turns with a collapsed tail and one in stages, and says which was which."""

from __future__ import annotations

import pytest

from benchmarks.tail import main
from srkd.errors import SrkdError
from srkd.networks import subpixel


def test_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two turns and one that does not count, in two precisions: six collapsed passes of twelve."""
    seen: list[int] = []
    whole = subpixel.collapse
    monkeypatch.setattr(subpixel, "collapse", lambda *a: seen.append(1) or whole(*a))
    assert main(["--quick", "--patch", "40", "--no-grad"]) == 0
    assert len(seen) == 6
    rows = [line for line in capsys.readouterr().out.splitlines() if "rcan_a" in line]
    assert [row.split(" | ")[1] for row in rows] == ["fp32", "bf16"]


def test_small_patches_are_refused() -> None:
    with pytest.raises(SrkdError, match="from 40 LR pixels on"):
        main(["--patch", "24"])
