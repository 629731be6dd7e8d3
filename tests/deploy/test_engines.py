"""Engines run what they say they run, and a loader that refuses what it cannot vouch for."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploy.engines import (
    CPU_PROVIDER,
    ENGINES,
    PRECISIONS,
    EngineRunError,
    available,
    check_file,
    engine_kind,
    engine_settings,
    load_engine,
    open_engine,
    require_engine,
)
from deploy.export import export
from deploy.machine import Gpu, absence
from deploy.ort_engine import OrtEngine
from deploy.places import export_file
from deploy.sidecar import PARITY_FILE, read_sidecar, record_hash, sidecar_path
from deploy.sizes import parse_sizes
from deploy.subjects import open_file
from deploy.torch_engines import TorchEngine
from srkd.errors import CheckFailedError, MissingError, SrkdError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.conftest import _Exports

BUILD = {"library": "tensorrt", "version": "10.13", "gpu": "A", "compute_capabilities": ["9.0"]}


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, dtype=np.float32)


def test_missing_and_hollow_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # import fails
    with pytest.raises(MissingError, match=r"needs onnxruntime.*pip install onnxruntime") as caught:
        require_engine("ort")
    assert caught.value.exit_code == 3
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(MissingError, match="empty"):
        require_engine("onnx")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("openvino", "engine 'openvino' needs openvino.*pip install openvino"),
        ("trt", "engine 'trt' needs tensorrt.*pip install tensorrt --extra-index-url https://pypi"),
        ("trt-rtx", "engine 'trt-rtx' needs tensorrt_rtx.*pip install tensorrt-rtx-cu13"),
    ],
)
def test_a_missing_library_says_what_to_install(
    name: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, ENGINES[name].module, None)
    with pytest.raises(MissingError, match=told):
        require_engine(name)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (
            ("tensorrt",),
            r"no engine 'tensorrt'; did you mean .* Valid: onnx, openvino, ort, torch,",
        ),
        (("ort", "bf16"), "in fp32 or fp16, not in 'bf16'; engines that do: torch, .*openvino"),
        (("trt", "bf16"), "engine 'trt' computes in fp32 or fp16"),
        (("ort", "int8"), r"not in 'int8'\.$"),
        (("torch", "fp16", "cpu"), "in fp32 or bf16 on cpu, not in 'fp16'"),
        (("openvino", "fp32", "cuda"), "runs on cpu, not on 'cuda'"),
    ],
)
def test_what_does_not_exist_is_refused(request_: tuple[str, ...], told: str) -> None:
    with pytest.raises(SrkdError, match=told):
        engine_kind(*request_)


def test_settings_of_an_engine() -> None:
    assert engine_settings("ort", threads=3) == {"provider": CPU_PROVIDER, "threads": 3}
    assert engine_settings("ort", "fp16", "cuda")["provider"] == "CUDAExecutionProvider"
    assert engine_settings("openvino", "bf16") == {"precision": "bf16", "threads": 0}
    assert engine_settings("torch", "fp16", "cuda") == {"device": "cuda", "threads": 0}
    assert engine_settings("trt-rtx", "fp16") == {"library": "tensorrt_rtx", "tf32": False}
    with pytest.raises(SrkdError, match="takes no threads"):
        engine_settings("trt", threads=2)
    with pytest.raises(SrkdError, match="fp32 or bf16 on cpu"):
        engine_settings("torch", "fp16")  # the CPU is the default


@pytest.mark.parametrize(
    ("engine", "device", "name"),
    [
        ("onnx", None, "x_fp16.onnx"),
        ("onnx", "cpu", "x_fp16.onnx"),
        ("ort", None, "x_fp16.ort.onnx"),
        ("ort", "cpu", "x_fp16.ort.onnx"),
        ("ort", "cuda", "x_fp16.ort-cuda.onnx"),
        ("openvino", "cpu", "x_fp16.openvino.onnx"),
        ("trt", "cuda", "x_fp16.trt.plan"),
    ],
)
def test_names_of_exported_files(
    engine: str, device: str | None, name: str, tmp_path: Path
) -> None:
    file = export_file(tmp_path, "x", engine, "fp16", ENGINES[engine], device)
    assert file == tmp_path / name


def test_a_model_inside_a_run_is_exported_into_the_folder_itself(tmp_path: Path) -> None:
    """Its name, `run/baseline`, is no folder of the export."""
    file = export_file(tmp_path, "a1/baseline", "onnx", "fp32", ENGINES["onnx"])
    assert file == tmp_path / "a1-baseline_fp32.onnx"


def test_every_line_of_the_table_is_whole() -> None:
    for name, kind in ENGINES.items():
        assert kind.precisions and set(kind.precisions) <= set(PRECISIONS), name
        assert (kind.source == "built") == (kind.builder is not None), name
        assert (kind.source == "network") == (kind.suffix == ""), name


def test_every_engine_that_opens_a_graph(exported: _Exports) -> None:
    made = exported("edsr_tiny")
    lr = image(1, 3, 7, 9)
    for name, kind in ENGINES.items():
        if kind.source == "graph":
            engine = open_engine(name, made.graph.path, 2, engine_settings(name, threads=1))
            assert engine.scale == 2 and engine(lr).shape == (1, 3, 14, 18)
            engine = open_engine(name, made.graph.path, 3, engine_settings(name, threads=1))
            told = r"makes \(1, 3, 14, 18\) of \(1, 3, 7, 9\), not \(1, 3, 21, 27\)"
            with pytest.raises(EngineRunError, match=told):
                engine(lr)
    with pytest.raises(SrkdError, match=r"runs a network, not a file such as edsr_tiny\.onnx"):
        open_engine("torch", made.graph.path, 2, {})


def test_available_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"tensorrt": "tensorrt is not installed"}
    monkeypatch.setattr("deploy.engines.absence", absent.get)
    monkeypatch.setattr("deploy.engines.gpu", lambda: None)
    monkeypatch.setattr("deploy.engines.cpp_compiler", lambda: None)
    found = {line.name: line for line in available()}
    assert list(found) == list(ENGINES)
    assert found["openvino"] == ("openvino", ("fp32", "fp16", "bf16"), None, False)
    assert found["torch"].precisions == ("fp32", "bf16")
    assert found["torch-compile"].precisions == ()
    assert "C++ compiler" in str(found["torch-compile"].reason)
    assert str(found["trt"].reason).startswith("tensorrt is not installed; install it: pip install")
    told = "builds here, runs on cuda, and no NVIDIA GPU was found"
    assert found["trt-rtx"] == ("trt-rtx", (), told, True) and not found["trt"].builds

    absent.clear()
    (found_trt,) = (line for line in available() if line.name == "trt")
    told = "it builds and runs on cuda, and no NVIDIA GPU was found"
    assert found_trt == ("trt", (), told, False)

    monkeypatch.setattr("deploy.engines.gpu", lambda: Gpu("NVIDIA A", "8.6"))
    found = {line.name: line for line in available()}
    assert found["torch"].precisions == ("fp32", "fp16", "bf16")
    assert found["trt-rtx"] == ("trt-rtx", ("fp32", "fp16"), None, True)
    assert found["trt"] == ("trt", ("fp32", "fp16"), None, True)
    assert found["torch-compile"].reason is None  # on CUDA it brings its own compiler

    monkeypatch.setattr("deploy.engines.gpu", lambda: Gpu("NVIDIA H200", "9.0"))
    found = {line.name: line for line in available()}
    assert found["trt"].precisions == ("fp32", "fp16")
    rtx = found["trt-rtx"]
    assert rtx.precisions == () and rtx.builds
    assert "this is NVIDIA H200 (compute capability 9.0); on it use --engine trt" in str(rtx.reason)


def test_absence_is_found_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hollow_library").mkdir()
    (tmp_path / "trap_library.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert absence("trap_library") is None and "trap_library" not in sys.modules
    assert "empty folder" in str(absence("hollow_library"))
    assert absence("no_such_library") == "no_such_library is not installed"


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
    return tmp_path / "x" / "edsr_tiny_fp32.ort.onnx"


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
    change_sidecar(spoilable, format=1)
    with pytest.raises(SrkdError, match=r"format 1, this version reads 3; .* or export again"):
        load_engine(spoilable)
    sidecar_path(spoilable).write_text(good)
    change_sidecar(spoilable, surprise=1)
    with pytest.raises(SrkdError, match=r"damaged.*surprise"):
        load_engine(spoilable)
    sidecar_path(spoilable).write_text(good)
    sidecar_path(spoilable).write_text(good[: len(good) // 2])
    with pytest.raises(SrkdError, match="cannot read"):
        load_engine(spoilable)
    sidecar_path(spoilable).unlink()
    with pytest.raises(SrkdError, match="has no sidecar"):
        load_engine(spoilable)
    spoilable.unlink()
    with pytest.raises(SrkdError, match="there is no exported file"):
        load_engine(spoilable)


@pytest.mark.parametrize(
    ("key", "values", "told"),
    [
        ("facts", {"scale": "two"}, r"damaged \(scale 'two'\)"),
        ("facts", {"scale": 1}, "scale 1"),
        ("facts", {"scale": 9}, "scale 9"),
        ("facts", {"receptive_field_px": 0}, "receptive_field_px 0"),
        ("facts", {"minimum_px": None}, "minimum_px None"),
        ("facts", {"exact_tiling": "yes"}, "exact_tiling 'yes'"),
        ("facts", {"output_range": "0..255"}, "output_range '0..255'"),
        ("facts", {"radius": 1}, "damaged .*radius"),
        ("parity", {"verdict": "FINE"}, "verdict 'FINE'"),
        ("parity", None, "parity is None"),
        ("build", {}, "the build says no compute_capabilities, gpu, library, version"),
        (
            "build",
            {"library": "", "version": "", "gpu": "", "compute_capabilities": []},
            "'ort' with",
        ),
        ("sizes", {"max": [64]}, r"size max is \[64\], not \[h, w\]"),
        ("sizes", {"min": [16, 16.0]}, "size min"),
        ("sizes", None, "sizes is None"),
        ("static", True, "it is static and has several sizes"),
        ("settings", {"threads": "2"}, "setting threads is '2'.*export\\.py"),
        ("settings", {"provider": None}, "setting provider is None"),
        ("settings", {"precision": "fp16"}, "setting precision is not the fp32"),
        ("engine", ["ort"], r"engine is \['ort'\]"),
        ("engine", "trt", "setting library is None; .*'trt' without a build"),
        ("engine", "best", "there is no engine 'best'"),
        ("precision", "fp8", "not in 'fp8'"),
        ("build", {**BUILD, "compute_capabilities": [9]}, r"capabilities are \[9\]"),
        ("model", {"arguments": [64]}, r"arguments are \[64\]"),
        ("model", [], r"model is \[\]"),
    ],
)
def test_values_that_no_export_writes(key: str, values: Any, told: str, spoilable: Path) -> None:
    held = json.loads(sidecar_path(spoilable).read_text())[key]
    both = isinstance(held, dict) and isinstance(values, dict)
    change_sidecar(spoilable, **{key: {**held, **values} if both else values})
    with pytest.raises(SrkdError, match=told):
        check_file(spoilable)


def test_a_forged_parity_record_is_refused(spoilable: Path) -> None:
    path = spoilable.parent / "parity.json"
    document = json.loads(path.read_text())
    document["files"][spoilable.name]["task"]["engine_db"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(SrkdError, match="not the one its sidecar's verdict rests on"):
        load_engine(spoilable)
    path.unlink()  # a file shipped with its sidecar alone still loads
    loaded = load_engine(spoilable)
    assert loaded.sidecar.verdict == "UNVERIFIED"
    (note,) = loaded.notes
    assert "is UNVERIFIED: its sidecar says PASS, but parity.json beside it does not hold" in note
    with pytest.raises(CheckFailedError, match="its parity verdict is UNVERIFIED"):
        open_file(spoilable, image(1, 3, 8, 8))
    # A record that is not there makes nothing better either.
    change_sidecar(spoilable, parity={**read_sidecar(spoilable).parity, "verdict": "FAIL"})
    with pytest.raises(CheckFailedError, match="FAILED its parity check"):
        load_engine(spoilable)


def change_verdict(file: Path, verdict: str) -> None:
    """What an export leaves that found another verdict."""
    path = file.parent / PARITY_FILE
    document = json.loads(path.read_text())
    record = {**document["files"][file.name], "verdict": verdict}
    path.write_text(json.dumps({**document, "files": {file.name: record}}))
    parity = {"verdict": verdict, "record_sha256": record_hash(record)}
    change_sidecar(file, parity={**read_sidecar(file).parity, **parity})


@pytest.mark.parametrize("measured", ["FAIL", "INCONCLUSIVE", "BUILT, NOT VERIFIED"])
def test_a_verdict_other_than_the_record_s_is_refused(measured: str, spoilable: Path) -> None:
    change_verdict(spoilable, measured)
    change_sidecar(spoilable, parity={**read_sidecar(spoilable).parity, "verdict": "PASS"})
    told = rf"says PASS, and the parity record that this rests on says {measured}.*export\.py"
    with pytest.raises(SrkdError, match=told):
        check_file(spoilable)


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_a_measured_verdict_needs_a_record(verdict: str, spoilable: Path) -> None:
    parity = {"verdict": "UNVERIFIED", "blame": None, "record": None, "record_sha256": None}
    change_sidecar(spoilable, parity=parity)
    check_file(spoilable)
    (spoilable.parent / PARITY_FILE).unlink()
    check_file(spoilable)
    change_sidecar(spoilable, parity={**parity, "verdict": verdict})
    with pytest.raises(SrkdError, match=rf"says {verdict} and names no parity record"):
        check_file(spoilable)


@pytest.mark.parametrize("verdict", ["INCONCLUSIVE", "BUILT, NOT VERIFIED"])
def test_a_doubtful_verdict_is_repeated(
    verdict: str, spoilable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_verdict(spoilable, verdict)
    with caplog.at_level(logging.WARNING):
        engine = load_engine(spoilable)
    assert verdict in engine.notes[0]
    assert verdict in caplog.text


def test_a_failed_file_is_not_served(spoilable: Path) -> None:
    change_verdict(spoilable, "FAIL")
    with pytest.raises(CheckFailedError, match="FAILED its parity check") as caught:
        load_engine(spoilable)
    assert caught.value.exit_code == 1
    assert load_engine(spoilable, allow_failed=True).scale == 2


def test_float16_on_the_cpu_proves_little(spoilable: Path) -> None:
    change_sidecar(spoilable, precision="fp16")
    (note,) = load_engine(spoilable).notes
    assert "computes in float32 on a CPU" in note


# --- built files ----------------------------------------------------------------------------------


@pytest.fixture
def built(spoilable: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the engine `trt`, built by a stand-in of its library (`BUILD`)."""
    library = types.ModuleType("tensorrt")
    library.Builder, library.__version__ = object, "10.13"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr("deploy.engines.gpu", lambda: Gpu("A", "9.0"))
    change_sidecar(spoilable, engine="trt", build=BUILD, settings=engine_settings("trt"))
    return spoilable


