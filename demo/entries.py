"""What the shelf holds, in words: keys, labels and kinds of networks, and the engines of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from demo.jobs import BICUBIC, NEAREST, TRUTH
from demo.saying import without_folders
from deploy.engines import (
    CUDA_PROVIDER,
    ENGINES,
    PRECISIONS,
    available,
    require_engine,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from srkd.loaded import LoadedModel

Kind = Literal["teacher", "scratch", "distilled", "other"]

MOST_KEY_CHARACTERS = 40
TITLES = {
    "edsr": "EDSR",
    "rcan": "RCAN",
    "swinir": "SwinIR",
    "rdn": "RDN",
    "san": "SAN",
    "han": "HAN",
    "bsrn": "BSRN",
    "rlfn": "RLFN",
    "smfanet": "SMFANet",
}
ENGINE_TITLES = {
    "torch": "PyTorch",
    "torch-compile": "torch.compile",
    "ort": "ONNX Runtime",
    "openvino": "OpenVINO",
    "trt": "TensorRT",
    "trt-rtx": "TensorRT for RTX",
}
DEVICE_TITLES = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(frozen=True)
class ModelEntry:
    """A network on the shelf.

    key         what a `Choice` names
    label       for people: "RCAN-C, teacher", "RCAN-A, distilled by fitnet from RCAN-C"
    about       one line more: size, training
    scores      set -> {"psnr_y": dB, "ssim_y": 0..1} as model.json has them, protocol paper-y; empty if not measured
    engine, precision   the only ones that an exported file runs on; None: any
    """

    key: str
    label: str
    scale: int
    parameters: int
    kind: Kind
    about: str
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    engine: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class EngineEntry:
    """An engine: its precisions on the device that it would use here, none where `reason` says why not."""

    key: str
    label: str
    precisions: tuple[str, ...]
    reason: str | None
    device: str


# --- networks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """What is read of a network at the start: its record and the hash of its weights, not the weights."""

    name: str
    scale: int
    parameters: int
    info: dict[str, Any]
    weights: str

    @property
    def training(self) -> dict[str, Any]:
        return self.info.get("training") or {}

    @property
    def teachers(self) -> list[dict[str, Any]]:
        return self.training.get("teachers") or []


def known(model: LoadedModel, weights: str) -> Known:
    own = sum(p.numel() for p in model.network.parameters())
    # An exported file has no parameters of its own, but says how many the network had.
    parameters = own or int(model.info.get("parameters") or 0)
    return Known(model.name, model.scale, parameters, model.info, weights)


def entries(shelf: Iterable[Known]) -> list[ModelEntry]:
    """The entries of all networks, in their order: keys and labels are unique."""
    all_known = list(shelf)
    taught_by = {t.get("weights_sha256") for k in all_known for t in k.teachers}
    titles = {k.weights: _title(k) for k in all_known}
    largest = {k.scale: 0 for k in all_known}
    for k in all_known:
        largest[k.scale] = max(largest[k.scale], k.parameters)
    found: list[ModelEntry] = []
    for k in all_known:
        key = unique(slug(k.name), {TRUTH, NEAREST, BICUBIC, *(e.key for e in found)})
        label = _label(k, k.weights in taught_by, titles)
        if label in {e.label for e in found}:
            label = f"{label} ({key})"
        kind = kind_of(k, k.weights in taught_by, k.parameters == largest[k.scale])
        found.append(
            ModelEntry(
                key=key,
                label=label,
                scale=k.scale,
                parameters=k.parameters,
                kind=kind,
                about=_about(k),
                scores=k.info.get("scores") or {},
                engine=k.info.get("engine"),
                precision=k.info.get("precision"),
            )
        )
    return found


def kind_of(k: Known, teaches: bool, largest: bool) -> Kind:
    """By the training facts: what was trained without a teacher is one if it taught another, or is the largest."""
    method = k.training.get("method")
    if method is None:
        return "teacher" if teaches else "other"
    if method != "scratch":
        return "distilled"
    return "teacher" if teaches or largest else "scratch"


def slug(name: str) -> str:
    """A key from a name: small letters, digits, - and _, at most 40 characters."""
    cleaned = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-_")
    return cleaned[:MOST_KEY_CHARACTERS] or "model"


def unique(key: str, taken: set[str]) -> str:
    if key not in taken:
        return key
    return next(k for n in range(2, len(taken) + 3) if (k := f"{key}-{n}") not in taken)


def _title(k: Known) -> str:
    """RCAN-A for our rcan_a; networks that are not in the zoo go by their own name."""
    zoo, family = k.info.get("network"), k.info.get("family")
    if not zoo or family not in TITLES:
        return k.name
    rest = zoo.removeprefix(family).strip("_").split("_")
    return "-".join([TITLES[family], *(p.upper() if len(p) == 1 else p for p in rest if p)])


def _label(k: Known, teaches: bool, titles: Mapping[str, str]) -> str:
    """By the training facts; `teaches` another network here, `titles` are theirs by the hash of their weights."""
    method = k.training.get("method")
    if "engine" in k.info:
        return f"{k.name}, exported for {ENGINE_TITLES.get(k.info['engine'], k.info['engine'])}"
    if method in (None, "scratch"):
        alone = f"{_title(k)}, trained from scratch" if method else _title(k)
        return f"{_title(k)}, teacher" if teaches else alone
    names = [
        titles.get(t.get("weights_sha256", ""))
        or str(t.get("name", "")).removesuffix(f"_x{k.scale}")
        for t in k.teachers
    ]
    return f"{_title(k)}, distilled by {method}" + (f" from {' + '.join(names)}" if names else "")


def _about(k: Known) -> str:
    parts = [f"{k.parameters:,} parameters", f"x{k.scale}"]
    training = k.training
    if training:
        data = (training.get("data") or {}).get("name")
        steps = training.get("iterations")
        parts.append(
            f"trained for {steps:,} steps" + (f" on {data}" if data else "")
            if isinstance(steps, int)
            else "trained by this project"
        )
    return ", ".join(parts)


# --- engines ------------------------------------------------------------------------------------


def engine_entries(device: str) -> list[EngineEntry]:
    """The engines for a machine whose torch runs on `device` (cpu, cuda), usable or not."""
    found = []
    for engine in available():
        if engine.name == "onnx":
            continue  # the same file in the same runtime as ort
        runs_on = _runs_on(engine.name, device, engine.reason)
        have = ENGINES[engine.name].runs[runs_on]
        found.append(
            EngineEntry(
                key=engine.name,
                label=f"{ENGINE_TITLES[engine.name]} ({DEVICE_TITLES[runs_on]})",
                precisions=() if engine.reason else tuple(p for p in PRECISIONS if p in have),
                reason=None if engine.reason is None else without_folders(engine.reason),
                device=runs_on,
            )
        )
    return found


def _runs_on(engine: str, device: str, reason: str | None) -> str:
    """The device that an engine uses beside a torch on `device`."""
    kind = ENGINES[engine]
    if device not in kind.runs:
        return next(iter(kind.runs))
    if engine == "ort" and device == "cuda" and reason is None:
        # There are two builds of ONNX Runtime, and only one of them has CUDA.
        return (
            device if CUDA_PROVIDER in require_engine(engine).get_available_providers() else "cpu"
        )
    return device
