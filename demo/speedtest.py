"""Measure the speed: the network alone, warm, the chosen ones taking turns, timed as deploy/benchmark.py does it.

A page is no record: it waits for less than the benchmark, and where that refuses because the machine is busy it shows
times that are marked as such.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from demo.jobs import Progress
from demo.saying import in_words
from deploy import speed
from deploy.benchmark import three_digits
from deploy.engine_model import EngineNetwork
from deploy.environment import Others, PeakMemory, check_gpus, read_gpus
from deploy.sidecar import read_sidecar
from deploy.speed_card import compute_runs, pictures, to_floats
from deploy.subjects import device_of
from deploy.torch_engines import TorchEngine
from srkd.errors import CheckFailedError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from demo.jobs import Choice, Pane, Result
    from demo.lane import Turn
    from demo.service import Service
    from demo.shelf import Ready
    from deploy.engines import Engine

LARGEST_PX = 256  # of a side of the LR picture
LEAST_RUNS = 30
MOST_S = 120.0
# Two windows of the warm-up agree to 5 %: at the benchmark's 1 % too many visitors would wait in vain.
DRIFT = 0.05
NOTE = "speed: "


@dataclass(frozen=True)
class SpeedRow:
    """One network. `p50_ms`, `p95_ms`, `runs` are None where the warm-up did not settle.

    peak_mib   of the process during the first run, None where the system does not tell
    note       what is unusual: it did not settle, fewer runs than wanted
    """

    choice: Choice
    label: str
    p50_ms: float | None
    p95_ms: float | None
    runs: int | None
    peak_mib: float | None
    note: str = ""


@dataclass(frozen=True)
class SpeedResult:
    """All rows, of LR pictures of `size` (h, w). `busy` is the sentence about other work on the machine, if any."""

    rows: tuple[SpeedRow, ...]
    size: tuple[int, int]
    busy: str | None = None


def measure(
    service: Service, choices: Sequence[Choice], lr_size: tuple[int, int], seconds: float
) -> Iterator[Progress | SpeedResult]:
    """Time networks on photographs of `lr_size` (h, w), cut to `LARGEST_PX` a side; the last event is the result.

    `seconds` for all of them together, without loading and warm-up. A network of which `LEAST_RUNS` would take more than
    twice its share is run less often, ten times at least, and says so. Closing the generator stops after one run.
    """
    most = service.limits.max_choices
    if not 1 <= len(set(choices)) == len(choices) <= most:
        raise SrkdError(f"{len(choices)} networks were chosen; choose 1 to {most}, each once.")
    if not 0 < seconds <= MOST_S:
        raise SrkdError(f"{seconds} s of measuring were asked for; give up to {MOST_S:.0f}.")
    for choice in choices:
        service.shelf.check(choice)

    def job(turn: Turn[SpeedResult]) -> None:
        with in_words({}):
            turn.tell(_measured(service, choices, lr_size, seconds, turn))

    yield from service.lane.run(job)


# --- measuring ----------------------------------------------------------------------------------


def _measured(
    service: Service,
    choices: Sequence[Choice],
    lr_size: tuple[int, int],
    seconds: float,
    turn: Turn[SpeedResult],
) -> SpeedResult:
    def say(text: str) -> None:
        turn.tell(Progress(0.0, text))

    ready = {_name(r): r for r in (service.open(choice, say) for choice in choices)}
    size = _size(lr_size, list(ready.values()))
    devices = {name: _device(service, r) for name, r in ready.items()}
    timed: dict[str, speed.Timed] = {}
    peaks: dict[str, float | None] = {}
    for name, r in ready.items():
        say(f"first run of {name}")
        engine = _engine(r)
        photos = [to_floats([photo]) for photo in pictures(size, r.model.scale)]
        with PeakMemory() as peak:
            engine(photos[0])
        before, added = peak.before, peak.added_mib
        peaks[name] = None if before is None or added is None else before + added
        row = compute_runs(engine, devices[name], photos, name)
        timed[name] = replace(row, run=_stoppable(row.run, turn))
    found, busy = _take_times(
        timed, _limits(seconds / len(ready)), turn, "cuda" in devices.values()
    )
    rows = []
    for name, r in ready.items():
        m = found[name]
        s = speed.summarise(m.seconds) if m.conclusive else None
        p50, p95, n = (s.p50_ms, s.p95_ms, s.n) if s else (None, None, None)
        rows.append(SpeedRow(r.choice, r.entry.label, p50, p95, n, peaks[name], m.note))
    return SpeedResult(tuple(rows), size, busy)


def _take_times(
    timed: Mapping[str, speed.Timed], limits: speed.Limits, turn: Turn[SpeedResult], on_gpu: bool
) -> tuple[dict[str, speed.Measurement], str | None]:
    """The measurements, and the sentence by which the benchmark would have refused this machine."""
    steps, heard, doing = len(timed) + limits.rounds + 1, 0, "measuring"

    def say(text: str) -> None:
        nonlocal heard
        heard += 1
        # Rounds are repeated on a busy machine, so there may be more steps than were planned.
        shown = text.partition(" of ")[0] if text.startswith("round ") else text
        turn.tell(Progress(min(heard, steps - 1) / steps, f"{doing} · {shown}"))

    try:
        if on_gpu:
            check_gpus(read_gpus())
        return speed.measure(timed, limits, Others(), say), None
    except CheckFailedError as refusal:
        busy = str(refusal)
    doing = "the machine is busy, measuring nevertheless"
    return speed.measure(timed, limits, say=say), busy


def _limits(share_s: float) -> speed.Limits:
    return speed.Limits(
        seconds=share_s,
        runs=LEAST_RUNS,
        longest_s=2 * share_s,
        warm_up_s=min(1.0, share_s),
        warm_up_runs=10,
        give_up_s=2 * share_s,
        drift=DRIFT,
    )


def _name(ready: Ready) -> str:
    c = ready.choice
    return f"{ready.entry.label} · {c.engine} {c.precision}"


def _size(lr_size: tuple[int, int], ready: Sequence[Ready]) -> tuple[int, int]:
    """(h, w) that all of them take, nearest to the picture's."""
    sides = []
    for axis, side in enumerate(lr_size):
        least = [max(r.model.facts.minimum_px, r.model.limits.smallest[axis]) for r in ready]
        ends = [r.model.limits.largest for r in ready]
        largest = min([LARGEST_PX, *(end[axis] for end in ends if end is not None)])
        sides.append(max(min(side, largest), *least))
    return sides[0], sides[1]


