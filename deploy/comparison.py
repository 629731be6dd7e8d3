"""Two engines on the same pictures: the numbers behind an edge of the parity chain.

Errors are given twice: as they are, and relative to the range of the reference's own output where that exceeds 1.
On the finest checkerboard a trained network may answer with -2 to 3, and rounding grows with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from deploy.difference import Difference, difference, worst_of
from deploy.verdict import Worst
from srkd.errors import SrkdError
from srkd.metrics import psnr

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from deploy.engines import Engine
    from deploy.inputs import Input
    from srkd.types import Facts

BORDER_PX = 8  # LR pixels; padding faults show in this band


@dataclass(frozen=True)
class Task:
    """Mean PSNR-Y in dB against HR of the reference (the network in torch, in E1) and of the engine, on the
    same photographs."""

    photographs: int
    torch_db: float
    engine_db: float

    @property
    def delta_db(self) -> float:
        return 0.0 if self.torch_db == self.engine_db else self.engine_db - self.torch_db


@dataclass(frozen=True)
class Comparison:
    """Numbers over all gated inputs, a row per input, PSNR against HR where inputs have it.

    `relative_by_kind` has the relative numbers of the photographs and of the patterns apart.
    """

    rows: tuple[dict[str, Any], ...]
    numbers: Difference
    relative: Difference
    relative_by_kind: dict[str, Difference]
    task: Task | None
    worst: Worst


class RefusedError(SrkdError):
    """An engine refused an input, or answered in another size. Holds what the inputs before it gave."""

    def __init__(self, message: str, rows: tuple[dict[str, Any], ...], worst: Worst | None) -> None:
        super().__init__(message)
        self.rows = rows
        self.worst = worst


def compare(reference: Engine, engine: Engine, facts: Facts, inputs: Iterable[Input]) -> Comparison:
    """Run both on every input, at least one of which must be gated."""
    rows: list[dict[str, Any]] = []
    gated: list[Difference] = []
    relative: dict[str, list[Difference]] = {}
    scores: list[tuple[float, float]] = []
    worst: Worst | None = None
    for item in inputs:
        try:
            x, y = reference(item.lr), engine(item.lr)
            found = _compare(x, y, item, facts)
        except SrkdError as error:
            raise RefusedError(f"{item.name}: {error}", tuple(rows), worst) from error
        rows.append({"input": item.name, "kind": item.kind, "gated": item.gated, **found.to_json()})
        if item.gated:
            if worst is None or found.max_abs > max(g.max_abs for g in gated):
                image = slice(found.worst.image, found.worst.image + 1)
                worst = Worst(item.name, x[image], y[image], found.worst.y, found.worst.x)
            gated.append(found)
            span = max(1.0, float(x.max() - x.min()))
            scaled = found if span == 1 else _compare(x / span, y / span, item, facts)
            relative.setdefault(item.kind, []).append(scaled)
        if item.hr is not None and not found.nonfinite:
            scores.append(_score(x, y, item.hr, facts.scale))
    assert worst is not None
    columns = list(zip(*scores, strict=True))
    task = Task(len(scores), fmean(columns[0]), fmean(columns[1])) if scores else None
    by_kind = {kind: worst_of(parts) for kind, parts in relative.items()}
    overall = worst_of([part for parts in relative.values() for part in parts])
    return Comparison(tuple(rows), worst_of(gated), overall, by_kind, task, worst)


def _compare(x: np.ndarray, y: np.ndarray, item: Input, facts: Facts) -> Difference:
    n, _, h, w = item.lr.shape
    need = (n, 3, facts.scale * h, facts.scale * w)
    if y.shape != need or x.shape != need:
        raise SrkdError(
            f"the output is {y.shape} (of the reference: {x.shape}), a x{facts.scale} one is {need}"
        )
    return difference(x, y, item.name, border_px=facts.scale * BORDER_PX)


def _score(x: np.ndarray, y: np.ndarray, hr: np.ndarray, scale: int) -> tuple[float, float]:
    target = torch.from_numpy(hr)
    reference_db, engine_db = (
        psnr(torch.from_numpy(sr.copy()), target, scale).mean().item() for sr in (x, y)
    )
    return reference_db, engine_db
