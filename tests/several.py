"""Run a function in several processes that are one group, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from forked import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def in_group(world: int, work: Callable[..., T], *arguments: Any) -> list[T]:
    """What `work(*arguments)` returns on every rank; torch is imported once, in the server of the forks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(world, CONTEXT) as pool:
        tasks = [pool.submit(_as_rank, rank, world, port, work, arguments) for rank in range(world)]
        return [task.result(timeout=120) for task in tasks]


def _as_rank(
    rank: int, world: int, port: int, work: Callable[..., T], arguments: tuple[Any, ...]
) -> T:
    # Bound to this machine: a host name may lead elsewhere.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import srkd.ranks as ranks

    with ranks.group("cpu"):
        return work(*arguments)


def rank_process(parent: int, rank: int) -> int:
    """The process that torchrun started as `rank`."""
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if int(fields[1]) == parent and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"torchrun started no rank {rank}")
