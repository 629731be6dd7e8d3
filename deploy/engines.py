"""Engines: things that run a network, one protocol for all, so that parity and timing are written once.

    torch   the reference: fp32, eval, CPU
    onnx    the graph as the product; run here by ONNX Runtime on the CPU with its defaults
    ort     the graph bound to ONNX Runtime: provider and threads recorded and used again at loading

To add one: its module with an opener, and one line in ENGINES. Importing this loads no library.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deploy.machine import require
from deploy.sidecar import read_parity, read_sidecar, record_hash
from srkd.errors import CheckFailedError, MissingError, SrkdError, nearest
from srkd.files import sha256

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import nn

    from deploy.sidecar import Sidecar
    from srkd.types import Facts

log = logging.getLogger(__name__)

CPU_PROVIDER = "CPUExecutionProvider"


class Engine(Protocol):
    """lr (N, 3, h, w) float32 in [0, 1] -> sr (N, 3, scale*h, scale*w) float32, not clamped."""

    scale: int

    def __call__(self, lr: np.ndarray) -> np.ndarray: ...


class EngineRunError(SrkdError):
    """The engine refused an input or died on it."""


@dataclass(frozen=True)
class EngineKind:
    """One line of the table. `opener` is "module:function": (file, scale, settings) -> Engine."""

    about: str
    module: str
    attribute: str
    install: str
    opener: str
    suffix: str
    settings: dict[str, Any]


_ORT = {
    "module": "onnxruntime",
    "attribute": "InferenceSession",
    "install": "pip install onnxruntime",
    "opener": "deploy.engines:open_ort",
    "suffix": ".onnx",
}

ENGINES: dict[str, EngineKind] = {
    "onnx": EngineKind(
        about="the graph, for any runtime; verified here by ONNX Runtime on the CPU",
        settings={"provider": CPU_PROVIDER, "threads": 0},
        **_ORT,
    ),
    "ort": EngineKind(
        about="the same graph bound to ONNX Runtime: provider and threads are recorded and used again",
        settings={"provider": CPU_PROVIDER, "threads": 0},
        **_ORT,
    ),
}
PRECISIONS = ("fp32",)


def engine_kind(name: str, precision: str = "fp32") -> EngineKind:
    """The line of an engine; what this version does not have is refused."""
    if name not in ENGINES or precision not in PRECISIONS:
        raise SrkdError(
            f"engine '{name}' in {precision} is not available: this version exports fp32 with engines "
            f"onnx and ort; {nearest(name, list(ENGINES))}"
        )
    return ENGINES[name]


def require_engine(name: str) -> None:
    """Refuse (exit 3) when the library that runs this engine is not usable here."""
    kind = engine_kind(name)
    require(kind.module, kind.attribute, f"engine '{name}'", kind.install)


def open_engine(name: str, file: Path, scale: int, settings: dict[str, Any]) -> Engine:
    """Open an exported file with an engine's opener. `load_engine` is the way for users."""
    require_engine(name)
    module, _, function = engine_kind(name).opener.partition(":")
    opener: Callable[[Path, int, dict[str, Any]], Engine] = getattr(import_module(module), function)
    return opener(file, scale, settings)


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
    """Open an exported file after checking it against its sidecar (`check_file`).

    A parity verdict of FAIL is refused too, unless `allow_failed`, which is for looking into it. Any
    verdict but PASS is repeated on the log as a warning, and in `notes`.
    """
    file = Path(file)
    sidecar = check_file(file)
    notes = _notes(file, sidecar)
    if sidecar.verdict == "FAIL" and not allow_failed:
        raise CheckFailedError(notes[0])
    engine = open_engine(sidecar.engine, file, sidecar.network_facts.scale, sidecar.settings)
    for note in notes:
        log.warning(note)
    return LoadedEngine(engine, sidecar, notes)


