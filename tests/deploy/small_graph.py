"""Graphs small enough to compute by hand, noted and named as the exporter does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.graph import KEPT_NOTE, OPSET
from srkd.types import Facts

FACTS = Facts(scale=1, receptive_field_px=1, exact_tiling=True)
SIZE = ["batch", 3, "height", "width"]


def node(
    op: str, module: str, inputs: Sequence[str], output: str, **attributes: object
) -> onnx.NodeProto:
    """A node of `module` ("" for the network itself), noted with all modules around it."""
    made = helper.make_node(op, list(inputs), [output], name=f"node_{output}", **attributes)
    parts = module.split(".") if module else []
    around = ["", *(".".join(parts[: k + 1]) for k in range(len(parts)))]
    made.metadata_props.add(key=KEPT_NOTE, value=str([*around, output]))
    return made


def model(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """`lr` to `sr`, both float32 (batch, 3, height, width)."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, SIZE) for n in ("lr", "sr")]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "small", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


@dataclass
class Residual:
    """255 lr, then blocks x + conv2(relu(conv1(x))), then back to [0, 1]; every convolution is 1 x 1 and
    keeps the channels apart. conv1 multiplies by `gain`, conv2 divides by twice that, so that a block multiplies
    by 1.5 and holds `gain` times its input (one number, or one per channel). `bias` is added by conv1 and subtracted again by conv2.
    """

    blocks: int = 3
    gain: dict[int, float | tuple[float, float, float]] = field(default_factory=dict)
    bias: dict[int, float] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        weights = {"range": np.array(255, np.float32)}
        nodes = [node("Mul", "head", ["lr", "range"], "wide")]
        stream = self._conv(nodes, weights, "head.conv", "wide", 1.0)
        for k in range(self.blocks):
            gain, bias = np.array(self.gain.get(k, 1.0)), self.bias.get(k, 0.0)
            inner = self._conv(nodes, weights, f"groups.{k}.conv1", stream, gain, bias)
            nodes.append(node("Relu", f"groups.{k}", [inner], f"relu_{k}"))
            back = self._conv(
                nodes, weights, f"groups.{k}.conv2", f"relu_{k}", 0.5 / gain, -bias / 2 / gain
            )
            nodes.append(node("Add", f"groups.{k}", [stream, back], f"add_{k}"))
            stream = f"add_{k}"
        last = self._conv(nodes, weights, "tail.last", stream, 1.5**-self.blocks)
        nodes.append(node("Div", "tail", [last, "range"], "sr"))
        return model(nodes, weights)

    def _conv(
        self,
        nodes: list[onnx.NodeProto],
        weights: dict[str, np.ndarray],
        module: str,
        x: str,
        gain: float | np.ndarray,
        bias: float | np.ndarray = 0.0,
    ) -> str:
        weights[f"{module}.weight"] = (gain * np.eye(3)).astype(np.float32)[..., None, None]
        weights[f"{module}.bias"] = np.full(3, bias).astype(np.float32)
        output = f"out_{module}"
        nodes.append(node("Conv", module, [x, f"{module}.weight", f"{module}.bias"], output))
        return output
