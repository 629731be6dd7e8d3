"""MODEL: a run folder, a weights file, an official checkpoint, or a name from `weights/`.

    folder/model.json            what it is: family, arguments, scale, versions, training facts, scores
    folder/weights.safetensors   the network's weights, keys of ours

A network is rebuilt from model.json alone. An aggregated teacher (the first stage of MTKD) needs its teachers
too: model.json says which, by the hash of their weights, in order, and recipe.toml of the folder says where they
are (`teacher.models`). Its weights.safetensors holds the aggregation network. The teacher of PISR (its first stage)
has encoder and decoder in one file; it is given HR images, so it is no MODEL.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srkd.errors import SrkdError, nearest
from srkd.files import read_json, replacing, sha256, write_json
from srkd.loaded import LoadedModel, load_state, read_safetensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from srkd.networks.base import Network
    from srkd.networks.dctswin import DctSwin
    from srkd.networks.privileged import PrivilegedTeacher

FORMAT = 1
INSIDE_A_RUN = ("stage1", "baseline")
AGGREGATE_FAMILY = "dctswin"
PRIVILEGED_FAMILY = "privileged"
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
    """The run folder or weights file that `spec` means: a path, else a name from `weights/`.

    The whole name of a folder there (rcan_a_x4_scratch) means that folder. A bare network (rcan_a) means
    `<network>_x<scale>`, without `scale` the only one there is; how a network was trained is never guessed.
    """
    path = Path(spec)
    if path.is_dir() and (path / "model.json").is_file():
        return path
    if path.is_file():
        # A file of a run folder means the run folder, which knows what the tensors cannot tell.
        inside_run = path.name == "weights.safetensors" and (path.parent / "model.json").is_file()
        return path.parent if inside_run else path
    shipped = shipped_models()
    name = str(spec)
    wanted = [f"{name}_x{s}" for s in ([scale] if scale else (2, 3, 4))]
    named = [name] if name in shipped else [s for s in shipped if s in wanted]
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
    if unset := re.findall(r"\$\{?(\w+)", name):
        listed = f"the environment variable {unset[0]} is not set."
    raise SrkdError(f"there is no file, run folder or shipped model '{spec}'; {listed}")


def shipped_models(folder: Path | None = None) -> list[str]:
    """Names of the networks in `weights/` (or another folder laid out so), e.g. rcan_c_x4."""
    place = WEIGHTS_FOLDER if folder is None else folder
    return sorted(p.parent.name for p in place.glob("*/model.json")) if place.is_dir() else []


def shipped_name(path: Path) -> str | None:
    """The name under which a folder of `weights/` is found, None for every other path."""
    inside = path.resolve().parent == WEIGHTS_FOLDER.resolve()
    return path.name if inside and (path / "model.json").is_file() else None


def _load_folder(folder: Path) -> LoadedModel:
    from srkd.networks.dctswin import DctSwin
    from srkd.networks.privileged import PrivilegedTeacher

    network, info = _read_folder(folder)
    if isinstance(network, DctSwin):
        return _aggregate(folder, network, info, None)
    if isinstance(network, PrivilegedTeacher):
        raise SrkdError(
            f"{folder} holds the teacher of a pisr run, which is given the HR image itself and upscales nothing; give "
            "the run's student, or use it as --stage1 of another run."
        )
    return LoadedModel(network, _name(folder), folder, network.facts, info)


def load_aggregate(
    folder: Path, teachers: Sequence[str] | None = None, scale: int | None = None
) -> LoadedModel:
    """The aggregated teacher in a run folder; its network is a `srkd.aggregate.Aggregate`, in eval mode.

    `teachers` are other places of the same weights, in the same order; default: `teacher.models` of the
    folder's recipe.toml. Other weights, another order and another `scale` are refused.
    """
    from srkd.networks.dctswin import DctSwin

    network, info = _read_folder(folder)
    if not isinstance(network, DctSwin):
        raise SrkdError(
            f"{folder} holds a network (family '{network.family}'), not an aggregated teacher; give the "
            "folder of a first stage."
        )
    _check_scale(folder, network.scale, scale)
    return _aggregate(folder, network, info, teachers)


def load_privileged(folder: Path, scale: int | None = None) -> LoadedModel:
    """The teacher of PISR in a run folder, in eval mode: its network is a `PrivilegedTeacher` and takes HR images."""
    from srkd.networks.privileged import PrivilegedTeacher

    network, info = _read_folder(folder)
    if not isinstance(network, PrivilegedTeacher):
        raise SrkdError(
            f"{folder} holds a network (family '{network.family}'), not a teacher that sees HR images; give the "
            "folder of a first stage of pisr."
        )
    _check_scale(folder, network.scale, scale)
    return LoadedModel(network.eval(), _name(folder), folder, network.facts, info)


def _check_scale(folder: Path, found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise SrkdError(
            f"the first stage in {folder} is x{found}, but x{wanted} was asked for; choose a first stage "
            f"of x{wanted}, or --scale {found}."
        )


def _aggregate(
    folder: Path, network: DctSwin, info: dict[str, Any], places: Sequence[str] | None
) -> LoadedModel:
    from srkd.aggregate import Aggregate

    try:
        known = [(member["name"], member["weights_sha256"]) for member in info["aggregates"]]
    except (TypeError, LookupError) as error:
        raise SrkdError(
            f"{folder / 'model.json'} is damaged (its list of teachers, 'aggregates': {error}); restore it or "
            "train again."
        ) from error
    specs = _teacher_places(folder) if places is None else list(places)
    teachers = _load_members(folder, specs, known, network.scale)
    aggregate = Aggregate(teachers, network).eval()
    notes = tuple(f"{teacher.name}: {note}" for teacher in teachers for note in teacher.notes)
    return LoadedModel(aggregate, _name(folder), folder, aggregate.facts, info, notes)


def _name(folder: Path) -> str:
    """A folder's own name; runs inside a run, which all have the same, with that of the run."""
    path = folder.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in INSIDE_A_RUN else path.name


