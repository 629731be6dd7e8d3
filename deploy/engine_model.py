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

from deploy.engines import engine_kind, engine_settings, load_engine, open_network_engine
from deploy.places import GRAPH_SUFFIX, SUFFIXES, default_folder, engine_named
from deploy.sidecar import read_sidecar, sidecar_path
from srkd.devices import pick_device
from srkd.errors import SrkdError
from srkd.infer import feature_channels
from srkd.loaded import LoadedModel
from srkd.models import load_model
from srkd.types import ANY_SIZE, Limits

if TYPE_CHECKING:
    from deploy.engines import Engine
    from deploy.sidecar import Sidecar

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


def load_any(
    spec: str | Path, scale: int | None = None, engine: str | None = None, device: str = "auto"
) -> LoadedModel:
    """Load MODEL as `srkd.models.load_model` does, or an exported file, or the export for `engine`.

    `device` is for engines that run the network themselves (torch-compile); an exported file has its own. Its
    parity verdict is repeated in the notes, and one that failed is refused.
    """
    path = Path(spec)
    if path.suffix in SUFFIXES and not path.is_dir():
        return _exported(path, scale, engine)
    if engine is None or engine == TORCH:
        return load_model(spec, scale)
    if engine_kind(engine).source == "network":
        return _through(engine, load_model(spec, scale), device)
    return _exported(_find_export(spec, scale, engine), scale, engine)


def _through(engine: str, model: LoadedModel, device: str) -> LoadedModel:
    """The network run by another engine than plain torch, on `device` (cpu, cuda, auto)."""
    settings = engine_settings(engine, device=str(pick_device(device)))
    opened = open_network_engine(engine, model, settings=settings)
    parameters = sum(p.numel() for p in model.network.parameters())
    return replace(
        model,
        network=EngineNetwork(opened, feature_channels(model.network)),
        info={**model.info, "engine": engine, "parameters": parameters},
    )


def device_for(model: LoadedModel, name: str) -> str:
    """Device of the tensors given to MODEL: `name` as `pick_device` has it, the CPU for an engine.

    An engine that runs the network was opened on its device by `load_any`; an exported file has its own.
    """
    if not isinstance(model.network, EngineNetwork):
        return str(pick_device(name))
    if name != "auto" and engine_kind(str(model.info["engine"])).source != "network":
        raise SrkdError(
            f"--device {name} does not move {model.name}: an exported file runs on what it was exported for. "
            "Leave --device out, or run the network there: the run folder, with --engine torch."
        )
    return "cpu"


def _exported(file: Path, scale: int | None, engine: str | None) -> LoadedModel:
    """An exported file; `engine` other than the one it was verified for is refused."""
    if engine is not None and engine_kind(engine).source == "network":
        raise SrkdError(
            f"{file} is an exported file, and engine '{engine}' runs the network itself; give the run folder "
            f"with --engine {engine}."
        )
    if engine is not None and file.is_file() and (own := read_sidecar(file).engine) != engine:
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
        limits=_limits(sidecar),
    )


def _limits(sidecar: Sidecar) -> Limits:
    """The sizes that a built engine or a static graph takes; other graphs take any."""
    if Path(sidecar.file).suffix == GRAPH_SUFFIX and not sidecar.static:
        return ANY_SIZE
    smallest, largest = (sidecar.sizes[which] for which in ("min", "max"))
    return Limits((smallest[0], smallest[1]), (largest[0], largest[1]))


def _find_export(spec: str | Path, scale: int | None, engine: str) -> Path:
    """The only file that `deploy/export.py` left for this engine in its default folder.

    Names tell the engine, so that a damaged record of another file stands in nobody's way.
    """
    kind = engine_kind(engine)
    model = load_model(spec, scale)
    folder = default_folder(model)
    found = [
        file
        for file in sorted(folder.glob(f"*{kind.suffix}"))
        if engine_named(file) == engine and sidecar_path(file).is_file()
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
