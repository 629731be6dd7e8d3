"""Measure the speed: by the benchmark's rules, stoppable, honest about a busy machine. A clock of our own tells the time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from demo.jobs import Choice, Numbers, Pane, Progress, Result
from demo.lane import Lane
from demo.limits import Limits
from demo.scores import table
from demo.speedtest import LARGEST_PX, SpeedResult, SpeedRow, measure, with_times
from deploy.engine_model import EngineNetwork
from deploy.speed import WallClock
from srkd.errors import SrkdError
from srkd.types import ANY_SIZE, Facts
from srkd.types import Limits as Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

A, B = Choice("a"), Choice("b", "ort", "fp16")


@dataclass
class Repeating:
    """An engine that enlarges by repetition and keeps what it was given."""

    scale: int = 2
    takes_s: float = 0.0
    given: list[np.ndarray] = field(default_factory=list)

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        time.sleep(self.takes_s)
        self.given.append(lr)
        return lr.repeat(self.scale, 2).repeat(self.scale, 3)


class StandIn:
    """A service whose networks are `Repeating`."""

    def __init__(self, *choices: Choice, smallest: int = 1, sizes: Sizes = ANY_SIZE) -> None:
        self.limits = Limits()
        self.lane = Lane()
        self.engines = {choice: Repeating() for choice in choices}
        self.shelf = SimpleNamespace(
            check=self.check, engine=lambda key: SimpleNamespace(device="cpu")
        )
        facts = Facts(scale=2, receptive_field_px=1, exact_tiling=True, minimum_px=smallest)
        self.model = SimpleNamespace(scale=2, facts=facts, limits=sizes)

    def check(self, choice: Choice) -> None:
        if choice not in self.engines:
            raise SrkdError(f"There is no network '{choice.model}'")

    def open(self, choice: Choice, say: Callable[[str], None]) -> Any:
        say(f"loading {choice.model}")
        return SimpleNamespace(
            choice=choice,
            entry=SimpleNamespace(label=choice.model.upper(), engine=None),
            model=self.model,
            timed=SimpleNamespace(network=EngineNetwork(self.engines[choice], 8)),
            place="cpu",
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[float]], None]:
    """Sets what the clock of the runs says at each look; a run is two looks."""

    def use(looks: Iterator[float]) -> None:
        monkeypatch.setattr("deploy.speed_card.WallClock", lambda: WallClock(lambda: next(looks)))

    monkeypatch.setattr("demo.speedtest.Others", lambda: lambda: 0.0)
    return use


def finish(events: Iterator[Any]) -> tuple[list[Progress], SpeedResult]:
    *told, last = events
    assert isinstance(last, SpeedResult)
    return told, last


# --- measuring ----------------------------------------------------------------------------------


def test_rows_are_timed_in_turns_on_photographs(clock: Any) -> None:
    clock(count(0, 0.06))
    service = StandIn(A, B)
    told, done = finish(measure(service, [A, B], (20, 24), 4))
    assert done.size == (20, 24) and done.busy is None
    assert [(row.choice, row.label) for row in done.rows] == [(A, "A"), (B, "B")]
    for row in done.rows:
        assert row.runs is not None and row.runs >= 30 and row.note == ""
        assert row.p50_ms == pytest.approx(60) and row.p95_ms == pytest.approx(60)
    for engine in service.engines.values():
        assert {lr.shape for lr in engine.given} == {(1, 3, 20, 24)}
        assert len({lr.tobytes() for lr in engine.given}) == 4
        assert all(lr.std() > 0.01 and lr.min() >= 0 and lr.max() <= 1 for lr in engine.given)
    assert all(a.done <= b.done < 1 for a, b in pairwise(told))
    assert {"loading a", "first run of B · ort fp16", "measuring · round 5/5"} <= {
        event.text for event in told
    }


def test_slow_network_is_run_less_often_and_says_so(clock: Any) -> None:
    clock(count(0, 1.0))
    _, done = finish(measure(StandIn(A), [A], (8, 8), 3))
    assert done.rows[0].runs == 10
    assert done.rows[0].note == "10 runs, not 30: one takes 1000 ms and a row is given 6 s"


def test_times_that_do_not_settle_are_not_told(clock: Any) -> None:
    clock(1.5**look for look in count())  # every run takes longer than the last
    _, done = finish(measure(StandIn(A), [A], (8, 8), 3))
    (row,) = done.rows
    assert (row.p50_ms, row.p95_ms, row.runs) == (None, None, None)
    assert row.note.startswith("INCONCLUSIVE: ")


def test_busy_machine_is_measured_and_marked_in_the_words_of_the_benchmark(
    clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(count(0, 0.06))
    monkeypatch.setattr("demo.speedtest.Others", lambda: lambda: 0.5)
    told, done = finish(measure(StandIn(A), [A], (8, 8), 2))
    assert done.busy is not None and done.busy.startswith("other work took 50 % of the processors")
    assert done.rows[0].runs is not None
    assert any(event.text.startswith("the machine is busy") for event in told)
    assert all(a.done <= b.done < 1 for a, b in pairwise(told))


@pytest.mark.parametrize(
    ("lr", "smallest", "largest", "size"),
    [
        ((1000, 90), 1, None, (LARGEST_PX, 90)),
        ((3, 5), 8, None, (8, 8)),
        ((300, 300), 1, (128, 200), (128, 200)),
    ],
)
def test_size_is_the_pictures_as_far_as_all_networks_take_it(
    clock: Any, lr: Any, smallest: int, largest: Any, size: Any
) -> None:
    clock(count(0, 1.0))
    service = StandIn(A, smallest=smallest, sizes=Sizes(largest=largest))
    _, done = finish(measure(service, [A], lr, 1))
    assert done.size == size
    assert service.engines[A].given[0].shape[2:] == size


def test_closing_stops_after_one_run_and_frees_the_device(clock: Any) -> None:
    clock(count(0, 0.0001))  # by which the warm-up alone is 10,000 runs
    service = StandIn(A)
    service.engines[A].takes_s = 0.002
    events = measure(service, [A], (8, 8), 100)
    while not next(events).text.startswith("measuring"):
        pass
    events.close()
    runs = len(service.engines[A].given)
    assert runs < 5_000
    assert list(service.lane.run(lambda turn: turn.tell(Progress(1.0, "next")))) == [
        Progress(1.0, "next")
    ]
    assert len(service.engines[A].given) == runs


@pytest.mark.parametrize(
    ("choices", "seconds", "message"),
    [
        ([], 1, "0 networks were chosen"),
        ([A, A], 1, "each once"),
        ([Choice("x")], 1, "no network 'x'"),
        ([A], 0, "0 s of measuring"),
        ([A], 1e9, "give up to 120"),
    ],
)
def test_bad_requests_are_named(choices: list[Choice], seconds: float, message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        next(measure(StandIn(A), choices, (8, 8), seconds))


# --- into the table -----------------------------------------------------------------------------


def compared(*panes: tuple[str, Choice]) -> Result:
    made = [
        Pane(
            key,
            key,
            "model",
            Path("x.png"),
            (8, 8),
            Numbers(engine=c.engine, precision=c.precision),
        )
        for key, c in panes
    ]
    bicubic = Pane("bicubic", "bicubic", "bicubic", Path("b.png"), (8, 8))
    return Result((bicubic, *made), "p.png", 2, (4, 4), "", notes=("kept",))


def row(choice: Choice, p50: float | None = 10.0, note: str = "") -> SpeedRow:
    times = (None, None, None) if p50 is None else (p50, 2 * p50, 30)
    return SpeedRow(choice, choice.model.upper(), *times, 77.0, note)


def test_times_go_to_their_network_on_their_engine() -> None:
    fp16 = Choice("a", "ort", "fp16")
    result = compared(("a", A), ("a-ort-fp16", fp16))
    done = with_times(result, SpeedResult((row(fp16, 4.0), row(A, 9.0)), (40, 30)))
    bicubic, first, second = (pane.numbers for pane in done.panes)
    assert bicubic.p50_ms is None
    assert (first.p50_ms, first.p95_ms, first.runs, first.timed_px) == (9.0, 18.0, 30, (40, 30))
    assert (second.p50_ms, second.busy, second.peak_mib) == (4.0, False, 77.0)
    assert done.notes == ("kept",)
    assert "n = 30, LR 30x40 px" in table(done).rows[1]


def test_network_without_a_pane_is_told_in_a_note() -> None:
    done = with_times(compared(("a", A)), SpeedResult((row(A), row(B, 4.0)), (40, 30)))
    assert done.notes[1] == (
        "speed: B (ort fp16) is not among the pictures; p50 4 ms, p95 8 ms, n = 30, LR 30x40 px"
    )
    # The same network on another engine is another row.
    other = with_times(
        compared(("a", A)), SpeedResult((row(replace(A, precision="bf16")),), (4, 4))
    )
    assert other.panes[1].numbers.p50_ms is None


def test_new_times_take_the_place_of_all_old_ones() -> None:
    result = compared(("a", A), ("b", B))
    busy = SpeedResult((row(A, note="few"), row(B, None, "INCONCLUSIVE")), (4, 4), busy="too much.")
    first = with_times(result, busy)
    assert first.notes == ("kept", "speed: measured on a busy machine: too much.")
    assert first.panes[1].numbers.busy and first.panes[1].notes == ("speed: few",)
    assert first.panes[2].numbers.runs is None and first.panes[2].notes == ("speed: INCONCLUSIVE",)
    again = with_times(first, SpeedResult((row(B),), (4, 4)))
    assert again.panes[1].numbers.p50_ms is None and again.panes[1].numbers.timed_px is None
    assert again.panes[2].numbers.p50_ms == 10.0 and not again.panes[2].numbers.busy
    assert again.notes == ("kept",) and again.panes[1].notes == again.panes[2].notes == ()
