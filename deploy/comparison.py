"""Two engines on the same pictures: the numbers behind an edge of the parity chain.

Errors are given twice: as they are, and relative to the range of the reference's own output where that exceeds 1.
On the finest checkerboard a trained network may answer with -2 to 3, and rounding grows with it.

On some patterns float32 itself is lost: of BSRN's answer to the checkerboard, -947 to 752, the network in
torch is off by 19 (against float64). No error within a few times that tells of a fault (`without_lost_patterns`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from deploy.difference import Difference, difference, worst_of
from deploy.verdict import Task, Worst, judge
from srkd.errors import SrkdError
from srkd.metrics import psnr

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from deploy.engines import Engine
    from deploy.inputs import Input
    from deploy.verdict import Gate
    from srkd.types import Facts

BORDER_PX = 8  # LR pixels; padding faults show in this band


@dataclass(frozen=True)
class Part:
    """One gated input and its errors, as they are and relative."""

    item: Input
    found: Difference
    relative: Difference


@dataclass(frozen=True)
class Comparison:
    """Every gated input, a row for each input, PSNR against HR where inputs have it."""

    rows: tuple[dict[str, Any], ...]
    parts: tuple[Part, ...]
    task: Task | None
    worst: Worst

    @property
    def numbers(self) -> Difference:
        return worst_of([part.found for part in self.parts])

    @property
    def relative(self) -> Difference:
        return worst_of([part.relative for part in self.parts])

    def only(self, kind: str) -> Comparison:
        """The photographs or the patterns alone."""
        return replace(self, parts=tuple(p for p in self.parts if p.item.kind == kind))


class RefusedError(SrkdError):
    """An engine refused an input, or answered in another size. Holds what the inputs before it gave."""

    def __init__(self, message: str, rows: tuple[dict[str, Any], ...], worst: Worst | None) -> None:
        super().__init__(message)
        self.rows = rows
        self.worst = worst


def compare(reference: Engine, engine: Engine, facts: Facts, inputs: Iterable[Input]) -> Comparison:
    """Run both on every input, at least one of which must be gated."""
    rows: list[dict[str, Any]] = []
    parts: list[Part] = []
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
            if worst is None or found.max_abs > max(p.found.max_abs for p in parts):
                image = slice(found.worst.image, found.worst.image + 1)
                worst = Worst(item.name, x[image], y[image], found.worst.y, found.worst.x)
            span = max(1.0, float(x.max() - x.min()))
            relative = found if span == 1 else _compare(x / span, y / span, item, facts)
            parts.append(Part(item, found, relative))
        if item.hr is not None and not found.nonfinite:
            scores.append((psnr_y(x, item.hr, facts.scale), psnr_y(y, item.hr, facts.scale)))
    assert worst is not None
    columns = list(zip(*scores, strict=True))
    task = Task(len(scores), fmean(columns[0]), fmean(columns[1])) if scores else None
    return Comparison(tuple(rows), tuple(parts), task, worst)


def _compare(x: np.ndarray, y: np.ndarray, item: Input, facts: Facts) -> Difference:
    n, _, h, w = item.lr.shape
    need = (n, 3, facts.scale * h, facts.scale * w)
    if y.shape != need or x.shape != need:
        raise SrkdError(
            f"the output is {y.shape} (of the reference: {x.shape}), a x{facts.scale} one is {need}"
        )
    return difference(x, y, item.name, border_px=facts.scale * BORDER_PX)


def psnr_y(sr: np.ndarray, hr: np.ndarray, scale: int) -> float:
    """Mean PSNR-Y in dB of a batch (N, 3, H, W), `scale` pixels of border left out: the task's own number."""
    return psnr(torch.from_numpy(sr.copy()), torch.from_numpy(hr), scale).mean().item()


# --- where float32 itself is lost -----------------------------------------------------------------


@dataclass(frozen=True)
class Float32:
    """How far a network in float32 is from the same network in float64: both in torch."""

    single: Engine
    double: Engine

    def multiple(self, part: Part) -> float:
        """The errors of `part` over float32's own on that input: of max abs or rms, the larger quotient.

        Infinite where float32 loses nothing, or where a network of another's code cannot run in float64.
        """
        try:
            own = difference(self.double(part.item.lr), self.single(part.item.lr))
        except SrkdError:
            return math.inf
        if own.nonfinite or part.found.nonfinite or own.max_abs == 0:
            return math.inf
        rms = 10 ** ((own.psnr_db - part.found.psnr_db) / 20)
        return max(rms, part.found.max_abs / own.max_abs)


def without_lost_patterns(
    found: Comparison, gate: Gate, float32: Float32 | None
) -> tuple[Comparison, str]:
    """`found` without patterns that exceed the gate by float32's own fault, and a sentence about them.

    A pattern that the gate stops is left out where its error is at most `gate.float32_errors` times what
    float32 loses on it. Photographs are never left out, nor the last input.
    """
    if gate.float32_errors is None or float32 is None:
        return found, ""
    kept, told = [], []
    for part in found.parts:
        beyond = part.item.kind == "pattern" and judge(part.relative, gate)[0] != "PASS"
        multiple = float32.multiple(part) if beyond else math.inf
        if multiple <= gate.float32_errors:
            told.append(f"; {part.item.name}: {multiple:.2g} times what float32 itself loses on it")
        else:
            kept.append(part)
    return (replace(found, parts=tuple(kept)), "".join(told)) if kept else (found, "")
