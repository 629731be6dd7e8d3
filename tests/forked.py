"""Processes of their own for what must be killed or limited; torch is imported once, in the server of the forks."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from srkd.console import run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

T = TypeVar("T")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["srkd.train"])


def in_child(work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns in a process of its own."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(work, *arguments).result(timeout=120)


def told_by(main: Callable[[list[str]], int], arguments: list[str]) -> tuple[int, str]:
    """Exit code of a command and what it says on stderr."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = run_command(main, arguments)
    return code, told.getvalue()


def distil_until_killed(arguments: Sequence[str], steps: int) -> None:
    """Run the command with these arguments and kill it for good once it has told of `steps` steps."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_distil, args=(list(arguments), writer))
    process.start()
    writer.close()
    seen, said = 0, []
    with os.fdopen(os.dup(reader.fileno()), encoding="utf-8") as lines:
        for line in lines:
            said.append(line)
            seen += " step " in line
            if seen >= steps:
                break
    process.kill()
    process.join()
    assert seen >= steps, "".join(said)


def _distil(arguments: list[str], told: Connection) -> None:
    os.dup2(told.fileno(), sys.stderr.fileno())
    from scripts.distill import main

    sys.exit(run_command(main, arguments))