def _engine(ready: Ready) -> Engine:
    inner = ready.timed.network
    if isinstance(inner, EngineNetwork):
        return inner.engine
    # As the comparison runs it (srkd/infer.py).
    return TorchEngine(inner, ready.model.scale, device=ready.place, fast=ready.place == "cpu")


def _device(service: Service, ready: Ready) -> str:
    """cpu or cuda; an exported file on the shelf has its own."""
    if ready.entry.engine is not None:
        return device_of(read_sidecar(ready.model.source).settings)
    return service.shelf.engine(ready.choice.engine).device


def _stoppable(run: Callable[[], object], turn: Turn[SpeedResult]) -> Callable[[], object]:
    """`run`, unless the job is to end; asking takes less than a microsecond."""

    def checked() -> object:
        turn.check()
        return run()

    return checked


# --- into the table -----------------------------------------------------------------------------


def with_times(result: Result, measured: SpeedResult) -> Result:
    """The result of a comparison with these times in the place of earlier ones; networks without a pane become notes."""
    panes = [_without_times(pane) for pane in result.panes]
    notes = [note for note in result.notes if not note.startswith(NOTE)]
    if measured.busy is not None:
        notes.append(f"{NOTE}measured on a busy machine: {measured.busy}")
    for row in measured.rows:
        at = next((i for i, pane in enumerate(panes) if _shows(pane, row.choice)), None)
        if at is None:
            notes.append(_told(row, measured.size))
        else:
            panes[at] = _with_times(panes[at], row, measured)
    return replace(result, panes=tuple(panes), notes=tuple(notes))


def _shows(pane: Pane, choice: Choice) -> bool:
    n, c = pane.numbers, choice
    keys = (c.model, f"{c.model}-{c.engine}-{c.precision}")
    return pane.key in keys and (n.engine, n.precision) == (c.engine, c.precision)


def _without_times(pane: Pane) -> Pane:
    numbers = replace(pane.numbers, p50_ms=None, p95_ms=None, runs=None, timed_px=None, busy=None)
    notes = tuple(note for note in pane.notes if not note.startswith(NOTE))
    return replace(pane, numbers=numbers, notes=notes)


def _with_times(pane: Pane, row: SpeedRow, measured: SpeedResult) -> Pane:
    numbers = pane.numbers
    if row.runs is not None:
        numbers = replace(
            numbers,
            p50_ms=row.p50_ms,
            p95_ms=row.p95_ms,
            runs=row.runs,
            timed_px=measured.size,
            busy=measured.busy is not None,
        )
    if numbers.peak_mib is None:
        numbers = replace(numbers, peak_mib=row.peak_mib)
    notes = (*pane.notes, f"{NOTE}{row.note}") if row.note else pane.notes
    return replace(pane, numbers=numbers, notes=notes)


def _told(row: SpeedRow, size: tuple[int, int]) -> str:
    head = (
        f"{NOTE}{row.label} ({row.choice.engine} {row.choice.precision}) is not among the pictures"
    )
    if row.p50_ms is None or row.p95_ms is None:
        return f"{head}; {row.note}"
    return (
        f"{head}; p50 {three_digits(row.p50_ms)} ms, p95 {three_digits(row.p95_ms)} ms, n = {row.runs}, LR "
        f"{size[1]}x{size[0]} px{f', {row.note}' if row.note else ''}"
    )
