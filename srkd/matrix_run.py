"""Train the runs of a matrix side by side, each in a process of its own, and say how long it will take.

The time of a step is read from the logs of runs of the same row, student and scale. Where there is none, a dry
run measures one; while training, the mean over the other rows of the student stands in for it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING

from srkd.finished import is_number
from srkd.first_stage import FOLDER as FIRST_STAGE
from srkd.first_stage import first_stage_of
from srkd.matrix import PlannedRun, last_records, progress_of, stages
from srkd.probe import step_seconds
from srkd.progress import StatusLine, duration
from srkd.train import Interrupt
from srkd.training import prepare

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.live import Live

POLL_S = 0.2
LIVE_S = 1.0  # between two pictures of the board on a terminal
LINES_S = 60.0  # and between two lines elsewhere

Kind = tuple[str, str, int]  # row, student, scale
Pace = dict[tuple[Kind, str], float]  # of a stage: seconds of a step


# -- estimates ----------------------------------------------------------------------------------


def paces(runs: Iterable[PlannedRun]) -> Pace:
    """What the logs say about the runs that began; of several the median."""
    found: dict[tuple[Kind, str], list[float]] = {}
    for run in runs:
        for stage in stages(run.recipe):
            speeds = [r.get("steps_per_s") for r in last_records(run.folder / stage)]
            if known := [v for v in speeds if is_number(v) and v > 0]:
                found.setdefault((run.kind, stage), []).append(1 / median(known))
    return {key: median(values) for key, values in found.items()}


def measure_pace(run: PlannedRun, device: str) -> Pace:
    """Time a step of every stage, on random images; what cannot be trained is refused."""
    training = prepare(run.recipe, device)
    distil, whole = run.recipe.train.distil_iterations, run.recipe.train.iterations
    seconds = step_seconds(training, distil + (whole - distil) // 2) * (whole - distil)
    if distil:
        seconds += step_seconds(training, distil // 2) * distil
    found: Pace = {(run.kind, ""): seconds / whole}
    if FIRST_STAGE in stages(run.recipe):
        stage1 = prepare(first_stage_of(training.recipe), device)
        middle = stage1.recipe.train.iterations // 2
        found[run.kind, FIRST_STAGE] = step_seconds(stage1, middle)
    return found


def seconds_left(run: PlannedRun, pace: Pace) -> float | None:
    """By the pace of its kind, else by that of the student's other rows; None where nobody knows."""
    done, total = progress_of(run), 0.0
    for stage, steps in stages(run.recipe).items():
        known = pace.get((run.kind, stage))
        others = [v for (kind, s), v in pace.items() if kind[1:] == run.kind[1:] and s == stage]
        step = known if known is not None else fmean(others) if others else None
        if step is None:
            return None
        # A second stage that began tells that the first is over.
        left = 0 if stage == FIRST_STAGE and done[""] else max(0, steps - done[stage])
        total += left * step
    return total


def matrix_seconds(left: Sequence[float | None], jobs: int) -> float | None:
    """Of all runs, `jobs` at a time; runs of unknown time count as the mean of the others."""
    known = [v for v in left if v is not None]
    if not known:
        return None if left else 0.0
    whole = sum(known) + fmean(known) * (len(left) - len(known))
    return max(whole / jobs, max(known))


# -- training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """`failed`: run -> the last sentence it said."""

    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


