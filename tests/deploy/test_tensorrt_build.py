"""Engines that TensorRT-RTX really builds, on any machine; running them needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from deploy.cuda_stream import CudaStream, current_gpu
from deploy.graph import export_graph
from deploy.machine import gpu
from deploy.sizes import Sizes, parse_sizes
from deploy.tensorrt_build import build, engine_key
from deploy.tensorrt_engine import TensorRTEngine, supported
from deploy.tensorrt_library import LIBRARIES, load_library
from srkd.errors import CheckFailedError, MissingError, SrkdError
from srkd.models import load_model, save_model
from srkd.networks import build as build_network

if TYPE_CHECKING:
    from tests.deploy.conftest import _Exports

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install .[trt-rtx]")

SIZES = parse_sizes("16x16:32x32:64x64")
RTX = {"library": "tensorrt_rtx", "tf32": False}
# Each costs seconds to export; the networks of the plain run are exported for other tests anyway.
OTHERS = ("rdn_tiny", "san_tiny", "han_tiny", "bsrn", "rlfn_ntire", "smfanet")


@pytest.mark.parametrize("name", ["edsr_tiny", "rcan_a", "edsr_mlperf", "swinir_small"])
def test_networks_build_in_fp32(name: str, exported: _Exports, tmp_path: Path) -> None:
    check_builds(exported(name).graph.path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_families_build_too(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_model(tmp_path / "run", build_network(name, 4), {})
    graph = export_graph(load_model(tmp_path / "run"), tmp_path / "n.onnx")
    check_builds(graph.path, tmp_path)


def check_builds(graph: Path, folder: Path) -> None:
    plan = folder / "n.plan"
    facts = build(graph, plan, SIZES, RTX)
    assert plan.read_bytes()[:4] == b"vtrt"
    assert [p for p in folder.iterdir() if p.suffix == ".part"] == []
    assert facts["bytes"] == plan.stat().st_size > 100_000
    assert facts["compute_capabilities"] == [] and facts["flags"]["tf32"] is False
    products = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum"}
    count = sum(n.op_type in products for n in onnx.load(graph).graph.node)
    assert facts["layers"] >= count > 0
    assert facts["precisions"] == {"FP32": count}


# --- graphs written by hand -----------------------------------------------------------------------


def write_graph(path: Path, first: str = "Conv", height: str | int = "height") -> Path:
    """A half-precision convolution and a single-precision one, then a pixel shuffle by 2."""
    half = numpy_helper.from_array(np.ones((3, 3, 3, 3), np.float16), "half")
    full = numpy_helper.from_array(np.ones((12, 3, 3, 3), np.float32), "full")
    nodes = [
        helper.make_node("Cast", ["lr"], ["a"], to=TensorProto.FLOAT16),
        helper.make_node(first, ["a", "half"], ["b"], pads=[1] * 4, name="first"),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["c", "full"], ["d"], pads=[1] * 4),
        helper.make_node("DepthToSpace", ["d"], ["sr"], blocksize=2, mode="CRD"),
    ]
    lr = helper.make_tensor_value_info("lr", TensorProto.FLOAT, ["batch", 3, height, "width"])
    sr = helper.make_tensor_value_info("sr", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [lr], [sr], [half, full])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_precision_is_that_of_the_graph(tmp_path: Path) -> None:
    facts = build(write_graph(tmp_path / "n.onnx"), tmp_path / "n.plan", SIZES, RTX)
    assert facts["precisions"] == {"FP16": 1, "FP32": 1}
    assert facts["profile"] == {"min": [16, 16], "opt": [32, 32], "max": [64, 64]}
    assert facts["seconds"] > 0 and facts["gpu"] is None


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "n.onnx", first="Banana")
    with pytest.raises(SrkdError, match=r"TensorRT-RTX 1\..*node 'first' \(Banana\)") as caught:
        build(graph, tmp_path / "n.plan", SIZES, RTX)
    assert "\n" not in str(caught.value) and not (tmp_path / "n.plan").exists()
    with pytest.raises(SrkdError, match=r"no graph .*absent\.onnx"):
        build(tmp_path / "absent.onnx", tmp_path / "n.plan", SIZES, RTX)


def test_what_the_library_says_is_heard_at_every_build(tmp_path: Path) -> None:
    # It keeps the first logger of a process, so a second build must listen to that one.
    build(write_graph(tmp_path / "n.onnx"), tmp_path / "n.plan", SIZES, RTX)
    before = (tmp_path / "n.plan").read_bytes()
    fixed = write_graph(tmp_path / "fixed.onnx", height=8)
    with pytest.raises(CheckFailedError, match=r"from fixed\.onnx for sizes 16x16.*Error"):
        build(fixed, tmp_path / "n.plan", SIZES, RTX)
    assert (tmp_path / "n.plan").read_bytes() == before


def test_compute_capabilities_of_the_installed_version() -> None:
    library, module = load_library("tensorrt_rtx")
    assert {"7.5", *library.capabilities} == {*supported(module)}  # 7.5 only where it is asked for
    assert LIBRARIES["tensorrt"].capabilities == ()


# --- without a GPU --------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_built_engine_says_that_it_cannot_run_here(tmp_path: Path) -> None:
    plan = tmp_path / "n.plan"
    facts = build(write_graph(tmp_path / "n.onnx"), plan, SIZES, RTX)
    settings = {**RTX, "built": facts}
    with pytest.raises(
        MissingError, match=r"n\.plan is built and cannot run here.*RTX GPU"
    ) as caught:
        TensorRTEngine(plan, 2, settings)
    assert caught.value.exit_code == 3
    with pytest.raises(MissingError, match=r"built by TensorRT-RTX 0\.9, and this machine has 1\."):
        TensorRTEngine(plan, 2, {**RTX, "built": {**facts, "version": "0.9"}})
    plan.write_bytes(b"junk" * 50)
    with pytest.raises(SrkdError, match="no TensorRT-RTX engine") as caught:
        TensorRTEngine(plan, 2, settings)
    assert caught.value.exit_code == 2
    plan.unlink()
    with pytest.raises(SrkdError, match=r"cannot read .*n\.plan"):
        TensorRTEngine(plan, 2, settings)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("make", [CudaStream, current_gpu])
def test_no_gpu_is_refused_with_the_sentence_given(make: Callable[[str], object]) -> None:
    with pytest.raises(MissingError, match="it needs a GPU"):
        make("it needs a GPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_buffers() -> None:
    own = CudaStream("none")
    array = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    there = own.upload(array[:, :, ::-1].copy())
    assert there.is_contiguous() and there.device == own.device and own.handle
    assert np.array_equal(own.download(there), array[:, :, ::-1])
    assert own.empty((1, 3, 4, 4)).dtype == torch.float32
    assert own.gpu == gpu()


# --- the key --------------------------------------------------------------------------------------

GIVEN: dict[str, Any] = {
    "graph_sha256": "ab",
    "sizes": Sizes((4, 4), (8, 8), (16, 16)),
    "settings": {"library": "tensorrt", "tf32": False},
    "version": "11.4",
    "compute_capabilities": ["9.0"],
}


@pytest.mark.parametrize(
    "changed",
    [
        {"graph_sha256": "ac"},
        {"sizes": Sizes((4, 4), (8, 8), (16, 20))},
        {"settings": {"library": "tensorrt_rtx", "tf32": False}},
        {"settings": {"library": "tensorrt", "tf32": True}},
        {"version": "11.5"},
        {"compute_capabilities": ["8.9"]},
        {"compute_capabilities": []},
    ],
)
def test_the_key_changes_with_whatever_changes_the_engine(changed: dict[str, Any]) -> None:
    assert engine_key(**{**GIVEN, **changed}) != engine_key(**GIVEN)


def test_the_key_does_not_depend_on_the_order_of_settings() -> None:
    turned = {"tf32": False, "library": "tensorrt"}
    assert engine_key(**{**GIVEN, "settings": turned}) == engine_key(**GIVEN)
    assert len(engine_key(**GIVEN)) == 64
