"""Does the exported network still give the same picture? A chain of edges, each with its own verdict.

    trained net --E0-- deploy net --E1-- ONNX fp32 --E2-- ONNX fp16 --E3-- engine
                                                             engine at two shapes --E4--
                                                             whole picture vs tiles --E5--

The first edge that fails names the fault: exporter, precision, engine, shapes, or tiling (`deploy.verdict`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from deploy.difference import Difference, difference, seam_score, worst_of
from deploy.inputs import PHOTOGRAPHS, Input, window
from deploy.verdict import EdgeResult, Gate, Worst, edge_json, judge, read_gates
from srkd.errors import SrkdError
from srkd.metrics import psnr
from srkd.tiling import halo_px, upscale_tiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from deploy.engines import Engine
    from deploy.inputs import Photo
    from srkd.types import Facts

BORDER_PX = 8  # LR pixels; padding faults show in this band
# Pictures of E4 and E5 exceed the receptive field. Up to FAR_PX they are square, beyond that strips, which
# keep the check of a network that sees far affordable.
FAR_PX = 48
TILE_PX = 64
MARGIN_PX = 24
STRIP_PX = 41


@dataclass(frozen=True)
class Task:
    """Mean PSNR-Y in dB against HR of the network and of the engine, on the same photographs."""

    photographs: int
    torch_db: float
    engine_db: float

    @property
    def delta_db(self) -> float:
        return 0.0 if self.torch_db == self.engine_db else self.engine_db - self.torch_db


@dataclass(frozen=True)
class Parity:
    """All edges of one exported file."""

    edges: tuple[EdgeResult, ...]
    photographs: int
    gates: dict[str, Gate] = field(default_factory=dict)
    task: Task | None = None
    worst: Worst | None = None

    @property
    def verdict(self) -> Literal["PASS", "FAIL", "INCONCLUSIVE"]:
        """The worst of the edges that ran."""
        found = {e.status for e in self.edges}
        if "FAIL" in found:
            return "FAIL"
        return "INCONCLUSIVE" if "INCONCLUSIVE" in found or "PASS" not in found else "PASS"

    @property
    def blame(self) -> str | None:
        """The first edge that failed: what it compares is where the fault lies."""
        return next((e.edge for e in self.edges if e.status == "FAIL"), None)

    def edge(self, name: str) -> EdgeResult:
        return next(e for e in self.edges if e.edge == name)

    def to_json(self) -> dict[str, Any]:
        """The record for parity.json; infinities become null, gates that are not asked are left out."""
        return {
            "verdict": self.verdict,
            "blame": self.blame,
            "photographs": self.photographs,
            "task": None
            if self.task is None
            else {**asdict(self.task), "delta_db": self.task.delta_db},
            "gates": {
                name: {k: v for k, v in asdict(gate).items() if v is not None}
                for name, gate in self.gates.items()
            },
            "edges": [edge_json(result) for result in self.edges],
        }


def verify(
    reference: Engine,
    engine: Engine,
    facts: Facts,
    inputs: Sequence[Input],
    photos: Sequence[Photo],
    progress: Callable[[str], None] | None = None,
) -> Parity:
    """Run every edge that this engine can run here. An engine that refuses an input fails the edge.

    `reference` is the network in torch fp32 (`TorchEngine`), `engine` the exported file as a user opens
    it. `photos` supply larger surroundings for E4 and E5.
    """
    gates = read_gates()
    say = progress or (lambda _: None)
    say("E1 torch vs graph")
    e1, task, worst = check_export(reference, engine, facts, inputs, len(photos), gates["E1"])
    say("E4 two shapes")
    e4 = check_shapes(engine, facts, photos, gates["E4"])
    say("E5 whole vs tiles")
    e5 = check_tiles(engine, facts, photos, gates)
    edges = (
        EdgeResult(
            "E0", "NOT RUN", "nothing is folded or rescaled: the trained network is exported"
        ),
        e1,
        EdgeResult("E2", "NOT RUN", "the export is fp32, there is no fp16 graph"),
        EdgeResult(
            "E3", "NOT RUN", "the engine is ONNX Runtime on the CPU itself, so E1 covers it"
        ),
        e4,
        e5,
    )
    used = {"E1", "E4", "E5_exact" if facts.exact_tiling else "E5_approximate"}
    kept = {name: gate for name, gate in gates.items() if name in used}
    return Parity(edges, len(photos), kept, task, worst)


# --- E1 -----------------------------------------------------------------------------------------


def check_export(
    reference: Engine,
    engine: Engine,
    facts: Facts,
    inputs: Iterable[Input],
    photographs: int,
    gate: Gate,
) -> tuple[EdgeResult, Task | None, Worst | None]:
    """E1: the network in torch against the exported file on every input.

    `photographs` is the number of different real pictures among the inputs. The gate judges errors relative
    to the range of the network's own output where that exceeds 1: on the finest checkerboard a
    trained network may answer with -2 to 3, and float32 rounding grows with it.
    """
    rows: list[dict[str, Any]] = []
    gated: list[Difference] = []
    relative: list[Difference] = []
    scores: list[tuple[float, float]] = []
    worst: Worst | None = None
    for item in inputs:
        try:
            x, y = reference(item.lr), engine(item.lr)
            found = _compare(x, y, item, facts)
        except SrkdError as error:
            failed = EdgeResult("E1", "FAIL", f"{item.name}: {error}", rows=tuple(rows))
            return failed, None, worst
        rows.append({"input": item.name, "kind": item.kind, "gated": item.gated, **found.to_json()})
        if item.gated:
            if worst is None or found.max_abs > max(g.max_abs for g in gated):
                image = slice(found.worst.image, found.worst.image + 1)
                worst = Worst(item.name, x[image], y[image], found.worst.y, found.worst.x)
            gated.append(found)
            span = max(1.0, float(x.max() - x.min()))
            relative.append(found if span == 1 else _compare(x / span, y / span, item, facts))
        if item.hr is not None and not found.nonfinite:
            scores.append(_score(x, y, item.hr, facts.scale))
    numbers = worst_of(gated)
    status, reason = judge(worst_of(relative), gate)
    if numbers.max_abs > worst_of(relative).max_abs:
        reason = f"{reason}, relative to the range of the output"
    if status == "PASS" and photographs < PHOTOGRAPHS:
        status = "INCONCLUSIVE"
        reason = (
            f"{reason}, but only {photographs} real photographs were given; {PHOTOGRAPHS} are needed: "
            "choose a larger set with --data"
        )
    columns = list(zip(*scores, strict=True))
    task = Task(len(scores), fmean(columns[0]), fmean(columns[1])) if scores else None
    return EdgeResult("E1", status, reason, numbers, rows=tuple(rows)), task, worst


def _compare(x: np.ndarray, y: np.ndarray, item: Input, facts: Facts) -> Difference:
    n, _, h, w = item.lr.shape
    need = (n, 3, facts.scale * h, facts.scale * w)
    if y.shape != need or x.shape != need:
        raise SrkdError(
            f"the output is {y.shape} (torch: {x.shape}), a x{facts.scale} one is {need}"
        )
    return difference(x, y, item.name, border_px=facts.scale * BORDER_PX)


def _score(x: np.ndarray, y: np.ndarray, hr: np.ndarray, scale: int) -> tuple[float, float]:
    target = torch.from_numpy(hr)
    torch_db, engine_db = (
        psnr(torch.from_numpy(sr.copy()), target, scale).mean().item() for sr in (x, y)
    )
    return torch_db, engine_db


# --- E4 -----------------------------------------------------------------------------------------


def check_shapes(engine: Engine, facts: Facts, photos: Sequence[Photo], gate: Gate) -> EdgeResult:
    """E4: two pictures that share their top left corner agree where both see the same surroundings.

    The smaller one ends earlier below and right; what lies farther than the receptive field from there
    cannot know.
    """
    radius = facts.receptive_field_px
    if radius is None:
        return EdgeResult(
            "E4",
            "NOT RUN",
            "the network looks at the whole picture: every shape has its own result",
        )
    if not photos:
        return EdgeResult("E4", "INCONCLUSIVE", "no photograph was given; choose a set with --data")
    pairs, parts = _surroundings(radius, MARGIN_PX), []
    rows: list[dict[str, Any]] = []
    for h, w in pairs:
        large = window(photos[0].lr, h, w)
        small_h, small_w = (side - MARGIN_PX if side > radius else side for side in (h, w))
        name = f"{photos[0].name} {h}x{w} vs {small_h}x{small_w}"
        keep = [
            facts.scale * (small - radius if small < side else side)
            for small, side in ((small_h, h), (small_w, w))
        ]
        try:
            whole = engine(large)
            part = engine(np.ascontiguousarray(large[..., :small_h, :small_w]))
        except SrkdError as error:
            return EdgeResult("E4", "FAIL", f"{name}: {error}", rows=tuple(rows))
        x, y = (sr[..., : keep[0], : keep[1]] for sr in (whole, part))
        parts.append(difference(x, y, name, border_px=facts.scale))
        rows.append({"input": name, **parts[-1].to_json()})
    numbers = worst_of(parts)
    status, reason = judge(numbers, gate)
    return EdgeResult("E4", status, reason, numbers, rows=tuple(rows))


def _surroundings(radius: int, more_px: int) -> list[tuple[int, int]]:
    """Sizes of pictures that exceed a reach by `more_px` and a margin: one, or a tall and a wide strip.

    Sides are unequal and odd ones are among them, so that no grid suits them.
    """
    long = radius + more_px + MARGIN_PX
    return [(long, long + 5)] if radius <= FAR_PX else [(long, STRIP_PX), (STRIP_PX, long)]


# --- E5 -----------------------------------------------------------------------------------------


def check_tiles(
    engine: Engine, facts: Facts, photos: Sequence[Photo], gates: dict[str, Gate]
) -> EdgeResult:
    """E5: the engine on a whole picture against the same engine on tiles of it.

    The picture exceeds a tile and its halo, so that tiles really miss part of it.
    """
    if not photos:
        return EdgeResult("E5", "INCONCLUSIVE", "no photograph was given; choose a set with --data")
    halo = halo_px(facts)
    tile = max(TILE_PX, halo + MARGIN_PX)
    rows: list[dict[str, Any]] = []
    parts, seams = [], []
    for photo, (h, w) in zip(
        islice(cycle(photos), 2), cycle(_surroundings(halo, tile)), strict=False
    ):
        lr = window(photo.lr, h, w)
        name = f"{photo.name} {h}x{w}, tiles of {tile}, halo {halo}"
        try:
            whole = engine(lr)
            tiled = upscale_tiled(as_torch(engine), torch.from_numpy(lr), facts, tile).numpy()
        except SrkdError as error:
            return EdgeResult("E5", "FAIL", f"{name}: {error}", rows=tuple(rows))
        parts.append(difference(whole, tiled, name, border_px=facts.scale * BORDER_PX))
        seams.append(seam_score(whole, tiled))
        rows.append({"input": name, "seam": seams[-1], **parts[-1].to_json()})
    numbers, seam = worst_of(parts), max(seams)
    gate = gates["E5_exact" if facts.exact_tiling else "E5_approximate"]
    status, reason = judge(numbers, gate, seam)
    return EdgeResult("E5", status, reason, numbers, seam, tuple(rows))


def as_torch(engine: Engine) -> Callable[[Tensor], Tensor]:
    """An engine as a function of tensors (N, 3, h, w) on the CPU."""

    def run(lr: Tensor) -> Tensor:
        # The result of a runtime may be read-only or reused, so it is copied.
        return torch.from_numpy(engine(np.ascontiguousarray(lr.numpy())).copy())

    return run
