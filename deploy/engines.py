"""Engines: things that run a network, one protocol for all, so that parity and timing are written once.

    torch, torch-compile    the network itself; torch in fp32 is the reference
    onnx, ort, openvino     open the ONNX graph
    trt, trt-rtx            open a file that was built from the ONNX graph for one kind of GPU

To add one: its module with an opener, and one line in ENGINES. Importing this loads no library.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from deploy.machine import absence, gpu, require
from deploy.sidecar import PARITY_FILE, how_to_rebuild, read_parity, read_sidecar, record_hash
from deploy.tensorrt_library import ELSEWHERE, LIBRARIES
from srkd.compiler import cpp_compiler
from srkd.errors import CheckFailedError, MissingError, SrkdError, nearest
from srkd.files import sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import numpy as np

    from deploy.sidecar import Sidecar
    from srkd.loaded import LoadedModel
    from srkd.types import Facts

log = logging.getLogger(__name__)

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
PROVIDERS = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}
PRECISIONS = ("fp32", "fp16", "bf16")
MEASURED = ("PASS", "FAIL", "INCONCLUSIVE")  # verdicts that always rest on a parity record


class Engine(Protocol):
    """lr (N, 3, h, w) float32 in [0, 1] -> sr (N, 3, scale*h, scale*w) float32, not clamped."""

    scale: int

    def __call__(self, lr: np.ndarray) -> np.ndarray: ...


class EngineRunError(SrkdError):
    """The engine refused an input or died on it."""


@dataclass(frozen=True)
class EngineKind:
    """One line of the table.

    `source`   network: runs the network itself; graph: opens the ONNX file; built: opens what `builder`
               made of the ONNX file, `suffix` is that file's
    `opener`   "module:function"; (model, precision, settings) -> Engine for a network, else
               (file, scale, settings) -> Engine
    `builder`  "module:function"; (graph, target, sizes, settings) -> facts of the build
    `runs`     device -> precisions that it has there; the first device is the default
    `rounds`   it rounds to its precision itself and takes the float32 graph for all of them
    `settings` defaults of what the opener is given; a built file gets the facts of its build as "built" too
    """

    about: str
    source: Literal["network", "graph", "built"]
    module: str
    attribute: str
    install: str
    opener: str
    runs: dict[str, tuple[str, ...]]
    settings: dict[str, Any]
    suffix: str = ""
    builder: str | None = None
    rounds: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """All that it has on any device."""
        return tuple(p for p in PRECISIONS if any(p in has for has in self.runs.values()))


_TORCH: dict[str, Any] = {
    "source": "network",
    "module": "torch",
    "attribute": "Tensor",
    "install": "pip install torch",
    "runs": {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")},
    "settings": {"device": "cpu", "threads": 0},
}
_ORT: dict[str, Any] = {
    "source": "graph",
    "module": "onnxruntime",
    "attribute": "InferenceSession",
    "install": "pip install onnxruntime (onnxruntime-gpu for CUDA; never both)",
    "opener": "deploy.ort_engine:open_ort",
    "suffix": ".onnx",
    "settings": {"provider": CPU_PROVIDER, "threads": 0},
}
_TRT: dict[str, Any] = {
    "source": "built",
    "attribute": "Builder",
    "opener": "deploy.tensorrt_engine:open_tensorrt",
    "builder": "deploy.tensorrt_build:build",
    "runs": {"cuda": ("fp32", "fp16")},
    "suffix": ".plan",
}

ENGINES: dict[str, EngineKind] = {
    "torch": EngineKind(
        about="the network in torch, the reference",
        opener="deploy.torch_engines:open_torch",
        **_TORCH,
    ),
    "torch-compile": EngineKind(
        about="the network through torch.compile",
        opener="deploy.torch_engines:open_compiled",
        **_TORCH,
    ),
    "onnx": EngineKind(
        about="the graph, for any runtime; verified here by ONNX Runtime on the CPU",
        runs={"cpu": ("fp32", "fp16")},
        **_ORT,
    ),
    "ort": EngineKind(
        about="the same graph bound to ONNX Runtime: provider and threads are recorded and used again",
        runs={"cpu": ("fp32", "fp16"), "cuda": ("fp32", "fp16")},
        **_ORT,
    ),
    "openvino": EngineKind(
        about="the graph in OpenVINO on the CPU, its precision pinned",
        source="graph",
        module="openvino",
        attribute="Core",
        install="pip install openvino",
        opener="deploy.openvino_engine:open_openvino",
        runs={"cpu": ("fp32", "fp16", "bf16")},
        suffix=".onnx",
        rounds=True,
        settings={"precision": "fp32", "threads": 0},
    ),
    "trt": EngineKind(
        about="TensorRT, built for the NVIDIA GPU of this machine",
        module="tensorrt",
        install="pip install tensorrt --extra-index-url https://pypi.nvidia.com",
        settings={"library": "tensorrt", "tf32": False},
        **_TRT,
    ),
    "trt-rtx": EngineKind(
        about="TensorRT for RTX, built on any machine, run on consumer NVIDIA GPUs",
        module="tensorrt_rtx",
        install="pip install tensorrt-rtx-cu13",
        settings={"library": "tensorrt_rtx", "tf32": False},
        **_TRT,
    ),
}


def engine_kind(name: str, precision: str = "fp32", device: str | None = None) -> EngineKind:
    """The line of an engine; a combination that does not exist is refused."""
    if name not in ENGINES:
        raise SrkdError(f"there is no engine '{name}'; {nearest(name, list(ENGINES))}")
    kind = ENGINES[name]
    if device is not None and device not in kind.runs:
        raise SrkdError(f"engine '{name}' runs on {_either(kind.runs)}, not on '{device}'.")
    have = kind.precisions if device is None else kind.runs[device]
    if precision not in have:
        others = [n for n, k in ENGINES.items() if precision in k.precisions]
        raise SrkdError(
            f"engine '{name}' computes in {_either(have)}{f' on {device}' if device else ''}, not in "
            f"'{precision}'" + (f"; engines that do: {', '.join(others)}." if others else ".")
        )
    return kind


def _either(words: Any) -> str:
    return " or ".join(words)


def engine_settings(
    name: str, precision: str = "fp32", device: str | None = None, threads: int = 0
) -> dict[str, Any]:
    """Everything an engine is opened with. `threads` of one picture on the CPU; 0 is the library's choice."""
    device = device or next(iter(engine_kind(name).runs))
    kind = engine_kind(name, precision, device)
    chosen = {
        "precision": precision,
        "device": device,
        "provider": PROVIDERS[device],
        "threads": threads,
    }
    if threads and "threads" not in kind.settings:
        raise SrkdError(f"engine '{name}' runs on a GPU and takes no threads; leave them out.")
    return {key: chosen.get(key, default) for key, default in kind.settings.items()}


