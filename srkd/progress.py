"""Progress for people, on stderr: one line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


def duration(seconds: float) -> str:
    """42s, 3m05, 5h12, 2d04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}"
    if s < 86_400:
        return f"{s // 3600}h{s % 3600 // 60:02d}"
    return f"{s // 86_400}d{s % 86_400 // 3600:02d}h"


class StatusLine:
    """A line that is rewritten in place on a terminal and printed whole elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._open = False

    def show(self, text: str) -> None:
        if self.quiet:
            return
        if self.live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            sys.stderr.write("\r\x1b[2K" + text[: width - 1])
            self._open = True
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self._open:
            sys.stderr.write("\r\x1b[2K")
            self._open = False
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._open:
            sys.stderr.write("\n")
            self._open = False


class TrainingLine(StatusLine):
    """step 1200/300000 · 14.2 it/s · pixel 0.021 · PSNR-Y 31.42 (best 31.42) · data 0 % · ETA 5h12"""

    def __init__(self, title: str, iterations: int, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self.title, self.iterations = title, iterations
        self.psnr = ""
        self._first = True

    def __enter__(self) -> TrainingLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def validated(self, psnr_y: float, best: float) -> None:
        self.psnr = f"PSNR-Y {psnr_y:.2f} (best {best:.2f})"

    def update(
        self, step: int, terms: dict[str, float], steps_per_s: float, data_wait: float
    ) -> None:
        """`data_wait` is the share of time spent waiting for data; above 5 % it says what helps."""
        left = (self.iterations - step) / steps_per_s if steps_per_s else 0.0
        wait = f"data {100 * data_wait:.0f} %"
        first, self._first = self._first, False  # the first lap also waits for the first batch
        if data_wait > 0.05 and not first:
            wait += (
                " (the step waits for crops: set data.cache to a faster disk, or data.place=device)"
            )
        parts = [
            f"{self.title} step {step}/{self.iterations}",
            f"{steps_per_s:.1f} it/s",
            *(f"{name} {_shown(value)}" for name, value in terms.items()),
            self.psnr,
            wait,
            f"ETA {duration(left)}",
        ]
        self.show(" · ".join(part for part in parts if part))


def _shown(value: float) -> str:
    """Four decimals; what they would show as nothing in powers of ten."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def counter(title: str, *, quiet: bool = False) -> Callable[[int, int], None]:
    """A function (done, total) that shows a count with an estimate; quiet for the first second."""
    line = StatusLine(quiet=quiet)
    start = time.monotonic()
    shown = start

    def update(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        finished = done >= total
        pause = 0.2 if line.live else 10.0
        if now - start < 1 or (now - shown < pause and not finished):
            return
        shown = now
        left = (now - start) / max(done, 1) * (total - done)
        line.show(f"{title} {done}/{total} · ETA {duration(left)}")
        if finished:
            line.close()

    return update
