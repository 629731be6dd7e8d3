"""FP16 in the graph: the same file with float16 weights and activations, and what that costs (edge E2).

The types are written into the graph, one per tensor, because engines that are strongly typed (TensorRT from
version 11, TensorRT for RTX) have no other way to learn them, and the others then do the same. `lr` and
`sr` stay float32, so does the arithmetic at both ends, and so do islands (`deploy.islands`).

The conversion is ours and not `onnxruntime.transformers.float16`: that one rounds every tensor inside a
float32 island to float16 and back, gives two casts one name where two nodes of an island read one tensor,
replaces constants that do not fit by the nearest that do, and needs a runtime in order to write a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.comparison import BORDER_PX, psnr_y
from deploy.difference import Difference, difference, worst_of
from deploy.float16 import HALF_MAX, overflows
from deploy.islands import check_islands, ends, fixed_islands, inside, node_paths
from deploy.verdict import EdgeResult, Gate, Status, Task, judge, judge_task, with_task_margin
from srkd.errors import CheckFailedError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from deploy.engines import Engine
    from deploy.inputs import Input
    from srkd.types import Facts

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16

# --- the conversion -------------------------------------------------------------------------------


def to_half(graph: onnx.ModelProto, islands: Sequence[str] = ()) -> onnx.ModelProto:
    """A copy of an exported float32 graph that computes in float16, outside `islands`.

    `islands` are names as in `deploy.islands`; the islands that every network needs are added to them. All are
    noted in the file under `srkd.fp32_islands`. Weights are rounded to the nearest float16; tiny ones
    become zero. Refused: weights beyond 65504, unless their block is an island; a graph that holds
    float16 already, or graphs within the graph.
    """
    types = tensor_types(graph)
    _check_convertible(graph, types)
    paths = node_paths(graph)
    check_islands(paths, islands)
    islands = [*dict.fromkeys([*fixed_islands(graph, types), *islands])]
    wide = wide_nodes(graph, types, islands)
    half = _Conversion(graph, types).run(wide, paths)
    notes = {"srkd.precision": "fp16", "srkd.fp32_islands": json.dumps(islands)}
    for key, value in notes.items():
        half.metadata_props.add(key=key, value=value)
    try:
        onnx.checker.check_model(half, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailedError(
            f"the float16 graph does not pass the ONNX checker ({str(error).strip().splitlines()[0]}); "
            "this is a fault of the conversion: export in fp32."
        ) from error
    return half


def wide_nodes(graph: onnx.ModelProto, types: dict[str, int], islands: Iterable[str]) -> set[int]:
    """Positions of the nodes that stay float32: both ends of the graph and all of `islands`."""
    paths = node_paths(graph)
    inner = {k for k, path in enumerate(paths) if any(inside(path, i) for i in islands)}
    return inner | ends(graph, types)


def tensor_types(graph: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor of the graph by name, weights included."""
    inner = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    values = [*inner.input, *inner.value_info, *inner.output]
    return {
        **{v.name: v.type.tensor_type.elem_type for v in values},
        **{t.name: t.data_type for t in inner.initializer},
    }


def _check_convertible(graph: onnx.ModelProto, types: dict[str, int]) -> None:
    if HALF in types.values():
        raise SrkdError("the graph holds float16 already; convert the fp32 export instead.")
    nested = graph.functions or any(a.HasField("g") for n in graph.graph.node for a in n.attribute)
    if nested:
        raise SrkdError(
            "the graph has branches or functions inside, which cannot be converted to float16: a "
            "network's Python code must not branch on the image. Export it in fp32."
        )


