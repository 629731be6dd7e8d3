"""Weights files without model.json: official checkpoints, files of other frameworks, bare files of ours.

    file -> tensors (never runs pickled code) -> layout, by its keys -> keys of ours -> sizes, from the
    tensors -> what tensors cannot tell (residual scale, range, mean shift), from a sidecar or a table

What no row of `srkd.networks.layouts` fits goes to spandrel, if installed.

Sidecar: `<same stem>.json` beside the file may hold {"scale": 4, "hyper_parameters": {"res_scale": 0.1,
"rgb_range": 255, "mean_shift": true}, "io": "... range 0..255 ..., no mean shift"}; every key is optional.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.errors import MissingError, SrkdError
from srkd.files import read_json
from srkd.loaded import LoadedModel, load_state, read_safetensors
from srkd.networks import ZOO, build_family, zoo_name
from srkd.networks.base import DIV2K_MEAN
from srkd.networks.layouts import LAYOUTS, MEAN_SHIFT_KEYS, Layout, State, translate
from srkd.networks.sizes import SIZES, UNWRITTEN
from srkd.types import Facts

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

MAX_BYTES = 4 * 1024**3
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
# Where frameworks put the weights inside the file. The averaged ones, where kept, are the published ones.
WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict")
MEAN_SHIFTS = {"sub_mean": -1, "add_mean": 1}


def read_checkpoint(path: Path, scale: int | None = None) -> LoadedModel:
    """Read a weights file into a network in eval mode.

    `notes` of the result say which layout was recognised, which sizes were inferred, and where residual
    scale, range and mean shift come from. Raises `SrkdError` for anything but a complete file of a known
    network of the asked `scale` (None: any).
    """
    state = read_tensors(path)
    sidecar = _sidecar(path)
    layout = next((x for x in LAYOUTS if x.fits(state)), None)
    if layout is None:
        first = ", ".join(list(state)[:3])
        loaded = _read_foreign(
            path,
            state,
            f"{path} fits no layout that srkd reads ({_layouts()}); it begins with {first}",
        )
    else:
        ours, leftovers = translate(layout, state)
        if leftovers:
            reason = (
                f"{path} looks like {layout.name}, but {len(leftovers)} of its tensors belong to "
                f"another variant (first: {leftovers[0]})"
            )
            loaded = _read_foreign(path, state, reason)
        else:
            loaded = _assemble(path, layout, ours, state, sidecar)
    for wanted, by in (
        (sidecar.get("scale"), f"its sidecar {path.stem}.json says"),
        (scale, "was asked for"),
    ):
        if isinstance(wanted, int) and wanted != loaded.scale:
            raise SrkdError(
                f"{path} is a x{loaded.scale} network, but x{wanted} {by}; "
                f"give a x{wanted} checkpoint or use x{loaded.scale}."
            )
    return loaded


def read_tensors(path: Path) -> State:
    """The flat dict of tensors in a weights file; wrapper dicts and a DataParallel prefix are taken off.

    Nothing in the file is ever executed. Damage, foreign formats, pickled objects, files over 4 GiB and
    weights that are not finite become an `SrkdError`.
    """
    if not path.is_file():
        raise SrkdError(f"there is no weights file {path}; check the path.")
    if path.stat().st_size > MAX_BYTES:
        raise SrkdError(
            f"{path} has {path.stat().st_size / 1024**3:.1f} GiB, more than the 4 GiB that a "
            "super-resolution network can need; give the weights alone, without optimiser state."
        )
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        content: Any = read_safetensors(path)
    elif suffix in PICKLED:
        content = _read_pickled(path)
    else:
        raise SrkdError(
            f"{path} is no weights file by its name; give a .safetensors, "
            f"{', '.join(PICKLED[:-1])} or {PICKLED[-1]} file."
        )
    if isinstance(content, dict):
        inner = next((w for w in WRAPPERS if isinstance(content.get(w), dict)), None)
        content = content if inner is None else content[inner]
    if not isinstance(content, dict) or not content:
        got = (
            type(content).__name__
            if content is not None and not isinstance(content, dict)
            else "nothing"
        )
        raise SrkdError(f"{path} holds {got}, not named tensors; give a state dict.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise SrkdError(
                f"{path} holds {type(value).__name__} under '{key}' where a named tensor is needed; "
                f"give a state dict, flat or under one of {', '.join(WRAPPERS)}."
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise SrkdError(
                f"tensor '{key}' of {path} has values that are not finite; the training that wrote it "
                "diverged or the file is damaged. Use an earlier checkpoint."
            )
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def _read_pickled(path: Path) -> Any:
    """`torch.load` that builds tensors and plain containers only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; failures are told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of arbitrary bytes: torch raises whatever it trips over
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is not None:
            raise SrkdError(
                f"{path} is a pickle that would run or import '{code[1]}'; it was refused and nothing "
                "was run. Give a file of tensors alone (a state dict or .safetensors)."
            ) from error
        raise SrkdError(
            f"{path} is not a readable weights file: it is empty, damaged, cut short, of another format, "
            "or pickles more than tensors, which is never read. Copy it again."
        ) from error


