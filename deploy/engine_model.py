"""Exported files and engines as MODEL, so that upscaling and evaluation take them as they take networks.

load_any("runs/x/deploy/x_fp32.onnx")     the file, as the engine it was exported for runs it
load_any("runs/x", engine="ort")          the file of that engine in runs/x/deploy
load_any("runs/x", engine="torch")        the network itself, like load_any("runs/x")
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from deploy.engines import engine_kind, load_engine, open_network_engine
from deploy.places import default_folder
from deploy.sidecar import read_sidecar, sidecar_path
from srkd.devices import pick_device
from srkd.errors import SrkdError
from srkd.infer import feature_channels
from srkd.loaded import LoadedModel
from srkd.models import load_model
from srkd.tiling import largest_tile
from srkd.types import ANY_SIZE, Limits

if TYPE_CHECKING:
    from deploy.engines import Engine
    from deploy.sidecar import Sidecar

GRAPH = ".onnx"
EXPORTED = (GRAPH, ".plan")
TORCH = "torch"
# What runtimes say when an allocation fails; each raises it as an exception of its own.
OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "out of memory", "outofmemory")


class EngineNetwork(nn.Module):
    """An engine in the place of a network: (N, 3, h, w) -> (N, 3, scale*h, scale*w), no parameters.

    Tensors of any device are taken; the engine itself runs where it was opened for. `channels` is the
    width of the features, from which the memory of a tile is estimated.
    """

    def __init__(self, engine: Engine, channels: int) -> None:
        super().__init__()
        self.engine = engine
        self.scale = engine.scale
        self.channels = channels

    def forward(self, lr: Tensor) -> Tensor:
        try:
            sr = self.engine(np.ascontiguousarray(lr.detach().cpu().numpy()))
        except SrkdError as error:
            # Of the two only the cause has all that the runtime said.
            said = f"{error} {error.__cause__}".lower()
            if any(words in said for words in OUT_OF_MEMORY):
                raise MemoryError(str(error)) from error
            raise
        # The result of a runtime may be read-only or reused, so it is copied.
        return torch.from_numpy(sr.copy()).to(lr.device)


def load_any(spec: str | Path, scale: int | None = None, engine: str | None = None) -> LoadedModel:
    """Load MODEL as `srkd.models.load_model` does, or an exported file, or the export for `engine`.

    The parity verdict of an exported file is repeated in the notes, and one that failed is refused.
    """
    path = Path(spec)
    if path.suffix in EXPORTED and not path.is_dir():
        return _exported(path, scale, engine)
    if engine is None or engine == TORCH:
        return load_model(spec, scale)
    if engine_kind(engine).source == "network":
        return _through(engine, load_model(spec, scale))
    return _exported(_find_export(spec, scale, engine), scale, engine)


def _through(engine: str, model: LoadedModel) -> LoadedModel:
    """The network run by another engine than plain torch."""
    parameters = sum(p.numel() for p in model.network.parameters())
    return replace(
        model,
        network=EngineNetwork(open_network_engine(engine, model), feature_channels(model.network)),
        info={**model.info, "engine": engine, "parameters": parameters},
    )


def device_for(model: LoadedModel, name: str) -> str:
    """Device of the tensors given to MODEL: `name` as `pick_device` has it, the CPU for an exported file."""
    if not isinstance(model.network, EngineNetwork):
        return str(pick_device(name))
    if name != "auto":
        raise SrkdError(
            f"--device {name} does not move {model.name}: an exported file runs on what it was exported for. "
            "Leave --device out, or give the run folder to run the network there."
        )
    return "cpu"


def _exported(file: Path, scale: int | None, engine: str | None) -> LoadedModel:
    """An exported file; `engine` other than the one it was verified for is refused."""
    if engine is not None and file.is_file() and (own := read_sidecar(file).engine) != engine:
        engine_kind(engine)
        raise SrkdError(
            f"{file} was exported and checked for engine '{own}', not for '{engine}'; leave --engine out, or "
            f"export the network for it: python deploy/export.py MODEL --engine {engine}"
        )
    loaded = load_engine(file)
    facts, sidecar = loaded.facts, loaded.sidecar
    if scale not in (None, facts.scale):
        raise SrkdError(
            f"{file} is a x{facts.scale} network, but x{scale} was asked for; choose a x{scale} model or --scale "
            f"{facts.scale}."
        )
    channels = (sidecar.model.get("arguments") or {}).get("channels", 64)
    return LoadedModel(
        network=EngineNetwork(loaded.engine, channels),
        name=file.stem,
        source=file,
        facts=facts,
        info={
            "engine": sidecar.engine,
            "precision": sidecar.precision,
            "parameters": sidecar.model.get("parameters"),
        },
        notes=loaded.notes,
        limits=_limits(sidecar, channels),
    )


def _limits(sidecar: Sidecar, channels: int) -> Limits:
    """The sizes that a built engine takes; a graph takes any.

    TensorRT counts the elements of a convolution's tensors with 32 bits ("Volume Limits" of its operator
    reference), so the largest size is cut to what `largest_tile` allows.
    """
    if Path(sidecar.file).suffix == GRAPH:
        return ANY_SIZE
    smallest, largest = (sidecar.sizes[which] for which in ("min", "max"))
    countable = largest_tile(sidecar.network_facts, channels)
    if largest[0] * largest[1] > countable**2:
        largest = [min(side, countable) for side in largest]
    return Limits((smallest[0], smallest[1]), (largest[0], largest[1]))


def _find_export(spec: str | Path, scale: int | None, engine: str) -> Path:
    """The only file that `deploy/export.py` left for this engine in its default folder."""
    kind = engine_kind(engine)
    model = load_model(spec, scale)
    folder = default_folder(model)
    found = [
        file
        for file in sorted(folder.glob(f"*{kind.suffix}"))
        if sidecar_path(file).is_file() and read_sidecar(file).engine == engine
    ]
    if len(found) > 1:
        raise SrkdError(
            f"{folder} holds several files for engine '{engine}' ({', '.join(f.name for f in found)}); give one "
            "of them as MODEL."
        )
    if not found:
        words = ["python", "deploy/export.py", str(spec), "--engine", engine]
        words += ["--scale", str(scale)] if scale else []
        raise SrkdError(
            f"{folder} holds no file for engine '{engine}'; export the network for it first: {shlex.join(words)}"
        )
    return found[0]
