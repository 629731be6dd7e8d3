"""Our TensorRT code, run to its last call against a stand-in whose names are those of the real bindings."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_stand_in import PLAN, VERSION, HostStream, StandIn, enlarged

from deploy.engines import EngineRunError
from deploy.sizes import parse_sizes
from deploy.tensorrt_build import build
from deploy.tensorrt_engine import TensorRTEngine, layer_precisions, open_tensorrt
from deploy.tensorrt_library import kernels_file, load_library
from srkd.errors import CheckFailedError, MissingError, SrkdError

SIZES = parse_sizes("4x4:8x8:16x12")
NAMES = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
BINDINGS = {
    "tensorrt": ("tensorrt 10.13.3.9", "tensorrt 11.4.0.106"),
    "tensorrt_rtx": ("tensorrt_rtx 1.7.1.116",),
}
PROOF = """{"Layers": [
  {"Name": "half + relu", "LayerType": "CaskConvolution",
   "Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]},
  {"Name": "old half", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Half"}]},
  {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]},
  {"Name": "__myl_CorrMulMax_myl0_3", "LayerType": "runtime_fusion",
   "Inputs": [{"Datatype": "Half", "Format": "(NHWC) Channel major format"}]},
  {"Name": "__myl_FcAdd_myl1_13", "LayerType": "runtime_fusion", "Inputs": [{"Datatype": "Float"}]},
  {"Name": "__myl_CastReplConc_myl0_1", "LayerType": "kgen", "Inputs": [{"Datatype": "Float"}]},
  {"Name": "node_matmul", "LayerType": "gemm", "Inputs": [{"Datatype": "BFloat16"}]}
]}"""


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> StandIn:
    stand_in = StandIn(rtx=name == "tensorrt_rtx")
    monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr("deploy.tensorrt_build.current_gpu", lambda refusal: HostStream.gpu)
    monkeypatch.setattr("deploy.tensorrt_engine.CudaStream", lambda refusal: HostStream())
    return stand_in


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, StandIn]:
    return request.param, install(monkeypatch, request.param)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return install(monkeypatch, "tensorrt")


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return install(monkeypatch, "tensorrt_rtx")


def made(folder: Path, library: str, **changed: Any) -> tuple[Path, dict[str, Any]]:
    """A built file and the settings to open it with."""
    graph, plan = folder / "n.onnx", folder / "n.plan"
    graph.write_bytes(b"graph")
    settings = {"library": library, "tf32": False}
    built = build(graph, plan, SIZES, settings)
    return plan, {**settings, "built": {**built, **changed}}


def opened(folder: Path, library: str, **changed: Any) -> TensorRTEngine:
    plan, settings = made(folder, library, **changed)
    return open_tensorrt(plan, 2, settings)


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, dtype=np.float32)


# --- the contract ---------------------------------------------------------------------------------


def everything(folder: Path, library: str, stand_in: StandIn) -> set[str]:
    """Names used by all that our code does with a library, refusals included."""
    with pytest.raises(SrkdError, match="Banana"):
        stand_in.parse_errors.append(("n", "Banana", "no"))
        made(folder, library)
    stand_in.parse_errors.clear()
    plan, settings = made(folder, library)
    engine = TensorRTEngine(plan, 2, settings)
    engine(image(1, 3, 4, 4))
    stand_in.switch(layers=PROOF)
    layer_precisions(engine)
    TensorRTEngine(plan, 2, settings)  # with the kernels that the first one kept
    stand_in.switch(tensors={"lr": "HALF", "sr": "FLOAT"})
    with pytest.raises(SrkdError, match="HALF"):
        TensorRTEngine(plan, 2, settings)
    if library == "tensorrt_rtx":
        for bits in (2, 4):
            stand_in.switch(validity=("INVALID", bits))
            with pytest.raises(MissingError):
                opened(folder, library)
    return stand_in.used


def test_every_name_we_use_is_in_the_real_bindings(
    either: tuple[str, StandIn], tmp_path: Path
) -> None:
    library, stand_in = either
    used = everything(tmp_path, library, stand_in)
    assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3"} <= used
    for name in sorted(used):
        missing = set(BINDINGS[library]) - set(NAMES["names"].get(name, ()))
        assert not missing, f"{name} is not in {', '.join(missing)}; see tensorrt_names.json"
    if library == "tensorrt_rtx":  # it uses all that TensorRT does and more
        assert used == set(NAMES["names"])


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
def test_names_against_the_installed_tensorrt_rtx() -> None:
    import tensorrt_rtx

    listed = [n for n, where in NAMES["names"].items() if BINDINGS["tensorrt_rtx"][0] in where]
    assert len(listed) > 50
    for name in listed:
        reduce(getattr, name.split("."), tensorrt_rtx)
    # what neither TensorRT 11 nor TensorRT-RTX has must not be used
    with pytest.raises(AttributeError):
        reduce(getattr, ["BuilderFlag", "FP16"], tensorrt_rtx)


# --- building -------------------------------------------------------------------------------------


def test_an_engine_is_typed_by_its_graph(either: tuple[str, StandIn], tmp_path: Path) -> None:
    library, api = either
    plan, settings = made(tmp_path, library)
    assert plan.read_bytes() == PLAN
    assert api.arguments("create_network") == [(2,)]  # 1 << STRONGLY_TYPED
    assert [given[0].name for given in api.arguments("clear_flag")] == ["TF32"]
    assert api.arguments("set_flag") == []
    assert api.config.profiling_verbosity.name == "DETAILED"
    assert api.arguments("set_shape") == [("lr", (1, 3, 4, 4), (1, 3, 8, 8), (1, 3, 16, 12))]
    assert len(api.arguments("add_optimization_profile")) == 1
    built = settings["built"]
    assert built["library"] == library and built["version"] == VERSION
    assert built["flags"] == {"strongly_typed": True, "tf32": False}
    assert built["precisions"] == {"FP16": 1, "FP32": 1}  # the pixel shuffle is no product
    assert (built["layers"], built["bytes"], len(built["key"])) == (3, len(PLAN), 64)
    assert built["warnings"] == ["a layer may be slow"]
    assert built["profile"] == {"min": [4, 4], "opt": [8, 8], "max": [16, 12]}
    portable = library == "tensorrt_rtx"
    assert built["compute_capabilities"] == ([] if portable else ["8.9"])
    assert built["gpu"] == (None if portable else "Stand-in GPU")


def test_tf32_when_asked_for(trt: StandIn, tmp_path: Path) -> None:
    (tmp_path / "n.onnx").write_bytes(b"graph")
    settings = {"library": "tensorrt", "tf32": True}
    built = build(tmp_path / "n.onnx", tmp_path / "n.plan", SIZES, settings)
    assert [given[0].name for given in trt.arguments("set_flag")] == ["TF32"]
    assert trt.arguments("clear_flag") == [] and built["flags"]["tf32"]


def test_no_engine_is_a_failed_check_with_the_first_error(trt: StandIn, tmp_path: Path) -> None:
    trt.switch(plan=None)
    with pytest.raises(CheckFailedError, match=r"4x4:8x8:16x12: out of memory\. Smaller sizes"):
        made(tmp_path, "tensorrt")
    assert not (tmp_path / "n.plan").exists()
    trt.switch(plan=PLAN, opens=False)  # errors of another call are not taken for this one's
    with pytest.raises(SrkdError, match=r"cannot open .*: magic tag"):
        opened(tmp_path, "tensorrt")


def test_all_errors_of_the_parser_are_in_one_sentence(trt: StandIn, tmp_path: Path) -> None:
    trt.parse_errors += [("up", "GridSample", "mode is\nnot supported"), ("", "If", "no")]
    with pytest.raises(
        SrkdError, match=r"node 'up' \(GridSample\): mode is not supported; node '' \(If\): no\."
    ):
        made(tmp_path, "tensorrt")


def test_a_driver_that_does_not_start(trt: StandIn, tmp_path: Path) -> None:
    trt.switch(starts=False)
    with pytest.raises(MissingError, match="does not start here: CUDA driver version is insuff"):
        made(tmp_path, "tensorrt")


def test_libraries_are_never_swapped(trt: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert load_library("tensorrt")[1] is trt
    with pytest.raises(MissingError, match=r"TensorRT-RTX needs.*pip install tensorrt-rtx-cu13"):
        load_library("tensorrt_rtx")
    with pytest.raises(SrkdError, match="no TensorRT library 'trt'"):
        load_library("trt")


# --- running --------------------------------------------------------------------------------------


def test_a_run(either: tuple[str, StandIn], tmp_path: Path) -> None:
    engine = opened(tmp_path, either[0])
    lr = image(2, 3, 9, 11)  # the engine takes one picture, a batch goes through it in turn
    sr = engine(lr)
    assert sr.dtype == np.float32 and np.array_equal(sr, enlarged(lr))
    flipped = lr[:, :, ::-1]  # not contiguous
    assert np.array_equal(engine(flipped), enlarged(flipped))
    assert not np.array_equal(sr[0], sr[1])


@pytest.mark.parametrize("size", [(17, 12), (16, 13), (3, 8)])
def test_sizes_outside_the_profile_are_refused(
    size: tuple[int, int], trt: StandIn, tmp_path: Path
) -> None:
    engine = opened(tmp_path, "tensorrt")
    assert engine(image(1, 3, 16, 12)).shape == (1, 3, 32, 24)
    with pytest.raises(EngineRunError, match=r"built for pictures of 4x4 to 16x12.*--size"):
        engine(image(1, 3, *size))


def test_failed_runs(trt: StandIn, tmp_path: Path) -> None:
    engine = opened(tmp_path, "tensorrt")
    trt.switch(runs=False)
    with pytest.raises(EngineRunError, match=r"input of \(1, 3, 4, 4\): illegal address"):
        engine(image(1, 3, 4, 4))
    trt.switch(shape_scale=3)  # it would write more than there is room for
    with pytest.raises(EngineRunError, match=r"makes \(1, 3, 12, 12\)"):
        engine(image(1, 3, 4, 4))


def test_tensors_that_are_not_ours_are_refused(trt: StandIn, tmp_path: Path) -> None:
    trt.switch(tensors={"lr": "HALF", "sr": "FLOAT"})
    with pytest.raises(SrkdError, match="lr HALF, sr FLOAT, and needs lr FLOAT"):
        opened(tmp_path, "tensorrt")
    trt.switch(tensors={"input": "FLOAT", "sr": "FLOAT"})
    with pytest.raises(SrkdError, match="input FLOAT"):
        opened(tmp_path, "tensorrt")


def test_an_engine_of_another_version_or_gpu(trt: StandIn, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"built by TensorRT 11\.4.*this machine has 10\.13"):
        opened(tmp_path, "tensorrt", version="11.4.0.106")
    with pytest.raises(
        MissingError, match=r"built on H200 \(compute capability 9\.0\).*Stand-in GPU \(8\.9\)"
    ):
        opened(tmp_path, "tensorrt", compute_capabilities=["9.0"], gpu="H200")
    trt.switch(opens=False)
    with pytest.raises(SrkdError, match=r"cannot open .*magic tag is wrong"):
        opened(tmp_path, "tensorrt")


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (0, "the library gives no reason"),
        (1, "another version of TensorRT-RTX built it"),
        (2, r"not support Stand-in GPU .*8\.9\); it supports 8\.9, 12\.0\..*--engine ort.*torch"),
        (4 | 8, "driver is too old.*; the CUDA runtime is too old"),
        (16, "too little free memory"),
        (64, "not installed as it should be"),
    ],
)
def test_objections_of_tensorrt_rtx(bits: int, said: str, rtx: StandIn, tmp_path: Path) -> None:
    rtx.switch(validity=("INVALID", bits))
    with pytest.raises(MissingError, match=said) as caught:
        opened(tmp_path, "tensorrt_rtx")
    assert caught.value.exit_code == 3


def test_a_malformed_engine_is_a_wrong_file_not_a_missing_gpu(rtx: StandIn, tmp_path: Path) -> None:
    rtx.switch(validity=("INVALID", 32))
    with pytest.raises(SrkdError, match=r"n\.plan is no TensorRT-RTX engine") as caught:
        opened(tmp_path, "tensorrt_rtx")
    assert caught.value.exit_code == 2


def test_a_gpu_it_was_not_built_for_is_a_warning(
    rtx: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rtx.switch(validity=("SUBOPTIMAL", 0))
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path, "tensorrt_rtx").scale == 2
    assert "may be slow" in caplog.text


# --- kernels that TensorRT-RTX compiled -----------------------------------------------------------


def test_compiled_kernels_are_kept_and_used_again(rtx: StandIn, tmp_path: Path) -> None:
    plan, settings = made(tmp_path, "tensorrt_rtx")
    file = kernels_file(plan)
    first = TensorRTEngine(plan, 2, settings)
    strategy = rtx.run_config.dynamic_shapes_kernel_specialization_strategy
    assert strategy.name == "EAGER" and rtx.arguments("deserialize") == []
    assert rtx.arguments("create_execution_context") == [(rtx.run_config,)]
    assert not file.exists()
    first(image(1, 3, 4, 4))
    assert file.read_bytes() == b"kernels"
    rtx.switch(compiled=b"more kernels")
    first(image(1, 3, 4, 4))  # no new size, nothing to compile
    assert file.read_bytes() == b"kernels"
    first(image(1, 3, 4, 5))
    assert file.read_bytes() == b"more kernels"

    TensorRTEngine(plan, 2, settings)
    assert rtx.arguments("deserialize") == [(b"more kernels",)]
    rtx.switch(cache_fits=False)  # written by another GPU or driver: replaced
    other = TensorRTEngine(plan, 2, settings)
    rtx.switch(compiled=b"other")
    other(image(1, 3, 4, 4))
    assert file.read_bytes() == b"other"
    made(tmp_path, "tensorrt_rtx")
    assert not file.exists()  # a new engine starts without the kernels of the old


def test_kernels_that_cannot_be_kept_are_a_warning(
    rtx: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(tmp_path, "tensorrt_rtx")
    kernels_file(engine.file).mkdir()
    with caplog.at_level(logging.WARNING):
        assert engine(image(1, 3, 4, 4)).shape == (1, 3, 8, 8)
    assert "compiled kernels are lost" in caplog.text


def test_tensorrt_keeps_no_kernels(trt: StandIn, tmp_path: Path) -> None:
    engine = opened(tmp_path, "tensorrt")
    engine(image(1, 3, 4, 4))
    assert trt.arguments("create_execution_context") == [()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n.onnx", "n.plan"]


# --- precision proof ------------------------------------------------------------------------------


def test_precisions_of_convolutions_and_matrix_products(
    either: tuple[str, StandIn], tmp_path: Path
) -> None:
    engine = opened(tmp_path, either[0])
    assert layer_precisions(engine) == {}
    either[1].switch(layers=PROOF)
    found = layer_precisions(engine)
    assert found == {"FP16": 3, "FP32": 1, "BF16": 1}


def test_an_engine_without_layer_types_proves_nothing(trt: StandIn, tmp_path: Path) -> None:
    engine = opened(tmp_path, "tensorrt")
    trt.switch(layers='{"Layers": ["conv1", "conv2"]}')
    with pytest.raises(CheckFailedError, match="without layer types"):
        layer_precisions(engine)
