"""One comparison as it runs in its lane: pictures are made one after the other, written, then scored from their files."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from demo.jobs import BICUBIC, NEAREST, TRUTH, Numbers, Pane, Result
from demo.meter import Meter, Step
from demo.pictures import baseline, read_pictures, rgb8, save
from demo.saying import in_words, reworded
from demo.scores import cost_of, protocol_of, scores, too_small
from demo.watched import Stoppable
from deploy.environment import PeakMemory
from srkd.devices import pick_device
from srkd.images import read_rgb8, write_png
from srkd.infer import feature_channels, upscale_file
from srkd.tiling import auto_tile, largest_kept, memory_budget

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import numpy as np

    from demo.jobs import Choice, CompareRequest, Event
    from demo.lane import Turn
    from demo.limits import Limits
    from demo.pictures import Pictures
    from demo.shelf import Ready, Shelf
    from demo.workspace import Workspace

LABELS = {TRUTH: "ground truth", NEAREST: "nearest", BICUBIC: "bicubic"}
# Multiply-adds that take as long as this work on one pixel of the output; measured roughly against a network.
SCORING, WRITING, BASELINE = 8000, 2500, 4000


def comparison(
    shelf: Shelf,
    workspace: Workspace,
    limits: Limits,
    request: CompareRequest,
    pace: dict[Hashable, float],
    *,
    alone: bool = False,
) -> Callable[[Turn[Event]], None]:
    """The job of a request that was checked. `alone`: the networks' pictures without baselines and scores."""

    def job(turn: Turn[Event]) -> None:
        scale = shelf.entry(request.choices[0].model).scale
        pictures = read_pictures(request, scale, limits)
        sources = {shelf.sources[c.model]: shelf.entry(c.model).label for c in request.choices}
        panes = len(request.choices) + (0 if alone else 2) + (pictures.truth is not None)
        with (
            workspace.job((panes + 1) * pictures.sr_bytes) as folder,
            in_words({f"{folder}/": "", request.picture: pictures.name, **sources}),
        ):
            _Comparison(shelf, request, pictures, folder, pace, turn, alone).run()

    return job


