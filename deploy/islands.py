"""Which operations of a graph stay float32 when the rest becomes float16, and how they are named.

Operations are named by the module tree, as the exporter notes it: "groups.0.blocks.1.conv1/conv2d_3" is the
operation conv2d_3 of that module. An island is written as one of

    "groups.0.blocks.1"     the module with all that is inside it
    "groups.0/"             the module's own operations, without those of its submodules ("/": the network's)
    "groups.0/add_71"       one operation

Three kinds of steps are islands in every network, because pictures that are larger or flatter than the ones
a check can afford would break them (`fixed_islands`); the arithmetic at both ends of the graph stays float32
because it is nearly free there (`ends`).
"""

from __future__ import annotations

import ast
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.float16 import overflows
from deploy.graph import KEPT_NOTE
from srkd.errors import SrkdError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NETWORK = "/"  # the network's own operations
_NO_MODULE = "_empty_nn_module_stack"  # the exporter's word for sizes, which belong to no module
_SUMS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_SAME_MATRIX = frozenset({"Transpose", "Reshape", "Identity"})
_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def node_paths(graph: onnx.ModelProto) -> list[str]:
    """`module/operation` of every node, in their order. A node without a note (the exporter's own) goes
    with the node that makes its first input."""
    made: dict[str, str] = {}
    paths = []
    for node in graph.graph.node:
        noted = next((p.value for p in node.metadata_props if p.key == KEPT_NOTE), None)
        path = _path(noted) if noted else next((made[i] for i in node.input if i in made), NETWORK)
        paths.append(path)
        made.update(dict.fromkeys(node.output, path))
    return paths


def _path(note: str) -> str:
    """The note is a list of modules from the root on, then the operation: "['', 'head', 'sub']"."""
    *modules, operation = ast.literal_eval(note)
    module = modules[-1] if modules and not modules[0].startswith(_NO_MODULE) else ""
    return f"{module}/{operation}"


def inside(path: str, island: str) -> bool:
    """Whether the operation belongs to the island."""
    if island.endswith("/"):
        return path.startswith(island)
    return path == island or path.startswith((f"{island}/", f"{island}."))


def check_islands(paths: Sequence[str], islands: Iterable[str]) -> None:
    """Refuse an island that no operation belongs to."""
    for island in islands:
        if not any(inside(path, island) for path in paths):
            known = sorted(set(blocks(paths)) | {p.partition("/")[0] for p in paths if p[0] != "/"})
            raise SrkdError(
                f"the graph has no block '{island}' to keep in float32; {nearest(island, known)}"
            )


def blocks(paths: Sequence[str]) -> list[str]:
    """The block of every operation: residual blocks, and what lies around them.

    A block is a module down to its last number ("groups.0.blocks.1"), or what is left beside numbered
    ones ("groups.0.conv", "groups.0/"). No operation is in two blocks.
    """
    modules = [path.partition("/")[0] for path in paths]
    numbered = {_to_last_number(m) for m in modules} - {None}
    split = {".".join(n.split(".")[:k]) for n in numbered if n for k in range(1, n.count(".") + 1)}
    return [_block(m, split) for m in modules]


def _to_last_number(module: str) -> str | None:
    parts = module.split(".")
    last = max((k for k, part in enumerate(parts) if part.isdigit()), default=None)
    return None if last is None else ".".join(parts[: last + 1])


def _block(module: str, split: set[str]) -> str:
    if not module:
        return NETWORK
    parts = module.split(".")
    start = _to_last_number(module) or parts[0]
    for k in range(start.count(".") + 1, len(parts) + 1):
        block = ".".join(parts[:k])
        if block not in split:
            return block
    return f"{module}/"


def fixed_islands(graph: onnx.ModelProto, types: Mapping[str, int]) -> list[str]:
    """Modules whose own operations half precision would ruin, whatever the weights.

    `types` are element types by tensor name. They are modules with one of
    a Gram matrix x x^T: it sums squares over a whole picture;
    a single constant that float16 turns into zero or infinity: mostly a guard against dividing by zero;
    a count or size as a number (integer to float): it passes 65504 on pictures of 256 x 256.
    """
    nodes, paths = graph.graph.node, node_paths(graph)
    guards = {t.name for t in graph.graph.initializer if _ruined(t)}
    same = {node.output[0]: node.input[0] for node in nodes if node.op_type in _SAME_MATRIX}
    counts: set[str] = set()
    found: dict[str, None] = {}
    for node, path in zip(nodes, paths, strict=True):
        if node.op_type == "Cast" and types.get(node.input[0]) in _INTEGERS:
            counts.update(node.output)
        gram = node.op_type == "MatMul" and len({_origin(i, same) for i in node.input}) == 1
        if gram or guards.intersection(node.input) or counts.intersection(node.input):
            found[path.partition("/")[0] + "/"] = None
    return list(found)


def _ruined(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) != 1:
        return False
    value = numpy_helper.to_array(tensor)
    return overflows(value) or bool(np.any((value != 0) & (value.astype(np.float16) == 0)))


def _origin(name: str, same: Mapping[str, str]) -> str:
    while name in same:
        name = same[name]
    return name


def ends(graph: onnx.ModelProto, types: Mapping[str, int]) -> set[int]:
    """Positions of the nodes between the input and the first sums, and between the last sums and the output.

    Subtracting a mean, scaling to 0..255 and back, adding a skipped image: on three channels, on numbers that
    arrive and leave as float32. Worth 0 to 6 dB in trained networks (docs/deploy_fp16.md).
    """
    nodes = graph.graph.node
    early: set[int] = set()
    raw = {value.name for value in graph.graph.input}
    weights = {t.name for t in graph.graph.initializer}
    for k, node in enumerate(nodes):
        floats = [i for i in node.input if types.get(i) == onnx.TensorProto.FLOAT]
        pictures = [i for i in floats if i not in weights]
        if node.op_type not in _SUMS and pictures and raw.issuperset(pictures):
            early.add(k)
            raw.update(node.output)
    late: set[int] = set()
    inner = {i for node in nodes if node.op_type in _SUMS for i in node.input}
    for k, node in reversed(list(enumerate(nodes))):
        if node.op_type in _SUMS or inner.intersection(node.output):
            inner.update(node.input)
        else:
            late.add(k)
    return early | late