def _teacher_places(folder: Path) -> list[str]:
    """`teacher.models` of the folder's recipe, with environment variables filled in."""
    path = folder / "recipe.toml"
    try:
        models = tomllib.loads(path.read_text(encoding="utf-8"))["teacher"]["models"]
        return [os.path.expandvars(spec) for spec in models]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, LookupError, TypeError) as error:
        raise SrkdError(
            f"{path} does not say where the teachers of this aggregated teacher are ({error!r}); restore it, or "
            "write [teacher] models = [...] into it, in the order of model.json."
        ) from error


def _load_members(
    folder: Path, specs: list[str], known: list[tuple[str, str]], scale: int
) -> list[LoadedModel]:
    """The teachers at these places, which must be the ones the aggregation network was trained with."""
    order = ", ".join(name for name, _ in known)
    if len(specs) != len(known):
        raise SrkdError(
            f"got {len(specs)} teacher{'s' * (len(specs) != 1)} ({', '.join(specs) or 'none'}), but {folder} aggregates {len(known)} "
            f"({order}); list these, in this order."
        )
    teachers = []
    for i, spec in enumerate(specs):
        try:
            teachers.append(load_model(spec, scale))
        except SrkdError as error:
            raise type(error)(
                f"teacher {i + 1} of {len(specs)} ({known[i][0]}) of {folder} cannot be loaded from {spec}: "
                f"{error} Its place is named by teacher.models of the recipe."
            ) from error
    found, wanted = [weights_hash(teacher) for teacher in teachers], [own for _, own in known]
    if found == wanted:
        return teachers
    if sorted(found) == sorted(wanted):
        right = ", ".join(specs[found.index(own)] for own in wanted)
        raise SrkdError(
            f"the teachers of {folder} are given in another order than it was trained with; list them as "
            f"{right} (teacher.models)."
        )
    wrong = next(i for i in range(len(specs)) if found[i] != wanted[i])
    raise SrkdError(
        f"teacher {wrong + 1} of {len(specs)} of {folder} was {known[wrong][0]}, but {specs[wrong]} holds other "
        "weights (its hash differs); restore that file or name its place in teacher.models, or train the "
        "first stage again with these teachers."
    )


