"""What float16 alone costs a network: its float16 graph against the fp32 one, before any island is planned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import onnx

from deploy.difference import finite_or_none
from deploy.emulation import HalfEmulation
from deploy.graph import export_graph
from deploy.half import measure_half, to_half
from deploy.island_search import unfit_blocks
from deploy.ort_engine import OrtEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from deploy.inputs import Input
    from srkd.loaded import LoadedModel


@dataclass(frozen=True)
class HalfParity:
    """PSNR in dB of the worst photograph (infinite: equal, minus infinity: a value is not finite), the mean change
    of the task's PSNR (None without originals), and the values that are not finite on any picture."""

    psnr_db: float
    task_delta_db: float | None
    nonfinite: int

    def to_json(self) -> dict[str, Any]:
        return {name: finite_or_none(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        parts = [f"{self.nonfinite} values not finite"]
        if self.task_delta_db is not None:
            parts.insert(0, f"task PSNR {self.task_delta_db:+.4f} dB")
        if math.isfinite(self.psnr_db):
            parts.insert(0, f"worst photograph {self.psnr_db:.1f} dB")
        return ", ".join(parts)


def half_parity(model: LoadedModel, network: nn.Module, inputs: Sequence[Input]) -> HalfParity:
    """`network` as a float16 graph in the faithful emulation, against its own fp32 graph; facts are `model`'s.

    Blocks whose weights do not fit stay float32, as in every export.
    """
    with TemporaryDirectory() as folder:
        path = export_graph(replace(model, network=network), Path(folder) / "graph.onnx").path
        wide = onnx.load(path)
        half = HalfEmulation(to_half(wide, unfit_blocks(wide)), model.scale)
        gated = [item for item in inputs if item.gated]
        found = measure_half(OrtEngine(path, model.scale), half, model.facts, gated)
    photographs = {item.name for item in gated if item.kind == "photograph"}
    return HalfParity(
        min((d.psnr_db for d in found.judged if d.worst.input in photographs), default=math.inf),
        found.task_delta_db,
        sum(d.nonfinite for d in found.judged),
    )
