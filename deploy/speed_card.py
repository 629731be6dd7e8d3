"""The speed card: three named times of every engine, side by side, with the evidence.

    compute      the engine alone. CPU: its call, float32 in, float32 out. CUDA: tensors stay on the device, events
    latency      one picture: bytes on the host -> float -> engine -> bytes on the host
    throughput   the same through a pipeline: while the engine runs, the next batch is made ready and the last one is
                 turned into bytes. The engine takes one batch at a time, so any engine may stand in it

FPS = pictures per run / median. Pictures are photographs, and the same for every engine.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from deploy.inputs import window
from deploy.photographs import load_photographs
from deploy.records import BUILTIN
from deploy.speed import (
    CudaEvents,
    Limits,
    Timed,
    WallClock,
    check_events,
    check_watch,
    compare_all,
    measure,
    summarise,
)
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from torch import Tensor

    from deploy.engines import Engine
    from deploy.inputs import Photo
    from deploy.speed import Comparison, Measurement
    from deploy.subjects import Subject

Quantity = Literal["compute", "latency", "throughput"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
FORMAT = 1
PICTURES = 4  # at least so many take turns
MATMUL = 4096


# --- pictures -----------------------------------------------------------------------------------


def pictures(size: tuple[int, int], scale: int, count: int = PICTURES) -> list[np.ndarray]:
    """`count` photographs of (h, w), (h, w, 3) uint8; small ones are continued by mirroring."""
    photos = [window(photo.lr, *size)[0] for photo in _photographs(scale)]
    found = [np.rint(p * 255).astype(np.uint8).transpose(1, 2, 0) for p in photos]
    return [np.ascontiguousarray(p) for p in islice(cycle(found), count)]


@cache
def _photographs(scale: int) -> list[Photo]:
    return load_photographs(BUILTIN, scale)


# These two use NumPy on purpose: torch would start a second set of OpenMP threads in the pipeline's helpers.
def to_floats(batch: Sequence[np.ndarray]) -> np.ndarray:
    """(h, w, 3) uint8 each -> (N, 3, h, w) float32 in [0, 1]."""
    planes = np.stack(batch).transpose(0, 3, 1, 2)
    return np.divide(planes, np.float32(255), dtype=np.float32, order="C")


def to_bytes(sr: np.ndarray) -> np.ndarray:
    """(N, 3, H, W) in about [0, 1] -> (N, H, W, 3) uint8, clamped and rounded."""
    levels = np.rint(np.clip(sr, 0, 1) * np.float32(255)).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


class Pipeline:
    """One batch per call, made ready during the call before, turned into bytes during the next one."""

    def __init__(self, engine: Engine, batches: Iterable[Sequence[np.ndarray]]) -> None:
        self.engine = engine
        self.source = cycle(batches)
        self.pool = ThreadPoolExecutor(2)
        self.ready = self.pool.submit(to_floats, next(self.source))
        self.last: Future[np.ndarray] | None = None

    def __call__(self) -> np.ndarray | None:
        """Bytes of the batch before, (N, H, W, 3) uint8; None at the first call."""
        lr = self.ready.result()
        self.ready = self.pool.submit(to_floats, next(self.source))
        sr = self.engine(lr)
        done = None if self.last is None else self.last.result()
        self.last = self.pool.submit(to_bytes, sr)
        return done

    def close(self) -> None:
        self.pool.shutdown()


# --- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One quantity of one engine. `summary` is None where the warm-up did not settle."""

    quantity: Quantity
    subject: Subject
    batch: int
    size: tuple[int, int]
    measured: Measurement

    def to_json(self) -> dict[str, Any]:
        m, s = self.measured, self.subject
        h, w = self.size
        row: dict[str, Any] = {
            "name": s.name,
            "quantity": self.quantity,
            "size": [h, w],
            "scale": s.facts.scale,
            "batch": self.batch,
            "precision": s.precision,
            "verdict": "MEASURED" if m.conclusive else "INCONCLUSIVE",
            "note": m.note,
            "warm_up": asdict(m.warm_up),
            "others": list(m.others),
        }
        if not m.conclusive:
            return row
        summary = summarise(m.seconds)
        per_s = 1000 * self.batch / summary.p50_ms
        row |= {"fps": per_s, "output_mpx_per_s": per_s * h * w * s.facts.scale**2 / 1e6}
        medians = [1000 * float(np.median(turn)) for turn in m.turns]
        return {**row, **asdict(summary), "turn_medians_ms": medians}


