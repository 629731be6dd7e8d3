"""One job at a time: order, stopping, failing; and the share that a job tells."""

from __future__ import annotations

import asyncio
import threading

import pytest

from demo import lane as lane_module
from demo.jobs import Progress
from demo.lane import Lane
from demo.meter import Meter, Step, rough_time
from srkd.errors import MissingError, SrkdError

PATIENCE_S = 10


def count_to(n, running=None, seen=None):
    """A job that tells 1 to n; `running` may hold one job at most."""

    def job(turn):
        if running is not None:
            assert running.acquire(blocking=False), "two jobs at once"
        try:
            for i in range(1, n + 1):
                turn.tell(i)
                if seen is not None:
                    seen.append(i)
        finally:
            if running is not None:
                running.release()

    return job


def numbers(events):
    return [event for event in events if not isinstance(event, Progress)]


def test_events_come_in_order():
    assert numbers(Lane().run(count_to(4))) == [1, 2, 3, 4]


def test_jobs_of_many_threads_run_one_by_one_and_do_not_mix():
    lane, running, found = Lane(), threading.Semaphore(1), {}

    def user(n):
        found[n] = numbers(lane.run(count_to(n, running)))

    threads = [threading.Thread(target=user, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == {n: list(range(1, n + 1)) for n in range(1, 9)}


def held_lane():
    """A lane with a job that runs until `go` is set."""
    lane, go, begun = Lane(), threading.Event(), threading.Event()

    def hold(turn):
        begun.set()
        go.wait(PATIENCE_S)
        turn.tell("held")

    first = lane.run(hold)
    reader = threading.Thread(target=lambda: list(first))
    reader.start()
    assert begun.wait(PATIENCE_S)
    return lane, go, reader


def test_a_second_job_waits_and_says_so():
    lane, go, reader = held_lane()
    second = lane.run(count_to(1))
    waiting = next(second)
    assert waiting.text == "waiting for the device · 1 job before this one"
    go.set()
    assert numbers(second) == [1]
    reader.join(PATIENCE_S)


def test_a_waiting_job_that_is_closed_leaves_the_line_and_never_runs():
    lane, go, reader = held_lane()
    seen = []
    second = lane.run(count_to(1, seen=seen))
    next(second)
    second.close()
    third = lane.run(count_to(2))
    assert next(third).text == "waiting for the device · 1 job before this one"
    go.set()
    assert numbers(third) == [1, 2]
    reader.join(PATIENCE_S)
    assert seen == []


def test_a_job_that_says_nothing_can_be_stopped(monkeypatch):
    """Gradio can close a generator only between two events; an export says nothing for minutes."""
    monkeypatch.setattr(lane_module, "SILENCE_S", 0.01)
    ended = threading.Event()

    def silent(turn):
        turn.tell(Progress(0.5, "exporting"))
        try:
            while not ended.wait(0.01):
                turn.check()
        finally:
            ended.set()

    events = Lane().run(silent)
    assert [next(events).text for _ in range(3)] == ["exporting"] * 3
    events.close()
    assert ended.is_set()


def test_an_event_loop_that_closes_a_job_does_not_wait_for_it():
    go, lane = threading.Event(), Lane()

    def tile(turn):
        turn.tell(1)
        go.wait(PATIENCE_S)
        turn.tell(2)

    events = lane.run(tile)
    next(events)

    async def close():
        events.close()
        assert len(lane._line) == 1, "the tile still runs"

    asyncio.run(close())
    go.set()
    assert numbers(lane.run(count_to(1))) == [1]


def test_closing_stops_a_job_at_its_next_event_and_frees_the_lane():
    lane, seen = Lane(), []
    step = threading.Semaphore(1)

    def slow(turn):
        for i in range(100):
            step.acquire(timeout=PATIENCE_S)
            seen.append(i)
            turn.tell(i)

    events = lane.run(slow)
    assert next(events) == 0
    step.release()
    events.close()
    assert len(seen) <= 2
    assert numbers(lane.run(count_to(1))) == [1]


def test_a_generator_that_nobody_reads_on_holds_nobody_up():
    lane = Lane()
    left = lane.run(count_to(3))
    next(left)
    assert numbers(lane.run(count_to(1))) == [1]
    left.close()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [(SrkdError("no"), SrkdError, "no"), (MemoryError(), MissingError, "memory of this machine")],
)
def test_a_job_that_fails_tells_and_frees_the_lane(error, kind, words):
    lane = Lane()

    def fail(turn):
        turn.tell(1)
        raise error

    events = lane.run(fail)
    assert next(events) == 1
    with pytest.raises(kind, match=words):
        next(events)
    assert numbers(lane.run(count_to(1))) == [1]


def test_a_closed_lane_stops_its_jobs_and_takes_no_more():
    lane = Lane()
    begun = threading.Event()

    def endless(turn):
        while True:
            begun.set()
            turn.tell(1)
            threading.Event().wait(0.005)

    reader = threading.Thread(target=lambda: list(lane.run(endless)))
    reader.start()
    assert begun.wait(PATIENCE_S)
    lane.close()
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    with pytest.raises(SrkdError, match="shut down"):
        next(lane.run(count_to(1)))


# --- the share ----------------------------------------------------------------------------------


def metered(*steps):
    told, now = [], [0.0]
    return Meter(steps, {}, told.append, lambda: now[0]), told, now


def test_the_share_counts_work_and_the_time_is_learned_from_it():
    meter, told, now = metered(Step("a", 100), Step("a", 300))
    meter.start(0)
    now[0] = 1.0
    meter.at(0.5, "tile 1/2")
    assert (told[-1].done, told[-1].left_s) == (0.125, 7.0)
    assert told[-1].text == "tile 1/2 · ~7 s"
    meter.at(1, "tile 2/2")
    assert told[-1].done == 0.25


def test_every_kind_has_its_own_pace():
    meter, told, now = metered(Step("fast", 100), Step("slow", 100), Step("fast", 100))
    meter.start(0)
    now[0] = 1.0
    meter.at(1, "")
    meter.start(1)
    now[0] = 11.0
    meter.at(1, "")
    assert told[-1].left_s == pytest.approx(1.0)


def test_the_share_never_falls():
    meter, told, now = metered(Step("a", 1))
    meter.start(0)
    now[0] = 1.0
    meter.at(0.6, "")
    meter.at(0.1, "after running out of memory")
    assert told[-1].done == 0.6


def test_nothing_is_estimated_before_anything_ran_and_loading_is_told_once():
    meter, told, _ = metered(Step("a", 1))
    meter.start(0)
    meter.at(0, "tile 1/2")
    assert told[-1] == Progress(0.0, "tile 1/2", None)
    meter.say("loading")
    meter.say("loading")
    assert [event.text for event in told] == ["tile 1/2", "loading"]


@pytest.mark.parametrize(
    ("s", "text"), [(0.1, "1 s"), (12.4, "12 s"), (100, "2 min"), (7300, "2 h")]
)
def test_estimates_are_round(s, text):
    assert rough_time(s) == text