class _Conversion:
    """One pass over the nodes; a tensor is cast once for all nodes that want its other type."""

    def __init__(self, graph: onnx.ModelProto, types: dict[str, int]) -> None:
        self.half = onnx.ModelProto()
        self.half.CopyFrom(graph)
        self.opset = next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
        self.weights = {t.name: t for t in self.half.graph.initializer if t.data_type == FLOAT}
        self.stored = {name: t for name, t in types.items() if t == FLOAT}
        self.other: dict[str, str] = {}  # a tensor's copy in the other type
        self.nodes: list[onnx.NodeProto] = []
        self.extra: list[onnx.TensorProto] = []

    def run(self, wide: set[int], paths: list[str]) -> onnx.ModelProto:
        inner = self.half.graph
        for k, node in enumerate(inner.node):
            ports = None if k in wide else _half_ports(node, self.opset)
            for i, name in enumerate(node.input):
                if name in self.stored:
                    want = HALF if ports and ports[0][i] else FLOAT
                    node.input[i] = self._as(name, want, node, paths[k])
            self.nodes.append(node)
            if ports:
                _narrow_attributes(node, paths[k])
                narrow = [o for o, may in zip(node.output, ports[1], strict=True) if may]
                self.stored.update({o: HALF for o in narrow if o in self.stored})
        self._keep_outputs()
        used = {name for node in self.nodes for name in node.input}
        kept = [t for t in (*inner.initializer, *self.extra) if t.name in used]
        for value in inner.value_info:
            if value.name in self.stored:
                value.type.tensor_type.elem_type = self.stored[value.name]
        nodes = [_copy(node) for node in self.nodes]
        weights = [_copy(t) for t in kept]
        del inner.node[:], inner.initializer[:]
        inner.node.extend(nodes)
        inner.initializer.extend(weights)
        return self.half

    def _as(self, name: str, want: int, node: onnx.NodeProto, path: str) -> str:
        """The name under which the tensor exists in this type, made at first use."""
        if self.stored[name] == want:
            return name
        if name not in self.other:
            copy = f"{name}_{'fp16' if want == HALF else 'fp32'}"
            if name in self.weights:
                self.extra.append(_narrow(self.weights[name], copy, path))
            else:
                cast = helper.make_node("Cast", [name], [copy], name=f"cast_{copy}", to=want)
                cast.metadata_props.extend(node.metadata_props)
                self.nodes.append(cast)
            self.other[name] = copy
        return self.other[name]

    def _keep_outputs(self) -> None:
        """The graph's outputs keep name and type: a float16 one is renamed and cast."""
        for value in self.half.graph.output:
            if self.stored.get(value.name) != HALF:
                continue
            renamed = f"{value.name}_fp16"
            for node in self.nodes:
                node.input[:] = [renamed if i == value.name else i for i in node.input]
                node.output[:] = [renamed if o == value.name else o for o in node.output]
            self.nodes.append(helper.make_node("Cast", [renamed], [value.name], to=FLOAT))


def _half_ports(node: onnx.NodeProto, opset: int) -> tuple[list[bool], list[bool]] | None:
    """Which inputs and outputs of a node may be float16; None where the operator knows no float16."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def ports(names: Sequence[str], formal: Sequence[Any]) -> list[Sequence[str]]:
        """Types of every port in use; the last formal parameter stands for all further ones."""
        last = len(formal) - 1
        kinds = [formal[min(k, last)].type_str for k in range(len(names))]
        return [allowed.get(t, (t,)) if name else () for name, t in zip(names, kinds, strict=True)]

    both = [ports(node.input, schema.inputs), ports(node.output, schema.outputs)]
    for types in (*both[0], *both[1]):
        # A port of one type only ("tensor(float)") is fixed: the scales of Resize stay float32 beside a
        # float16 picture. One of several types without float16 rules the operator out.
        if len(types) > 1 and "tensor(float)" in types and "tensor(float16)" not in types:
            return None
    inputs, outputs = ([("tensor(float16)" in types) for types in side] for side in both)
    return inputs, outputs


def _narrow(weight: onnx.TensorProto, name: str, path: str) -> onnx.TensorProto:
    """The constant as float16, rounded to nearest. One that does not fit is refused, never clipped."""
    value = numpy_helper.to_array(weight)
    if overflows(value):
        largest = float(np.abs(value[np.isfinite(value)]).max())
        module = path.partition("/")[0] or "/"
        raise SrkdError(
            f"'{weight.name}' holds {largest:g}, and float16 ends at {HALF_MAX:g}. Keep '{module}' in "
            "float32 (an island), or export in fp32."
        )
    return numpy_helper.from_array(value.astype(np.float16), name)


def _narrow_attributes(node: onnx.NodeProto, path: str) -> None:
    """Types and constants that a node carries itself: the target of a cast, the value of a constant."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == FLOAT:
            attribute.i = HALF
        elif attribute.HasField("t") and attribute.t.data_type == FLOAT:
            attribute.t.CopyFrom(_narrow(attribute.t, attribute.t.name, path))


def spoiled_constants(graph32: onnx.ModelProto, half: onnx.ModelProto) -> list[str]:
    """Names of the constants in `half` that are neither those of `graph32` nor their nearest float16.

    Single numbers that became zero or infinite count too: guards against dividing by zero. None in a sound
    conversion. Pictures tell little: weights rounded to bfloat16 on the way leave 57 to 67 dB on photographs, sound
    networks have 69 or more, and a guard is missed by few pictures.
    """
    before = {name: numpy_helper.to_array(t) for name, t in _constants(graph32).items()}
    spoiled = []
    for name, tensor in _constants(half).items():
        value, origin = numpy_helper.to_array(tensor), before.get(name)
        if origin is None:
            origin = before.get(name.removesuffix("_fp16"))
        if origin is None or not _is_rounded(origin, value):
            spoiled.append(name)
    return spoiled


