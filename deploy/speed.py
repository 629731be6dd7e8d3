"""Times that can be trusted: warm-up by convergence, turns, percentiles, and when one row is faster.

    warm-up    until the medians of two windows of runs, one after the other, differ by less than 1 %
    turns      every round runs A B C, then C B A, so that a drift of the machine meets all rows alike
    numbers    no run is left out: minimum, p50, p90, p95, p99, coefficient of variation, n
    faster     the bootstrap interval of the ratio of medians lies outside 1 +- 2 %

Nothing here knows networks: a row is a function without arguments and the watch that times it. All times are in
seconds, what a reader sees in milliseconds.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np

from srkd.errors import CheckFailedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")

SLOW_S = 0.5  # rows whose run takes longer are warmed up by few runs
SLOW_WINDOW = 3
LEAD_S = (
    0.05  # a turn starts with runs that do not count, unless a single one takes longer than this
)
SAME = 0.02  # rows that differ by less are not told apart
OFF = 0.05  # how far a watch may be from a duration that is known
BUSY = 0.10  # share of the processors that other work may take
RESAMPLES = 1000

Judged = Literal["faster", "slower", "equal", "undecided"]


@dataclass(frozen=True)
class Limits:
    """How long a row is warmed up and timed.

    A row is timed `runs` times and for `seconds` at least. One that would need longer than `longest_s` gets
    fewer runs, but one in every turn.
    """

    seconds: float = 5.0
    runs: int = 200
    longest_s: float = 20.0
    rounds: int = 5
    warm_up_s: float = 1.0
    warm_up_runs: int = 20
    give_up_s: float = 30.0
    drift: float = 0.01


# --- watches ------------------------------------------------------------------------------------


class Watch(Protocol):
    """Seconds of each of `count` runs."""

    def time(self, run: Callable[[], object], count: int) -> list[float]: ...


class WallClock:
    """For runs that are over when they return."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def time(self, run: Callable[[], object], count: int) -> list[float]:
        times = []
        for _ in range(count):
            begin = self.clock()
            run()
            times.append(self.clock() - begin)
        return times


class CudaEvents:
    """For runs that only enqueue work on one stream: a pair of events around each.

    The host waits once, after the last run, so that it is no part of what is timed.
    """

    def __init__(self, cuda: Any, stream: Any = None) -> None:
        """`cuda` is the module torch.cuda. Runs that work on the current stream get one of their own."""
        self.cuda = cuda
        self.stream = cuda.Stream() if stream is None else stream

    def time(self, run: Callable[[], object], count: int) -> list[float]:
        pairs = [[self.cuda.Event(enable_timing=True) for _ in "be"] for _ in range(count)]
        with self.cuda.stream(self.stream):
            for begin, end in pairs:
                begin.record(self.stream)
                run()
                end.record(self.stream)
        self.stream.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def check_watch(
    watch: Watch, known_s: float = 0.05, sleep: Callable[[float], object] = time.sleep
) -> dict[str, float]:
    """Time a sleep of known duration; a watch that is off by more than 5 % is refused."""
    measured = statistics.median(watch.time(lambda: sleep(known_s), 5))
    return _known("a sleep", known_s, measured)


def check_events(
    watch: Watch,
    matmul: Callable[[], object],
    operations: float,
    clock: Callable[[], float] = time.perf_counter,
    count: int = 20,
) -> dict[str, float]:
    """Time `count` products of matrices by events and, from outside, by the clock; they must agree within 5 %.

    A watch that does not wait for the device times the launch alone, and is far off. `operations` are those of
    one product: the rate in the record can be held against the device's data sheet.
    """
    watch.time(matmul, count)
    begin = clock()
    measured = sum(watch.time(matmul, count))
    found = _known(f"{count} matrix products", clock() - begin, measured)
    return {**found, "tflop_per_s": count * operations / measured / 1e12}


def _known(what: str, known_s: float, measured_s: float) -> dict[str, float]:
    off = measured_s / known_s - 1
    if abs(off) > OFF:
        raise CheckFailedError(
            f"the watch gave {1000 * measured_s:.1f} ms for {what} of {1000 * known_s:.1f} ms "
            f"({100 * off:+.0f} %, at most {100 * OFF:.0f} % is accepted); close other programs and measure again."
        )
    return {"known_ms": 1000 * known_s, "measured_ms": 1000 * measured_s, "off": off}