def timed_runs(
    quantity: Quantity, subject: Subject, photos: Sequence[np.ndarray], batch: int
) -> Timed:
    """What is timed for a quantity; `photos` are (h, w, 3) uint8 and take turns."""
    engine = subject.opened.engine
    if quantity == "latency":
        singles = cycle([[photo] for photo in photos])
        return Timed(lambda: to_bytes(engine(to_floats(next(singles)))), WallClock())
    batches = [
        [photos[(i + k) % len(photos)] for k in range(batch)] for i in range(0, len(photos), batch)
    ]
    if quantity == "throughput":
        return Timed(Pipeline(engine, batches), WallClock())
    return compute_runs(engine, subject.device, [to_floats(b) for b in batches], subject.name)


def compute_runs(engine: Engine, device: str, batches: Sequence[np.ndarray], name: str) -> Timed:
    """The engine alone. `batches` are (N, 3, h, w) float32 in [0, 1]: they take turns on the CPU; on CUDA the first
    one stays on the device."""
    if device == "cpu":
        inputs = cycle(batches)
        return Timed(lambda: engine(next(inputs)), WallClock())
    import torch

    lr = torch.from_numpy(batches[0]).to(device)
    run, stream = on_device(engine, lr, name)
    return Timed(run, CudaEvents(torch.cuda, stream))


def on_device(engine: Any, lr: Tensor, name: str) -> tuple[Callable[[], object], Any]:
    """A run with tensors that stay where `lr` is, and the CUDA stream that it works on (None: the current one).

    An engine offers `run(lr)`, or `enqueue(lr, sr)` on the stream of its own.
    """
    if hasattr(engine, "run"):
        return lambda: engine.run(lr), None
    if hasattr(engine, "enqueue"):
        n, c, h, w = lr.shape
        sr = lr.new_empty((n, c, engine.scale * h, engine.scale * w))
        return lambda: engine.enqueue(lr, sr), engine.stream.stream
    raise SrkdError(
        f"{name} cannot keep its tensors on the GPU, so its compute time is not known; ask for --quantity "
        "latency,throughput."
    )


def measure_rows(
    subjects: Sequence[Subject],
    size: tuple[int, int],
    batch: int,
    limits: Limits,
    others: Callable[[], float | None],
    say: Callable[[str], object] = lambda text: None,
    quantities: Sequence[Quantity] = QUANTITIES,
    over: Callable[[], object] = lambda: None,
) -> tuple[list[Row], list[tuple[Quantity, Comparison]]]:
    """Every quantity of every engine; the engines of one quantity take turns. `over` is called after each quantity."""
    photos = {s: pictures(size, s, max(PICTURES, batch)) for s in {x.facts.scale for x in subjects}}
    rows: list[Row] = []
    comparisons: list[tuple[Quantity, Comparison]] = []
    for quantity in quantities:
        each = 1 if quantity == "latency" else batch
        timed = {s.name: timed_runs(quantity, s, photos[s.facts.scale], each) for s in subjects}
        try:
            found = measure(timed, limits, others, lambda text, q=quantity: say(f"{q}  {text}"))
        finally:
            for row in timed.values():
                if isinstance(row.run, Pipeline):
                    row.run.close()
        over()
        rows += [Row(quantity, s, each, size, found[s.name]) for s in subjects]
        comparisons.extend((quantity, c) for c in compare_all(found))
    return rows, comparisons


def check_watches(subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
    """The self-test of every watch that the card uses."""
    tested = {"clock": check_watch(WallClock())}
    if any(s.device == "cuda" for s in subjects):
        import torch

        a = torch.ones(MATMUL, MATMUL, device="cuda", dtype=torch.float16)
        events = CudaEvents(torch.cuda)
        tested["events"] = check_events(events, lambda: a @ a, 2.0 * MATMUL**3)
    return tested


# --- the card -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedCard:
    """All that was measured, and where. `environment` has the keys machine, before, during (after each
    quantity) and after."""

    rows: list[Row]
    comparisons: list[tuple[Quantity, Comparison]]
    subjects: list[Subject]
    limits: Limits
    self_test: dict[str, dict[str, float]]
    environment: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Literal["MEASURED", "INCONCLUSIVE"]:
        return "MEASURED" if all(r.measured.conclusive for r in self.rows) else "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict == "MEASURED" else 1

    def against_first(self, row: Row) -> Comparison | None:
        """How fast this row is as a multiple of the first engine; None for itself and what was not timed."""
        pair = (row.subject.name, self.subjects[0].name)
        found = (c for q, c in self.comparisons if q == row.quantity and (c.a, c.b) == pair)
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "pictures": f"built-in photographs, at least {PICTURES} in turn",
            "subjects": [s.to_json() for s in self.subjects],
            "rows": [r.to_json() for r in self.rows],
            "comparisons": [
                {"quantity": q, **asdict(c), "judged": c.judged} for q, c in self.comparisons
            ],
            "limits": asdict(self.limits),
            "self_test": self.self_test,
            "environment": self.environment,
            "notes": list(self.notes),
        }
