"""What a speed card measures: engines opened from models and exported files, with what opening them cost.

An exported file is measured only if its parity was proved: of this very file (hash), with the verdict PASS.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.difference import difference
from deploy.engines import (
    check_build,
    check_file,
    engine_kind,
    engine_settings,
    open_engine,
    open_network_engine,
    opened_with,
    require_engine,
)
from deploy.environment import PeakMemory, affinity
from deploy.places import SUFFIXES, default_folder, export_file
from deploy.sidecar import how_to_rebuild, read_parity
from deploy.torch_engines import TorchEngine
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import sha256
from srkd.models import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from deploy.engines import Engine, EngineKind
    from deploy.sidecar import Sidecar
    from srkd.loaded import LoadedModel
    from srkd.types import Facts


@dataclass(frozen=True)
class Opened:
    """A running engine, its first picture (N, 3, H, W), and what both cost; `device_mib` is None without a device."""

    engine: Engine
    first: np.ndarray
    open_s: float
    first_run_s: float
    host_mib: float | None
    device_mib: float | None


@dataclass(frozen=True)
class Subject:
    """An engine that is measured.

    `folder` is where the card goes. `parity` says what is known of its output: verdict, worst PSNR in dB (None: equal
    or not measured), and against what. `tf32` is None where it does not apply.
    """

    name: str
    model: str
    engine: str
    precision: str
    facts: Facts
    folder: Path
    settings: dict[str, Any]
    threads: int
    device: str
    opened: Opened
    parity: dict[str, Any]
    file: Path | None = None
    sha256: str | None = None

    @property
    def tf32(self) -> bool | None:
        return self.settings.get("tf32")

    def to_json(self) -> dict[str, Any]:
        o = self.opened
        return {
            "name": self.name,
            "model": self.model,
            "engine": self.engine,
            "precision": self.precision,
            "scale": self.facts.scale,
            "device": self.device,
            "threads": self.threads,
            "settings": self.settings,
            "file": None if self.file is None else str(self.file),
            "sha256": self.sha256,
            "parity": self.parity,
            "cold_start_s": {"open": o.open_s, "first_run": o.first_run_s},
            "memory_mib": {
                "file": None if self.file is None else self.file.stat().st_size / 2**20,
                "host_added": o.host_mib,
                "device_added": o.device_mib,
            },
        }


def start(make: Callable[[], Engine], lr: np.ndarray) -> Opened:
    """Open an engine and run it once on `lr` (N, 3, h, w)."""
    device = _device_mib()
    with PeakMemory() as peak:
        begin = time.perf_counter()
        engine = make()
        opened = time.perf_counter()
        first = engine(lr)
        ran = time.perf_counter()
    after = _device_mib()
    added = None if device is None or after is None else after - device
    return Opened(engine, first, opened - begin, ran - opened, peak.added_mib, added)


def _device_mib() -> float | None:
    """Memory in use on the current CUDA device, by any library."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


# --- models and files ---------------------------------------------------------------------------


def is_exported(target: str | Path) -> bool:
    """Whether MODEL_OR_ENGINE means an exported file."""
    return Path(target).suffix in SUFFIXES


def open_file(file: Path, lr: np.ndarray, threads: int = 0, engine: str | None = None) -> Subject:
    """An exported file, on the engine that it was verified with.

    `threads` other than 0 take the place of the recorded ones. Refused: every parity verdict but PASS, and another
    `engine` than that of the file.
    """
    sidecar = check_file(file)
    if engine not in (None, sidecar.engine):
        raise SrkdError(
            f"{file} was exported and verified for engine {sidecar.engine}, but {engine} was asked for; export the "
            f"model with --engine {engine}."
        )
    check_verdict(file, sidecar)
    check_build(file, sidecar)
    settings = opened_with(sidecar)
    if threads and "threads" in settings:
        settings["threads"] = threads
    facts = sidecar.network_facts
    opened = start(lambda: open_engine(sidecar.engine, file, facts.scale, settings), lr)
    model = str(sidecar.model["name"])
    return Subject(
        name=f"{model} {sidecar.engine} {sidecar.precision}",
        model=model,
        engine=sidecar.engine,
        precision=sidecar.precision,
        facts=facts,
        folder=file.parent,
        settings=settings,
        threads=settings.get("threads") or len(affinity()),  # 0: the library takes them all
        device=device_of(settings),
        opened=opened,
        parity=proved_parity(file, sidecar),
        file=file,
        sha256=sha256(file),
    )


def proved_parity(file: Path, sidecar: Sidecar) -> dict[str, Any]:
    """The verdict with the worst PSNR of the edges that it rests on."""
    record = read_parity(file.parent).get(file.name, {})
    numbers = [e["numbers"] for e in record.get("edges", []) if e["name"] in ("E1", "E2", "E3")]
    psnr = [n["psnr_db"] for n in numbers if n and n["psnr_db"] is not None]
    return {
        "verdict": sidecar.verdict,
        "psnr_db": min(psnr, default=None),
        "against": record.get("reference", "not recorded"),
    }


