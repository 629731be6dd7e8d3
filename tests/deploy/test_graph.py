"""The exported file: contract, honesty, reproducibility."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from deploy.collapse import collapse_tail
from deploy.graph import OPSET, check_graph, export_graph, weights_file
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import sha256
from srkd.loaded import LoadedModel
from srkd.types import Facts

if TYPE_CHECKING:
    from tests.deploy.conftest import _Exports

ALL = ["edsr_tiny", "rcan_a", "edsr_mlperf", "swinir_small"]


@pytest.mark.parametrize("name", ALL)
def test_contract(name: str, exported: _Exports) -> None:
    made = exported(name)
    proto = onnx.load(made.graph.path)
    onnx.checker.check_model(proto, full_check=True)
    scale = made.model.scale
    assert made.graph.input_dims == ["batch", 3, "height", "width"]
    assert made.graph.output_dims == ["batch", 3, f"{scale}*height", f"{scale}*width"]
    assert [o.version for o in proto.opset_import if o.domain == ""] == [OPSET]
    modes = [
        {a.name: a.s for a in n.attribute}["mode"]
        for n in proto.graph.node
        if n.op_type == "DepthToSpace"
    ]
    shuffles = sum(isinstance(m, torch.nn.PixelShuffle) for m in made.model.network.modules())
    assert modes == [b"CRD"] * shuffles and shuffles > 0
    assert not [n for n in proto.graph.node if n.op_type in ("Clip", "If", "Loop")]
    assert sha256(made.graph.path) == made.graph.sha256
    assert not [i for i in proto.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]


@pytest.mark.parametrize("name", ALL)
def test_weights_keep_their_names_and_values(name: str, exported: _Exports) -> None:
    made = exported(name)
    found = {i.name: i for i in onnx.load(made.graph.path).graph.initializer}
    network = collapse_tail(made.model.network) or made.model.network
    convolutions = {key: value for key, value in network.state_dict().items() if value.ndim == 4}
    assert convolutions
    for key, value in convolutions.items():
        assert np.array_equal(numpy_helper.to_array(found[key]), value.numpy()), key


def test_metadata_names_the_network_and_its_weights(exported: _Exports) -> None:
    made = exported("rcan_a")
    notes = {p.key: p.value for p in onnx.load(made.graph.path).metadata_props}
    assert notes["srkd.scale"] == "3" and notes["srkd.family"] == "rcan"
    assert '"group_count": 4' in notes["srkd.arguments"]
    assert notes["srkd.weights_sha256"] == sha256(weights_file(made.model))
    assert "not clamped" in notes["srkd.output_range"]


def test_the_file_tells_nothing_of_the_machine(exported: _Exports) -> None:
    content = exported("rcan_a").graph.path.read_bytes()
    for telltale in (b"stack_trace", b"site-packages", b".py", str(Path.home()).encode()):
        assert telltale not in content
    assert b"groups.0.blocks.0.conv1" in content  # module paths stay, they name a faulty layer


def test_export_is_reproducible_and_leaves_the_network_alone(
    exported: _Exports, tmp_path: Path
) -> None:
    made = exported("edsr_tiny")
    network = made.model.network
    network.train()
    try:
        again = export_graph(made.model, tmp_path / "again.onnx")
        assert network.training
    finally:
        network.eval()
    assert again.sha256 == made.graph.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["again.onnx"]


def test_wrong_shuffle_order_is_refused(exported: _Exports) -> None:
    proto = onnx.load(exported("edsr_tiny").graph.path)
    with pytest.raises(CheckFailedError, match=r"2 pixel shuffles.*CRD"):
        check_graph(proto, scale=2, shuffles=2)
    (node,) = [n for n in proto.graph.node if n.op_type == "DepthToSpace"]
    next(a for a in node.attribute if a.name == "mode").s = b"DCR"
    with pytest.raises(CheckFailedError, match=r"modes \['DCR'\]"):
        check_graph(proto, scale=2, shuffles=1)


def test_baked_sizes_are_refused(exported: _Exports) -> None:
    proto = onnx.load(exported("edsr_tiny").graph.path)
    check_graph(proto, scale=2, shuffles=1)
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64
    with pytest.raises(CheckFailedError, match="baked"):
        check_graph(proto, scale=2, shuffles=1)


class BranchesOnSize(torch.nn.Module):
    """What foreign code does: pad only when it must. The exporter cannot keep both branches."""

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        if lr.shape[-1] % 4:
            lr = torch.nn.functional.pad(lr, (0, 4 - lr.shape[-1] % 4))
        return torch.nn.functional.interpolate(lr, scale_factor=2.0)


def test_a_network_that_cannot_be_dynamic_is_refused_in_one_sentence(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"none")
    facts = Facts(scale=2, receptive_field_px=1, exact_tiling=True, size_multiple=4)
    model = LoadedModel(BranchesOnSize(), "branches", weights, facts)
    with pytest.raises((SrkdError, CheckFailedError), match=r"dynamic sizes|baked") as caught:
        export_graph(model, tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.onnx").exists()