def weights_hash(model: LoadedModel) -> str:
    """Hash of the file that a model was read from, with the sidecar that completes it.

    An aggregated teacher adds the hashes of its teachers, in order.
    """
    source = model.source
    if source.is_dir():
        own = sha256(source / "weights.safetensors")
        members = model.info.get("aggregates", ())
        return "+".join([own, *(member["weights_sha256"] for member in members)])
    sidecar = source.with_suffix(".json")
    return sha256(source) + (f"+{sha256(sidecar)}" if sidecar.is_file() else "")


def _read_folder(folder: Path) -> tuple[Network | DctSwin | PrivilegedTeacher, dict[str, Any]]:
    """The network that model.json describes, with the folder's weights, and model.json itself."""
    from srkd.networks import build_family

    description = folder / "model.json"
    info = read_json(description)
    if info.get("format") != FORMAT:
        raise SrkdError(
            f"{description} has format {info.get('format')!r}, this version reads {FORMAT}; "
            "use the srkd version that wrote it, or train again."
        )
    try:
        family, arguments = info["family"], info["arguments"]
        if family == AGGREGATE_FAMILY:
            network = _build_dctswin(arguments)
        elif family == PRIVILEGED_FAMILY:
            network = _build_privileged(arguments)
        else:
            network = build_family(family, arguments)
        if info["scale"] != network.scale or not arguments.get("rgb_range", 1) > 0:
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
    return network, info


def _build_dctswin(arguments: dict[str, Any]) -> DctSwin:
    from srkd.networks.dctswin import DctSwin, DctSwinConfig

    # JSON has lists, configs are hashable.
    return DctSwin(DctSwinConfig(**{**arguments, "depths": tuple(arguments["depths"])}))


def _build_privileged(arguments: dict[str, Any]) -> PrivilegedTeacher:
    from srkd.networks import build_family
    from srkd.networks.privileged import PrivilegedTeacher

    decoder = arguments["decoder"]
    return PrivilegedTeacher(build_family(decoder["family"], decoder["arguments"]))


def _load_file(path: Path, scale: int | None) -> LoadedModel:
    from srkd.checkpoint import read_checkpoint

    return read_checkpoint(path, scale)


def save_model(
    folder: Path, network: Network, info: dict[str, Any], state: dict[str, Tensor] | None = None
) -> None:
    """Write weights.safetensors, then model.json, which names the weights by hash.

    `state` replaces the network's own weights (EMA). `info` adds training facts, scores, versions.
    """
    from srkd.networks import zoo_name

    zoo = zoo_name(network.family, network.arguments)
    _save(folder, network, zoo, state or network.state_dict(), info)


def save_aggregate(
    folder: Path,
    network: DctSwin,
    teachers: Sequence[LoadedModel],
    hashes: Sequence[str],
    info: dict[str, Any],
) -> None:
    """The same for an aggregation network; its teachers are named in order, by `hashes` of `weights_hash`."""
    members = [
        {"name": teacher.name, "weights_sha256": own}
        for teacher, own in zip(teachers, hashes, strict=True)
    ]
    _save(folder, network, None, network.state_dict(), {"aggregates": members, **info})


def save_privileged(folder: Path, network: PrivilegedTeacher, info: dict[str, Any]) -> None:
    """The same for the teacher of PISR; `scores` in `info` are those of HR images as its input."""
    _save(folder, network, None, network.state_dict(), {"input": "the HR image", **info})


def _save(
    folder: Path,
    network: Network | DctSwin | PrivilegedTeacher,
    zoo: str | None,
    state: dict[str, Tensor],
    info: dict[str, Any],
) -> None:
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    weights = folder / "weights.safetensors"
    with replacing(weights) as temporary:
        temporary.write_bytes(save(tensors))
    description = {
        "format": FORMAT,
        "network": zoo,
        "family": network.family,
        "arguments": network.arguments,
        "scale": network.scale,
        "range": "RGB in [0, 1], in and out",
        "parameters": sum(p.numel() for p in network.parameters()),
        "weights_sha256": sha256(weights),
        **info,
    }
    write_json(folder / "model.json", description)