def require_engine(name: str, settings: dict[str, Any] | None = None) -> ModuleType:
    """The library that runs this engine; refused (exit 3) when it is not usable here.

    With `settings`, those of `engine_settings`, also when it lacks the provider that they name.
    """
    kind = engine_kind(name)
    library = require(kind.module, kind.attribute, f"engine '{name}'", kind.install)
    if settings is not None and "provider" in settings:
        require_provider(library, settings["provider"], f"engine '{name}'")
    return library


def require_provider(library: ModuleType, provider: str, purpose: str) -> None:
    """Refuse (exit 3) a provider that this installation of ONNX Runtime was not built with."""
    have = library.get_available_providers()
    if provider in have:
        return
    todo = (
        "put onnxruntime-gpu in the place of onnxruntime (never both), or leave --device cuda out"
        if provider == CUDA_PROVIDER
        else "install the onnxruntime that has it"
    )
    raise MissingError(
        f"{purpose} needs ONNX Runtime's {provider}, which this installation lacks (it has "
        f"{', '.join(have)}): {todo}."
    )


class Available(NamedTuple):
    """What an engine can do here: its precisions on the devices there are, or the reason why nothing.

    `builds`: a file for it can be built here, even where it cannot run; False where nothing is built.
    """

    name: str
    precisions: tuple[str, ...]
    reason: str | None
    builds: bool


def available() -> list[Available]:
    """Every engine of the table. Looks for libraries without importing them and asks the GPU's driver.

    A library that is there may still fail to start; that is known when the engine is opened.
    """
    here_gpu = gpu()
    devices = ("cpu",) if here_gpu is None else ("cpu", "cuda")
    found = []
    for name, kind in ENGINES.items():
        here = [p for p in PRECISIONS if any(p in kind.runs.get(d, ()) for d in devices)]
        reason, builds = absence(kind.module), False
        if reason is not None:
            reason = f"{reason}; install it: {kind.install}"
        elif kind.source == "built":
            library = LIBRARIES[kind.settings["library"]]
            builds = bool(here) or library.portable
            if here_gpu is None:
                runs = "builds here, runs on" if builds else "it builds and runs on"
                reason = f"{runs} {_either(kind.runs)}, and no NVIDIA GPU was found"
            elif library.capabilities and here_gpu.capability not in library.capabilities:
                reason = (
                    f"builds here, runs on compute capability {', '.join(library.capabilities)}, and this is "
                    f"{here_gpu}; on it {ELSEWHERE}"
                )
        elif name == "torch-compile" and "cuda" not in devices and cpp_compiler() is None:
            reason = "it needs a C++ compiler on the CPU; install g++"
        found.append(Available(name, () if reason else tuple(here), reason, builds))
    return found


