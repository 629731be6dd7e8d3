"""deploy/export.py as a user meets it: files, words, exit codes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import deploy.graph
from deploy.engines import load_engine
from deploy.export import default_folder, export, main
from deploy.sidecar import how_to_rebuild, read_sidecar
from deploy.sizes import parse_sizes
from srkd.console import run_command
from srkd.errors import SrkdError
from srkd.files import sha256
from srkd.images import write_png
from srkd.loaded import LoadedModel
from srkd.models import load_model

if TYPE_CHECKING:
    from deploy.graph import Graph
    from tests.deploy.conftest import _Exports

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = ("--size", "16x16:24x28:32x32")


def test_the_whole_command(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(run), "--engine", "ort", "--threads", "1", *SIZES]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "PASSED"
    assert [line.split()[0] for line in err.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    folder = run / "deploy"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "a1_fp32.ort.onnx",
        "a1_fp32.ort.onnx.json",
        "a1_fp32.ort.worst.png",
        "parity.json",
        "report.md",
    ]
    file = folder / "a1_fp32.ort.onnx"
    for path in (file, folder / "a1_fp32.ort.onnx.json", folder / "report.md"):
        assert str(path) in out

    sidecar = read_sidecar(file)
    assert sidecar.graph_sha256 == sha256(file)
    assert sidecar.weights_sha256 == sha256(run / "weights.safetensors")
    assert sidecar.settings == {"provider": "CPUExecutionProvider", "threads": 1}
    assert sidecar.sizes == {"min": [16, 16], "opt": [24, 28], "max": [32, 32]}
    assert sidecar.input["dims"] == ["batch", 3, "height", "width"]
    assert sidecar.output["dims"] == ["batch", 3, "2*height", "2*width"]
    assert "not clamped" in sidecar.output["range"]
    assert sidecar.facts["receptive_field_px"] == load_model(run).facts.receptive_field_px
    assert {"torch", "onnx", "onnxruntime", "python", "srkd"} <= sidecar.versions.keys()
    assert sidecar.verdict == "PASS" and "**PASS**" in (folder / "report.md").read_text()

    # Nothing names this machine, and where the folder is moved to, the command rebuilds the same file.
    assert sidecar.model["source"] == ".."
    for path in (file.with_name(f"{file.name}.json"), folder / "parity.json", folder / "report.md"):
        assert str(run.parent) not in path.read_text()
    (run.parent / "elsewhere").mkdir()
    run.rename(run.parent / "elsewhere" / run.name)
    monkeypatch.chdir(run.parent / "elsewhere")
    file = Path("a1/deploy/a1_fp32.ort.onnx")
    file.write_bytes(b"spoilt")
    words = how_to_rebuild(file, sidecar).split()
    assert words[:3] == ["python", "deploy/export.py", "a1"] and "a1/deploy" in words
    assert main([*words[2:], "--quiet"]) == 0
    assert sha256(file) == sidecar.graph_sha256
    assert load_engine(file).notes == ()


@pytest.mark.usefixtures("fast_export")
class TestOutcomes:
    def test_json_is_one_document(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(run), "--engine", "onnx", "--json", "--quiet", *SIZES]) == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert err == ""
        assert (document["verdict"], document["exit_code"]) == ("PASS", 0)
        assert document["parity"]["task"]["photographs"] == 8
        assert set(document["seconds"]) == {"load", "onnx", "engine", "verify"}
        stored = json.loads((run / "deploy" / "parity.json").read_text())
        assert stored["files"]["a1_fp32.onnx"] == document["parity"]

    def test_no_parity(
        self, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)  # a graph alone needs no runtime
        assert main([str(run), "--engine", "onnx", "--no-parity"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "UNVERIFIED"
        monkeypatch.undo()
        file = run / "deploy" / "a1_fp32.onnx"
        assert read_sidecar(file).verdict == "UNVERIFIED"
        assert "UNVERIFIED" in load_engine(file).notes[0]

    def test_no_parity_forgets_an_older_verdict(self, run: Path) -> None:
        assert main([str(run), "--engine", "onnx", "--quiet", *SIZES]) == 0
        again = [str(run), "--engine", "onnx", "--no-parity", "--overwrite", "--quiet"]
        assert main(again) == 0
        folder = run / "deploy"
        assert json.loads((folder / "parity.json").read_text())["files"] == {}
        assert "PASS" not in (folder / "report.md").read_text()
        assert not (folder / "a1_fp32.worst.png").exists()

    def test_too_few_photographs(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
        write_png(photos / "one.png", pixels)
        code = main([str(run), "--engine", "onnx", "--data", str(photos), "--quiet", *SIZES])
        assert code == 1
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == "INCONCLUSIVE" and "only 1 real photographs" in out
        file = run / "deploy" / "a1_fp32.onnx"
        assert "INCONCLUSIVE" in load_engine(file).notes[0]

    def test_a_faulty_graph_fails_and_is_not_served(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sound = deploy.graph.export_graph

        def faulty(
            model: LoadedModel, path: Path, size: tuple[int, int] | None, *, staged: bool
        ) -> Graph:
            graph = sound(model, path, size)
            proto = onnx.load(path)
            for node in proto.graph.node:
                if node.op_type == "DepthToSpace":
                    next(a for a in node.attribute if a.name == "mode").s = b"DCR"
            onnx.save(proto, path)
            return deploy.graph.Graph(**{**vars(graph), "sha256": sha256(path)})

        monkeypatch.setattr(deploy.graph, "export_graph", faulty)
        assert main([str(run), "--engine", "ort", "--threads", "1", *SIZES]) == 1
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == "FAILED" and "E1  FAIL" in out and "FAIL" in err
        file = run / "deploy" / "a1_fp32.ort.onnx"
        assert read_sidecar(file).parity["blame"] == "E1"
        with pytest.raises(SrkdError, match="FAILED its parity check"):
            load_engine(file)

    def test_an_interrupted_check_leaves_an_unverified_file(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("deploy.parity.verify", interrupt)
        assert run_command(main, [str(run), "--engine", "onnx", "--quiet", *SIZES]) == 130
        assert read_sidecar(run / "deploy" / "a1_fp32.onnx").verdict == "UNVERIFIED"

    def test_a_failed_export_leaves_the_one_before(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = [str(run), "--engine", "onnx", "--quiet", *SIZES]
        assert main(first) == 0
        before = {p.name: p.read_bytes() for p in (run / "deploy").iterdir()}

        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(deploy.graph, "export_graph", interrupt)
        assert run_command(main, [*first, "--overwrite"]) == 130
        assert {p.name: p.read_bytes() for p in (run / "deploy").iterdir()} == before

    def test_existing_files_are_kept_unless_told(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = [str(run), "--engine", "onnx", "--quiet", "--no-parity"]
        assert main(arguments) == 0
        before = sha256(run / "deploy" / "a1_fp32.onnx.json")
        assert run_command(main, [*arguments, "--size", "8x8"]) == 2
        assert "add --overwrite or choose another --out" in capsys.readouterr().err
        assert sha256(run / "deploy" / "a1_fp32.onnx.json") == before
        assert main([*arguments, "--size", "8x8", "--overwrite"]) == 0
        assert sha256(run / "deploy" / "a1_fp32.onnx.json") != before

    def test_two_exports_share_one_folder(self, run: Path, tmp_path: Path) -> None:
        out, small = tmp_path / "out", parse_sizes(SIZES[1])
        other = Path(shutil.copytree(run, tmp_path / "b2"))
        for folder in (run, other):
            assert export(folder, "onnx", out=out, sizes=small, quiet=True).exit_code == 0
        report = (out / "report.md").read_text()
        assert "## a1_fp32.onnx: **PASS**" in report and "## b2_fp32.onnx: **PASS**" in report
        assert load_engine(out / "a1_fp32.onnx").notes == ()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{run}", "--engine", "trtx"], 2, "there is no engine 'trtx'; did you mean 'trt"),
        (
            ["{run}", "--engine", "torch"],
            2,
            "runs the network itself, so there is nothing to export",
        ),
        (["{run}", "--engine", "ort", "--precision", "bf16"], 2, "engines that do: "),
        (["{run}", "--engine", "openvino", "--device", "cuda"], 2, "runs on cpu, not on 'cuda'"),
        (["{run}", "--engine", "onnx", "--no-parity", "--benchmark"], 2, "whose parity passed"),
        (["{run}", "--engine", "onnx", "--size", "64"], 2, "MIN:OPT:MAX"),
        (["{run}", "--engine", "onnx", "--scale", "3"], 2, "is a x2 network"),
        (
            ["{run}", "--engine", "onnx", "--threads", "2"],
            2,
            "--threads belongs to engines bound to a CPU",
        ),
        (["{run}", "--engine", "ort", "--threads", "-1"], 2, "is negative"),
        (["{run}", "--engine", "onnx", "--data", "/nowhere"], 2, "/nowhere"),
        (["{run}", "--engine", "onnx", "--out", "{run}/model.json"], 2, "is a file"),
        (["{run}", "--engine", "onnx", "--out", "/proc/none"], 2, "cannot write in /proc/none"),
        (["nonesuch", "--engine", "onnx"], 2, "nonesuch"),
        (["{run}"], 2, "--engine"),
    ],
)
def test_bad_requests(
    arguments: list[str], code: int, said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        got = run_command(main, [a.format(run=run) for a in arguments])
    except SystemExit as stop:  # argparse
        got = stop.code
    captured = capsys.readouterr()
    assert got == code and said in captured.err and captured.out == ""
    assert "Traceback" not in captured.err
    assert not (run / "deploy").exists()


def test_a_missing_library_is_reported_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_command(main, ["no such model", "--engine", "ort"]) == 3
    assert "pip install onnxruntime" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, exported: _Exports
) -> None:
    def no_space(self: Path, data: bytes) -> int:
        self.open("wb").write(data[:100])
        raise OSError(28, "No space left on device")

    made = exported("edsr_tiny")
    monkeypatch.setattr(deploy.graph, "_trace", lambda *_: onnx.load(made.graph.path))
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(SrkdError, match="No space left"):
        export(run, "onnx", quiet=True)
    assert list((run / "deploy").iterdir()) == []


def test_default_folders(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(run)
    assert default_folder(model) == run / "deploy"
    single = LoadedModel(model.network, "net", run / "weights.safetensors", model.facts)
    assert default_folder(single) == Path("deploy_out/net")
    # A shipped network stays as it was shipped.
    monkeypatch.setattr("srkd.models.WEIGHTS_FOLDER", run.parent)
    assert default_folder(model) == Path("deploy_out/a1")


def test_no_file_hides_a_library() -> None:
    """`python deploy/export.py` puts deploy/ first on the import path."""
    stems = {p.stem for p in (ROOT / "deploy").glob("*.py")} - {"__init__"}
    assert "export" in stems
    assert [stem for stem in sorted(stems) if importlib.util.find_spec(stem)] == []


def test_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "deploy/export.py")]
    done = subprocess.run(
        [*command, "nonesuch", "--engine", "onnx"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ")
