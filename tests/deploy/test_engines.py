"""Engines run what they say they run, and a loader that refuses what it cannot vouch for."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch

from deploy.engines import (
    CPU_PROVIDER,
    ENGINES,
    Engine,
    EngineRunError,
    OrtEngine,
    TorchEngine,
    engine_kind,
    load_engine,
    open_engine,
    require_engine,
)
from deploy.export import export
from deploy.sidecar import read_sidecar, sidecar_path
from deploy.sizes import parse_sizes
from srkd.errors import CheckFailedError, MissingError, SrkdError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.conftest import _Exports


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, dtype=np.float32)


def test_torch_engine_is_the_network_in_eval_fp32(exported: _Exports) -> None:
    network = copy.deepcopy(exported("rcan_a").model.network)
    lr = image(2, 3, 9, 11)
    with torch.no_grad():
        expected = network(torch.from_numpy(lr)).numpy()
    network.train().half()
    engine = TorchEngine(network, 3)
    assert network.training and next(network.parameters()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        got = engine(lr)
    assert got.dtype == np.float32 and got.shape == (2, 3, 27, 33)
    # the weights went through half precision, the computation did not
    assert 0 < np.abs(got - expected).max() < 1e-3


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


def test_missing_and_hollow_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # import fails
    with pytest.raises(MissingError, match=r"needs onnxruntime.*pip install onnxruntime") as caught:
        require_engine("ort")
    assert caught.value.exit_code == 3
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(MissingError, match="empty"):
        require_engine("onnx")


@pytest.mark.parametrize(("name", "precision"), [("trt", "fp32"), ("ort", "fp16")])
def test_what_this_version_lacks_is_refused(name: str, precision: str) -> None:
    with pytest.raises(SrkdError, match="exports fp32 with engines onnx and ort"):
        engine_kind(name, precision)


def test_every_engine_of_the_table_opens(exported: _Exports) -> None:
    made = exported("edsr_tiny")
    lr = image(1, 3, 7, 9)
    for name, kind in ENGINES.items():
        engine = open_engine(name, made.graph.path, 2, kind.settings)
        assert engine.scale == 2 and engine(lr).shape == (1, 3, 14, 18)


# --- the loader -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified(run_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that passed, to be copied before it is spoilt."""
    out = tmp_path_factory.mktemp("verified")
    result = export(
        run_folders["edsr_tiny"],
        "ort",
        out=out,
        sizes=parse_sizes("16x16:32x32:48x48"),
        threads=1,
        quiet=True,
    )
    assert result.verdict == "PASS"
    return out


@pytest.fixture
def spoilable(verified: Path, tmp_path: Path) -> Path:
    shutil.copytree(verified, tmp_path / "x")
    return tmp_path / "x" / "edsr_tiny_fp32.onnx"


def change_sidecar(file: Path, **values: Any) -> None:
    path = sidecar_path(file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_load_engine(spoilable: Path, exported: _Exports, caplog: pytest.LogCaptureFixture) -> None:
    engine = load_engine(str(spoilable))
    assert engine.scale == 2 and engine.notes == () and not caplog.records
    assert engine.facts == exported("edsr_tiny").model.facts
    assert isinstance(engine.engine, OrtEngine)
    assert engine.engine.session.get_session_options().intra_op_num_threads == 1
    lr = image(2, 3, 10, 14)
    reference = TorchEngine(exported("edsr_tiny").model.network, 2)
    assert np.abs(engine(lr) - reference(lr)).max() < 1e-6


def test_a_changed_graph_is_refused_with_the_command_that_rebuilds_it(spoilable: Path) -> None:
    content = bytearray(spoilable.read_bytes())
    content[len(content) // 2] ^= 1
    spoilable.write_bytes(content)
    with pytest.raises(SrkdError, match=r"its hash differs.*export\.py .*--overwrite"):
        load_engine(spoilable)


def test_sidecar_absent_newer_or_damaged(spoilable: Path) -> None:
    good = sidecar_path(spoilable).read_text()
    change_sidecar(spoilable, format=2)
    with pytest.raises(SrkdError, match="format 2, this version reads 1"):
        load_engine(spoilable)
    sidecar_path(spoilable).write_text(good)
    change_sidecar(spoilable, surprise=1)
    with pytest.raises(SrkdError, match=r"damaged.*surprise"):
        load_engine(spoilable)
    sidecar_path(spoilable).write_text(good)
    change_sidecar(spoilable, facts={"scale": "two"})
    with pytest.raises(SrkdError, match="damaged"):
        load_engine(spoilable)
    sidecar_path(spoilable).write_text(good[: len(good) // 2])
    with pytest.raises(SrkdError, match="cannot read"):
        load_engine(spoilable)
    sidecar_path(spoilable).unlink()
    with pytest.raises(SrkdError, match="has no sidecar"):
        load_engine(spoilable)
    spoilable.unlink()
    with pytest.raises(SrkdError, match="there is no exported file"):
        load_engine(spoilable)


def test_a_forged_parity_record_is_refused(spoilable: Path) -> None:
    path = spoilable.parent / "parity.json"
    document = json.loads(path.read_text())
    document["files"][spoilable.name]["task"]["engine_db"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(SrkdError, match="not the one its sidecar's verdict rests on"):
        load_engine(spoilable)
    path.unlink()  # a file shipped with its sidecar alone still loads
    assert load_engine(spoilable).notes == ()


@pytest.mark.parametrize("verdict", ["UNVERIFIED", "INCONCLUSIVE"])
def test_a_doubtful_verdict_is_repeated(
    verdict: str, spoilable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_sidecar(spoilable, parity={**read_sidecar(spoilable).parity, "verdict": verdict})
    with caplog.at_level(logging.WARNING):
        engine = load_engine(spoilable)
    assert verdict in engine.notes[0]
    assert verdict in caplog.text


def test_a_failed_file_is_not_served(spoilable: Path) -> None:
    change_sidecar(spoilable, parity={**read_sidecar(spoilable).parity, "verdict": "FAIL"})
    with pytest.raises(CheckFailedError, match="FAILED its parity check") as caught:
        load_engine(spoilable)
    assert caught.value.exit_code == 1
    assert load_engine(spoilable, allow_failed=True).scale == 2