def open_model(
    model: LoadedModel,
    engine: str,
    precision: str,
    lr: np.ndarray,
    reference: Callable[[], np.ndarray],
    threads: int = 0,
) -> Subject:
    """A model on an engine: the network itself, or the file that was exported from it.

    `reference` gives what torch fp32 makes of `lr`.
    """
    kind = engine_kind(engine, precision)
    if kind.source != "network":
        file = _exported(model, engine, precision, kind)
        return open_file(file, lr, threads, engine)
    import torch

    settings = engine_settings(engine, precision, threads=threads)
    opened = start(lambda: open_network_engine(engine, model, precision, settings), lr)
    if (engine, precision) == ("torch", "fp32"):
        parity = {"verdict": "REFERENCE", "psnr_db": None, "against": "itself"}
    else:
        parity = compared(reference(), opened.first)
    return Subject(
        name=f"{model.name} {engine} {precision}",
        model=model.name,
        engine=engine,
        precision=precision,
        facts=model.facts,
        folder=default_folder(model),
        settings=settings,
        threads=settings.get("threads") or torch.get_num_threads(),
        device=device_of(settings),
        opened=opened,
        parity=parity,
    )


def _exported(model: LoadedModel, engine: str, precision: str, kind: EngineKind) -> Path:
    """The only file that was exported from a model for this engine, on whichever device."""
    folder = default_folder(model)
    files = [export_file(folder, model.name, engine, precision, kind, d) for d in kind.runs]
    found = [file for file in files if file.is_file()]
    if not found:
        raise SrkdError(
            f"{model.name} has no exported file {files[0]}, which engine {engine} needs; export it first: python "
            f"deploy/export.py {model.source} --engine {engine} --precision {precision}"
        )
    if len(found) > 1:
        raise SrkdError(
            f"{model.name} has files for engine {engine} on several devices ({', '.join(map(str, found))}); give the "
            "one that is to be measured in the place of the model."
        )
    return found[0]


def compared(reference: np.ndarray, sr: np.ndarray) -> dict[str, Any]:
    """How far an engine without a parity record is from torch fp32; NaN and infinity are refused."""
    found = difference(reference, sr)
    if found.nonfinite:
        raise CheckFailedError(
            f"the engine gave {found.nonfinite} values that are NaN or infinite on a photograph, so its speed is no "
            "result; use fp32 or bf16."
        )
    return {
        "verdict": "MEASURED",
        "psnr_db": found.to_json()["psnr_db"],
        "against": "torch fp32, CPU, on one photograph",
    }


def checked(
    targets: Sequence[str | Path | LoadedModel],
    engines: Sequence[tuple[str, str]],
    scale: int | None = None,
) -> list[Path | LoadedModel]:
    """The targets, models loaded; what cannot be measured is refused before anything is waited for."""
    for engine, precision in engines:
        engine_kind(engine, precision)
        require_engine(engine)
    found: list[Path | LoadedModel] = []
    for target in targets:
        if isinstance(target, str | Path) and is_exported(target):
            check_verdict(Path(target), check_file(Path(target)))
            found.append(Path(target))
        else:
            found.append(load_model(target, scale) if isinstance(target, str | Path) else target)
    return found


def check_verdict(file: Path, sidecar: Sidecar) -> None:
    """Refuse a file whose parity was not proved."""
    if sidecar.verdict != "PASS":
        raise CheckFailedError(
            f"{file} is not measured: its parity verdict is {sidecar.verdict}, and the speed of an engine that may "
            f"give another picture is no result. Verify it: {how_to_rebuild(file, sidecar)}"
        )


def open_targets(
    targets: Sequence[str | Path | LoadedModel],
    engines: Sequence[tuple[str, str]],
    picture: Callable[[int], np.ndarray],
    scale: int | None = None,
    threads: int = 0,
) -> list[Subject]:
    """Everything that is asked for, opened. `engines` are (name, precision) and apply to models.

    `picture` gives (1, 3, h, w) for a scale. Names that come twice get what they were opened from behind them; a
    thing that comes twice is refused.
    """
    found: list[tuple[str, Subject]] = []
    for target in targets:
        if isinstance(target, str | Path) and is_exported(target):
            file = Path(target)
            lr = picture(check_file(file).network_facts.scale)
            found.append((str(target), open_file(file, lr, threads)))
            continue
        model = load_model(target, scale) if isinstance(target, str | Path) else target
        lr = picture(model.scale)
        reference = cache(partial(_reference, model, lr))
        for engine, precision in engines:
            subject = open_model(model, engine, precision, lr, reference, threads)
            found.append((str(model.source), subject))
    names = [subject.name for _, subject in found]
    subjects = [
        replace(s, name=f"{s.name} ({origin})") if names.count(s.name) > 1 else s
        for origin, s in found
    ]
    names = [subject.name for subject in subjects]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise SrkdError(f"{twice[0]} is asked for twice; give everything once.")
    check_tf32(subjects)
    return subjects


def _reference(model: LoadedModel, lr: np.ndarray) -> np.ndarray:
    return TorchEngine(model.network, model.scale)(lr)


def check_tf32(subjects: Sequence[Subject]) -> None:
    """Refuse a card whose rows differ in TF32: it is another precision under the name fp32."""
    states = {s.name: s.tf32 for s in subjects if s.tf32 is not None}
    if len(set(states.values())) > 1:
        told = ", ".join(f"{name}: {'on' if state else 'off'}" for name, state in states.items())
        raise SrkdError(
            f"TF32 differs between the rows ({told}), so their times do not compare; open all of them with the same "
            "setting."
        )


def device_of(settings: dict[str, Any]) -> str:
    """cpu or cuda, by what the engine was opened with."""
    named = [settings[key] for key in ("device", "provider", "library") if key in settings]
    first = str(named[0]).lower() if named else "cpu"
    return "cuda" if first.startswith(("cuda", "tensorrt", "nvtensorrt")) else "cpu"
