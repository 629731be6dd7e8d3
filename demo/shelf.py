"""The networks that the demo shows, and engines opened for them: on demand, the last few kept.

At the start each network is loaded once and let go again: what cannot be loaded is refused then, with the loader's
sentence.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from demo.entries import engine_entries, entries, known
from demo.exported import Wanted, exported_file
from demo.saying import in_words
from demo.watched import Timed
from deploy.engine_model import EngineNetwork, load_any
from deploy.engines import check_file, engine_settings, open_network_engine
from deploy.inputs import window
from deploy.machine import gpu
from deploy.subjects import compared
from deploy.torch_engines import TorchEngine
from srkd.data.cache import default_cache
from srkd.data.sets import open_set
from srkd.errors import MissingError, SrkdError, nearest
from srkd.files import sha256
from srkd.images import to_tensor
from srkd.infer import feature_channels
from srkd.models import WEIGHTS_FOLDER, shipped_models, weights_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from demo.entries import EngineEntry, Known, ModelEntry
    from demo.jobs import Choice
    from srkd.loaded import LoadedModel

KEPT = 6  # one whole comparison
REFERENCE = ("torch", "fp32")
# These compile for every size of picture; the others run any size once they have run.
COMPILE_BY_SIZE = ("torch-compile", "openvino")
CHECKED_PX = 64


@dataclass(frozen=True)
class Ready:
    """A network opened by an engine.

    model     what upscales: its network is `timed`, whatever runs inside
    network   the network in torch, for counting its cost; None for an exported file, which has none
    place     where `srkd.infer` puts pictures: "cpu" or "cuda"
    device    the name of what computes
    parity    verdict of the parity record, REFERENCE for torch in fp32, MEASURED for the light check of engines
              without a file (`notes` say against what)
    """

    choice: Choice
    entry: ModelEntry
    model: LoadedModel
    timed: Timed
    network: nn.Module | None
    place: str
    device: str
    parity: str
    notes: tuple[str, ...] = ()


def _quiet(text: str) -> None:
    pass


class Shelf:
    """Networks and engines by the keys of `models` and `engines`; at most `kept` are open."""

    def __init__(self, extra_models: Sequence[str] = (), kept: int = KEPT) -> None:
        self.kept = kept
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._lock = threading.Lock()
        self._open: OrderedDict[Choice, Ready] = OrderedDict()
        found: dict[Path, Known] = {}
        for spec in [*(WEIGHTS_FOLDER / name for name in shipped_models()), *extra_models]:
            model = load_any(spec)
            found[model.source.resolve()] = known(model, _weights(model))
        if not found:
            raise SrkdError(
                "There is no network to show: weights/ is empty; name one with --model (a run folder or a file)."
            )
        self.models: list[ModelEntry] = entries(found.values())
        self.sources = {e.key: source for e, source in zip(self.models, found, strict=True)}
        self.engines: list[EngineEntry] = engine_entries(self.device)

    def entry(self, key: str) -> ModelEntry:
        for entry in self.models:
            if entry.key == key:
                return entry
        raise SrkdError(
            f"There is no network '{key[:40]}'; {nearest(key[:40], [e.key for e in self.models])}"
        )

    def engine(self, key: str) -> EngineEntry:
        for engine in self.engines:
            if engine.key == key:
                return engine
        raise SrkdError(
            f"There is no engine '{key[:40]}'; {nearest(key[:40], [e.key for e in self.engines])}"
        )

    def check(self, choice: Choice) -> None:
        """Refuse what this machine does not run, with the reason; opens nothing."""
        entry, engine = self.entry(choice.model), self.engine(choice.engine)
        if engine.reason is not None:
            raise MissingError(f"{engine.label} cannot be used here: {engine.reason}.")
        if choice.precision not in engine.precisions:
            raise MissingError(
                f"{engine.label} computes in {' or '.join(engine.precisions)} here, not in "
                f"'{choice.precision[:20]}'; choose one of these."
            )
        if entry.engine is not None and (choice.engine, choice.precision) != (
            entry.engine,
            entry.precision,
        ):
            raise SrkdError(
                f"{entry.label}, is one file for one engine: choose {entry.engine} in {entry.precision} for it, or "
                "show the run that it was exported from."
            )

    def open(self, choice: Choice, say: Callable[[str], None] = _quiet) -> Ready:
        """A choice, open; kept from the last time, or opened now, which takes up to minutes at first use.

        `say` is told what takes long and may raise to stop it.
        """
        self.check(choice)
        with self._lock:
            ready = self._open.pop(choice, None)
            if ready is None:
                # Room first: two large engines more than `kept` may not fit.
                while len(self._open) >= self.kept:
                    self._open.popitem(last=False)
                with in_words({self.sources[choice.model]: self.entry(choice.model).label}):
                    ready = self._opened(choice, say)
            self._open[choice] = ready
            return ready

    def _opened(self, choice: Choice, say: Callable[[str], None]) -> Ready:
        entry, engine = self.entry(choice.model), self.engine(choice.engine)
        say(f"loading {entry.label}")
        base = load_any(self.sources[choice.model])
        device = _device_name(engine.device)
        by_size = choice.engine in COMPILE_BY_SIZE
        if entry.engine is not None:
            verdict = check_file(self.sources[choice.model]).verdict
            timed = Timed(base.network, by_size)
            model = replace(base, network=timed)
            return Ready(choice, entry, model, timed, None, "cpu", device, verdict, base.notes)
        if (choice.engine, choice.precision) == REFERENCE:
            timed = Timed(base.network, by_size)
            model = replace(base, network=timed)
            return Ready(
                choice,
                entry,
                model,
                timed,
                base.network,
                self.device,
                device,
                "REFERENCE",
                base.notes,
            )
        if choice.engine in ("torch", "torch-compile"):
            inner, parity, notes = self._through(base, choice, engine, say)
            model = base
        else:
            title = engine.label
            wanted = Wanted(base, choice.engine, choice.precision, engine.device, title)
            found = exported_file(wanted, default_cache().expanduser() / "demo" / "exports", say)
            say(f"opening {title}")
            model = load_any(found.file)
            inner, parity = model.network, found.sidecar.verdict
            notes = (*base.notes, *model.notes, f"{title}: {found.note}")
        timed = Timed(inner, by_size)
        opened = replace(model, network=timed, name=base.name)
        return Ready(choice, entry, opened, timed, base.network, "cpu", device, parity, notes)

    def _through(
        self, base: LoadedModel, choice: Choice, engine: EngineEntry, say: Callable[[str], None]
    ) -> tuple[nn.Module, str, tuple[str, ...]]:
        """A network in torch, reduced or compiled, after a check against fp32 on one photograph."""
        settings = engine_settings(choice.engine, choice.precision, engine.device)
        say(f"opening {engine.label} {choice.precision}")
        opened = open_network_engine(choice.engine, base, choice.precision, settings)
        photo = to_tensor(open_set("builtin", base.scale).readers[0]().lr).numpy()
        lr = window(photo, CHECKED_PX, CHECKED_PX)
        say(f"checking {engine.label} {choice.precision}")
        found = compared(TorchEngine(base.network, base.scale)(lr), opened(lr))
        psnr = found["psnr_db"]
        told = "equal to" if psnr is None else f"{psnr:.1f} dB from"
        notes = (
            *base.notes,
            f"{engine.label} {choice.precision} is {told} {found['against']}; engines without a file have no parity record",
        )
        return EngineNetwork(opened, feature_channels(base.network)), found["verdict"], notes


def _weights(model: LoadedModel) -> str:
    return sha256(model.source) if isinstance(model.network, EngineNetwork) else weights_hash(model)


def _device_name(device: str) -> str:
    found = gpu() if device == "cuda" else None
    return found.name if found is not None else device.upper()
