"""What an export tells while it runs: a line for every stage that is done, with its time."""

from __future__ import annotations

import time

from srkd.progress import StatusLine


class Stages:
    """`[2/4] onnx  ...  3.1 s` on stderr, and how long each took."""

    def __init__(self, quiet: bool, *, half: bool, built: bool) -> None:
        self.names = (
            "load",
            *(("range",) if half else ()),
            "onnx",
            *(("fp16",) if half else ()),
            *(("build",) if built else ()),
            "engine",
            "verify",
        )
        self.line = StatusLine(quiet=quiet)
        self.seconds: dict[str, float] = {}
        self.begin = time.perf_counter()

    def _head(self, name: str) -> str:
        return f"[{self.names.index(name) + 1}/{len(self.names)}] {name:<7}"

    def done(self, name: str, told: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.begin = now - self.begin, now
        self.line.say(f"{self._head(name)} {told}  {self.seconds[name]:.1f} s")

    def say(self, text: str) -> None:
        self.line.say(f"      {text}")

    def show(self, text: str) -> None:
        """A passing remark on the stage that runs: only where the line can be rewritten."""
        if self.line.live:
            running = self.names[min(len(self.seconds), len(self.names) - 1)]
            self.line.show(f"{self._head(running)} {text}")
