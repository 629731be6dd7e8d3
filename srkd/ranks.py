"""Several processes that train one network together: `torchrun --nproc-per-node N scripts/distill.py ...`.

Each process ("rank") has its own part of every batch and the same networks; gradients are averaged, so
that N processes do what one process does with N micro-batches. The first process alone writes. Everything
here is a plain call of torch.distributed (gloo between CPUs, NCCL between GPUs) and does nothing in a
process that is alone.

DistributedDataParallel is not used: it wraps one forward pass of one module, and a step here runs the
student from several places, through functional copies, and steps several optimisers.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srkd.errors import CheckFailedError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

# Others wait while the first decodes images or computes a teacher cache, and that may take hours. torchrun
# ends everybody when a process dies, so nobody waits for the dead.
PATIENCE = timedelta(days=2)
BUCKET_BYTES = 32 * 2**20  # gradients travel in pieces of at most this size
LAUNCH = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets besides
LOST = ("Connection closed by peer", "Connection reset", "Socket closed", "NCCL", "Broken pipe")


class SaidElsewhereError(SrkdError):
    """Another process has failed and says why; this one ends without a word, with that exit code."""

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__()
        self.exit_code = exit_code


def world() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Which process this is, 0-based."""
    return dist.get_rank() if _grouped() else 0


def is_first() -> bool:
    """Whether this process writes the run."""
    return rank() == 0


def local_rank() -> int:
    """Which process of its machine this is: the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _grouped() else 0


def launched() -> int:
    """Number of processes that torchrun has started, whether or not they are a group yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def sharing(device: torch.device) -> int:
    """Number of processes that share the memory of the device: of a machine's memory all that run on it."""
    if device.type != "cpu" or not _grouped():
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


@contextmanager
def group(
    device: str, go_on: str = "Continue with --resume, with any number of processes."
) -> Iterator[None]:
    """The processes that torchrun has started are one group inside; nothing for a process alone.

    A process that is lost ends the others with one sentence, whose end is `go_on`.
    """
    if launched() == 1 or _grouped():
        yield
        return
    if missing := [name for name in LAUNCH if name not in os.environ]:
        raise SrkdError(
            f"WORLD_SIZE = {launched()} promises several processes, but {', '.join(missing)} is not set; start them "
            "with torchrun, or unset WORLD_SIZE."
        )
    cuda = device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        if not is_first():
            raise SaidElsewhereError(CheckFailedError.exit_code) from error
        raise CheckFailedError(
            f"a process was lost; torchrun says below which one and how it ended. {go_on}"
        ) from error
    except _EndedError:
        if not is_first():
            raise SaidElsewhereError(CheckFailedError.exit_code) from None
        raise CheckFailedError(
            "torchrun ended this process, because another one was lost or because it was told to stop; it says "
            f"below which. {go_on}"
        ) from None
    finally:
        dist.destroy_process_group()


class _EndedError(Exception):
    """torchrun wants this process to end."""


@contextmanager
def ended_by_torchrun() -> Iterator[None]:
    """Inside a group, for work without calls to the others, which would notice that one is lost: SIGTERM ends it
    as such a call would, files closed and removed."""
    if world() == 1:
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _EndedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over the processes, in place; all have the same list."""
    if world() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            _average_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _average_bucket(bucket)


def _average_bucket(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    dist.all_reduce(flat)
    pieces = flat.div_(world()).split([t.numel() for t in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Average the gradients of the parameters that have one."""
    if world() > 1:
        average_([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """All processes take the first one's values."""
    if world() > 1:
        for tensor in tensors:
            held = tensor.contiguous()
            dist.broadcast(held, 0)
            tensor.copy_(held)


def first_says(value: T) -> T:
    """The first process's `value`, on all: anything that can be pickled."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


def any_says(flag: bool) -> bool:
    """Whether any process says so. The flag travels between CPUs: no wait for a GPU."""
    if world() == 1:
        return flag
    seen = torch.tensor(int(flag))
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return bool(seen)


def collected(value: T) -> list[T]:
    """The value of every process, in order of rank: anything that can be pickled."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gathered(part: Sequence[T]) -> list[T]:
    """Element i of the whole is element i // world of process i % world: `part` of all, merged."""
    parts = collected(list(part))
    return [parts[i % world()][i // world()] for i in range(sum(len(p) for p in parts))]


def together(work: Callable[[], T]) -> T:
    """`work()` on every process; where one fails, all fail, and the lowest rank among them says why."""
    if world() == 1:
        return work()
    error: SrkdError | None = None
    result: T | None = None
    try:
        result = work()
    except SrkdError as caught:
        error = caught
    codes: list[Any] = [None] * world()
    dist.all_gather_object(codes, None if error is None else error.exit_code)
    speaker = next((r for r, code in enumerate(codes) if code is not None), None)
    if speaker is None:
        return result  # type: ignore[return-value]
    if speaker == rank():
        assert error is not None
        raise error
    raise SaidElsewhereError(codes[speaker])


def in_turn(work: Callable[[], T]) -> T:
    """`work()` on the first process of every machine, then on the others, which find its cache filled."""
    if world() == 1:
        return work()
    early = together(lambda: [work()] if local_rank() == 0 else [])
    late = together(lambda: early or [work()])
    return late[0]