# --- warm-up and number of runs -----------------------------------------------------------------


@dataclass(frozen=True)
class WarmUp:
    """`drift` is how far the medians of the last two windows were apart."""

    runs: int
    seconds: float
    typical_s: float
    drift: float
    converged: bool


def warm_up(run: Callable[[], object], watch: Watch, limits: Limits) -> WarmUp:
    """Run until it takes the same time, or `give_up_s` is over.

    A window is half of `warm_up_s` and of `warm_up_runs`, whichever is longer, so that two windows are both. A run
    of more than half a second has windows of three.
    """
    times = watch.time(run, SLOW_WINDOW)
    typical = statistics.median(times)
    window = SLOW_WINDOW
    if typical <= SLOW_S:
        share = limits.warm_up_s / 2 / max(typical, 1e-6)
        window = max(SLOW_WINDOW, limits.warm_up_runs // 2, math.ceil(share))
    while True:
        times += watch.time(run, max(2 * window - len(times), window // 5, 1))
        early, late = (
            statistics.median(w) for w in (times[-2 * window : -window], times[-window:])
        )
        drift, spent = abs(late / early - 1), sum(times)
        settled = drift < limits.drift and spent >= limits.warm_up_s
        if settled or spent >= limits.give_up_s:
            return WarmUp(len(times), spent, late, drift, settled)


def runs_per_turn(typical_s: float, limits: Limits) -> tuple[int, str]:
    """Runs in each of the 2 * `rounds` turns of a row, and why they are fewer than asked, or nothing."""
    turns = 2 * limits.rounds
    wanted = max(limits.runs, math.ceil(limits.seconds / typical_s))
    count = min(wanted, max(turns, int(limits.longest_s / typical_s)))
    each = math.ceil(count / turns)
    if turns * each >= wanted:
        return each, ""
    return each, (
        f"{turns * each} runs, not {wanted}: one takes {1000 * typical_s:.0f} ms and a row is given "
        f"{limits.longest_s:g} s"
    )


# --- turns --------------------------------------------------------------------------------------


def take_turns(
    rows: Mapping[str, Callable[[], T]],
    passes: int,
    done: Callable[[int], object] = lambda number: None,
) -> dict[str, list[T]]:
    """What each row returned, pass by pass: A B C, then C B A, and so on. `done` hears how many passes are over."""
    found: dict[str, list[T]] = {name: [] for name in rows}
    for number in range(passes):
        for name in list(rows)[:: -1 if number % 2 else 1]:
            found[name].append(rows[name]())
        done(number + 1)
    return found


@dataclass(frozen=True)
class Timed:
    """A row that is to be measured."""

    run: Callable[[], object]
    watch: Watch


@dataclass(frozen=True)
class Measurement:
    """A row that was measured: seconds of the runs of every turn, two turns a round.

    `others` is the share of the processors that other work took in each round; `note` says what is unusual.
    """

    warm_up: WarmUp
    turns: tuple[list[float], ...] = ()
    others: tuple[float | None, ...] = ()
    note: str = ""

    @property
    def conclusive(self) -> bool:
        return self.warm_up.converged

    @property
    def seconds(self) -> list[float]:
        return [s for turn in self.turns for s in turn]

    @property
    def rounds(self) -> list[list[float]]:
        """Seconds by round."""
        pairs = zip(self.turns[::2], self.turns[1::2], strict=True)
        return [[*there, *back] for there, back in pairs]


def measure(
    rows: Mapping[str, Timed],
    limits: Limits,
    others: Callable[[], float | None] = lambda: None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Measurement]:
    """Warm up and time all rows, taking turns.

    A row whose warm-up does not settle is INCONCLUSIVE and not timed. `others` is the share of the processors
    that other work took since its last call (None: not known). A round with more than 10 % is repeated; after as many
    repetitions as there are rounds the machine is refused.
    """
    warm: dict[str, WarmUp] = {}
    for name, row in rows.items():
        say(f"{name}: warm-up")
        warm[name] = warm_up(row.run, row.watch, limits)
    plans = {n: runs_per_turn(w.typical_s, limits) for n, w in warm.items() if w.converged}

    def turn(name: str) -> list[float]:
        row, typical = rows[name], max(warm[name].typical_s, 1e-6)
        # What ran before has left its data in the caches, and its threads may still be spinning.
        if typical <= LEAD_S:
            row.watch.time(row.run, math.ceil(LEAD_S / 2 / typical))
        return row.watch.time(row.run, plans[name][0])

    turns: dict[str, list[list[float]]] = {name: [] for name in plans}
    shares: list[float | None] = []
    repeated = 0
    while plans and len(shares) < limits.rounds:
        say(f"round {len(shares) + 1}/{limits.rounds} of {', '.join(plans)}")
        others()
        pairs = take_turns({name: lambda name=name: turn(name) for name in plans}, 2)
        share = others()
        if share is not None and share > BUSY:
            repeated += 1
            if repeated > limits.rounds:
                raise CheckFailedError(
                    f"other work took {100 * share:.0f} % of the processors, and {repeated} rounds had to be thrown "
                    "away; close other programs and measure again."
                )
            continue
        for name, pair in pairs.items():
            turns[name] += pair
        shares.append(share)
    again = f"rounds repeated because the machine was busy: {repeated}" if repeated else ""
    found = {name: Measurement(w, note=_unsettled(w)) for name, w in warm.items()}
    for name, (_, fewer) in plans.items():
        note = "; ".join(text for text in (fewer, again) if text)
        found[name] = Measurement(warm[name], tuple(turns[name]), tuple(shares), note)
    return found


def _unsettled(w: WarmUp) -> str:
    return (
        f"INCONCLUSIVE: after {w.runs} runs in {w.seconds:.0f} s of warm-up two windows still differ by "
        f"{100 * w.drift:.1f} %"
    )


# --- numbers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Of all runs, in ms. `cov` is the standard deviation over the mean, 0 for a single run."""

    n: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    cov: float


def summarise(seconds: Sequence[float]) -> Summary:
    """Percentiles lie between neighbouring runs (linear)."""
    ms = 1000 * np.asarray(seconds, np.float64)
    p50, p90, p95, p99 = (float(v) for v in np.quantile(ms, (0.5, 0.9, 0.95, 0.99)))
    cov = float(ms.std(ddof=1) / ms.mean()) if len(ms) > 1 else 0.0
    return Summary(len(ms), float(ms.min()), p50, p90, p95, p99, cov)


@dataclass(frozen=True)
class Comparison:
    """How fast `a` is as a multiple of `b`: median of b / median of a, with its 95 % interval."""

    a: str
    b: str
    speed: float
    low: float
    high: float

    @property
    def judged(self) -> Judged:
        """Of `a`."""
        if self.low > 1 + SAME:
            return "faster"
        if self.high < 1 - SAME:
            return "slower"
        return "equal" if self.low >= 1 - SAME and self.high <= 1 + SAME else "undecided"


def compare(a: str, b: str, rounds_a: list[list[float]], rounds_b: list[list[float]]) -> Comparison:
    """Bootstrap over rounds and the runs in them.

    Runs of one round resemble each other, so rounds are drawn first, the same for both rows, which were measured
    side by side in them.
    """
    random = np.random.default_rng(0)
    both = [[np.asarray(r) for r in rounds] for rounds in (rounds_a, rounds_b)]
    ratios = []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(rounds_a), size=len(rounds_a))
        medians = [
            np.median(
                np.concatenate([r[i][random.integers(len(r[i]), size=len(r[i]))] for i in drawn])
            )
            for r in both
        ]
        ratios.append(medians[1] / medians[0])
    low, high = (float(v) for v in np.quantile(ratios, (0.025, 0.975)))
    median_a, median_b = (float(np.median(np.concatenate(r))) for r in both)
    return Comparison(a, b, median_b / median_a, low, high)


def compare_all(measured: Mapping[str, Measurement]) -> list[Comparison]:
    """Every conclusive row (a) against every one before it (b)."""
    sound = {name: m for name, m in measured.items() if m.conclusive}
    return [compare(a, b, sound[a].rounds, sound[b].rounds) for b, a in combinations(sound, 2)]
