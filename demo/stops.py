"""Which jobs of which page run, and which of them were asked to stop.

Gradio's own cancelling does not say when a job has ended: a tile that is in work is finished first, and what the
job tells after that would stand where the page says that it was stopped.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Stops:
    """Running jobs by page (Gradio's session of one open tab)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[str, list[threading.Event]] = {}

    @contextmanager
    def job(self, page: str) -> Iterator[threading.Event]:
        """A job of `page` for as long as the block lasts; the event is set when it shall stop."""
        asked = threading.Event()
        with self._changed:
            self._running.setdefault(page, []).append(asked)
        try:
            yield asked
        finally:
            with self._changed:
                self._running[page].remove(asked)
                if not self._running[page]:
                    del self._running[page]
                self._changed.notify_all()

    def stop(self, page: str, patience_s: float) -> bool:
        """Ask the page's jobs to stop and wait for their end; False if one still runs after `patience_s`."""
        end = time.monotonic() + patience_s
        with self._changed:
            asked = list(self._running.get(page, ()))
            for event in asked:
                event.set()
            while any(event in self._running.get(page, ()) for event in asked):
                if (
                    not self._changed.wait(max(0.0, end - time.monotonic()))
                    and time.monotonic() >= end
                ):
                    return False
        return True
