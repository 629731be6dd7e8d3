"""The speed card and its command: what is measured, what is refused, what is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from parity_record import RECORD

from deploy import benchmark as command
from deploy.benchmark import benchmark, main, opening_cells, print_card, speed_cells, three_digits
from deploy.export import export
from deploy.graph import Graph
from deploy.sidecar import read_sidecar, record_hash, write_parity, write_sidecar
from deploy.speed import Comparison, Limits, Measurement, WallClock, WarmUp
from deploy.speed_card import (
    Pipeline,
    Row,
    SpeedCard,
    on_device,
    pictures,
    timed_runs,
    to_bytes,
    to_floats,
)
from deploy.subjects import (
    Opened,
    Subject,
    check_tf32,
    compared,
    device_of,
    open_file,
    open_model,
    open_targets,
    start,
)
from deploy.torch_engines import TorchEngine
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import sha256
from srkd.images import to_tensor, to_uint8
from srkd.models import load_model
from srkd.types import Facts

if TYPE_CHECKING:
    from deploy.engines import Engine
    from srkd.loaded import LoadedModel

SIZE = (12, 10)
# One window of three runs, one run a turn: nothing waits for times to settle.
TINY = Limits(0.0, 2, 0.0, rounds=1, warm_up_s=0.0, warm_up_runs=2, give_up_s=0.0, drift=1e9)


class Nearest:
    """Enlarges by repeating pixels, and counts its runs."""

    scale = 2

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        self.seen.append(lr)
        return lr.repeat(2, 2).repeat(2, 3)


def subject(engine: Engine, name: str = "net torch fp32", **changes: Any) -> Subject:
    made = Subject(
        name=name,
        model="net",
        engine="torch",
        precision="fp32",
        facts=Facts(2, 1, True),
        folder=Path("out"),
        settings={},
        threads=2,
        device="cpu",
        opened=Opened(engine, np.zeros((1, 3, 2, 2), np.float32), 0.25, 1.5, 12.5, None),
        parity={"verdict": "REFERENCE", "psnr_db": None, "against": "itself"},
    )
    return replace(made, **changes)


def enlarging_graph(
    model: LoadedModel, path: Path, size: tuple[int, int] | None, *, staged: bool
) -> Graph:
    """A graph of one node that repeats pixels, in place of the exporter's, which takes seconds."""
    images = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None, 3, None, None])
        for n in ("lr", "sr")
    ]
    scales = onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    node = onnx.helper.make_node("Resize", ["lr", "", "scales"], ["sr"], mode="nearest")
    graph = onnx.helper.make_graph([node], "enlarge", images[:1], images[1:], [scales])
    opset = onnx.helper.make_opsetid("", 18)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return Graph(path, sha256(path), 18, 1, False, ["N", 3, "h", "w"], ["N", 3, "2*h", "2*w"])


@pytest.fixture(scope="module")
def run_folder(run_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of this file alone."""
    return Path(shutil.copytree(run_folders["edsr_tiny"], tmp_path_factory.mktemp("run") / "tiny"))


@pytest.fixture(scope="module")
def exported_file(run_folder: Path) -> Path:
    """An exported file where that of the run folder is looked for, not verified."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.graph.export_graph", enlarging_graph)
        return export(run_folder, "ort", parity=False, quiet=True).file


def passed(file: Path) -> None:
    """Give the sidecar the verdict of a check that passed."""
    sidecar = read_sidecar(file)
    write_parity(file.parent, file.name, RECORD)
    parity = {"verdict": "PASS", "record_sha256": record_hash(RECORD)}
    write_sidecar(file, replace(sidecar, parity={**sidecar.parity, **parity}))


# --- what is timed ------------------------------------------------------------------------------


def test_pictures_are_photographs_of_the_size() -> None:
    found = pictures(
        (40, 200), 2, 9
    )  # wider than some: continued by mirroring; more than there are
    assert [p.shape for p in found] == [(40, 200, 3)] * 9
    assert all(p.std() > 5 and p.dtype == np.uint8 for p in found)
    assert not np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[8])


def test_bytes_and_floats_are_those_of_the_product() -> None:
    batch = [np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * k for k in (1, 10)]
    floats = to_floats(batch)
    assert floats.shape == (2, 3, 2, 4) and floats.flags["C_CONTIGUOUS"]
    assert np.array_equal(floats[1:], to_tensor(batch[1]).numpy())
    sr = np.linspace(-0.2, 1.2, 48, dtype=np.float32).reshape(2, 3, 2, 4)
    assert np.array_equal(to_bytes(sr)[1], to_uint8(torch.from_numpy(sr[1:])))


