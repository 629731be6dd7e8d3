"""Times: watches, warm-up, turns, numbers, verdicts. No test waits or looks at a real clock."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count

import numpy as np
import pytest

from deploy.environment import (
    GPU_FIELDS,
    CpuTimes,
    Others,
    PeakMemory,
    check_gpus,
    parse_cpu_times,
    parse_gpus,
    throttled,
    wait_until_quiet,
)
from deploy.speed import (
    Comparison,
    CudaEvents,
    Limits,
    Measurement,
    Timed,
    WallClock,
    WarmUp,
    check_events,
    check_watch,
    compare,
    compare_all,
    measure,
    runs_per_turn,
    summarise,
    take_turns,
    warm_up,
)
from srkd.errors import CheckFailedError


class Clock:
    """A clock that only `spend` moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float, name: str = "") -> None:
        self.now += seconds
        self.log.append(name)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def row(clock: Clock, seconds: float, name: str) -> Timed:
    return Timed(lambda: clock.spend(seconds, name), WallClock(clock))


# --- watches ------------------------------------------------------------------------------------


def test_wall_clock_times_every_run(clock: Clock) -> None:
    durations = iter([0.1, 0.3, 0.2])
    assert WallClock(clock).time(lambda: clock.spend(next(durations)), 3) == pytest.approx(
        [0.1, 0.3, 0.2]
    )