def check_file(file: Path) -> Sidecar:
    """The sidecar of an exported file, if both belong together and the parity record to them.

    Refused: no file, no sidecar, a damaged or newer one, a graph or parity record of another hash.
    """
    if not file.is_file():
        raise SrkdError(f"there is no exported file {file}; make it with deploy/export.py.")
    sidecar = read_sidecar(file)
    if sha256(file) != sidecar.graph_sha256:
        raise SrkdError(
            f"{file} is not the file its sidecar describes (its hash differs: it was changed, cut "
            f"short or replaced). Build it again: {sidecar.rebuild}"
        )
    record = read_parity(file.parent).get(file.name)
    proved = sidecar.parity.get("record_sha256")
    if record is not None and proved is not None and record_hash(record) != proved:
        raise SrkdError(
            f"the parity record of {file} is not the one its sidecar's verdict rests on. Build it "
            f"again: {sidecar.rebuild}"
        )
    return sidecar


def _notes(file: Path, sidecar: Sidecar) -> tuple[str, ...]:
    said = {
        "FAIL": f"{file.name} FAILED its parity check and must not be used; see report.md beside it.",
        "INCONCLUSIVE": f"{file.name}: parity is INCONCLUSIVE; see report.md beside it.",
        "UNVERIFIED": f"{file.name} is UNVERIFIED: it was exported without a parity check. "
        f"Verify it: {sidecar.rebuild}",
    }
    return (said[sidecar.verdict],) if sidecar.verdict in said else ()


class TorchEngine:
    """The reference: the network itself in fp32, eval mode, on the CPU, without reduced matmuls."""

    def __init__(self, network: nn.Module, scale: int) -> None:
        self.scale = scale
        # A copy: the caller's network may be in training mode, on a GPU, or in another precision.
        self.network = copy.deepcopy(network).float().cpu().eval()

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        import torch

        check_input(lr)
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                return self.network(torch.from_numpy(lr.copy())).numpy()
        finally:
            torch.set_float32_matmul_precision(kept)


class OrtEngine:
    """An ONNX graph in ONNX Runtime, on the provider asked for and on no other."""

    def __init__(
        self, file: Path, scale: int, provider: str = CPU_PROVIDER, threads: int = 0
    ) -> None:
        """`threads` inside one operator; 0 lets ONNX Runtime take every core."""
        import onnxruntime

        self.scale = scale
        self.file = file
        if provider not in onnxruntime.get_available_providers():
            raise MissingError(
                f"{file.name} was built for ONNX Runtime's {provider}, which this installation lacks "
                f"(it has {', '.join(onnxruntime.get_available_providers())}). Install it, or export "
                "again on this machine."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise SrkdError(
                f"ONNX Runtime cannot open {file} ({_first_line(error)}); export it again."
            ) from error
        used = self.session.get_providers()
        # Only the session tells the truth: a provider that fails to start is replaced silently.
        if used[0] != provider:
            raise MissingError(
                f"ONNX Runtime runs {file.name} on {used[0]} although {provider} was asked for; its "
                "start-up failed. Repair that installation, or export for the CPU."
            )

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        check_input(lr)
        try:
            (sr,) = self.session.run(["sr"], {"lr": lr})
        except Exception as error:
            raise EngineRunError(
                f"ONNX Runtime could not run {self.file.name} on an input of {tuple(lr.shape)}: "
                f"{_first_line(error)}"
            ) from error
        return sr  # type: ignore[return-value]


def open_ort(file: Path, scale: int, settings: dict[str, Any]) -> OrtEngine:
    """Opener of the engines `onnx` and `ort`."""
    return OrtEngine(file, scale, settings["provider"], settings["threads"])


def check_input(lr: np.ndarray) -> None:
    """Refuse what is not a batch of float32 RGB images."""
    if lr.ndim != 4 or lr.shape[1] != 3 or str(lr.dtype) != "float32" or 0 in lr.shape:
        raise SrkdError(
            f"an engine needs float32 (N, 3, h, w) in [0, 1], got {lr.dtype} {tuple(lr.shape)}."
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
