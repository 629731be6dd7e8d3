"""One job at a time on the device. A job is a function in a thread of its own; its events come out of a generator.

Jobs run in the order in which they were started. Closing the generator tells the job to stop at its next
event or check, and waits for it unless an event loop closes it. A generator that nobody reads any more holds
nobody up: the job ends by itself.

All that computes for more than a moment runs here, networks or not. "Measure the speed" sees what other processes take of
the machine, but not what other threads of this one do.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from demo.jobs import Progress
from srkd.errors import MissingError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


SILENCE_S = 1.0


class StoppedError(Exception):
    """Raised in a job whose result nobody wants any more. Not an `SrkdError`: nobody is told."""


class Turn(Generic[T]):
    """What a job has of its lane."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[T | Progress | Exception | None] = queue.SimpleQueue()
        self._stop = threading.Event()

    def tell(self, event: T | Progress) -> None:
        """Hand out an event; raises `StoppedError` when the job is to end."""
        self.check()
        self._events.put(event)

    def next(self, told: Progress | None) -> T | Progress | Exception | None:
        """The next event, or what was `told` last when none comes for a while: a reader can stop only between two."""
        try:
            return self._events.get(timeout=None if told is None else SILENCE_S)
        except queue.Empty:
            return told

    def check(self) -> None:
        """Raise `StoppedError` when the job is to end."""
        if self._stop.is_set():
            raise StoppedError


class Lane:
    """Where jobs wait for each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: list[Turn] = []  # the first one runs
        self._closed = False

    def run(self, job: Callable[[Turn[T]], None]) -> Iterator[T | Progress]:
        """The events of `job`, which starts with the first `next` and when those before it are done."""
        turn: Turn[T] = Turn()
        with self._changed:
            if self._closed:
                raise SrkdError("The demo is being shut down; start it again to run this.")
            self._line.append(turn)
        thread = threading.Thread(target=self._work, args=(turn, job), name="srkd-demo-job")
        try:
            thread.start()
        except RuntimeError as error:  # a turn without a thread would hold up all others
            with self._changed:
                self._line.remove(turn)
            raise MissingError("The server has too much to do; try again later.") from error
        told: Progress | None = None
        try:
            while (event := turn.next(told)) is not None:
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Progress):
                    told = event
                yield event
        finally:
            self._stop(turn)
            # Gradio closes in its event loop, where waiting would hold up every other request.
            if not _in_event_loop():
                thread.join()

    def one(self, text: str, work: Callable[[Turn[T]], T]) -> Iterator[T | Progress]:
        """`run` for `work` that gives one value; people are told `text` meanwhile."""

        def job(turn: Turn[T]) -> None:
            turn.tell(Progress(0.0, text))
            turn.tell(work(turn))

        return self.run(job)

    def close(self) -> None:
        """Stop every job, wait for the one that runs, and take no more."""
        with self._changed:
            self._closed = True
            for turn in self._line:
                turn._stop.set()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._line)

    def _stop(self, turn: Turn) -> None:
        with self._changed:
            turn._stop.set()
            self._changed.notify_all()

    def _work(self, turn: Turn[T], job: Callable[[Turn[T]], None]) -> None:
        failure: Exception | None = None
        try:
            self._wait(turn)
            job(turn)
        except StoppedError:
            pass
        except MemoryError as error:
            failure = MissingError(
                "The memory of this machine does not suffice for that; use a smaller picture or fewer networks."
            )
            failure.__cause__ = error
        except Exception as error:
            failure = error
        finally:
            # The lane is free before the reader learns that the job is over.
            with self._changed:
                self._line.remove(turn)
                self._changed.notify_all()
            if failure is not None:
                turn._events.put(failure)
            turn._events.put(None)

    def _wait(self, turn: Turn) -> None:
        """Return when `turn` is the first in the line; tells how many are before it."""
        told = 0
        with self._changed:
            while before := self._line.index(turn):
                if before != told:
                    jobs = "1 job" if before == 1 else f"{before} jobs"
                    turn.tell(Progress(0.0, f"waiting for the device · {jobs} before this one"))
                    told = before
                self._changed.wait()
                turn.check()
            turn.check()


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