def test_pipeline_gives_every_picture_one_call_later() -> None:
    photos = [np.full((2, 2, 3), v, np.uint8) for v in (10, 20, 30)]
    pipeline = Pipeline(Nearest(), [[p] for p in photos])
    try:
        found = [pipeline() for _ in range(4)]
    finally:
        pipeline.close()
    assert found[0] is None
    assert [int(f[0, 0, 0, 0]) for f in found[1:] if f is not None] == [10, 20, 30]
    assert [f.shape for f in found[1:] if f is not None] == [(1, 4, 4, 3)] * 3


def test_rows_take_turns_over_the_photographs() -> None:
    photos = [np.full((2, 2, 3), 51 * v, np.uint8) for v in range(4)]
    engine = Nearest()
    compute = timed_runs("compute", subject(engine), photos, 2)
    sr = [compute.run() for _ in range(3)]
    assert isinstance(compute.watch, WallClock) and isinstance(sr[0], np.ndarray)
    means = [[float(x.mean()) for x in lr] for lr in engine.seen]
    assert np.allclose(means, [[0, 0.2], [0.4, 0.6], [0, 0.2]])
    latency = timed_runs("latency", subject(engine), photos, 1)
    done: Any = [latency.run() for _ in range(2)]
    assert done[1].dtype == np.uint8 and int(done[1].mean()) == 51


def test_tensors_that_stay_on_the_device() -> None:
    lr = torch.ones(1, 3, 2, 2)
    run, stream = on_device(SimpleNamespace(run=lambda x: x + 1), lr, "net")
    assert torch.equal(run(), lr + 1) and stream is None  # type: ignore[arg-type]
    filled: list[Any] = []
    plan = SimpleNamespace(
        scale=2,
        stream=SimpleNamespace(stream="own"),
        enqueue=lambda lr, sr: filled.append(sr.shape),
    )
    run, stream = on_device(plan, lr, "net")
    run()
    assert filled == [(1, 3, 4, 4)] and stream == "own"
    with pytest.raises(SrkdError, match="net cannot keep its tensors on the GPU"):
        on_device(Nearest(), lr, "net")


# --- opening and refusals -----------------------------------------------------------------------


def test_opening_counts_the_first_run() -> None:
    lr = np.ones((1, 3, 2, 2), np.float32)
    found = start(Nearest, lr)
    assert found.first.shape == (1, 3, 4, 4) and found.device_mib is None
    assert min(found.open_s, found.first_run_s) >= 0


def test_only_files_that_passed_are_measured(exported_file: Path) -> None:
    lr = np.ones((1, 3, *SIZE), np.float32)
    with pytest.raises(
        CheckFailedError, match=r"verdict is UNVERIFIED, .* Verify it: python deploy"
    ):
        open_file(exported_file, lr)
    passed(exported_file)
    found = open_file(exported_file, lr, threads=1)
    assert (found.engine, found.parity["verdict"], found.threads) == ("ort", "PASS", 1)
    assert (
        found.settings["threads"] == 1 and found.sha256 == read_sidecar(exported_file).graph_sha256
    )
    assert found.to_json()["memory_mib"]["file"] == exported_file.stat().st_size / 2**20
    with pytest.raises(SrkdError, match="exported and verified for engine ort, but onnx was asked"):
        open_file(exported_file, lr, engine="onnx")
    held = exported_file.read_bytes()
    exported_file.write_bytes(held + b"x")
    try:
        with pytest.raises(SrkdError, match="not the file its sidecar describes"):
            open_file(exported_file, lr)
    finally:
        exported_file.write_bytes(held)


def test_a_model_on_its_exported_file(exported_file: Path, run_folder: Path) -> None:
    passed(exported_file)
    lr = np.ones((1, 3, *SIZE), np.float32)
    found = open_targets([run_folder], [("torch", "fp32"), ("ort", "fp32")], lambda scale: lr)
    assert [s.name for s in found] == ["tiny torch fp32", "tiny ort fp32"]
    assert found[1].file == exported_file and found[0].folder == exported_file.parent
    assert found[0].opened.first.shape == found[1].opened.first.shape == (1, 3, 24, 20)
    elsewhere = exported_file.with_name("tiny_fp32.ort-cuda.onnx")
    elsewhere.touch()
    try:
        with pytest.raises(
            SrkdError, match=r"on several devices \(.*ort\.onnx, .*ort-cuda\.onnx\)"
        ):
            open_targets([run_folder], [("ort", "fp32")], lambda scale: lr)
    finally:
        elsewhere.unlink()
    with pytest.raises(SrkdError, match=r"tiny torch fp32 \(.*\) is asked for twice"):
        open_targets([run_folder, run_folder], [("torch", "fp32")], lambda scale: lr)