class _Comparison:
    """`done` are the panes so far; the pictures that scores compare with are held, all others are read again."""

    def __init__(
        self,
        shelf: Shelf,
        request: CompareRequest,
        pictures: Pictures,
        folder: Path,
        pace: dict[Hashable, float],
        turn: Turn[Event],
        alone: bool,
    ) -> None:
        self.shelf = shelf
        self.request = request
        self.pictures = pictures
        self.folder = folder
        self.turn = turn
        self.alone = alone
        self.scored = pictures.opaque and not alone
        self.keys = pane_keys(request.choices)
        self.baselines = () if alone else (NEAREST, BICUBIC)
        self.meter = Meter(self._steps(), pace, turn.tell)
        self.done: dict[str, Pane] = {}
        self.truth = None if pictures.truth is None or not self.scored else rgb8(pictures.truth)
        self.reference: np.ndarray | None = None
        wanted = request.reference
        chosen = next((k for c, k in self.keys.items() if wanted in (None, c.model)), None)
        has_truth = pictures.truth is not None
        self.reference_key = chosen if self.scored and not has_truth else None
        self.source = request.picture
        if request.shrink:
            self.source = folder / "lr.png"

    def run(self) -> None:
        p = self.pictures
        if self.request.shrink:
            save(self.source, p.lr)
        if p.truth is not None and not self.alone:
            path = self.folder / f"{TRUTH}.png"
            save(path, p.truth)
            self._add(Pane(TRUTH, LABELS[TRUTH], "truth", path, p.sr_size))
        for index, kind in enumerate(self.baselines):
            self.meter.start(index)
            self.meter.at(0, LABELS[kind])
            self._baseline(kind)
            self.meter.at(1, LABELS[kind])
        for number, (choice, key) in enumerate(self.keys.items()):
            self._network(choice, key, number)
        self.turn.tell(self._result(complete=True))

    # --- panes ----------------------------------------------------------------------------------

    def _baseline(self, kind: Literal["nearest", "bicubic"]) -> None:
        begin = time.perf_counter()
        pixels, notes = baseline(kind, self.pictures.lr, self.pictures.scale)
        path = self.folder / f"{kind}.png"
        write_png(path, pixels, self.pictures.lr.icc)
        numbers = Numbers(total_s=time.perf_counter() - begin)
        del pixels  # scoring reads it again and needs room
        self._add(
            Pane(kind, LABELS[kind], kind, path, self.pictures.sr_size, numbers, tuple(notes))
        )

    def _network(self, choice: Choice, key: str, number: int) -> None:
        head = f"model {number + 1}/{len(self.keys)}"

        def say(text: str) -> None:
            self.turn.check()
            self.meter.say(f"{head} · {text}")

        ready = self.shelf.open(choice, say)
        parameters, macs_g = self._cost(ready, say)
        index = len(self.baselines) + number
        self.meter.start(index)
        path = self.folder / f"{key}.png"
        tile = self._tile(ready)
        tiles = _Tiles(self.pictures.lr.size, tile, ready.model.facts.size_multiple)
        # What follows the network is a known part of the step.
        share = self._network_work(choice) / self.meter.steps[index].work

        def on_tile(pixels: int) -> None:
            self.meter.at(share * tiles.done(pixels), f"{head} · {tiles.text()}")

        self.meter.at(0, f"{head} · {tiles.text()}")
        with ready.timed.watched(self.turn.check), PeakMemory() as peak:
            report = upscale_file(
                self.source,
                path,
                ready.model,
                tile=tile,
                device=ready.place,
                max_pixels=self.pictures.lr.rgb.size,
                progress=on_tile,
            )
        own = [note for note in report.notes if note not in self.pictures.lr.notes]
        names: dict[Path | str, str] = {self.shelf.sources[choice.model]: ready.entry.label}
        added = peak.added_mib
        pane = Pane(
            key=key,
            label=self._label(choice, ready),
            role="model",
            file=path,
            size=report.sr_size,
            numbers=Numbers(
                model_s=ready.timed.seconds,
                total_s=report.seconds,
                warm=ready.timed.warm,
                parameters=parameters,
                macs_g=macs_g,
                peak_mib=None if added is None or peak.before is None else peak.before + added,
                engine=choice.engine,
                precision=choice.precision,
                device=ready.device,
                parity=ready.parity,
            ),
            notes=tuple(reworded(note, names) for note in (*ready.notes, *own)),
        )
        if key == self.reference_key:
            self.reference = read_rgb8(path)
        self._add(pane)
        self.meter.at(1, head)

    def _cost(self, ready: Ready, say: Callable[[str], None]) -> tuple[int | None, float | None]:
        """Parameters and multiply-adds for this picture."""
        if ready.network is None:
            return ready.entry.parameters or None, None
        if not ready.timed.seen:
            say("counting multiply-adds")
        return cost_of(ready.network, self.pictures.lr.size, ready.model.facts)

    def _tile(self, ready: Ready) -> int | None:
        """Side of the tiles, None for the whole picture; what `srkd.infer` would choose, known beforehand."""
        size, tile = self.pictures.lr.size, self.request.tile
        if tile != "auto":
            return tile
        most = largest_kept(size, ready.model.facts, ready.model.limits)
        channels = feature_channels(ready.model.network)
        free = memory_budget(pick_device(ready.place))
        return auto_tile(*size, ready.model.facts, channels, free, most)

    def _label(self, choice: Choice, ready: Ready) -> str:
        models = Counter(c.model for c in self.keys)
        if models[choice.model] == 1:
            return ready.entry.label
        return f"{ready.entry.label} · {self.shelf.engine(choice.engine).label} {choice.precision}"

    # --- scores and events ----------------------------------------------------------------------

    def _add(self, pane: Pane) -> None:
        """A finished picture: scored, and told with all before it."""
        self.done[pane.key] = pane
        self.turn.check()
        if self.scored and pane.role != "truth":
            # With the reference come the scores of those that were finished before it.
            again = list(self.done) if pane.key == self.reference_key else []
            for key in dict.fromkeys([pane.key, *again]):
                self._score(key)
                self.turn.check()
        self.turn.tell(self._result(complete=False))

    def _score(self, key: str) -> None:
        pane, p = self.done[key], self.pictures
        first = pane.numbers.consistency_db is None
        truth = self.truth
        reference = self.reference if key != self.reference_key else None
        lr = rgb8(p.lr) if truth is None and first else None
        if truth is None and reference is None and lr is None:
            return
        with Stoppable(self.turn.check):
            found = scores(read_rgb8(pane.file), p.scale, truth=truth, reference=reference, lr=lr)
        self.done[key] = replace(pane, numbers=replace(pane.numbers, **found))

    def _result(self, complete: bool) -> Result:
        p = self.pictures
        notes = list(p.notes)
        if not self.alone and not self.scored:
            notes.append("the picture has transparent pixels, so nothing is scored")
        elif self.scored:
            notes += too_small(p.sr_size, p.scale)
        return Result(
            panes=tuple(self.done.values()),
            name=p.name,
            scale=p.scale,
            lr_size=p.lr.size,
            protocol=protocol_of(p.scale),
            reference=self.reference_key if self.reference is not None else None,
            complete=complete,
            notes=tuple(notes),
        )

    # --- work -----------------------------------------------------------------------------------

    def _steps(self) -> list[Step]:
        height, width = self.pictures.sr_size
        after = height * width * (WRITING + (SCORING if self.scored else 0))
        bare = [Step(kind, height * width * BASELINE + after) for kind in self.baselines]
        return [*bare, *(Step(choice, self._network_work(choice) + after) for choice in self.keys)]

    def _network_work(self, choice: Choice) -> float:
        """About one multiply-add for each parameter and LR pixel, as in convolutions; no network need be open."""
        h, w = self.pictures.lr.size
        return h * w * max(1, self.shelf.entry(choice.model).parameters)


class _Tiles:
    """Counts the tiles of one picture; after running out of memory their number is not known any more."""

    def __init__(self, size: tuple[int, int], tile_px: int | None, grid: int) -> None:
        self.pixels = size[0] * size[1]
        step = max(size) if tile_px is None else -(-tile_px // grid) * grid
        self.total: int | None = math.ceil(size[0] / step) * math.ceil(size[1] / step)
        self.count = 0
        self.last = 0

    def done(self, pixels: int) -> float:
        """One tile more; the share of the picture."""
        if pixels <= self.last:
            self.total = None
        self.count, self.last = self.count + 1, pixels
        return pixels / self.pixels

    def text(self) -> str:
        """The tile that runs now."""
        if self.total is None:
            return f"tile {self.count + 1}"
        return f"tile {min(self.count + 1, self.total)}/{self.total}"


def pane_keys(choices: tuple[Choice, ...]) -> dict[Choice, str]:
    """A key for each choice, in order: that of the model, with engine and precision where it comes twice."""
    models = Counter(choice.model for choice in choices)
    return {
        c: c.model if models[c.model] == 1 else f"{c.model}-{c.engine}-{c.precision}"
        for c in choices
    }
