"""An ONNX graph in OpenVINO on the CPU, in the precision asked for: engine `openvino`.

OpenVINO takes bf16 by itself where the CPU has it (several times as fast, 60 dB away from float32), so the
precision is always pinned, and read back from the compiled network.

A network is compiled for every size of picture: one for all sizes is slower, most of all where windows are cut from
the picture. The first picture of a size therefore costs a compilation.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from deploy.engine_io import check_input, check_output, first_line, one_by_one
from deploy.engines import EngineRunError
from deploy.machine import require
from deploy.proof import Proof
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import openvino

PLACE = "CPU"
HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
# Names that the CPU plugin gives to convolutions and matrix products.
ARITHMETIC = (
    "Convolution",
    "Deconvolution",
    "FullyConnected",
    "MatMul",
    "ScaledDotProductAttention",
)
KEPT_SIZES = 8


class OpenVinoEngine:
    """A graph in OpenVINO; `precision` is that of the arithmetic, the graph may be float32 or float16."""

    def __init__(self, file: Path, scale: int, precision: str = "fp32", threads: int = 0) -> None:
        """`threads` of one picture; 0 lets OpenVINO take every core."""
        library = require("openvino", "Core", "engine 'openvino'", "pip install openvino")
        self.scale = scale
        self.file = file
        self.options = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
        }
        self.core = library.Core()
        self.compiled: OrderedDict[tuple[int, ...], openvino.CompiledModel] = OrderedDict()
        try:
            shape = self.core.read_model(file).input(0).get_partial_shape()
        except RuntimeError as error:
            raise SrkdError(
                f"OpenVINO cannot open {file} ({first_line(error)}); export it again."
            ) from error
        h, w = (shape[axis] for axis in (2, 3))
        self.size = (h.get_length(), w.get_length()) if shape.is_static else None

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        check_input(lr)
        if self.size is not None:
            return one_by_one(self._run, lr, self.size, self.file)
        return self._run(lr)

    def _run(self, lr: np.ndarray) -> np.ndarray:
        try:
            sr: np.ndarray = self._network(lr.shape)([lr])[0]
        except RuntimeError as error:
            raise EngineRunError(
                f"OpenVINO could not run {self.file.name} on an input of {tuple(lr.shape)}: "
                f"{first_line(error)}"
            ) from error
        check_output(sr, lr, self.scale, self.file)
        return sr

    def _network(self, shape: tuple[int, ...]) -> openvino.CompiledModel:
        """Compiled for `shape`; the KEPT_SIZES used last are kept."""
        if shape not in self.compiled:
            graph = self.core.read_model(self.file)
            graph.reshape([*shape])
            self.compiled[shape] = self.core.compile_model(graph, PLACE, self.options)
            if len(self.compiled) > KEPT_SIZES:
                self.compiled.popitem(last=False)
        self.compiled.move_to_end(shape)
        return self.compiled[shape]

    def proof(self, lr: np.ndarray) -> Proof:
        """Read from the network as it was compiled for the size of `lr`."""
        layers: Counter[str] = Counter()
        names = {hint: precision for precision, hint in HINTS.items()}
        for operation in self._network(lr.shape).get_runtime_model().get_ops():
            about = operation.get_rt_info()
            if about["layerType"].astype(str) in ARITHMETIC:
                kind: str = about["runtimePrecision"].astype(str)
                layers[names.get(kind, kind)] += 1
        return Proof(dict(layers), PLACE, {PLACE: layers.total()})


def open_openvino(file: Path, scale: int, settings: dict[str, Any]) -> OpenVinoEngine:
    """Opener of the engine `openvino`."""
    return OpenVinoEngine(file, scale, settings["precision"], settings["threads"])