def open_engine(name: str, file: Path, scale: int, settings: dict[str, Any]) -> Engine:
    """Open an exported file with an engine's opener. `load_engine` is the way for users."""
    kind = engine_kind(name)
    if kind.source == "network":
        raise SrkdError(
            f"engine '{name}' runs a network, not a file such as {file.name}; give it the run folder."
        )
    require_engine(name, settings)
    opener: Callable[[Path, int, dict[str, Any]], Engine] = named(kind.opener)
    return opener(file, scale, settings)


def open_network_engine(
    name: str, model: LoadedModel, precision: str = "fp32", settings: dict[str, Any] | None = None
) -> Engine:
    """Open a network with an engine that runs it itself; `settings` as of `engine_settings`."""
    kind = engine_kind(name, precision)
    if kind.source != "network":
        raise SrkdError(
            f"engine '{name}' opens an exported file, not a network; export {model.name} first: "
            f"python deploy/export.py {model.source} --engine {name}"
        )
    settings = engine_settings(name, precision) if settings is None else settings
    engine_kind(name, precision, settings["device"])
    require_engine(name)
    opener: Callable[[LoadedModel, str, dict[str, Any]], Engine] = named(kind.opener)
    return opener(model, precision, settings)


def named(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


@dataclass(frozen=True)
class LoadedEngine:
    """An engine with its record. `notes` are sentences that a user must see."""

    engine: Engine
    sidecar: Sidecar
    notes: tuple[str, ...] = ()

    @property
    def scale(self) -> int:
        return self.engine.scale

    @property
    def facts(self) -> Facts:
        """Facts of the network, for tiling."""
        return self.sidecar.network_facts

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        """(N, 3, h, w) float32 in [0, 1] -> (N, 3, scale*h, scale*w) float32, not clamped."""
        return self.engine(lr)


def load_engine(file: str | Path, allow_failed: bool = False) -> LoadedEngine:
    """Open an exported file after checking it against its sidecar (`check_file`) and this machine.

    A parity verdict of FAIL is refused too, unless `allow_failed`, which is for looking into it. Any
    verdict but PASS is repeated on the log as a warning, and in `notes`.
    """
    file = Path(file)
    sidecar = check_file(file)
    notes = _notes(file, sidecar)
    if sidecar.verdict == "FAIL" and not allow_failed:
        raise CheckFailedError(notes[0])
    check_build(file, sidecar)
    scale = sidecar.network_facts.scale
    engine = open_engine(sidecar.engine, file, scale, opened_with(sidecar))
    for note in notes:
        log.warning(note)
    return LoadedEngine(engine, sidecar, notes)


def opened_with(sidecar: Sidecar) -> dict[str, Any]:
    """The settings that an exported file is opened with; a built one needs the facts of its build too."""
    built = {} if sidecar.build is None else {"built": sidecar.build}
    return {**sidecar.settings, **built}


def check_file(file: Path) -> Sidecar:
    """The sidecar of an exported file, if both belong together and the parity record to them.

    Refused: no file, no sidecar, a damaged or newer one, a file or parity record of another hash, a
    verdict that is not that of the record. A verdict whose record is not there counts as UNVERIFIED, for nobody
    can compare it; FAIL stays.
    """
    if not file.is_file():
        raise SrkdError(f"there is no exported file {file}; make it with deploy/export.py.")
    sidecar = read_sidecar(file)
    _check_settings(file, sidecar)
    if sha256(file) != sidecar.engine_sha256:
        raise SrkdError(
            f"{file} is not the file its sidecar describes (its hash differs: it was changed, cut "
            f"short or replaced). Build it again: {how_to_rebuild(file, sidecar)}"
        )
    return _with_proved_verdict(file, sidecar)


def _check_settings(file: Path, sidecar: Sidecar) -> None:
    """Refuse settings that the opener of the file's engine could not read."""
    kind = engine_kind(sidecar.engine, sidecar.precision)
    damage = [
        f"its setting {key} is {sidecar.settings.get(key)!r}"
        for key, usual in kind.settings.items()
        if type(sidecar.settings.get(key)) is not type(usual)
    ]
    if sidecar.settings.get("precision", sidecar.precision) != sidecar.precision:
        damage.append(f"its setting precision is not the {sidecar.precision} of the file")
    if (kind.source == "built") != (sidecar.build is not None):
        damage.append(f"engine '{sidecar.engine}' {'with' if sidecar.build else 'without'} a build")
    if damage:
        raise SrkdError(
            f"the sidecar of {file} is damaged ({'; '.join(damage)}). Build it again: {how_to_rebuild(file, sidecar)}"
        )


def _with_proved_verdict(file: Path, sidecar: Sidecar) -> Sidecar:
    """Refuse a verdict that rests on no parity record, or on another one than lies beside the file.

    A file may be copied without parity.json: it loads, but as what it can show (`_notes` tells).
    """
    proved = sidecar.parity.get("record_sha256")
    if proved is None:
        if sidecar.verdict in MEASURED:
            raise SrkdError(
                f"the sidecar of {file} says {sidecar.verdict} and names no parity record that this rests on, "
                f"so it was edited. Build it again: {how_to_rebuild(file, sidecar)}"
            )
        return sidecar
    record = read_parity(file.parent).get(file.name)
    if record is None:
        if sidecar.verdict == "FAIL":
            return sidecar
        demoted = {"verdict": "UNVERIFIED", "claimed": sidecar.verdict}
        return replace(sidecar, parity={**sidecar.parity, **demoted})
    if record_hash(record) != proved:
        raise SrkdError(
            f"the parity record of {file} is not the one its sidecar's verdict rests on. Build it "
            f"again: {how_to_rebuild(file, sidecar)}"
        )
    if record["verdict"] != sidecar.verdict:
        raise SrkdError(
            f"the sidecar of {file} says {sidecar.verdict}, and the parity record that this rests on says "
            f"{record['verdict']}. Build it again: {how_to_rebuild(file, sidecar)}"
        )
    return sidecar


def check_build(file: Path, sidecar: Sidecar) -> None:
    """Refuse (exit 3) a built file of another version of its library, or for another compute capability."""
    if sidecar.build is None:
        return
    kind = engine_kind(sidecar.engine)
    have, built = require_engine(sidecar.engine).__version__, sidecar.build["version"]
    if have != built:
        raise MissingError(
            f"{file} was built by {kind.module} {built}, and this machine has {have}: such files do not "
            f"move between versions. Build it again: {how_to_rebuild(file, sidecar)}"
        )
    here, meant = gpu(), sidecar.build["compute_capabilities"]
    if meant and (here is None or here.capability not in meant):
        raise MissingError(
            f"{file} was built on {sidecar.build['gpu']} for compute capability {', '.join(meant)}, and this "
            f"machine has {here or 'no NVIDIA GPU'}. Build it again on the machine that runs it: {how_to_rebuild(file, sidecar)}"
        )


def _notes(file: Path, sidecar: Sidecar) -> tuple[str, ...]:
    said = {
        "FAIL": f"{file.name} FAILED its parity check and must not be used; see report.md beside it.",
        "INCONCLUSIVE": f"{file.name}: parity is INCONCLUSIVE; see report.md beside it.",
        "UNVERIFIED": f"{file.name} is UNVERIFIED: it was exported without a parity check. "
        f"Verify it: {how_to_rebuild(file, sidecar)}",
        "BUILT, NOT VERIFIED": f"{file.name} is BUILT, NOT VERIFIED: the machine that built it could not "
        f"run it. Verify it on one that can: {how_to_rebuild(file, sidecar)}",
    }
    if sidecar.verdict == "UNVERIFIED" and sidecar.parity.get("record_sha256") is not None:
        said["UNVERIFIED"] = (
            f"{file.name} is UNVERIFIED: its sidecar says {sidecar.parity['claimed']}, but {PARITY_FILE} beside it does not hold the "
            f"measurements that this rests on. Copy it along, or verify it: {how_to_rebuild(file, sidecar)}"
        )
    notes = [said[sidecar.verdict]] if sidecar.verdict in said else []
    if sidecar.precision == "fp16" and sidecar.settings.get("provider") == CPU_PROVIDER:
        notes.append(
            f"{file.name} holds float16, which ONNX Runtime computes in float32 on a CPU: that it runs "
            "here shows neither its range nor its speed on a GPU."
        )
    return tuple(notes)
