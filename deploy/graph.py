"""Network -> ONNX graph: one file, dynamic batch, height and width or one fixed size, float32, output not clamped.

Uses the exporter built on torch.export (`dynamo=True`), because (measured with torch 2.13, one core)
it names every weight as the network does, writes the output size as an expression (`4*height`) and
writes SwinIR in a third of the nodes of the old exporter. It costs about 5 s once (imports) and 2 s per
small network; the old one is faster but deprecated.

Opset 20: the exporter's own default, and old enough for every engine we target.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import nn
from torch.export import Dim

from deploy.collapse import collapse_tail, export_facts
from deploy.machine import srkd_version
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import replacing, sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from srkd.models import LoadedModel

OPSET = 20
INPUT, OUTPUT = "lr", "sr"
INPUT_RANGE = "RGB in [0, 1]"
OUTPUT_RANGES = {
    "unclamped": "RGB in about [0, 1], not clamped: clamp before rounding to levels",
    "clamped": "RGB in [0, 1]",
}
# Of the exporter's notes per node we keep the module path, which names a faulty layer. The others hold
# stack traces with the folders of the machine that exported.
KEPT_NOTE = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Graph:
    """An exported file and what it declares; `collapsed`: its upsampling is that of deploy/collapse.py."""

    path: Path
    sha256: str
    opset: int
    nodes: int
    collapsed: bool
    input_dims: list[str | int]
    output_dims: list[str | int]


def weights_file(model: LoadedModel) -> Path:
    """The file that the weights of MODEL came from; its hash ties a graph to a network."""
    source = model.source
    return source / "weights.safetensors" if source.is_dir() else source


def export_graph(
    model: LoadedModel,
    path: Path,
    size: tuple[int, int] | None = None,
    *,
    staged: bool = False,
) -> Graph:
    """Write `model` as ONNX to `path`, checked by the ONNX checker.

    Input `lr` (batch, 3, height, width) float32 RGB in [0, 1]; output `sr` (batch, 3, scale*height,
    scale*width), not clamped. With `size` (h, w) all dims are numbers, batch 1. A linear upsampling is collapsed
    (deploy/collapse.py) unless `staged`. The network's mode and device are left alone. Raises `SrkdError` for a
    network that cannot be exported and `CheckFailedError` for a graph that breaks the contract.
    """
    network = copy.deepcopy(model.network).float().cpu().eval()
    model = replace(model, facts=export_facts(model, staged=staged))
    whole = None if staged else collapse_tail(network)
    network = network if whole is None else whole
    proto = _trace(network, model, size)
    _strip_notes(proto)
    _describe(proto, model)
    check_graph(proto, model.scale, _pixel_shuffles(network), size)
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return Graph(
        path=path,
        sha256=sha256(path),
        opset=_opset(proto),
        nodes=len(proto.graph.node),
        collapsed=whole is not None,
        input_dims=_dims(proto.graph.input[0]),
        output_dims=_dims(proto.graph.output[0]),
    )


def _trace(network: nn.Module, model: LoadedModel, size: tuple[int, int] | None) -> onnx.ModelProto:
    facts = model.facts
    if size is None:
        # Sizes off the network's grid, unequal, and a batch of two: whatever the exporter would bake in
        # from a convenient sample fails here instead of at the user's first odd picture.
        start, grid = facts.minimum_px + 2 * facts.size_multiple, facts.size_multiple
        h, w = islice((s for s in count(start + 1) if grid == 1 or s % grid), 2)
        sample = torch.rand(2, 3, h, w)
        low = facts.minimum_px
        sizes = ({0: Dim("batch"), 2: Dim("height", min=low), 3: Dim("width", min=low)},)
    else:
        sample, sizes = torch.rand(1, 3, *size), None
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                network,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=sizes,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        first = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        dynamic = (
            "with dynamic sizes: {} A network whose Python code branches on the image size must compute the size "
            "instead, or be exported for one size: --static."
        )
        told = (dynamic if size is None else "for one size: {}").format(first.strip())
        raise SrkdError(f"{model.name} cannot be written as ONNX {told}") from error
    assert program is not None  # None only when the exporter is told to write the file itself
    return program.model_proto


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence notices that a user can do nothing about (absent torchvision, inner deprecations)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _strip_notes(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        kept = [note for note in node.metadata_props if note.key == KEPT_NOTE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def _describe(proto: onnx.ModelProto, model: LoadedModel) -> None:
    """The facts a stranger's tool can read from the file alone (the sidecar has them all)."""
    network = model.network
    notes = {
        "srkd.version": srkd_version(),
        "srkd.name": model.name,
        "srkd.family": str(getattr(network, "family", type(network).__name__)),
        "srkd.arguments": json.dumps(getattr(network, "arguments", {}), sort_keys=True),
        "srkd.scale": str(model.scale),
        "srkd.input_range": INPUT_RANGE,
        "srkd.output_range": OUTPUT_RANGES[model.facts.output_range],
        "srkd.weights_sha256": sha256(weights_file(model)),
    }
    del proto.metadata_props[:]
    for key, value in notes.items():
        proto.metadata_props.add(key=key, value=value)


def _pixel_shuffles(network: nn.Module) -> int:
    return sum(isinstance(m, nn.PixelShuffle) for m in network.modules())


def check_graph(
    proto: onnx.ModelProto, scale: int, shuffles: int, size: tuple[int, int] | None = None
) -> None:
    """Refuse a graph that breaks the contract: structure, names, types, dims, order of pixel shuffle.

    `size` is the only one (h, w) that it takes, None for any.
    `shuffles` is the number of pixel shuffles of the network; each must be DepthToSpace in CRD mode
    (channel = color * r^2 + row * r + column), which is torch's order. DCR scrambles the colours.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailedError(
            f"the exported graph does not pass the ONNX checker ({_first_line(error)}); "
            "this is a fault of the exporter: try another torch version."
        ) from error
    modes = [
        next((a.s.decode() for a in node.attribute if a.name == "mode"), "DCR")
        for node in proto.graph.node
        if node.op_type == "DepthToSpace"
    ]
    if any(mode != "CRD" for mode in modes) or len(modes) < shuffles:
        raise CheckFailedError(
            f"the network has {shuffles} pixel shuffles, the graph has DepthToSpace in modes {modes}; "
            "each must be there and CRD, or colours are scrambled. Try another torch version."
        )
    got = {v.name: (v.type.tensor_type.elem_type, _dims(v)) for v in _ends(proto)}
    lr: list[str | int] = ["batch", 3, "height", "width"]
    sr: list[str | int] = ["batch", 3, f"{scale}*height", f"{scale}*width"]
    if size is not None:
        lr, sr = [1, 3, *size], [1, 3, *(scale * side for side in size)]
    need = {INPUT: (onnx.TensorProto.FLOAT, lr), OUTPUT: (onnx.TensorProto.FLOAT, sr)}
    if got != need:
        raise CheckFailedError(
            f"the exported graph has inputs and outputs {got}, not {need}: a size was baked in or "
            "a name was lost. Try another torch version."
        )


def _ends(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*proto.graph.input, *proto.graph.output]


def _dims(value: onnx.ValueInfoProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _opset(proto: onnx.ModelProto) -> int:
    return max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