def _assemble(
    path: Path, layout: Layout, ours: State, state: State, sidecar: dict[str, Any]
) -> LoadedModel:
    """Sizes from the tensors, the rest from file constants, sidecar or table; then a strict load."""
    try:
        sizes = SIZES[layout.family](ours)
    except (LookupError, ValueError, ArithmeticError) as error:
        raise SrkdError(
            f"{path} looks like {layout.name}, but its sizes cannot be told ({error}); tensors are "
            "missing or of another variant. Copy it again or give another checkpoint."
        ) from error
    if sizes["scale"] not in (2, 3, 4):
        raise SrkdError(f"{path} is a x{sizes['scale']} network; this version has x2, x3 and x4.")
    arguments, said = _unwritten(path, layout, sizes, state, sidecar)
    network = build_family(layout.family, sizes | arguments)
    load_state(network, ours, path)
    listed = ", ".join(f"{k} {v}" for k, v in sizes.items())
    dropped = sum(layout.drops(key) and key not in MEAN_SHIFT_KEYS for key in state)
    if dropped:
        said.append(f"{dropped} tensors left out that no layer of the network reads")
    notes = (f"layout {layout.name}; from the tensors: {listed}", *said)
    info = {
        "network": zoo_name(layout.family, network.arguments),
        "family": layout.family,
        "arguments": network.arguments,
        "scale": network.scale,
        "parameters": sum(p.numel() for p in network.parameters()),
        "sidecar": sidecar,
    }
    return LoadedModel(network.eval(), path.stem, path, network.facts, info, notes)


@dataclass(frozen=True)
class Told:
    """What a sidecar says of the things that tensors cannot tell; None where it is silent."""

    residual_scale: float | None = None
    rgb_range: float | None = None
    mean_shift: bool | None = None


def _told(sidecar: dict[str, Any], name: str) -> Told:
    """Read `hyper_parameters` first, then the sentence under `io`. `name` is for messages."""
    hyper = sidecar.get("hyper_parameters")
    hyper = hyper if isinstance(hyper, dict) else {}
    io = str(sidecar.get("io", ""))
    in_words = re.search(r"range 0\.\.(255|1)\b", io)
    rgb_range = hyper.get("rgb_range", in_words[1] if in_words else None)
    mean_shift = hyper.get("mean_shift", "no mean shift" not in io if "mean shift" in io else None)
    if not isinstance(mean_shift, bool | None):
        raise SrkdError(f"{name} has mean_shift {mean_shift!r}, where true or false is needed.")
    residual_scale = hyper.get("res_scale", hyper.get("residual_scale"))
    return Told(
        _positive(residual_scale, "res_scale", name),
        _positive(rgb_range, "rgb_range", name),
        mean_shift,
    )


