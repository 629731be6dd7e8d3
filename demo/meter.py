"""How far a job is, as one share that never falls, and how long it may still take.

The share counts work, in multiply-adds that were guessed beforehand; the time comes from the steps as they run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from demo.jobs import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

LEAST_S = 0.5  # what is nearly over needs no estimate


@dataclass(frozen=True)
class Step:
    """A part of a job: its work in multiply-adds, and what runs it (steps of one `kind` are equally fast)."""

    kind: Hashable
    work: float


class Meter:
    """Of one job. `pace` is seconds per multiply-add by kind; it is learned here and lives longer than the job."""

    def __init__(
        self,
        steps: Sequence[Step],
        pace: dict[Hashable, float],
        tell: Callable[[Progress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = steps
        self.pace = pace
        self.tell = tell
        self.clock = clock
        self.total = sum(step.work for step in steps)
        self.index = -1
        self.begin = 0.0
        self.best = 0.0
        self.said = ""

    def start(self, index: int) -> None:
        """Step number `index` begins to run; what was before it is done."""
        self.index = index
        self.begin = self.clock()

    def at(self, share: float, text: str) -> None:
        """`share` of the running step is done (0 to 1); after running out of memory it may be less than before."""
        step = self.steps[self.index]
        if share > 0:
            self.pace[step.kind] = (self.clock() - self.begin) / (share * step.work)
        before = sum(s.work for s in self.steps[: self.index])
        self.best = max(self.best, (before + share * step.work) / self.total)
        left = self._left(share)
        told = text if left is None or left < LEAST_S else f"{text} · ~{rough_time(left)}"
        self.tell(Progress(self.best, told, left))

    def say(self, text: str) -> None:
        """Something takes time that is no part of the work, such as loading; told once."""
        if text != self.said:
            self.said = text
            self.tell(Progress(self.best, text))

    def _left(self, share: float) -> float | None:
        """Seconds for the rest, None until a step like it or any other has run."""
        if not self.pace:
            return None
        usual = sum(self.pace.values()) / len(self.pace)
        rest = [(self.steps[self.index].kind, (1 - share) * self.steps[self.index].work)]
        rest += [(step.kind, step.work) for step in self.steps[self.index + 1 :]]
        return sum(self.pace.get(kind, usual) * work for kind, work in rest)


def rough_time(seconds: float) -> str:
    """12 s, 3 min, 2 h; whole numbers, because it is a guess."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{round(seconds / 3600)} h"
