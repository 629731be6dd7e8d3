"""Where an export lies: one folder for a network, one name for every precision and engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploy.engines import ENGINES

if TYPE_CHECKING:
    from deploy.engines import EngineKind
    from srkd.loaded import LoadedModel


GRAPH_SUFFIX = ENGINES["onnx"].suffix
SUFFIXES = {kind.suffix for kind in ENGINES.values()} - {""}


def default_folder(model: LoadedModel) -> Path:
    """`deploy/` in a run folder; shipped networks and single files get `deploy_out/<name>`."""
    from srkd.models import shipped_name

    if model.source.is_dir() and shipped_name(model.source) is None:
        return model.source / "deploy"
    return Path("deploy_out") / model.name


def export_file(
    folder: Path,
    name: str,
    engine: str,
    precision: str,
    kind: EngineKind,
    device: str | None = None,
    size: tuple[int, int] | None = None,
) -> Path:
    """name_fp32.onnx for the engine onnx; the others, which may share its folder, say who they are.

    A `device` other than the engine's usual one is in the name too, name_fp32.ort-cuda.onnx, and the only `size`
    (h, w) that a file takes: name_fp32_64x64.onnx. A model inside a run, `run/baseline`, gives run-baseline_fp32.onnx.
    """
    name = name.replace("/", "-")
    only = "" if size is None else "_{}x{}".format(*size)
    return folder / f"{name}_{precision}{only}{own_part(engine, kind, device)}{kind.suffix}"


def own_part(engine: str, kind: EngineKind, device: str | None = None) -> str:
    """What the name of an exported file says of its engine: nothing for onnx, .ort, .ort-cuda."""
    if engine == "onnx":
        return ""
    usual = next(iter(kind.runs))
    return f".{engine}" if device in (None, usual) else f".{engine}-{device}"


def engine_named(file: Path) -> str | None:
    """The engine that a file name of `export_file` tells: name_fp32.ort-cuda.onnx is of ort, None of none."""
    for name, kind in ENGINES.items():
        parts = {own_part(name, kind, device) for device in kind.runs} - {""}
        if kind.suffix and parts and file.name.endswith(tuple(p + kind.suffix for p in parts)):
            return name
    return "onnx" if file.suffix == GRAPH_SUFFIX else None