def _positive(value: Any, key: str, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise SrkdError(
            f"{name} has {key} {value!r}, where a positive number is needed; correct it."
        )
    return number


def _unwritten(
    path: Path, layout: Layout, sizes: dict[str, Any], state: State, sidecar: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments that sizes do not tell (residual scale, range, mean shift), with a note for each."""
    beside = f"sidecar {path.stem}.json"
    told = _told(sidecar, beside)
    arguments: dict[str, Any] = {}
    notes: list[str] = []
    unwritten = UNWRITTEN[layout.family]
    if "residual_scale" in unwritten:
        table, row = _table_residual_scale(sizes["channels"], sizes["blocks"], path)
        residual_scale, source = _first((told.residual_scale, beside), (table, row))
        arguments["residual_scale"] = residual_scale
        notes.append(f"residual scale {residual_scale:g} ({source})")

    in_file = _mean_shift_range(path, state)
    if in_file is None and told.rgb_range is None and layout.rgb_range is None:
        raise SrkdError(
            f"{path} does not tell its range: networks of {layout.name} were trained on images in 0..255 or "
            f'in 0..1. Write {{"hyper_parameters": {{"rgb_range": 255}}}}, or 1, in {path.stem}.json beside it.'
        )
    usual = f"as {layout.name} networks have it"
    rgb_range, source = _first(
        (in_file, "constants of the file"), (told.rgb_range, beside), (layout.rgb_range, usual)
    )
    notes.append(f"internal range 0..{rgb_range:g} ({source})")
    mean_shift, source = _first(
        (None if in_file is None else True, "constants of the file"),
        (told.mean_shift, beside),
        # EDSR with the one-step tail is the mobile network, which has no mean shift.
        (
            layout.mean_shift and (layout.family != "edsr" or sizes["tail"] != "one_step"),
            usual,
        ),
    )
    notes.append(f"{'DIV2K mean shift' if mean_shift else 'no mean shift'} ({source})")

    for key, value, only in (
        ("rgb_range", rgb_range, layout.rgb_range),
        ("mean_shift", mean_shift, layout.mean_shift),
    ):
        if key in unwritten:
            arguments[key] = value
        elif value != only:
            raise SrkdError(
                f"{path} has {key} {value} by its {beside}, but {layout.family} networks have {only} "
                "here; correct the sidecar or give another checkpoint."
            )
    return arguments, notes


def _first(*options: tuple[T | None, str]) -> tuple[T, str]:
    """The first known value, with its source."""
    return next((value, source) for value, source in options if value is not None)


def _table_residual_scale(channels: int, blocks: int, path: Path) -> tuple[float, str]:
    """Residual scale by width and depth, as the zoo has it; with where it comes from."""
    for name, entry in ZOO.items():
        a = entry.arguments
        if entry.family == "edsr" and (a["channels"], a["blocks"]) == (channels, blocks):
            return a.get("residual_scale", 1.0), f"table by width and depth: {name}"
    value = 0.1 if channels >= 256 else 1.0
    return value, (
        f"ASSUMED: no table entry for {channels} channels and {blocks} blocks; "
        f"set hyper_parameters.res_scale in {path.stem}.json"
    )


def _mean_shift_range(path: Path, state: State) -> float | None:
    """Range that the frozen mean-shift convolutions of a head/tail file stand for; None without them.

    sub_mean is the identity with bias -range * mean, add_mean the identity with bias +range * mean.
    """
    if not any(f"{module}.bias" in state for module in MEAN_SHIFTS):
        return None
    mean = torch.tensor(DIV2K_MEAN)
    for rgb_range in (255.0, 1.0):
        fits = (
            _close(state.get(f"{module}.bias"), sign * rgb_range * mean)
            and _close(state.get(f"{module}.weight"), torch.eye(3).view(3, 3, 1, 1))
            for module, sign in MEAN_SHIFTS.items()
        )
        if all(fits):
            return rgb_range
    found = {
        key: [round(float(v), 3) for v in state[key].flatten()[:3]]
        for key in MEAN_SHIFT_KEYS
        if key in state
    }
    raise SrkdError(
        f"{path} does not subtract and add the DIV2K mean: its constants are {found}, where identities "
        f"and -/+ {[round(m * 255, 3) for m in DIV2K_MEAN]} (or a 255th of it) are needed. "
        "The file belongs to another network."
    )


def _close(found: Tensor | None, expected: Tensor) -> bool:
    """True also for a constant that the file leaves out."""
    if found is None:
        return True
    return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-3)


def _sidecar(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    return read_json(beside) if beside.is_file() else {}


def _layouts() -> str:
    return ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))


# --- networks that are not ours ---------------------------------------------------------------


class Foreign(nn.Module):
    """A network of another library: (N, 3, h, w) in [0, 1] -> (N, 3, scale*h, scale*w), any h, w >= 1.

    Pads bottom and right by repeating the border where the network asks for a size multiple or a
    minimum, and crops the output.
    """

    def __init__(self, model: nn.Module, scale: int, multiple: int, minimum: int) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.multiple = multiple
        self.minimum = minimum

    def forward(self, lr: Tensor) -> Tensor:
        h, w = lr.shape[-2:]
        more_h, more_w = (self._padded(size) - size for size in (h, w))
        # A copy in any case: some networks scale their input in place.
        padded = bool(more_h or more_w)
        lr = F.pad(lr, (0, more_w, 0, more_h), mode="replicate") if padded else lr.clone()
        return self.model(lr)[..., : self.scale * h, : self.scale * w]

    def _padded(self, size: int) -> int:
        return math.ceil(max(size, self.minimum) / self.multiple) * self.multiple


def _read_foreign(path: Path, state: State, reason: str) -> LoadedModel:
    """What no layout of ours fits, through spandrel. `reason` says why, for the message."""
    try:
        spandrel: Any = import_module(
            "spandrel"
        )  # an optional extra, so unknown to the type checker
    except ModuleNotFoundError as error:
        if error.name != "spandrel":
            raise MissingError(
                f"spandrel is installed but lacks {error.name}; install that too."
            ) from error
        raise SrkdError(f"{reason}. `pip install srkd[spandrel]` reads many more.") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingError(
            f"{reason}; and spandrel is installed but does not import ({error})."
        ) from error
    try:
        found = spandrel.ModelLoader(device="cpu").load_from_state_dict(dict(state))
    except Exception as error:  # 40 architectures, each raises its own
        said = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0]
        raise SrkdError(f"{reason}, and spandrel cannot read it either ({said}).") from error
    needs = found.size_requirements
    colours = {found.input_channels, found.output_channels}
    if not isinstance(found, spandrel.ImageModelDescriptor) or colours != {3} or needs.square:
        raise SrkdError(
            f"{path} is a {found.architecture.name} network that does not map any RGB image to an RGB "
            "image; give a super-resolution network."
        )
    multiple = needs.multiple_of or 1
    network = Foreign(found.model, found.scale, multiple, needs.minimum or 1).eval()
    facts = Facts(
        scale=found.scale,
        receptive_field_px=None,
        exact_tiling=False,
        size_multiple=multiple,
    )
    parameters = sum(p.numel() for p in network.parameters())
    info = {"family": found.architecture.name, "scale": found.scale, "parameters": parameters}
    notes = (f"layout {found.architecture.name}, read by spandrel: outputs only, no groups",)
    return LoadedModel(network, path.stem, path, facts, info, notes)