class FakeCuda:
    """torch.cuda of a device that takes 2 ms for a run and knows nothing until it was waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.device_ms = 0.0
        self.waited = False
        cuda = self

        class Stream:
            def synchronize(self) -> None:
                cuda.log.append("wait")
                cuda.waited = True

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                assert isinstance(stream, Stream)
                cuda.log.append("event")
                self.at = cuda.device_ms

            def elapsed_time(self, other: Event) -> float:
                assert cuda.waited
                return other.at - self.at

        self.Stream, self.Event = Stream, Event

    def stream(self, stream: object) -> object:
        self.log.append("stream")
        return nullcontext()

    def run(self) -> None:
        self.log.append("run")
        self.device_ms += 2.0


def test_cuda_events_surround_every_run_and_wait_once() -> None:
    cuda = FakeCuda()
    assert CudaEvents(cuda).time(cuda.run, 3) == [0.002] * 3
    assert cuda.log == ["stream", *["event", "run", "event"] * 3, "wait"]


def test_cuda_events_use_the_stream_of_the_engine() -> None:
    cuda = FakeCuda()
    own = cuda.Stream()
    assert CudaEvents(cuda, own).stream is own


def test_a_sleep_of_known_duration(clock: Clock) -> None:
    found = check_watch(WallClock(clock), 0.05, lambda s: clock.spend(1.04 * s))
    assert found["off"] == pytest.approx(0.04)
    with pytest.raises(CheckFailedError, match=r"gave 53\.0 ms for a sleep of 50\.0 ms \(\+6 %"):
        check_watch(WallClock(clock), 0.05, lambda s: clock.spend(1.06 * s))


def test_events_that_do_not_wait_are_found_out(clock: Clock) -> None:
    class Launches:
        """A device of 2 ms a product whose watch gives `told` ms."""

        def __init__(self, told: float) -> None:
            self.told = told

        def time(self, run: object, runs: int) -> list[float]:
            clock.spend(0.002 * runs)
            return [self.told / 1000] * runs

    found = check_events(Launches(2.0), lambda: None, 1e10, clock, 10)
    assert found["tflop_per_s"] == pytest.approx(5.0)
    with pytest.raises(CheckFailedError, match=r"gave 0\.1 ms for 10 matrix products of 20\.0 ms"):
        check_events(Launches(0.01), lambda: None, 1e10, clock, 10)


# --- warm-up and number of runs -----------------------------------------------------------------


def test_warm_up_ends_when_two_windows_agree(clock: Clock) -> None:
    # 40 runs of 20 ms, then 10 ms each. Windows are of 25 runs, half a second at the first pace.
    durations = (0.02 if i < 40 else 0.01 for i in count())
    found = warm_up(lambda: clock.spend(next(durations)), WallClock(clock), Limits())
    assert found.converged and found.typical_s == pytest.approx(0.01) and found.drift < 1e-9
    assert found.seconds == pytest.approx(clock.now) and found.seconds >= 1
    steady = warm_up(lambda: clock.spend(2**-7), WallClock(clock), Limits())
    assert (steady.runs, steady.seconds) == (128, 1.0)


def test_warm_up_is_at_least_twenty_runs_unless_a_run_takes_long(clock: Clock) -> None:
    assert warm_up(lambda: clock.spend(0.3), WallClock(clock), Limits()).runs == 20
    assert warm_up(lambda: clock.spend(2.0), WallClock(clock), Limits()).runs == 6


def test_warm_up_gives_up(clock: Clock) -> None:
    durations = (0.5 * 1.05**i for i in count())  # ever slower: a GPU that heats up, a leak
    found = warm_up(lambda: clock.spend(next(durations)), WallClock(clock), Limits())
    assert not found.converged and 30 <= found.seconds < 35 and found.drift > 0.1


@pytest.mark.parametrize(
    ("typical_s", "each", "note"),
    [
        (0.001, 500, ""),  # 5 s are 5000 runs in 10 turns
        (0.1, 20, ""),  # 200 runs are 20 s
        (0.5, 4, "40 runs, not 200: one takes 500 ms and a row is given 20 s"),
        (6.0, 1, "10 runs, not 200: one takes 6000 ms and a row is given 20 s"),
    ],
)
def test_number_of_runs(typical_s: float, each: int, note: str) -> None:
    assert runs_per_turn(typical_s, Limits()) == (each, note)


# --- turns --------------------------------------------------------------------------------------


def test_turns_go_forth_and_back() -> None:
    seen: list[str] = []
    rows = {name: (lambda name=name: seen.append(name) or name.lower()) for name in "ABC"}
    heard: list[int] = []
    assert take_turns(rows, 3, heard.append)["B"] == ["b", "b", "b"]
    assert "".join(seen) == "ABCCBAABC" and heard == [1, 2, 3]


SHORT = Limits(seconds=0.0, runs=4, rounds=2, warm_up_s=0.0, warm_up_runs=2)


def test_rows_are_measured_side_by_side(clock: Clock) -> None:
    rows = {"a": row(clock, 1.0, "a"), "b": row(clock, 2.0, "b")}
    found = measure(rows, SHORT)
    assert "".join(clock.log) == "aaaaaabbbbbb" + "abba" * 2
    assert found["a"].turns == ([1.0],) * 4 and found["b"].rounds == [[2.0, 2.0]] * 2
    assert found["b"].others == (None, None) and found["b"].note == ""


def test_quick_rows_start_a_turn_with_runs_that_do_not_count(clock: Clock) -> None:
    found = measure({"a": row(clock, 0.01, "a"), "b": row(clock, 1.0, "b")}, SHORT)
    # 25 ms are three runs of 10 ms; then the one that counts.
    assert "".join(clock.log)[12:] == "aaaabbaaaa" * 2
    assert len(found["a"].seconds) == 4


def test_a_busy_round_is_repeated(clock: Clock) -> None:
    # Two calls a round; the second is the share of the round.
    shares = iter([0.0, 0.05, 0.0, 0.30, 0.0, 0.02])
    found = measure({"a": row(clock, 1.0, "a")}, SHORT, lambda: next(shares))
    assert found["a"].others == (0.05, 0.02)
    assert len(found["a"].turns) == 4 and clock.log.count("a") == 6 + 3 * 2
    assert found["a"].note == "rounds repeated because the machine was busy: 1"


def test_a_machine_that_stays_busy_is_refused(clock: Clock) -> None:
    with pytest.raises(CheckFailedError, match="other work took 40 % of the processors, and 3"):
        measure({"a": row(clock, 1.0, "a")}, SHORT, lambda: 0.4)


def test_a_row_that_does_not_settle_is_inconclusive_and_not_timed(clock: Clock) -> None:
    durations = (1.0 * 1.05**i for i in count())
    unsettled = Timed(lambda: clock.spend(next(durations), "u"), WallClock(clock))
    found = measure({"u": unsettled, "b": row(clock, 1.0, "b")}, SHORT)
    assert not found["u"].conclusive and found["u"].turns == ()
    assert "INCONCLUSIVE" in found["u"].note and found["b"].conclusive
    assert compare_all(found) == []


# --- numbers ------------------------------------------------------------------------------------


def test_percentiles_by_hand() -> None:
    # 1..101 ms: the k-th percentile is k + 1.
    found = summarise([s / 1000 for s in range(1, 102)])
    assert (found.n, found.min_ms) == (101, 1.0)
    values = [found.p50_ms, found.p90_ms, found.p95_ms, found.p99_ms]
    assert values == pytest.approx([51, 91, 96, 100])
    # Squares of -50..50 sum to 85850.
    assert found.cov == pytest.approx((85850 / 100) ** 0.5 / 51)


def test_outliers_stay() -> None:
    assert summarise([0.001] * 9 + [1.0]).p99_ms > 900
    assert summarise([0.002]).cov == 0


def test_equal_times_have_no_interval() -> None:
    found = compare("a", "b", [[1.0, 1.0]] * 5, [[2.0, 2.0]] * 5)
    assert (found.speed, found.low, found.high, found.judged) == (2.0, 2.0, 2.0, "faster")


def test_the_interval_covers_rounds_that_differ() -> None:
    # In one round of five the machine was half as fast for `a` alone: no verdict may rest on the other four.
    found = compare("a", "b", [[1.0] * 4] * 3 + [[2.0] * 4] * 2, [[1.1] * 4] * 5)
    assert found.speed == pytest.approx(1.1)
    assert found.low == pytest.approx(0.55) and found.high == pytest.approx(1.1)
    assert found.judged == "undecided"


def test_noise_of_one_distribution_is_not_faster() -> None:
    random = np.random.default_rng(1)
    a, b = (random.normal(1.0, 0.02, (5, 40)).tolist() for _ in "ab")
    found = compare("a", "b", a, b)
    assert found.judged == "equal" and found.low < 1 < found.high


@pytest.mark.parametrize(
    ("low", "high", "judged"),
    [
        (1.021, 1.5, "faster"),
        (1.019, 1.5, "undecided"),
        (0.5, 0.979, "slower"),
        (0.5, 0.981, "undecided"),
        (0.981, 1.019, "equal"),
    ],
)
def test_verdicts(low: float, high: float, judged: str) -> None:
    assert Comparison("a", "b", 1.0, low, high).judged == judged


def test_every_pair_is_compared_with_what_came_before() -> None:
    warm = WarmUp(6, 1.0, 1.0, 0.0, True)
    rows = {n: Measurement(warm, ([t],) * 4) for n, t in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    found = {(c.a, c.b): c.speed for c in compare_all(rows)}
    assert found == {("b", "a"): 0.5, ("c", "a"): 0.25, ("c", "b"): 0.5}


# --- the machine --------------------------------------------------------------------------------

STAT = """\
cpu  999 999 999 999 999 0 0 0 0 0
cpu0 100 10 20 500 40 5 5 20 50 0
cpu1 1 1 1 1 1 1 1 1 1 1
cpu10 200 0 0 800 0 0 0 0 0 0
intr 5 5 5
"""


def test_cpu_times_of_the_processors_of_this_process() -> None:
    # 100 ticks a second: cpu0 has 700 ticks, 540 of them idle or waiting for a disk; cpu10 has 1000.
    assert parse_cpu_times(STAT, [0], 100, 1.5) == CpuTimes(7.0, 5.4, 1.5)
    assert parse_cpu_times(STAT, [0, 10], 100, 0.0) == CpuTimes(17.0, 13.4, 0.0)


def test_share_of_others() -> None:
    readings = iter(
        [CpuTimes(0, 0, 0), CpuTimes(20, 6, 10), CpuTimes(40, 6, 30), CpuTimes(50, 7, 40)]
    )
    others = Others(lambda: next(readings))
    # 20 s of two processors: 6 idle, 10 ours, 4 of others; then none; ticks may not sum up.
    assert others() == pytest.approx(0.2)
    assert others() == 0.0 and others() == 0.0
    assert Others(lambda: None)() is None


def test_a_busy_machine_is_waited_for_then_refused() -> None:
    slept: list[float] = []
    shares = iter([0.0, 0.5, 0.0, 0.08])
    assert wait_until_quiet(lambda: next(shares), slept.append) == 0.08
    assert slept == [1.0, 1.0]
    with pytest.raises(
        CheckFailedError, match="other work took 50 to 50 % of its processors for 10 s"
    ):
        wait_until_quiet(lambda: 0.5, slept.append)
    assert wait_until_quiet(lambda: None, slept.append) is None


def test_gpus_of_nvidia_smi() -> None:
    line = "NVIDIA L4, 570.1, P0, 1500 MHz, 2040 MHz, 6251 MHz, 61, 70.1 W, 0x{:016x}, {} %, 900 MiB, Enabled, [N/A]\n"
    (quiet,) = parse_gpus(line.format(0, 3))
    assert list(quiet) == list(GPU_FIELDS)
    assert quiet["name"] == "NVIDIA L4" and quiet["clocks.sm"] == "1500 MHz"
    check_gpus([quiet])
    assert throttled([quiet]) == []
    (hot,) = parse_gpus(line.format(0x24, 40))
    assert throttled([hot]) == ["NVIDIA L4 was slowed down: power cap, thermal slowdown"]
    with pytest.raises(CheckFailedError, match="NVIDIA L4 is 40 % busy"):
        check_gpus([hot])


def test_peak_memory(tmp_path) -> None:
    status = tmp_path / "status"
    status.write_text("VmHWM:\t  9000 kB\nVmRSS:\t  1024 kB\n")
    with PeakMemory(tmp_path) as peak:
        assert (tmp_path / "clear_refs").read_text() == "5"
        status.write_text("VmHWM:\t  4096 kB\nVmRSS:\t  2048 kB\n")
    assert peak.added_mib == 3.0
    with PeakMemory(tmp_path / "nowhere") as unknown:
        pass
    assert unknown.added_mib is None