@dataclass
class Child:
    """A training in a process of its own; what it says goes to `log` from `begin` on."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: Path
    begin: int

    def last_sentence(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.begin)
            lines = file.read().decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        code = self.process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return said[-1].removeprefix("error: ") if said else how


def train_all(
    runs: Sequence[PlannedRun],
    launcher: Sequence[str],
    *,
    jobs: int,
    options: Sequence[str] = (),
    pace: Pace | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train or continue `runs`, `jobs` at a time, by `launcher` (python scripts/distill.py) with `options`.

    `pace` is what is known of other runs. A run that fails is recorded, and the others go on. Ctrl-C asks every child to save and stop.
    """
    waiting, failed = deque(runs), dict[str, str]()
    running: list[Child] = []
    board = Board(len(runs), jobs, pace or {}, quiet=quiet)
    try:
        with Interrupt(quiet) as interrupt:
            asked = False
            while running or (waiting and not interrupt.asked):
                if interrupt.asked and not asked:
                    asked = True
                    for child in running:
                        child.process.terminate()
                while waiting and len(running) < jobs and not interrupt.asked:
                    running.append(start(waiting.popleft(), launcher, jobs, options))
                time.sleep(POLL_S)
                for child in [c for c in running if c.process.poll() is not None]:
                    running.remove(child)
                    if child.process.returncode and not asked:
                        failed[child.run.name] = child.last_sentence()
                        board.say(f"FAILED {child.run.name}: {failed[child.run.name]}")
                    else:
                        board.finished(child.run, asked)
                board.show([c.run for c in running], [*waiting])
            return Outcome(failed, interrupt.asked)
    finally:
        # Only after an error or a second Ctrl-C is anything left here.
        for child in running:
            child.process.kill()
        board.close()


def start(run: PlannedRun, launcher: Sequence[str], jobs: int, options: Sequence[str]) -> Child:
    """Begin a run, or continue the one in its folder."""
    known = (run.folder / "recipe.toml").is_file()
    words = ["--resume", str(run.folder)] if known else [*run.words, "--out", str(run.folder)]
    log = run.folder.with_name(f"{run.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*launcher, *words, *options, "--quiet"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            # A Ctrl-C on the terminal is for us; the children are asked once, by us.
            start_new_session=True,
        )
        return Child(run, process, log, file.tell())


class Board:
    """How far the runs are: a table that is rewritten on a terminal, a line a minute elsewhere."""

    def __init__(self, total: int, jobs: int, pace: Pace, *, quiet: bool) -> None:
        self.total, self.jobs, self.pace, self.quiet = total, jobs, pace, quiet
        self.done = 0
        self.line = StatusLine(quiet=quiet)
        self.live: Live | None = None
        self._shown = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            self.line.say(text)

    def finished(self, run: PlannedRun, stopped: bool) -> None:
        self.done += not stopped
        self.say(f"{'stopped' if stopped else 'finished'} {run.name}")

    def show(self, running: Sequence[PlannedRun], waiting: Sequence[PlannedRun]) -> None:
        now = time.monotonic()
        if self.quiet or now - self._shown < (LIVE_S if self.line.live else LINES_S):
            return
        self._shown = now
        self.pace = self.pace | paces(running)
        left = [seconds_left(run, self.pace) for run in (*running, *waiting)]
        whole = matrix_seconds(left, self.jobs)
        eta = "unknown" if whole is None else duration(whole)
        head = f"{self.done}/{self.total} finished, {len(waiting)} waiting · ETA {eta}"
        rows = [self._row(run, s) for run, s in zip(running, left[: len(running)], strict=True)]
        if self.line.live:
            self._draw(head, rows)
        else:
            self.line.show(f"{head} · " + " · ".join(f"{name} {at}" for name, at, _ in rows))

    @staticmethod
    def _row(run: PlannedRun, left: float | None) -> tuple[str, str, str]:
        done, of = sum(progress_of(run).values()), sum(stages(run.recipe).values())
        return run.name, f"{done:,}/{of:,}", "-" if left is None else duration(left)

    def _draw(self, head: str, rows: Sequence[tuple[str, str, str]]) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        table.add_column("run")
        table.add_column("step", justify="right")
        table.add_column("left", justify="right")
        for row in rows:
            table.add_row(*row)
        if self.live is None:
            self.live = Live(console=Console(stderr=True), auto_refresh=False)
            self.live.start()
        self.live.update(Group(Text(head), table) if rows else Text(head), refresh=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.line.close()