def _is_rounded(origin: np.ndarray, value: np.ndarray) -> bool:
    """Whether `value` is `origin` itself or its nearest float16, and no single number is lost in it."""
    if value.dtype not in (origin.dtype, np.float16):
        return False
    lost = value.size == 1 and (
        (value == 0) != (origin == 0) or np.isinf(value) != np.isinf(origin)
    )
    with np.errstate(over="ignore"):
        return not lost and np.array_equal(value, origin.astype(value.dtype))


def _constants(graph: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Weights by name, constants that a node carries itself by the node's first output."""
    nodes = ((n.output[0], a.t) for n in graph.graph.node for a in n.attribute if a.HasField("t"))
    return {**{t.name: t for t in graph.graph.initializer}, **dict(nodes)}


def _copy(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


# --- E2 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfNumbers:
    """What float16 changes on some inputs.

    `rows` has a row per input, `judged` the difference of every photograph, and of any pattern where a value is
    not finite. `task_db` is the mean PSNR-Y of the float32 graph on inputs that have an original,
    `task_delta_db` the mean change of it; None without originals.
    """

    rows: tuple[dict[str, Any], ...]
    judged: tuple[Difference, ...]
    task_db: float | None
    task_delta_db: float | None


def check_half(
    graph32: Engine,
    emulated16: Engine,
    facts: Facts,
    inputs: Iterable[Input],
    gate: Gate,
    spoiled: Sequence[str] = (),
) -> EdgeResult:
    """E2: the float32 graph against the faithful emulation of the float16 one (`HalfEmulation`).

    The PSNR that the gate asks for rises with the task's, and what float16 takes from that is judged too:
    without originals the edge cannot pass. Patterns must only stay finite: a network that answers the finest
    checkerboard with values of thousands changes more by half a level of its input than by float16.
    `spoiled` are the `spoiled_constants` of the float16 graph: with any it fails.
    """
    try:
        measured = measure_half(graph32, emulated16, facts, inputs)
    except SrkdError as error:
        return EdgeResult("E2", "FAIL", str(error))
    status, reason = judge_half(measured, measured.task_db, gate)
    numbers = worst_of([*measured.judged]) if measured.judged else None
    if spoiled:
        status = "FAIL"
        shown = ", ".join(spoiled[:3]) + (", ..." if len(spoiled) > 3 else "")
        reason = f"constants that are not the float32 ones rounded to nearest: {len(spoiled)} ({shown}); {reason}"
    task = None
    if measured.task_db is not None and measured.task_delta_db is not None:
        scored = sum("task_delta_db" in row for row in measured.rows)
        task = Task(scored, measured.task_db, measured.task_db + measured.task_delta_db)
    return EdgeResult("E2", status, reason, numbers, rows=measured.rows, task=task)


def measure_half(
    graph32: Engine, emulated16: Engine, facts: Facts, inputs: Iterable[Input]
) -> HalfNumbers:
    """Both graphs on every input."""
    rows: list[dict[str, Any]] = []
    judged: list[Difference] = []
    tasks: list[Task] = []
    for item in inputs:
        x, y = graph32(item.lr), emulated16(item.lr)
        found = difference(x, y, item.name, border_px=facts.scale * BORDER_PX)
        gated = item.kind == "photograph" or (item.gated and found.nonfinite > 0)
        row = {"input": item.name, "kind": item.kind, "gated": gated, **found.to_json()}
        if gated:
            judged.append(found)
        if item.hr is not None and not found.nonfinite:
            tasks.append(Task(1, *(psnr_y(sr, item.hr, facts.scale) for sr in (x, y))))
            row["task_delta_db"] = tasks[-1].delta_db
        rows.append(row)
    task = fmean(one.torch_db for one in tasks) if tasks else None
    delta = fmean(one.delta_db for one in tasks) if tasks else None
    return HalfNumbers(tuple(rows), tuple(judged), task, delta)


def judge_half(measured: HalfNumbers, task_db: float | None, gate: Gate) -> tuple[Status, str]:
    """Verdict of E2. `task_db` is the task's PSNR-Y, which may be known from more inputs than were measured."""
    if not measured.judged:
        return "INCONCLUSIVE", "no photograph was given; choose a set with --data"
    numbers = worst_of([*measured.judged])
    status, reason = judge(numbers, with_task_margin(gate, task_db))
    if numbers.nonfinite:
        return status, reason
    return judge_task(status, reason, measured.task_delta_db, gate)