def test_a_built_file_goes_to_its_engine_with_its_build(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("deploy.engines.named", lambda _: lambda *given: opened.append(given))
    load_engine(built)
    # Another GPU of the same compute capability runs the same code.
    monkeypatch.setattr("deploy.engines.gpu", lambda: Gpu("B", "9.0"))
    load_engine(built)
    assert opened == [(built, 2, {"library": "tensorrt", "tf32": False, "built": BUILD})] * 2


def test_a_built_file_of_another_version(built: Path) -> None:
    sys.modules["tensorrt"].__version__ = "11.4"  # type: ignore[attr-defined]
    told = (
        r"built by tensorrt 10\.13, and this machine has 11\.4.*Build it again: python .*export\.py"
    )
    with pytest.raises(MissingError, match=told):
        load_engine(built)


@pytest.mark.parametrize(
    ("here", "told"),
    [
        (
            Gpu("A", "8.0"),
            r"on A for compute capability 9\.0, .* has A \(compute capability 8\.0\)",
        ),
        (None, r"for compute capability 9\.0, and this machine has no NVIDIA GPU"),
    ],
)
def test_a_built_file_of_another_kind_of_gpu(
    here: Gpu | None, told: str, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.engines.gpu", lambda: here)
    with pytest.raises(MissingError, match=told) as caught:
        load_engine(built)
    assert "export.py" in str(caught.value) and caught.value.exit_code == 3
