"""Does the exported network still give the same picture? A chain of edges, each with its own verdict.

    trained net --E0-- deploy net --E1-- ONNX fp32 --E2-- ONNX fp16 --E3-- engine
                                                             engine at two shapes --E4--
                                                             whole picture vs tiles --E5--

The first edge that fails names the fault: exporter, precision, engine, shapes, or tiling (`deploy.verdict`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from deploy.comparison import (
    BORDER_PX,
    Float32,
    RefusedError,
    compare,
    without_lost_patterns,
)
from deploy.difference import difference, seam_score, worst_of
from deploy.engine_check import check_engine, gate_name
from deploy.half import check_half
from deploy.inputs import PHOTOGRAPHS, window
from deploy.rescale import check_rescale
from deploy.verdict import EdgeResult, Gate, Task, Worst, edge_json, judge, read_gates
from srkd.errors import SrkdError
from srkd.tiling import halo_px, largest_kept, upscale_tiled
from srkd.types import ANY_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from deploy.engines import Engine
    from deploy.inputs import Input, Photo
    from deploy.proof import ProvableEngine
    from srkd.types import Facts, Limits

# Pictures of E4 and E5 exceed the receptive field. Up to FAR_PX they are square, beyond that strips, which
# keep the check of a network that sees far affordable.
FAR_PX = 48
TILE_PX = 64
MARGIN_PX = 24
STRIP_PX = 41


@dataclass(frozen=True)
class Parity:
    """All edges of one exported file."""

    edges: tuple[EdgeResult, ...]
    photographs: int
    gates: dict[str, Gate] = field(default_factory=dict)
    task: Task | None = None
    worst: Worst | None = None
    ran: bool = True  # whether the engine itself did

    @property
    def verdict(self) -> Literal["PASS", "FAIL", "INCONCLUSIVE", "BUILT, NOT VERIFIED"]:
        """The worst of the edges that ran; what they prove of an engine that did not run is not enough."""
        found = {e.status for e in self.edges}
        if "FAIL" in found:
            return "FAIL"
        if "INCONCLUSIVE" in found or "PASS" not in found:
            return "INCONCLUSIVE"
        return "PASS" if self.ran else "BUILT, NOT VERIFIED"

    @property
    def blame(self) -> str | None:
        """The first edge that failed: what it compares is where the fault lies."""
        return next((e.edge for e in self.edges if e.status == "FAIL"), None)

    def edge(self, name: str) -> EdgeResult:
        return next(e for e in self.edges if e.edge == name)

    def to_json(self) -> dict[str, Any]:
        """The record for parity.json; infinities become null, gates that are not asked are left out."""
        return {
            "verdict": self.verdict,
            "blame": self.blame,
            "photographs": self.photographs,
            "task": None
            if self.task is None
            else {**asdict(self.task), "delta_db": self.task.delta_db},
            "gates": {
                name: {k: v for k, v in asdict(gate).items() if v is not None}
                for name, gate in self.gates.items()
            },
            "edges": [edge_json(result) for result in self.edges],
        }


@dataclass(frozen=True)
class Chain:
    """What an export made on the way from the trained network to the engine; `verify` compares the links.

    trained     the network in torch fp32 (`TorchEngine`), the reference of everything
    graph       the fp32 graph in ONNX Runtime on the CPU
    engine      the exported file as a user opens it, None where it cannot run here: `absent` says why
    deployed    the rescaled network in torch fp32, None where nothing was rescaled: `as_trained` says why
    limits      the sizes that the engine takes
    half        the fp16 graph, faithfully emulated; None where no such graph is made
    spoiled     its constants that are not those of the fp32 graph (`spoiled_constants`)
    exact       the trained network in torch fp64, for patterns on which float32 itself is lost; without it none is
                forgiven
    """

    trained: Engine
    graph: Engine
    engine: ProvableEngine | None
    precision: str = "fp32"
    absent: str = ""
    deployed: Engine | None = None
    as_trained: str = "the trained network is exported as it is"
    half: Engine | None = None
    limits: Limits = ANY_SIZE
    spoiled: tuple[str, ...] = ()
    exact: Engine | None = None


def verify(
    chain: Chain,
    facts: Facts,
    inputs: Sequence[Input],
    photos: Sequence[Photo],
    progress: Callable[[str], None] | None = None,
) -> Parity:
    """Run every edge that can run here. An engine that refuses an input fails the edge.

    `photos` supply larger surroundings for E4 and E5.
    """
    gates, used = read_gates(), {"E1"}
    say = progress or (lambda _: None)
    edges = []
    if chain.deployed is None:
        edges.append(EdgeResult("E0", "NOT RUN", chain.as_trained))
    else:
        say("E0 trained vs rescaled")
        used.add("E0")
        edges.append(check_rescale(chain.trained, chain.deployed, inputs, gates["E0"]))
    say("E1 torch vs graph")
    reference = chain.deployed or chain.trained
    float32 = None if chain.exact is None else Float32(chain.trained, chain.exact)
    e1, task, worst = check_export(
        reference, chain.graph, facts, inputs, len(photos), gates["E1"], float32
    )
    edges.append(e1)
    if chain.half is None:
        edges.append(EdgeResult("E2", "NOT RUN", "there is no fp16 graph"))
    else:
        say("E2 fp32 vs fp16")
        used.add("E2")
        edges.append(check_half(chain.graph, chain.half, facts, inputs, gates["E2"], chain.spoiled))
    if chain.engine is None:
        edges += [EdgeResult(name, "NOT RUN", chain.absent) for name in ("E3", "E4", "E5")]
    else:
        say("E3 graph vs engine")
        gate = gate_name(chain.precision)
        e3 = check_engine(
            chain.graph, chain.engine, facts, inputs, gates[gate], chain.precision, float32
        )
        shapes, tiles = shape_gates(facts, chain.precision, chain.limits)
        say("E4 two shapes")
        e4 = check_shapes(chain.engine, facts, photos, gates[shapes], chain.limits)
        say("E5 whole vs tiles")
        e5 = check_tiles(chain.engine, facts, photos, gates[tiles], chain.limits, chain.trained)
        edges += [e3, e4, e5]
        used |= {gate, shapes, tiles}
    kept = {name: gate for name, gate in gates.items() if name in used}
    worst = _largest_error(chain, edges, inputs) or worst
    # The last link tells what the user gets.
    task = next((e.task for e in reversed(edges) if e.task is not None), task)
    return Parity(tuple(edges), len(photos), kept, task, worst, ran=chain.engine is not None)


def _largest_error(
    chain: Chain, edges: Sequence[EdgeResult], inputs: Sequence[Input]
) -> Worst | None:
    """To look at: where the first edge that failed differs most, or the last one that compares pictures."""
    pairs = {
        "E1": (chain.deployed or chain.trained, chain.graph),
        "E2": (chain.graph, chain.half),
        "E3": (chain.graph, chain.engine),
    }
    compared = [e for e in edges if e.edge in pairs and e.numbers is not None]
    chosen = next((e for e in compared if e.status == "FAIL"), compared[-1] if compared else None)
    if chosen is None or chosen.numbers is None:
        return None
    place = chosen.numbers.worst
    one, other = pairs[chosen.edge]
    assert other is not None
    lr = next(item.lr for item in inputs if item.name == place.input)
    image = slice(place.image, place.image + 1)
    return Worst(place.input, one(lr)[image], other(lr)[image], place.y, place.x, chosen.edge)


# --- E1 -----------------------------------------------------------------------------------------


def check_export(
    reference: Engine,
    engine: Engine,
    facts: Facts,
    inputs: Iterable[Input],
    photographs: int,
    gate: Gate,
    float32: Float32 | None = None,
) -> tuple[EdgeResult, Task | None, Worst | None]:
    """E1: the network in torch against the exported file on every input.

    `photographs` is the number of different real pictures among the inputs. The gate judges errors
    relative to the range of the output, and forgives what `float32` loses itself (`deploy.comparison`).
    """
    try:
        found = compare(reference, engine, facts, inputs)
    except RefusedError as refused:
        return EdgeResult("E1", "FAIL", str(refused), rows=refused.rows), None, refused.worst
    found, lost = without_lost_patterns(found, gate, float32)
    status, reason = judge(found.relative, gate)
    if found.numbers.max_abs > found.relative.max_abs:
        reason = f"{reason}, relative to the range of the output"
    reason += lost
    if status == "PASS" and photographs < PHOTOGRAPHS:
        status = "INCONCLUSIVE"
        reason = (
            f"{reason}, but only {photographs} real photographs were given; {PHOTOGRAPHS} are needed: "
            "choose a larger set with --data"
        )
    return EdgeResult("E1", status, reason, found.numbers, rows=found.rows), found.task, found.worst


def shape_gates(facts: Facts, precision: str, limits: Limits = ANY_SIZE) -> tuple[str, str]:
    """The tables of gates.toml for E4 and E5.

    In a reduced precision nothing is exact: kernels are chosen by shape and round differently.
    """
    if precision != "fp32":
        return "E4_reduced", "E5_approximate"
    if not facts.exact_tiling:
        return "E4", "E5_approximate"
    return "E4", "E5_torch" if _whole_pictures(facts, limits) is None else "E5_exact"


# --- E4 -----------------------------------------------------------------------------------------


def check_shapes(
    engine: Engine,
    facts: Facts,
    photos: Sequence[Photo],
    gate: Gate,
    limits: Limits = ANY_SIZE,
) -> EdgeResult:
    """E4: two pictures that share their top left corner agree where both see the same surroundings.

    The smaller one ends earlier below and right; what lies farther than the receptive field from there
    cannot know. `limits` are the sizes that the engine takes.
    """
    radius = facts.receptive_field_px
    if radius is None:
        return EdgeResult(
            "E4",
            "NOT RUN",
            "the network looks at the whole picture: every shape has its own result",
        )
    if not photos:
        return EdgeResult("E4", "INCONCLUSIVE", "no photograph was given; choose a set with --data")
    pairs, parts = _surroundings(radius, MARGIN_PX), []
    shrunk = [tuple(MARGIN_PX if side > radius else 0 for side in pair) for pair in pairs]
    fitting = [_fitted(pair, less, limits) for pair, less in zip(pairs, shrunk, strict=True)]
    if None in fitting:
        return EdgeResult("E4", "NOT RUN", _no_room(limits))
    rows: list[dict[str, Any]] = []
    for (h, w), (less_h, less_w) in zip(filter(None, fitting), shrunk, strict=True):
        large = window(photos[0].lr, h, w)
        small_h, small_w = h - less_h, w - less_w
        name = f"{photos[0].name} {h}x{w} vs {small_h}x{small_w}"
        keep = [
            facts.scale * (small - radius if small < side else side)
            for small, side in ((small_h, h), (small_w, w))
        ]
        try:
            whole = engine(large)
            part = engine(np.ascontiguousarray(large[..., :small_h, :small_w]))
        except SrkdError as error:
            return EdgeResult("E4", "FAIL", f"{name}: {error}", rows=tuple(rows))
        x, y = (sr[..., : keep[0], : keep[1]] for sr in (whole, part))
        parts.append(difference(x, y, name, border_px=facts.scale))
        rows.append({"input": name, **parts[-1].to_json()})
    numbers = worst_of(parts)
    status, reason = judge(numbers, gate)
    return EdgeResult("E4", status, reason, numbers, rows=tuple(rows))


def _fitted(size: tuple[int, int], less: tuple[int, ...], limits: Limits) -> tuple[int, int] | None:
    """The size, enlarged so that it less `less` is one of `limits`; None where it is too large then."""
    h, w = (max(s, low + d) for s, low, d in zip(size, limits.smallest, less, strict=True))
    high = limits.largest
    return None if high is not None and (h > high[0] or w > high[1]) else (h, w)


def _no_room(limits: Limits) -> str:
    assert limits.largest is not None
    low, high = ("x".join(map(str, size)) for size in (limits.smallest, limits.largest))
    if low == high:
        return f"the engine takes {low} alone: there is no second size to compare with"
    return (
        f"the engine was built for {low} to {high}, too small a range for two pictures that exceed the receptive "
        "field; build it for more sizes to check this"
    )


def _surroundings(radius: int, more_px: int) -> list[tuple[int, int]]:
    """Sizes of pictures that exceed a reach by `more_px` and a margin: one, or a tall and a wide strip.

    Sides are unequal and odd ones are among them, so that no grid suits them.
    """
    long = radius + more_px + MARGIN_PX
    return [(long, long + 5)] if radius <= FAR_PX else [(long, STRIP_PX), (STRIP_PX, long)]


# --- E5 -----------------------------------------------------------------------------------------


def check_tiles(
    engine: Engine,
    facts: Facts,
    photos: Sequence[Photo],
    gate: Gate,
    limits: Limits = ANY_SIZE,
    trained: Engine | None = None,
) -> EdgeResult:
    """E5: the engine on a whole picture against the same engine on tiles of it.

    The picture exceeds a tile and its halo, so that tiles really miss part of it. `limits` are the sizes
    that the engine takes; where they leave no room for such a picture, the whole one is that of `trained`, the
    network in torch.
    """
    if not photos:
        return EdgeResult("E5", "INCONCLUSIVE", "no photograph was given; choose a set with --data")
    halo, whole_engine = halo_px(facts), engine
    tile = _tile_px(facts)
    rows: list[dict[str, Any]] = []
    parts, seams = [], []
    sizes = _whole_pictures(facts, limits)
    if sizes is None:
        assert limits.largest is not None and trained is not None
        whole_engine = trained
        sizes = [(limits.largest[0] + MARGIN_PX, limits.largest[1] + MARGIN_PX + 5)]
        try:
            kept = largest_kept(sizes[0], facts, limits)
        except SrkdError as error:
            return EdgeResult("E5", "NOT RUN", str(error))
        assert kept is not None  # the picture exceeds what the engine takes
        tile = kept
    for photo, (h, w) in zip(islice(cycle(photos), 2), cycle(sizes), strict=False):
        lr = window(photo.lr, h, w)
        name = f"{photo.name} {h}x{w}, tiles of {tile}, halo {halo}"
        try:
            whole = whole_engine(lr)
            tiled = upscale_tiled(
                as_torch(engine), torch.from_numpy(lr), facts, tile, limits
            ).numpy()
        except SrkdError as error:
            return EdgeResult("E5", "FAIL", f"{name}: {error}", rows=tuple(rows))
        parts.append(difference(whole, tiled, name, border_px=facts.scale * BORDER_PX))
        seams.append(seam_score(whole, tiled))
        rows.append({"input": name, "seam": seams[-1], **parts[-1].to_json()})
    numbers, seam = worst_of(parts), max(seams)
    status, reason = judge(numbers, gate, seam)
    return EdgeResult("E5", status, reason, numbers, seam, tuple(rows))


def _tile_px(facts: Facts) -> int:
    return max(TILE_PX, halo_px(facts) + MARGIN_PX)


def _whole_pictures(facts: Facts, limits: Limits) -> list[tuple[int, int]] | None:
    """Sizes of pictures that the engine takes whole and that exceed a tile; None where `limits` leave no room."""
    pictures = _surroundings(halo_px(facts), _tile_px(facts))
    fitting = [_fitted(size, (0, 0), limits) for size in pictures]
    return None if None in fitting else [size for size in fitting if size is not None]


def as_torch(engine: Engine) -> Callable[[Tensor], Tensor]:
    """An engine as a function of tensors (N, 3, h, w) on the CPU."""

    def run(lr: Tensor) -> Tensor:
        # The result of a runtime may be read-only or reused, so it is copied.
        return torch.from_numpy(engine(np.ascontiguousarray(lr.numpy())).copy())

    return run