def test_engines_that_are_not_there(run_folders: dict[str, Path]) -> None:
    lr = np.ones((1, 3, *SIZE), np.float32)
    model = load_model(run_folders["edsr_mlperf"])

    def open_(engine: str, precision: str = "fp32") -> Subject:
        return open_model(model, engine, precision, lr, lambda: lr)

    with pytest.raises(SrkdError, match="no engine 'tortch'; did you mean 'torch'"):
        open_("tortch")
    with pytest.raises(
        SrkdError, match=r"has no exported file .*edsr_mlperf_fp32\.ort\.onnx, which engine ort"
    ):
        open_("ort")


def test_difference_to_the_reference() -> None:
    sr = np.full((1, 3, 4, 4), 0.5, np.float32)
    found = compared(sr, sr + np.float32(0.01))
    assert found["psnr_db"] == pytest.approx(40, abs=1e-4)
    with pytest.raises(CheckFailedError, match="48 values that are NaN or infinite"):
        compared(sr, sr * np.nan)


def test_rows_of_different_tf32_are_refused() -> None:
    on = subject(Nearest(), "a", settings={"tf32": True})
    off = subject(Nearest(), "b", settings={"tf32": False})
    check_tf32([on, on, subject(Nearest(), "c")])
    with pytest.raises(SrkdError, match=r"TF32 differs between the rows \(a: on, b: off\)"):
        check_tf32([on, subject(Nearest(), "c"), off])


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({}, "cpu"),
        ({"provider": "CPUExecutionProvider"}, "cpu"),
        ({"provider": "CUDAExecutionProvider"}, "cuda"),
        ({"device": "cuda:1"}, "cuda"),
        ({"library": "tensorrt_rtx"}, "cuda"),
    ],
)
def test_device(settings: dict[str, Any], device: str) -> None:
    assert device_of(settings) == device


# --- the card -----------------------------------------------------------------------------------


def card() -> SpeedCard:
    """Torch takes 20 ms a picture, ort 10 ms; a third did not settle."""
    warm = WarmUp(6, 1.0, 0.02, 0.001, True)
    first, second = subject(Nearest()), subject(Nearest(), "net ort fp32")
    third = subject(Nearest(), "net odd fp32")
    done = [Measurement(warm, ([t] * 2,) * 4, (0.0, 0.0)) for t in (0.02, 0.01)]
    unsettled = Measurement(replace(warm, converged=False), note="INCONCLUSIVE: it drifts")
    rows = [
        Row("compute", s, 2, (100, 50), m)
        for s, m in zip((first, second, third), (*done, unsettled), strict=True)
    ]
    environment = {
        "machine": {"cpu": "a CPU", "affinity": [0, 1]},
        "before": {"others": 0.015, "gpus": []},
    }
    pair = Comparison("net ort fp32", "net torch fp32", 2.0, 1.9, 2.1)
    return SpeedCard(
        rows, [("compute", pair)], [first, second, third], Limits(), {}, environment, ("hot",)
    )


def test_rates_follow_from_the_median() -> None:
    row = card().to_json()["rows"][1]
    # Two pictures in 10 ms; each is 200x100 pixels.
    assert row["fps"] == pytest.approx(200) and row["output_mpx_per_s"] == pytest.approx(4.0)
    assert (row["n"], row["turn_medians_ms"]) == (8, pytest.approx([10.0] * 4))
    assert row["size"] == [100, 50] and row["others"] == [0.0, 0.0]


def test_a_row_that_did_not_settle_has_no_rate_and_makes_the_card_inconclusive() -> None:
    made = card()
    row = made.to_json()["rows"][2]
    assert row["verdict"] == "INCONCLUSIVE" and "fps" not in row
    assert (made.verdict, made.exit_code) == ("INCONCLUSIVE", 1)
    sound = replace(made, rows=made.rows[:2])
    assert (sound.verdict, sound.exit_code) == ("MEASURED", 0)


