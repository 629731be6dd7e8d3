"""ONNX Runtime runs what it was asked to run, where it was asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from deploy.engines import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    Engine,
    EngineRunError,
    engine_settings,
    require_engine,
)
from deploy.ort_engine import PROVIDER_OPTIONS, OrtEngine, count_layers, run_bound
from deploy.proof import Proof
from deploy.torch_engines import TorchEngine
from srkd.errors import MissingError, SrkdError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.conftest import _Exports


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, dtype=np.float32)


@pytest.mark.parametrize("kind", ["torch", "ort"])
@pytest.mark.parametrize(
    "lr",
    [
        image(3, 8, 8),
        image(1, 4, 8, 8),
        image(1, 3, 8, 8).astype(np.float64),
        np.zeros((1, 3, 0, 8), np.float32),
        np.zeros((1, 3, 8, 8), np.uint8),
    ],
    ids=["3-d", "RGBA", "float64", "empty", "uint8"],
)
def test_wrong_inputs_are_refused(kind: str, lr: np.ndarray, exported: _Exports) -> None:
    made = exported("edsr_tiny")
    engine: Engine = (
        TorchEngine(made.model.network, 2) if kind == "torch" else OrtEngine(made.graph.path, 2)
    )
    with pytest.raises(SrkdError, match=r"needs float32 \(N, 3, h, w\)"):
        engine(lr)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_ort_runs_on_the_provider_asked_for(
    exported: _Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported("edsr_tiny").graph.path
    engine = OrtEngine(path, 2, threads=1)
    assert engine.session.get_providers() == [CPU_PROVIDER]
    assert engine.session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(MissingError, match="CUDAExecutionProvider, which this installation lacks"):
        OrtEngine(path, 2, provider="CUDAExecutionProvider")

    told = (
        r"'ort' needs .*CUDAExecutionProvider, .* put onnxruntime-gpu in the place of onnxruntime"
    )
    with pytest.raises(MissingError, match=told):
        require_engine("ort", engine_settings("ort", device="cuda"))
    require_engine("ort", engine_settings("ort"))

    # An installation that lists a provider which then fails to start: only the session knows.
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU_PROVIDER]
    )
    with pytest.raises(
        MissingError, match=r"runs edsr_tiny\.onnx on CPUExecutionProvider although"
    ):
        OrtEngine(path, 2, provider="CUDAExecutionProvider")


def test_ort_names_a_broken_file_and_a_failed_run(exported: _Exports, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(exported("edsr_tiny").graph.path.read_bytes()[:5000])
    with pytest.raises(SrkdError, match="cannot open") as caught:
        OrtEngine(broken, 2)
    assert "\n" not in str(caught.value)
    engine = OrtEngine(exported("swinir_small").graph.path, 2)
    with pytest.raises(EngineRunError, match=r"on an input of \(1, 3, 2, 2\)"):
        engine(image(1, 3, 2, 2))  # below the network's minimum


def test_bound_memory_gives_the_same_picture(exported: _Exports) -> None:
    engine = OrtEngine(exported("edsr_tiny").graph.path, 2, threads=1)
    for shape in ((1, 3, 9, 12), (2, 3, 8, 5)):
        lr = image(*shape)
        assert np.array_equal(run_bound(engine.session, lr, "cpu"), engine(lr))


def test_cuda_options_are_exact_and_quick_to_start() -> None:
    assert PROVIDER_OPTIONS[CUDA_PROVIDER]["use_tf32"] == "0"
    assert PROVIDER_OPTIONS[CUDA_PROVIDER]["cudnn_conv_algo_search"] == "HEURISTIC"


@pytest.mark.parametrize(("name", "layers"), [("edsr_tiny", 12), ("swinir_small", 18)])
def test_proof_counts_what_ran(name: str, layers: int, exported: _Exports) -> None:
    engine = OrtEngine(exported(name).graph.path, 2, threads=1)
    proof = engine.proof(image(1, 3, 16, 17))
    assert proof == Proof({"fp32": layers}, CPU_PROVIDER, {CPU_PROVIDER: layers})
    assert proof.mismatch("fp32", 1.0) is None
    told = proof.mismatch("fp16", 0.5)
    assert told is not None and f"0 of {layers} convolutions" in told and "50%" in told


def test_a_node_on_another_provider_is_seen() -> None:
    def ran(operator: str, provider: str, kind: str) -> dict[str, Any]:
        types = [{kind: [1, 3, 8, 8]}]
        return {"args": {"op_name": operator, "provider": provider, "input_type_shape": types}}

    events = [
        {"name": "session_initialization"},
        ran("FusedConv", CUDA_PROVIDER, "float16"),
        ran("Conv", CUDA_PROVIDER, "float16"),
        ran("MatMul", CPU_PROVIDER, "float"),
        ran("Shape", CPU_PROVIDER, "float16"),  # sizes are computed on the CPU, as they should be
    ]
    proof = count_layers(events, CUDA_PROVIDER)
    assert proof.layers == {"fp16": 2, "fp32": 1} and proof.share("fp16") == 2 / 3
    assert proof.mismatch("fp16", 0.5) == (
        "of 3 convolutions and matrix products, asked for on CUDAExecutionProvider, run 1 on "
        "CPUExecutionProvider"
    )
    assert count_layers(events[:3], CUDA_PROVIDER).mismatch("fp16", 1.0) is None
    assert "does not say" in str(count_layers([], CUDA_PROVIDER).mismatch("fp16", 0.5))
