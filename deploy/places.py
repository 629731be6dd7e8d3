"""Where an export lies: one folder for a network, one name for every precision and engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.engines import EngineKind
    from srkd.loaded import LoadedModel


def default_folder(model: LoadedModel) -> Path:
    """`deploy/` in a run folder; shipped networks and single files get `deploy_out/<name>`."""
    from srkd.models import WEIGHTS_FOLDER

    shipped = model.source.resolve().parent == WEIGHTS_FOLDER.resolve()
    if model.source.is_dir() and not shipped:
        return model.source / "deploy"
    return Path("deploy_out") / model.name


def export_file(folder: Path, name: str, engine: str, precision: str, kind: EngineKind) -> Path:
    """name_fp32.onnx for the engine onnx; the others, which may share its folder, say who they are."""
    own = "" if engine == "onnx" else f".{engine}"
    return folder / f"{name}_{precision}{own}{kind.suffix}"
