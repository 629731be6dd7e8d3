"""MODEL: a run folder, a weights file, an official checkpoint, or a name from `weights/`.

    folder/model.json            what it is: family, arguments, scale, versions, training facts, scores
    folder/weights.safetensors   the network's weights, keys of ours

A network is rebuilt from model.json alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from srkd.errors import SrkdError, nearest
from srkd.files import read_json, replacing, sha256, write_json
from srkd.loaded import LoadedModel, load_state, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from srkd.networks.base import Network

FORMAT = 1
WEIGHTS_FOLDER = Path(__file__).resolve().parent.parent / "weights"


def load_model(spec: str | Path, scale: int | None = None) -> LoadedModel:
    """Load MODEL; `scale` picks between the scales of a bare name and refuses a model of another scale."""
    path = find_model(spec, scale)
    loaded = _load_folder(path) if path.is_dir() else _load_file(path, scale)
    if scale is not None and loaded.scale != scale:
        raise SrkdError(
            f"{spec} is a x{loaded.scale} network, but x{scale} was asked for; "
            f"choose a x{scale} model or --scale {loaded.scale}."
        )
    loaded.network.eval()
    return loaded


def find_model(spec: str | Path, scale: int | None = None) -> Path:
    """The run folder or weights file that `spec` means."""
    path = Path(spec)
    if path.is_dir() and (path / "model.json").is_file():
        return path
    if path.is_file():
        # A file of a run folder means the run folder, which knows what the tensors cannot tell.
        inside_run = path.name == "weights.safetensors" and (path.parent / "model.json").is_file()
        return path.parent if inside_run else path
    shipped = shipped_models()
    name = str(spec)
    wanted = [name, *(f"{name}_x{s}" for s in ([scale] if scale else (2, 3, 4)))]
    named = [s for s in shipped if s in wanted]
    if len(named) == 1:
        return WEIGHTS_FOLDER / named[0]
    if len(named) > 1:
        raise SrkdError(f"'{name}' names several models ({', '.join(named)}); give one of these.")
    if path.is_dir():
        raise SrkdError(
            f"{path} is a folder without model.json, so it is no run folder; give the folder that "
            "scripts/distill.py wrote, or a weights file."
        )
    listed = nearest(name, shipped) if shipped else "weights/ holds no shipped model yet."
    raise SrkdError(f"there is no file, run folder or shipped model '{spec}'; {listed}")


def shipped_models() -> list[str]:
    """Names of the networks in `weights/`, e.g. rcan_c_x4."""
    if not WEIGHTS_FOLDER.is_dir():
        return []
    return sorted(p.parent.name for p in WEIGHTS_FOLDER.glob("*/model.json"))


def _load_folder(folder: Path) -> LoadedModel:
    from srkd.networks import build_family

    description = folder / "model.json"
    info = read_json(description)
    if info.get("format") != FORMAT:
        raise SrkdError(
            f"{description} has format {info.get('format')!r}, this version reads {FORMAT}; "
            "use the srkd version that wrote it, or train again."
        )
    try:
        network = build_family(info["family"], info["arguments"])
        if info["scale"] != network.scale or not info["arguments"].get("rgb_range", 1) > 0:
            raise ValueError("its scale or range contradicts its arguments")
    except (
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise SrkdError(
            f"{description} is damaged ({error}); restore it or train again."
        ) from error
    weights = folder / "weights.safetensors"
    if info.get("weights_sha256") not in (None, sha256(weights) if weights.is_file() else None):
        raise SrkdError(
            f"{weights} is not the file that {description} describes (its hash differs or it is gone); "
            "restore both from one run."
        )
    load_state(network, read_safetensors(weights), weights)
    return LoadedModel(network, folder.resolve().name, folder, network.facts, info)


def _load_file(path: Path, scale: int | None) -> LoadedModel:
    from srkd.checkpoint import read_checkpoint

    return read_checkpoint(path, scale)


def save_model(
    folder: Path, network: Network, info: dict[str, Any], state: dict[str, Tensor] | None = None
) -> None:
    """Write weights.safetensors, then model.json, which names the weights by hash.

    `state` replaces the network's own weights (EMA). `info` adds training facts, scores, versions.
    """
    from safetensors.torch import save

    from srkd.networks import zoo_name

    tensors = {k: v.detach().cpu().contiguous() for k, v in (state or network.state_dict()).items()}
    weights = folder / "weights.safetensors"
    with replacing(weights) as temporary:
        temporary.write_bytes(save(tensors))
    description = {
        "format": FORMAT,
        "network": zoo_name(network.family, network.arguments),
        "family": network.family,
        "arguments": network.arguments,
        "scale": network.scale,
        "range": "RGB in [0, 1], in and out",
        "parameters": sum(p.numel() for p in network.parameters()),
        "weights_sha256": sha256(weights),
        **info,
    }
    write_json(folder / "model.json", description)
