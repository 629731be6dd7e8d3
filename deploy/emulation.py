"""A float16 graph as a GPU would compute it, on the CPU: every stored value is rounded to float16.

ONNX Runtime's CPU has few float16 kernels. It computes a float16 graph in float32 and removes the casts
between neighbours, so that an overflow that blackens the picture on a GPU never happens there. Here the graph is
rewritten in float32 with the rounding spelled out: wherever the float16 graph stores a float16 tensor, the
value passes through float16 (nearest even, beyond 65504 infinite) before anything reads it. Sums inside
one operator are float32, as tensor cores accumulate them. A kernel's order of summation, operators that a GPU
splits in several and those that it fuses are not reproduced, so a verdict on it is
provisional until the engine itself was compared (E3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.engine_io import check_input
from deploy.engines import EngineRunError
from deploy.half import tensor_types

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# They move or pick values, which are rounded already. Left out only because ONNX Runtime takes seconds to
# open a graph with thousands of casts.
_MOVES = {
    *("Concat", "DepthToSpace", "Expand", "Gather", "Identity", "MaxPool", "Pad", "ReduceMax"),
    *("Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}


class HalfEmulation:
    """Engine of a float16 graph (`deploy.half.to_half`) in faithful emulation."""

    def __init__(self, graph: onnx.ModelProto, scale: int, threads: int = 0) -> None:
        """`threads` inside one operator; 0 takes every core."""
        self.scale = scale
        self.session = open_session(emulated(graph), threads)

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        check_input(lr)
        return run(self.session, ["sr"], lr)[0]


def emulated(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph that rounds where `graph` stores float16. Tensor names are kept."""
    types = tensor_types(graph)
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    inner = made.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        _widen_attributes(wide)
        nodes.append(wide)
        for k, name in enumerate(node.output):
            if types.get(name) == HALF and node.op_type not in _MOVES:
                wide.output[k] = f"{name}_exact"
                small = f"{name}_rounded"
                nodes.append(helper.make_node("Cast", [wide.output[k]], [small], to=HALF))
                nodes.append(helper.make_node("Cast", [small], [name], to=FLOAT))
    del inner.node[:], inner.value_info[:]
    inner.node.extend(nodes)
    for weight in inner.initializer:
        _widen(weight)
    return made


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == HALF:
            attribute.i = FLOAT
        elif attribute.HasField("t"):
            _widen(attribute.t)


def _widen(weight: onnx.TensorProto) -> None:
    if weight.data_type == HALF:
        value = numpy_helper.to_array(weight).astype(np.float32)
        weight.CopyFrom(numpy_helper.from_array(value, weight.name))


def open_session(graph: onnx.ModelProto, threads: int = 0) -> Any:
    """ONNX Runtime on the CPU without optimisations, which could move or remove a rounding."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(session: Any, names: Sequence[str], lr: np.ndarray) -> list[np.ndarray]:
    """Named tensors of a session for one input."""
    try:
        return session.run(list(names), {"lr": lr})
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        first = str(error).strip().splitlines()[0]
        raise EngineRunError(
            f"the emulation could not run an input of {tuple(lr.shape)}: {first}"
        ) from error
