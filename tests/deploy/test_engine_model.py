"""Exported files as MODEL: what upscaling and evaluation make of them is what the network makes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from deploy.engine_model import EngineNetwork, device_for, load_any
from deploy.engines import EngineRunError
from deploy.export import export
from deploy.places import engine_named
from deploy.sidecar import read_sidecar, sidecar_path
from deploy.sizes import parse_sizes
from scripts.evaluate import main as evaluate_main
from scripts.upscale import main as upscale_main
from srkd.console import run_command
from srkd.errors import CheckFailedError, SrkdError
from srkd.images import read_picture, write_png
from srkd.infer import upscale
from srkd.models import load_model
from srkd.types import Limits

if TYPE_CHECKING:
    from pathlib import Path

    from srkd.loaded import LoadedModel

SCALE = 2


@pytest.fixture(scope="module")
def run(run_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export for ONNX Runtime that nobody has verified."""
    folder = tmp_path_factory.mktemp("engine_model") / "tiny"
    shutil.copytree(run_folders["edsr_tiny"], folder)
    sizes = parse_sizes("16x16:32x32:40x48")
    export(folder, "ort", sizes=sizes, threads=1, parity=False, quiet=True)
    return folder


@pytest.fixture
def file(run: Path) -> Path:
    return run / "deploy" / "tiny_fp32.ort.onnx"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    write_png(tmp_path / "photo.png", np.kron(coarse, np.ones((7, 7, 1), np.uint8)))
    return tmp_path / "photo.png"


def copied(file: Path, folder: Path, name: str, **changes: Any) -> Path:
    """The exported file under another name, its sidecar changed."""
    target = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)
    record = json.loads(sidecar_path(file).read_text())
    sidecar_path(target).write_text(json.dumps({**record, "file": name, **changes}))
    return target


def words(*given: object) -> list[str]:
    return [str(word) for word in given]


def test_a_file_is_a_model(run: Path, file: Path) -> None:
    network, model = load_model(run), load_any(str(file))
    assert (model.name, model.scale, model.facts) == ("tiny_fp32.ort", SCALE, network.facts)
    assert model.limits == Limits()
    assert model.info["engine"] == "ort"
    assert model.info["parameters"] == sum(p.numel() for p in network.network.parameters())
    assert "UNVERIFIED" in model.notes[0]
    assert isinstance(model.network, EngineNetwork)
    assert model.network.channels == 16
    lr = torch.rand(2, 3, 9, 11)
    with torch.inference_mode():
        assert (model.network(lr) - network.network(lr)).abs().max() < 1e-5


def test_the_engine_of_a_run_folder(run: Path, file: Path, tmp_path: Path) -> None:
    assert load_any(run, engine="ort").source == file
    assert load_any(run, engine="torch").is_ours
    with pytest.raises(
        SrkdError, match=r"no file for engine 'onnx'.*export\.py .*tiny --engine onnx"
    ):
        load_any(run, engine="onnx")
    with pytest.raises(SrkdError, match=r"x2 network, but x3"):
        load_any(file, 3)
    shutil.copytree(run, tmp_path / "two")
    copied(file, tmp_path / "two" / "deploy", "other_fp32.ort-cuda.onnx")
    with pytest.raises(
        SrkdError, match=r"several files.*\(other_fp32\.ort-cuda\.onnx, tiny_fp32\.ort\.onnx\)"
    ):
        load_any(tmp_path / "two", engine="ort")


def test_a_damaged_record_of_another_engine_is_in_nobody_s_way(
    run: Path, file: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "two")
    for name in ("tiny_fp32.onnx", "tiny_fp32.openvino.onnx"):
        other = copied(file, tmp_path / "two" / "deploy", name)
        sidecar_path(other).write_text("{")
    assert load_any(tmp_path / "two", engine="ort").source.name == file.name
    with pytest.raises(SrkdError, match=r"cannot read .*tiny_fp32\.openvino\.onnx\.json"):
        load_any(tmp_path / "two", engine="openvino")


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("a_fp32.onnx", "onnx"),
        ("a.ort_fp32.onnx", "onnx"),
        ("a_fp16.ort.onnx", "ort"),
        ("a_fp16.ort-cuda.onnx", "ort"),
        ("a_bf16.openvino.onnx", "openvino"),
        ("a_fp16.trt.plan", "trt"),
        ("a_fp16.trt-rtx.plan", "trt-rtx"),
        ("a_fp16.plan", None),
    ],
)
def test_the_engine_that_a_name_tells(name: str, engine: str | None, tmp_path: Path) -> None:
    assert engine_named(tmp_path / name) == engine