def test_layout_of_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    header, lines = speed_cells(card())
    assert [len(line) for line in lines] == [len(header)] * 3
    by_name = dict(zip(header, lines[1], strict=True))
    assert by_name["engine"] == "net ort fp32, LR 100x50" and by_name["scale"] == "x2"
    assert (by_name["batch"], by_name["FPS"], by_name["p50 ms"]) == ("2", "200", "10")
    assert by_name["against net torch fp32"] == "2.00 [1.90, 2.10] faster"
    assert lines[0][-1] == "-" and lines[2][5] == "INCONCLUSIVE"
    header, lines = opening_cells(card())
    assert lines[0] == ["net torch fp32", "0.25", "1.50", "-", "12.5", "-", "REFERENCE"]
    print_card(card())
    out = capsys.readouterr().out
    assert "a CPU, 2 processors, other work before: 2 %" in out and "clocks not locked" in out
    assert "compute, net odd fp32: INCONCLUSIVE: it drifts" in out and "\nhot\n" in out


def test_numbers_without_exponent() -> None:
    assert [three_digits(v) for v in (0.01234, 9.876, 99.96, 12345.6)] == [
        "0.0123",
        "9.88",
        "100",
        "12,346",
    ]


# --- end to end ---------------------------------------------------------------------------------


def test_everything_in_miniature(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both look at real time.
    monkeypatch.setattr(command, "wait_until_quiet", lambda others: others())
    monkeypatch.setattr("deploy.speed_card.check_watch", lambda watch: {"off": 0.0})
    made, file = benchmark(
        [run_folder],
        size=SIZE,
        batch=2,
        limits=TINY,
        out=tmp_path,
        quiet=True,
        others=lambda: 0.0,
    )
    written = json.loads(file.read_text())
    assert file == tmp_path / "speed.json" and written["format"] == 1
    assert [(r["quantity"], r["batch"], r["n"]) for r in written["rows"]] == [
        ("compute", 2, 2),
        ("latency", 1, 2),
        ("throughput", 2, 2),
    ]
    assert written["limits"] == asdict(TINY) and made.verdict == "MEASURED"
    assert written["self_test"] == {"clock": {"off": 0.0}}
    environment = written["environment"]
    assert environment["before"]["others"] == 0.0 and len(environment["during"]) == 3
    assert "torch" in environment["machine"]["versions"] and environment["machine"]["affinity"]
    assert isinstance(made.subjects[0].opened.engine, TorchEngine)


# --- the command --------------------------------------------------------------------------------


def test_options_reach_the_measurement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def fake(targets: list[str], engines: Any, **options: Any) -> tuple[SpeedCard, Path]:
        asked.update(options, targets=targets, engines=engines)
        return card(), tmp_path / "speed.json"

    monkeypatch.setattr(command, "benchmark", fake)
    words = "a b.onnx --engine torch,ort:fp16 --size 20x30 --threads 3 --batch 4 --seconds 2"
    assert main([*words.split(), "--quantity", "latency,compute", "--scale", "4", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "INCONCLUSIVE"
    assert asked["targets"] == ["a", "b.onnx"]
    assert asked["engines"] == [("torch", "fp32"), ("ort", "fp16")]
    assert (asked["size"], asked["threads"], asked["batch"]) == ((20, 30), 3, 4)
    assert asked["scale"] == 4 and asked["quantities"] == ["compute", "latency"]
    assert (asked["limits"].seconds, asked["limits"].longest_s) == (2.0, 8.0)
    assert main(["a"]) == 1
    assert capsys.readouterr().out.endswith("speed.json\nINCONCLUSIVE\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--size 20", "--size 20 is no height and width"),
        ("--size 0x5", "--size 0x5 is no height"),
        ("--engine ,", "--engine ',' names no engine"),
        ("--threads -1", "--threads -1 is too small; give 0 or more"),
        ("--batch 0", "--batch 0 is too small; give 1 or more"),
        ("--seconds 0", "--seconds 0.0 is no duration"),
        ("--seconds nan", "--seconds nan is no duration"),
        ("--quantity latency,speed", "--quantity has 'speed', which is unknown"),
        ("--quantity latency,latency", "unknown or named twice; choose from compute, latency"),
    ],
)
def test_bad_requests(words: str, said: str) -> None:
    with pytest.raises(SrkdError, match=said):
        main(["a", *words.split()])
