"""Small networks exported once for all tests of deploy/."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import deploy.graph
from deploy.graph import Graph, export_graph
from deploy.photographs import load_photographs
from srkd.models import load_model, save_model
from srkd.networks import build, build_family

if TYPE_CHECKING:
    from deploy.inputs import Photo
    from srkd.loaded import LoadedModel

# Small, and each unlike the others: staged tail, global pooling, one-step tail without mean shift, windows.
NETWORKS = {
    "edsr_tiny": lambda: build("edsr_tiny", 2),
    "rcan_a": lambda: build("rcan_a", 3),
    "edsr_mlperf": lambda: build("edsr_mlperf_f32b5", 2),
    "swinir_small": lambda: build_family("swinir", {"scale": 2, "channels": 12, "depths": (2,)}),
}


@dataclass(frozen=True)
class Exported:
    model: LoadedModel
    graph: Graph


@pytest.fixture(scope="session")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of untrained networks, by name."""
    folders = {}
    for name, make in NETWORKS.items():
        torch.manual_seed(1)
        folders[name] = tmp_path_factory.mktemp("runs") / name
        save_model(folders[name], make(), {})
    return folders


@pytest.fixture(scope="session")
def exported(run_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> _Exports:
    """`exported("rcan_a")` is the network and its graph, made at the first call; with a size (h, w) a static one."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return _Exports(run_folders, shared / "graphs")


class _Exports:
    """Graphs in a folder that test processes side by side share: the exporter takes seconds for each."""

    def __init__(self, folders: dict[str, Path], out: Path) -> None:
        self.folders, self.out = folders, out
        self.made: dict[tuple[str, tuple[int, int] | None], Exported] = {}

    def __call__(self, name: str, size: tuple[int, int] | None = None) -> Exported:
        if (name, size) not in self.made:
            model = load_model(self.folders[name])
            only = "" if size is None else "_{}x{}".format(*size)
            self.made[name, size] = Exported(
                model, self._graph(model, self.out / f"{name}{only}.onnx", size)
            )
        return self.made[name, size]

    def _graph(self, model: LoadedModel, path: Path, size: tuple[int, int] | None) -> Graph:
        self.out.mkdir(exist_ok=True)
        facts = path.with_suffix(".json")
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if facts.is_file():
                return Graph(**{**json.loads(facts.read_text()), "path": path})
            graph = export_graph(model, path, size)
            facts.write_text(json.dumps({**vars(graph), "path": path.name}))
        return graph


@pytest.fixture
def run(run_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A run folder of its own."""
    return Path(shutil.copytree(run_folders["edsr_tiny"], tmp_path / "a1"))


@pytest.fixture
def fast_export(exported: _Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter takes seconds and is tested elsewhere: hand out the graph it made."""

    def copy_graph(
        model: LoadedModel,
        path: Path,
        size: tuple[int, int] | None = None,
        *,
        staged: bool = False,
    ) -> Graph:
        made = exported("edsr_tiny", size)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.graph.path, path)
        return Graph(**{**vars(made.graph), "path": path})

    monkeypatch.setattr(deploy.graph, "export_graph", copy_graph)


@pytest.fixture(scope="session")
def photographs() -> dict[int, list[Photo]]:
    """Eight built-in photographs by scale."""
    return {scale: load_photographs("builtin", scale) for scale in (2, 3)}
