"""Graphs of one size: what they declare, where they are checked, and pictures of other sizes through them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch

from deploy.engine_model import load_any
from deploy.engines import EngineRunError, load_engine
from deploy.export import export, main
from deploy.sidecar import read_sidecar
from deploy.sizes import parse_sizes
from srkd.console import run_command
from srkd.infer import upscale
from srkd.models import load_model
from srkd.types import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.export import ExportResult
    from tests.deploy.conftest import _Exports

SIZE = (40, 48)
SIZES = parse_sizes("40x48", static=True)


def edges(found: ExportResult) -> dict[str, tuple[str, str]]:
    assert found.record is not None
    return {edge["name"]: (edge["status"], edge["reason"]) for edge in found.record["edges"]}


@pytest.mark.usefixtures("fast_export")
class TestOneSize:
    def test_a_graph_that_upscales_in_tiles_of_its_size(self, run: Path) -> None:
        found = export(run, "ort", sizes=SIZES, threads=1, quiet=True)
        assert found.verdict == "PASS" and found.file.name == "a1_fp32_40x48.ort.onnx"
        told = edges(found)
        assert told["E4"] == (
            "NOT RUN",
            "the engine takes 40x48 alone: there is no second size to compare with",
        )
        assert told["E5"][0] == "PASS"  # tiles of 40x48 against the network in torch
        assert found.record is not None
        seen = {row["input"].split()[-1] for e in found.record["edges"][:2] for row in e["rows"]}
        assert {name for name in seen if name[0].isdigit()} == {"40x48"}
        sidecar = read_sidecar(found.file)
        assert sidecar.static and sidecar.input["dims"] == [1, 3, 40, 48]
        assert sidecar.output["dims"] == [1, 3, 80, 96]
        assert "--size 40x48" in sidecar.rebuild and "--static" in sidecar.rebuild

        model, network = load_any(found.file), load_model(run)
        assert model.limits == Limits(SIZE, SIZE)
        lr = np.random.default_rng(0).random((57, 61, 3)).astype(np.float32)
        assert np.abs(upscale(lr, model) - upscale(lr, network, tile=None)).max() < 1e-5
        with pytest.warns(UserWarning, match="takes 48x40 px or more, so the picture was extended"):
            assert upscale(lr[:9], model).shape == (18, 122, 3)

    @pytest.mark.parametrize("engine", ["ort", "openvino"])
    def test_a_batch_and_another_size(self, engine: str, run: Path) -> None:
        found = export(run, engine, sizes=SIZES, threads=1, parity=False, quiet=True)
        opened = load_engine(found.file)
        lr = np.random.default_rng(1).random((2, 3, *SIZE), dtype=np.float32)
        with torch.inference_mode():
            sr = load_model(run).network(torch.from_numpy(lr)).numpy()
        assert np.abs(opened(lr) - sr).max() < 1e-5
        with pytest.raises(EngineRunError, match="takes pictures of 40x48 alone, and got 40x40;"):
            opened(lr[..., :40])

    def test_half_precision(self, run: Path) -> None:
        found = export(run, "onnx", precision="fp16", sizes=SIZES, quiet=True)
        assert found.verdict == "PASS" and found.file.name == "a1_fp16_40x48.onnx"
        told = edges(found)
        assert (told["E2"][0], told["E5"][0]) == ("PASS", "PASS")

    def test_an_engine_is_built_of_it(self, run: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        found = export(run, "trt-rtx", sizes=SIZES, parity=False, quiet=True)
        assert found.file.name == "a1_fp32_40x48.trt-rtx.plan"
        sidecar = read_sidecar(found.file)
        assert sidecar.static and sidecar.build is not None
        assert sidecar.build["profile"] == {which: [40, 48] for which in ("min", "opt", "max")}

    def test_beside_the_graph_of_any_size(self, run: Path) -> None:
        """Neither replaces the other."""
        for sizes in (SIZES, parse_sizes("40x48")):
            export(run, "onnx", sizes=sizes, parity=False, quiet=True)
        kept = {p.name: read_sidecar(p).static for p in (run / "deploy").glob("*.onnx")}
        assert kept == {"a1_fp32.onnx": False, "a1_fp32_40x48.onnx": True}


def test_windows_of_a_size_off_their_grid(exported: _Exports, tmp_path: Path) -> None:
    """The dynamic SwinIR computes the window grid; here it is folded into constants."""
    folder = exported("swinir_small").model.source
    run = shutil.copytree(folder, tmp_path / "swin")
    found = export(run, "onnx", sizes=parse_sizes("21x27", static=True), quiet=True)
    assert found.verdict == "PASS", edges(found)
    assert edges(found)["E5"][0] == "NOT RUN" and "px of halo" in edges(found)["E5"][1]
    graph, dynamic = onnx.load(found.file), onnx.load(exported("swinir_small").graph.path)
    assert len(graph.graph.node) < len(dynamic.graph.node)
    assert not [n for n in graph.graph.node if n.op_type in ("Shape", "Mod")]


def test_several_sizes_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in ([], ["--size", "16x16:24x24:32x32"]):
        assert run_command(main, [str(run), "--engine", "onnx", "--static", *size]) == 2
        assert "graph of one size" in capsys.readouterr().err
    assert not (run / "deploy").exists()
