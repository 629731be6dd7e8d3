"""Where float16 breaks a network, and the fewest blocks that must stay float32 (the plan of islands).

A block is a residual block of the module tree, or what lies beside them (`deploy.islands.blocks`), so that
the answer is a name one can find in the network's code, not the number of a layer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.difference import finite_or_none
from deploy.emulation import HalfEmulation, emulated, open_session, run
from deploy.float16 import HALF_MAX, overflows
from deploy.half import HalfNumbers, judge_half, measure_half, tensor_types, to_half, wide_nodes
from deploy.islands import blocks, fixed_islands, node_paths
from srkd.errors import CheckFailedError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from deploy.inputs import Input
    from deploy.verdict import Gate
    from srkd.types import Facts

SEARCH_INPUTS = 3  # the worst ones; a plan found on them is checked on all
_LARGEST = "largest of "


@dataclass(frozen=True)
class BlockRow:
    """One block, in the order of the graph, while every block is float16.

    `largest` is the largest absolute value that float16 would have to store in it (it ends at 65504),
    `nonfinite` counts NaN and infinite values in what leaves it, `relative_error` is rms(error) / rms(value)
    of that, infinite where anything is not finite. `bought_db` is for an island: the PSNR that the worst
    input would lose without it, infinite where that input would not stay finite.
    """

    block: str
    largest: float
    nonfinite: int
    relative_error: float
    bought_db: float | None = None


@dataclass(frozen=True)
class Plan:
    """Islands that let E2 pass, PSNR of the worst input before and after, and a row for every block.

    `islands` come on top of those that every conversion has; where none is needed it is empty.
    """

    islands: tuple[str, ...]
    psnr_before: float
    psnr_after: float
    rows: tuple[BlockRow, ...]

    @property
    def overflow(self) -> str | None:
        """The first block in which a value does not fit float16."""
        return next((r.block for r in self.rows if r.nonfinite or r.largest > HALF_MAX), None)


def plan_islands(
    graph32: onnx.ModelProto,
    facts: Facts,
    inputs: Sequence[Input],
    gate: Gate,
    threads: int = 0,
) -> Plan:
    """The fewest blocks of the float32 graph to keep, so that its float16 version passes E2.

    The search begins with the blocks in which the float32 graph exceeds float16, or with all where those do
    not help, and drops halves of them, then quarters, down to single blocks, as long as E2 still passes: none
    of the result can be spared. Another choice of the same length may exist. `threads` as in `HalfEmulation`.
    """
    trial = _Trial(graph32, facts, inputs, gate, threads)
    fixed = unfit_blocks(graph32)
    before = trial.measure(fixed, inputs)
    if not before.judged:
        raise SrkdError("a plan of islands needs photographs; choose a set with --data.")
    if trial.passes(before):
        return Plan(tuple(fixed), _lowest(before), _lowest(before), ())
    seen = _worst(before, inputs)
    while True:
        rows = trace(graph32, to_half(graph32, fixed), [item.lr for item in seen], threads)
        start = [r.block for r in rows if r.block in fixed or r.largest > HALF_MAX]
        if not trial.works(start, seen):
            start = [r.block for r in rows]
        islands = smallest(start, fixed, seen, trial)
        after = trial.measure(islands, inputs)
        if trial.passes(after):
            break
        # Inputs that were not searched on fail: search again with them, at last with all.
        more = [i for i in inputs if i in seen or i in _worst(after, inputs)]
        seen = more if len(more) > len(seen) else list(inputs)
    best = _lowest(trial.measure(islands, seen))
    priced = [
        replace(row, bought_db=best - trial.without(row.block, islands, seen))
        if row.block in islands
        else row
        for row in rows
    ]
    return Plan(tuple(islands), _lowest(before), _lowest(after), tuple(priced))


def block_table(rows: Sequence[BlockRow]) -> list[dict[str, Any]]:
    """The rows as JSON holds them; what is not finite becomes null."""
    return [{k: finite_or_none(v) for k, v in asdict(row).items()} for row in rows]


class _Trial:
    """Conversions of one graph with different islands, measured as E2 does; float32 runs once per input."""

    def __init__(
        self,
        graph32: onnx.ModelProto,
        facts: Facts,
        inputs: Sequence[Input],
        gate: Gate,
        threads: int,
    ) -> None:
        self.graph32, self.facts, self.gate, self.threads = graph32, facts, gate, threads
        self.session = open_session(graph32, threads)
        self.scale = facts.scale
        self.known: dict[bytes, np.ndarray] = {}
        # The float32 graph against itself: what the task's PSNR is on all inputs.
        self.task_db = measure_half(self, self, facts, inputs).task_db

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        """The float32 graph as an engine that remembers."""
        key = str(lr.shape).encode() + lr.tobytes()
        if key not in self.known:
            (self.known[key],) = run(self.session, ["sr"], lr)
        return self.known[key]

    def measure(self, islands: Sequence[str], inputs: Sequence[Input]) -> HalfNumbers:
        half = HalfEmulation(to_half(self.graph32, islands), self.scale, self.threads)
        return measure_half(self, half, self.facts, inputs)

    def passes(self, measured: HalfNumbers) -> bool:
        """As E2, except that inputs without originals are judged by their PSNR alone, and that patterns
        alone pass when they are finite."""
        if not measured.judged:
            return True
        if measured.task_delta_db is None:
            measured = replace(measured, task_delta_db=0.0)
        return judge_half(measured, self.task_db, self.gate)[0] == "PASS"

    def works(self, islands: Sequence[str], inputs: Sequence[Input]) -> bool:
        return self.passes(self.measure(islands, inputs))

    def without(self, block: str, islands: Sequence[str], inputs: Sequence[Input]) -> float:
        """PSNR of the worst input when one island is float16 after all."""
        try:
            return _lowest(self.measure([b for b in islands if b != block], inputs))
        except SrkdError:
            return -math.inf  # its weights do not fit


def smallest(
    start: Sequence[str], fixed: Collection[str], inputs: Sequence[Input], trial: _Trial
) -> list[str]:
    """`start` without the blocks that can be spared, `fixed` ones kept. None of the rest can be."""
    if not trial.works(start, inputs):
        raise CheckFailedError(
            "the graph does not pass E2 even with every block in float32, so float16 is not what ails it. "
            "See edge E1 of the fp32 export."
        )
    kept = list(start)
    size = max(1, len(kept) // 2)
    while True:
        at, length = 0, len(kept)
        while at < len(kept):
            fewer = [b for k, b in enumerate(kept) if not at <= k < at + size or b in fixed]
            if len(fewer) < len(kept) and trial.works(fewer, inputs):
                kept = fewer
            else:
                at += size
        if size == 1 and len(kept) == length:
            return kept
        size = max(1, size // 2)


def _lowest(measured: HalfNumbers) -> float:
    """PSNR of the worst input in dB, minus infinity where a value is not finite; infinite for patterns
    alone, when they are finite."""
    return min((d.psnr_db for d in measured.judged), default=math.inf)


def _worst(measured: HalfNumbers, inputs: Sequence[Input]) -> list[Input]:
    order = sorted(measured.judged, key=lambda d: d.psnr_db)[:SEARCH_INPUTS]
    names = {d.worst.input for d in order}
    return [item for item in inputs if item.name in names]


# --- what happens inside --------------------------------------------------------------------------


def unfit_blocks(graph32: onnx.ModelProto) -> list[str]:
    """Blocks with weights beyond 65504, outside the islands that every conversion has."""
    types = tensor_types(graph32)
    wide = wide_nodes(graph32, types, fixed_islands(graph32, types))
    weights = [t for t in graph32.graph.initializer if t.data_type == TensorProto.FLOAT]
    large = {t.name for t in weights if overflows(numpy_helper.to_array(t))}
    found = blocks(node_paths(graph32))
    nodes = enumerate(graph32.graph.node)
    return [*dict.fromkeys(found[k] for k, n in nodes if k not in wide and large & set(n.input))]


def trace(
    graph32: onnx.ModelProto, half: onnx.ModelProto, lrs: Sequence[np.ndarray], threads: int = 0
) -> list[BlockRow]:
    """The float32 graph and the emulated float16 one side by side, a row for every block."""
    types, half_types = tensor_types(graph32), tensor_types(half)
    nodes, names = graph32.graph.node, blocks(node_paths(graph32))
    block_of = {
        output: block
        for node, block in zip(nodes, names, strict=True)
        for output in node.output
        if types.get(output) == TensorProto.FLOAT
    }
    leaving = {
        name
        for node, block in zip(nodes, names, strict=True)
        for name in node.input
        if block_of.get(name, block) != block
    } | {value.name for value in graph32.graph.output}
    order = [name for name in block_of if name in leaving]
    stored = [name for name in block_of if half_types.get(name) == TensorProto.FLOAT16]
    wide = open_session(_with_outputs(graph32, order, stored), threads)
    narrow = open_session(_with_outputs(emulated(half), order), threads)
    sums = {block: _Sums() for block in block_of.values()}
    for lr in lrs:
        found = run(wide, [*order, *(_LARGEST + name for name in stored)], lr)
        for name, x, y in zip(order, found, run(narrow, order, lr), strict=False):
            sums[block_of[name]].add(x, y)
        for name, largest in zip(stored, found[len(order) :], strict=True):
            sums[block_of[name]].largest = max(sums[block_of[name]].largest, float(largest))
    return [BlockRow(block, s.largest, s.nonfinite, s.relative_error) for block, s in sums.items()]


def _with_outputs(
    graph: onnx.ModelProto, names: Sequence[str], largest: Sequence[str] = ()
) -> onnx.ModelProto:
    """A copy that also gives `names`, and the largest absolute value of each of `largest`."""
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    for name in largest:
        made.graph.node.append(helper.make_node("Abs", [name], [f"abs of {name}"]))
        made.graph.node.append(
            helper.make_node("ReduceMax", [f"abs of {name}"], [_LARGEST + name], keepdims=0)
        )
    there = {value.name for value in made.graph.output}
    more = [n for n in (*names, *(_LARGEST + n for n in largest)) if n not in there]
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    return made


class _Sums:
    """What is known of one block so far."""

    def __init__(self) -> None:
        self.largest = self.error = self.value = 0.0
        self.nonfinite = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        bad = ~np.isfinite(y)
        self.nonfinite += int(bad.sum())
        wide = x.astype(np.float64)
        self.error += float(np.sum(np.where(bad, 0.0, np.where(bad, 0.0, y) - wide) ** 2))
        self.value += float(np.sum(wide**2))

    @property
    def relative_error(self) -> float:
        if self.nonfinite:
            return math.inf
        return math.sqrt(self.error / self.value) if self.value else 0.0
