"""A small network with all that an export makes of it, to be spoilt in one place.

Every method of `Sound` that returns a chain returns what `deploy.parity.verify` takes, with one link replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from deploy.emulation import HalfEmulation
from deploy.half import spoiled_constants
from deploy.ort_engine import OrtEngine
from deploy.parity import Chain
from deploy.proof import Proof
from deploy.torch_engines import DoubleTorchEngine, TorchEngine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deploy.inputs import Photo
    from srkd.networks.base import Network
    from srkd.types import Facts


@dataclass
class Sound:
    """A network, its float32 graph, and what an export makes of both. `folder` takes spoilt files."""

    network: Network
    graph: onnx.ModelProto
    folder: Path
    photos: list[Photo]
    facts: Facts = field(init=False)

    def __post_init__(self) -> None:
        self.facts = self.network.facts

    @cached_property
    def scale(self) -> int:
        return self.network.scale

    @cached_property
    def trained(self) -> TorchEngine:
        return TorchEngine(self.network, self.scale, threads=1)

    @cached_property
    def engine(self) -> OrtEngine:
        return self.open(self.graph)

    def open(self, graph: onnx.ModelProto) -> OrtEngine:
        path = self.folder / f"{len([*self.folder.iterdir()])}.onnx"
        onnx.save(graph, path)
        return OrtEngine(path, self.scale, threads=1)

    def chain(self, **links: Any) -> Chain:
        """The sound chain, `links` replaced; fp64 is that of the network alone."""
        exact = None if "trained" in links else DoubleTorchEngine(self.network, self.scale)
        sound = Chain(self.trained, self.engine, self.engine, exact=exact)
        return replace(sound, **links)

    def exported(self, graph: onnx.ModelProto) -> Chain:
        """`graph` in place of the sound one, as the file and as the engine."""
        engine = self.open(graph)
        return self.chain(graph=engine, engine=engine)

    def deployed(self, network: Any) -> Chain:
        """`network` in place of the rescaled one, and exported without fault."""
        made = TorchEngine(network, self.scale, threads=1)
        return self.chain(deployed=made, graph=made, engine=None, absent="nothing was built")

    def halved(self, half: onnx.ModelProto, wide: onnx.ModelProto | None = None) -> Chain:
        """`half` in place of the float16 graph; `wide` is the float32 graph that it was made from."""
        wide = wide or self.graph
        before = self.open(wide)
        return self.chain(
            trained=before,
            graph=before,
            engine=None,
            absent="nothing was built",
            precision="fp16",
            half=HalfEmulation(half, self.scale, threads=1),
            spoiled=tuple(spoiled_constants(wide, half)),
        )

    def answered(self, answer: Callable[[np.ndarray], np.ndarray]) -> Chain:
        """An engine that claims float32 and answers `answer(lr)`."""
        return self.chain(engine=Other(self.scale, answer))


@dataclass
class Other:
    """An engine that answers and proves what it is told to."""

    scale: int
    answer: Callable[[np.ndarray], np.ndarray]
    told: Proof = field(default_factory=lambda: Proof({"fp32": 1}, "CPU", {"CPU": 1}))

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        return self.answer(lr)

    def proof(self, lr: np.ndarray) -> Proof:
        return self.told


# --- spoilt graphs ---


def edited(graph: onnx.ModelProto, **changes: Callable[[np.ndarray], Any]) -> onnx.ModelProto:
    """A copy with some constants changed; `__` in the name of a constant stands for a dot."""
    made = copied(graph)
    names = {name.replace("__", "."): change for name, change in changes.items()}
    tensors = [t for t in made.graph.initializer if t.name in names]
    assert len(tensors) == len(names), "no such constant"
    for tensor in tensors:
        before = numpy_helper.to_array(tensor)
        after = np.ascontiguousarray(names[tensor.name](before.copy())).astype(before.dtype)
        assert after.shape == before.shape and not np.array_equal(after, before)
        tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
    return made


def all_edited(
    graph: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray]
) -> onnx.ModelProto:
    """A copy with every constant of floats changed."""
    made = copied(graph)
    for tensor in made.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            before = numpy_helper.to_array(tensor)
            after = change(before.astype(np.float32)).astype(before.dtype)
            tensor.CopyFrom(numpy_helper.from_array(after, tensor.name))
    return made


def copied(graph: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    return made


def to_bf16(value: np.ndarray) -> np.ndarray:
    return torch.from_numpy(value.copy()).bfloat16().float().numpy()


def tf32(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with what enters convolutions and matrix products rounded to 10 bits (through float16)."""
    made = copied(graph)
    del made.graph.node[:], made.graph.value_info[:]
    rounded: set[str] = set()
    for node in copied(graph).graph.node:
        for i, name in enumerate(
            node.input[:2] if node.op_type in ("Conv", "MatMul", "Gemm") else []
        ):
            if name not in rounded:
                small = f"{name}_10_bits"
                made.graph.node.append(
                    helper.make_node("Cast", [name], [small], to=TensorProto.FLOAT16)
                )
                made.graph.node.append(
                    helper.make_node("Cast", [small], [f"{name}_tf32"], to=TensorProto.FLOAT)
                )
                rounded.add(name)
            node.input[i] = f"{name}_tf32"
        made.graph.node.append(node)
    return made