def test_an_engine_of_networks_is_opened_on_its_device(
    run: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def fake(engine: str, model: LoadedModel, settings: dict[str, Any]) -> Short:
        opened.append((engine, settings))
        return Short()

    monkeypatch.setattr("deploy.engine_model.open_network_engine", fake)
    monkeypatch.setattr("deploy.engine_model.pick_device", lambda name: torch.device(name))
    for device in ("cpu", "cuda"):
        model = load_any(run, engine="torch-compile", device=device)
        assert device_for(model, device) == "cpu"  # of the tensors that the engine is given
    assert opened == [("torch-compile", {"device": d, "threads": 0}) for d in ("cpu", "cuda")]
    with pytest.raises(SrkdError, match="runs on cpu or cuda, not on 'cuda:1'"):
        load_any(run, engine="torch-compile", device="cuda:1")
    for engine in ("torch", "torch-compile"):
        with pytest.raises(SrkdError, match=f"give the run folder with --engine {engine}"):
            load_any(file, engine=engine)


def test_requests_that_a_file_cannot_meet(file: Path, tmp_path: Path) -> None:
    with pytest.raises(SrkdError, match=r"for engine 'ort', not for 'onnx'; leave --engine out"):
        load_any(file, engine="onnx")
    with pytest.raises(SrkdError, match="there is no exported file"):
        load_any(tmp_path / "none.onnx")
    model = load_any(file)
    assert device_for(model, "auto") == "cpu"
    with pytest.raises(
        SrkdError, match=r"--device cpu does not move tiny_fp32.*with --engine torch\."
    ):
        device_for(model, "cpu")
    failed = {**read_sidecar(file).parity, "verdict": "FAIL", "record_sha256": "0" * 64}
    with pytest.raises(CheckFailedError, match="FAILED its parity check"):
        load_any(copied(file, tmp_path, "x.onnx", parity=failed))


def test_upscale_through_a_file(
    run: Path, file: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--tile", "16", "--json"]
    for name, more in (
        ("net.png", ["--model", run, "--device", "cpu"]),
        ("file.png", ["--model", file]),
        ("engine.png", ["--model", run, "--engine", "ort"]),
    ):
        assert run_command(upscale_main, words(photo, tmp_path / name, *more, *common)) == 0
    told = capsys.readouterr()
    assert '"engine": "torch"' in told.out
    assert '"engine": "ort"' in told.out
    assert "UNVERIFIED" in told.err
    net, *others = (
        read_picture(tmp_path / f"{n}.png").rgb.astype(int) for n in ("net", "file", "engine")
    )
    for other in others:
        assert np.abs(other - net).max() <= 1


def test_evaluate_beside_the_network(
    run: Path, file: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(run, file, "--data", photo.parent, "--json", "--quiet", "--device", "cpu")
    assert run_command(evaluate_main, given) == 0
    network, engine = json.loads(capsys.readouterr().out)["models"]
    assert (network["model"], engine["model"]) == ("tiny", "tiny_fp32.ort")
    assert network["parameters"] == engine["parameters"]
    assert engine["sets"][0]["psnr_db"] == pytest.approx(network["sets"][0]["psnr_db"], abs=1e-3)


def test_tiles_keep_to_the_sizes_of_a_built_engine(run: Path, file: Path, tmp_path: Path) -> None:
    """A file that is no graph takes the sizes it was built for: 16x16 to 40x48 here, halo 12."""
    built = load_any(copied(file, tmp_path, "tiny.plan"))
    assert built.limits == Limits((16, 16), (40, 48))
    seen: set[tuple[int, ...]] = set()
    engine = built.network.engine
    assert callable(engine)

    def watched(lr: np.ndarray) -> np.ndarray:
        seen.add(lr.shape)
        return engine(lr)

    watched.scale = SCALE  # pyright: ignore[reportFunctionMemberAccess]
    model = replace(built, network=EngineNetwork(watched, 16), notes=())  # pyright: ignore[reportArgumentType]
    lr = np.random.default_rng(0).random((57, 45, 3)).astype(np.float32)
    got = upscale(lr, model)
    assert np.abs(got - upscale(lr, load_model(run), tile=None)).max() < 1e-5
    assert len(seen) > 1
    assert all(16 <= h <= 40 and 16 <= w <= 48 for *_, h, w in seen)
    with pytest.raises(
        SrkdError, match="a tile of 17 px was asked for, but tiny takes tiles of at most 16"
    ):
        upscale(lr, model, tile=17)
    with pytest.raises(SrkdError, match="the whole picture was asked for"):
        upscale(lr, model, tile=None)
    with pytest.warns(UserWarning, match="takes 16x16 px or more, so the picture was extended"):
        assert upscale(lr[:9], model).shape == (18, 90, 3)


class Short:
    """An engine whose runtime has too little memory, and says so as ONNX Runtime and OpenVINO do."""

    scale = SCALE
    said = "Failed to allocate memory for requested buffer of size 9216000000"

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        if lr.shape[-1] > 60:
            raise EngineRunError("the engine could not run it") from RuntimeError(self.said)
        return lr.repeat(SCALE, 2).repeat(SCALE, 3)


def test_an_engine_that_runs_out_of_memory_goes_on_in_smaller_tiles(file: Path) -> None:
    model = replace(load_any(file), network=EngineNetwork(Short(), 16), notes=())
    lr = np.random.default_rng(0).random((70, 90, 3)).astype(np.float32)
    with pytest.warns(UserWarning, match="out of memory, went on with tiles of 45 px"):
        assert np.array_equal(upscale(lr, model, tile=None), lr.repeat(2, 0).repeat(2, 1))


def test_other_failures_of_an_engine_are_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Short, "said", "invalid feature shape")
    model = replace(load_any(file), network=EngineNetwork(Short(), 16), notes=())
    with pytest.raises(EngineRunError, match="could not run it"):
        upscale(np.zeros((70, 90, 3), np.float32), model, tile=None)
