"""deploy/export.py for the engines beyond plain fp32 graphs: half precision, OpenVINO, TensorRT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deploy.engines import load_engine
from deploy.export import export, main
from deploy.sidecar import read_sidecar
from deploy.sizes import parse_sizes
from srkd.console import run_command
from srkd.errors import MissingError, SrkdError
from srkd.models import load_model, save_model

SIZES = parse_sizes("16x16:24x28:32x32")


def edges(record: dict) -> dict[str, str]:
    return {edge["name"]: edge["status"] for edge in record["edges"]}


@pytest.mark.usefixtures("fast_export")
class TestEngines:
    def test_half_precision_stands_in_the_file(self, run: Path) -> None:
        found = export(run, "onnx", precision="fp16", sizes=SIZES, threads=0, quiet=True)
        assert found.verdict == "PASS" and found.file == run / "deploy" / "a1_fp16.onnx"
        assert found.record is not None
        statuses = edges(found.record)
        assert (statuses["E0"], statuses["E2"], statuses["E3"]) == ("NOT RUN", "PASS", "NOT RUN")
        assert {"range", "onnx", "fp16", "verify"} <= found.seconds.keys()
        sidecar = read_sidecar(found.file)
        assert sidecar.precision == "fp16" and sidecar.precision_plan["rescale"] == 1
        assert (
            found.record["plan"]["ranges_before"] and sidecar.graph_sha256 == sidecar.engine_sha256
        )
        page = (run / "deploy" / "report.md").read_text()
        assert "Range: " in page and "Where E2 differs most" in page
        assert any("float16" in note for note in load_engine(found.file).notes)

    def test_openvino_is_compared_and_proves_its_precision(self, run: Path) -> None:
        found = export(run, "openvino", sizes=SIZES, threads=1, quiet=True)
        assert found.verdict == "PASS" and found.file.name == "a1_fp32.openvino.onnx"
        assert found.record is not None
        e3 = next(e for e in found.record["edges"] if e["name"] == "E3")
        assert e3["status"] == "PASS" and "convolutions and matrix products" in e3["reason"]

    def test_engines_share_a_folder(self, run: Path) -> None:
        for engine in ("onnx", "ort", "openvino"):
            assert (
                export(run, engine, sizes=SIZES, parity=False, quiet=True).verdict == "UNVERIFIED"
            )
        owners = {p.name: read_sidecar(p).engine for p in (run / "deploy").glob("*.onnx")}
        assert owners == {
            "a1_fp32.onnx": "onnx",
            "a1_fp32.ort.onnx": "ort",
            "a1_fp32.openvino.onnx": "openvino",
        }

    def test_built_but_it_cannot_run_here(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("tensorrt_rtx")
        if torch.cuda.is_available():
            pytest.skip("an NVIDIA GPU is here")
        command = [str(run), "--engine", "trt-rtx", "--precision", "fp16", "--size", str(SIZES)]
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == "BUILT, NOT VERIFIED"
        assert "E2  PASS" in out and "E3  NOT RUN" in out and ", key " in err
        file = run / "deploy" / "a1_fp16.trt-rtx.plan"
        sidecar = read_sidecar(file)
        assert sidecar.verdict == "BUILT, NOT VERIFIED" and sidecar.build is not None
        assert sidecar.build["precisions"]["FP16"] > 0
        assert sidecar.graph_sha256 != sidecar.engine_sha256
        with pytest.raises(MissingError, match="is built and cannot run here"):
            load_engine(file)
        # The same request takes the engine from the cache.
        before = file.read_bytes()
        assert main([*command, "--overwrite"]) == 0
        assert "cached key" in capsys.readouterr().err and file.read_bytes() == before

    def test_sizes_that_an_engine_cannot_count(self, run: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        with pytest.raises(SrkdError, match=r"a tensor inside a1 .* \(at most 5792x5792\)"):
            export(run, "trt-rtx", sizes=parse_sizes("8x8:8x8:6000x6000"), parity=False, quiet=True)
        assert list((run / "deploy").iterdir()) == []

    def test_a_library_that_is_not_here(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        try:
            import tensorrt  # noqa: F401

            pytest.skip("tensorrt is here")
        except ImportError:
            pass
        assert run_command(main, [str(run), "--engine", "trt", "--precision", "fp16"]) == 3
        assert "pip install tensorrt" in capsys.readouterr().err
        assert not (run / "deploy").exists()


def test_a_wide_network_is_rescaled_and_proved_equal(run: Path, tmp_path: Path) -> None:
    """Features a thousand times as large, undone at the end: float16 would lose them."""
    model = load_model(run)
    network = model.network
    with torch.no_grad():
        named = dict(network.named_parameters())
        for name, value in named.items():
            if name.startswith("head") or name.endswith("bias"):
                value.mul_(1000)
        last = [n for n in named if n.startswith("tail") and n.endswith("weight")][-1]
        named[last].div_(1000)
        named[last.replace("weight", "bias")].div_(1000)
    save_model(tmp_path / "wide", network, {})
    found = export(tmp_path / "wide", "onnx", precision="fp16", sizes=SIZES, quiet=True)
    assert found.record is not None
    plan = found.record["plan"]
    assert plan["rescale"] > 1 and edges(found.record)["E0"] == "PASS"
    assert found.verdict == "PASS", json.dumps(found.record["edges"], indent=1)[:2000]
    top_before = max(row["largest"] for row in plan["ranges_before"])
    assert max(row["largest"] for row in plan["ranges_after"]) < top_before / 100
