"""Nothing is lost and nothing is trained in vain: what is refused, when, and what survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import ROOT, photos, recipe_for, teacher, tensors_of

from scripts.distill import main
from srkd.console import run_command
from srkd.devices import pick_device
from srkd.errors import SrkdError
from srkd.evaluate import score
from srkd.files import plain
from srkd.images import write_png
from srkd.models import load_model
from srkd.recipe import load_recipe
from srkd.runs import Run
from srkd.train import distill, resume
from srkd.training import load_teachers, memory_advice, prepare

__all__ = ["photos", "teacher"]  # fixtures


@pytest.fixture
def finished(photos: Path, tmp_path: Path) -> Path:
    distill(
        recipe_for(photos, "train.iterations=4", "train.save_every=2"), tmp_path / "r", quiet=True
    )
    return tmp_path / "r"


def test_overwrite_keeps_the_old_run_until_the_new_request_is_sound(
    photos: Path, finished: Path
) -> None:
    before = (finished / "weights.safetensors").read_bytes()
    with pytest.raises(SrkdError, match="patch"):
        distill(recipe_for(photos, "data.patch=500"), finished, overwrite=True, quiet=True)
    assert (finished / "weights.safetensors").read_bytes() == before
    assert load_model(finished)


def test_a_failed_start_leaves_no_run_behind(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SrkdError, match="patch"):
        distill(recipe_for(photos, "data.patch=500"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_a_killed_start_left_is_free(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    distill(recipe_for(photos, "train.iterations=1"), tmp_path / "run", quiet=True)


def test_bad_validation_images_are_found_before_training(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "val")
    write_png(tmp_path / "val" / "tiny.png", np.zeros((12, 12, 3), np.uint8))
    recipe = recipe_for(photos, f"validate.sets=['{tmp_path / 'val'}']")
    with pytest.raises(SrkdError, match=r"validation image val/tiny is 6x6 px in LR"):
        distill(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_two_sets_of_one_name_are_refused(photos: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        shutil.copytree(photos, tmp_path / place / "val")
    sets = [str(tmp_path / place / "val") for place in ("a", "b")]
    with pytest.raises(SrkdError, match="two sets are named"):
        distill(recipe_for(photos, f"validate.sets={sets}"), tmp_path / "run", quiet=True)


def test_the_report_measures_the_teacher_on_the_sets_of_the_run(
    photos: Path, teacher: Path, tmp_path: Path
) -> None:
    """The teacher was validated on another folder of the same name; its old score is not used."""
    other = tmp_path / "elsewhere" / photos.name
    other.mkdir(parents=True)
    noise = np.random.default_rng(5).integers(0, 256, (48, 60, 3)).astype(np.uint8)
    write_png(other / "noise.png", noise)
    changes = [f"validate.sets=['{other}']", f"teacher.models=['{teacher}']", "method.name=logits"]
    recipe = recipe_for(photos, *changes, "train.iterations=1")
    result = distill(recipe, tmp_path / "run", quiet=True)
    from srkd.data.sets import open_set

    measured = score(load_model(teacher).network, open_set(str(other), 2)).psnr
    assert result.rows[-1]["scores"][photos.name]["psnr_y"] == pytest.approx(measured)
    assert load_model(teacher).info["scores"][photos.name]["psnr_y"] != pytest.approx(measured)


def test_a_teacher_that_goes_away_while_training_changes_nothing(
    photos: Path, teacher: Path, tmp_path: Path
) -> None:
    guide = tmp_path / "guide"
    shutil.copytree(teacher, guide)
    changes = ["method.name=logits", f"teacher.models=['{guide}']", "train.iterations=2"]
    training = prepare(recipe_for(photos, *changes), "cpu")
    known = training.teacher_hashes
    shutil.rmtree(guide)
    assert training.teacher_hashes == known and len(known[0]) == 64


def test_an_edited_recipe_refuses_to_resume(finished: Path) -> None:
    text = (finished / "recipe.toml").read_text()
    (finished / "recipe.toml").write_text(
        text.replace("learning_rate = 0.001", "learning_rate = 1.0")
    )
    with pytest.raises(SrkdError, match=r"train\.learning_rate: 0\.001 -> 1\.0"):
        resume(finished, quiet=True)
    (finished / "recipe.toml").write_text(text.replace("every = 6", "every = 3"))
    resume(finished, quiet=True)  # how often something is measured may change


def test_the_log_of_a_run_that_died_before_its_first_state_starts_anew(
    photos: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(photos, "train.iterations=3")
    run = Run.create(tmp_path / "run", prepare(recipe, "cpu").recipe)
    run.log({"step": 1, "terms": {}})
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "ter')
    run.close()
    resume(tmp_path / "run", quiet=True)
    steps = [r["step"] for r in run.log_records() if "terms" in r]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("content", [b"text", b"", b"\x80\x04]."])
def test_foreign_states_are_one_sentence(finished: Path, content: bytes) -> None:
    sorted((finished / "state").glob("step_*.pt"))[-1].write_bytes(content)
    with pytest.raises(SrkdError, match="is damaged"):
        resume(finished, quiet=True)


def test_states_of_another_shape_are_one_sentence(finished: Path) -> None:
    path = sorted((finished / "state").glob("step_*.pt"))[-1]
    torch.save([1, 2], path)
    with pytest.raises(SrkdError, match="has format 'list'"):
        resume(finished, quiet=True)
    torch.save({"format": 1}, path)
    with pytest.raises(SrkdError, match="does not fit its recipe"):
        resume(finished, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.learning_rate=nan", "finite"),
        ("train.warmup=-5", "0 or above"),
        ("validate.every=-3", "0 or above"),
        ("seed=18446744073709551616", "below 2"),
    ],
)
def test_senseless_numbers(change: str, message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        load_recipe(None, [change])


def test_a_batch_that_does_not_fit_says_what_to_lower(photos: Path, tmp_path: Path) -> None:
    words = r"does not fit in memory; lower train\.batch"
    with pytest.raises(SrkdError, match=words):
        distill(recipe_for(photos, "train.batch=2000000000"), tmp_path / "run", quiet=True)
    with pytest.raises(SrkdError, match=words), memory_advice(recipe_for(photos)):
        torch.empty(10**15)
    with pytest.raises(RuntimeError, match="another"), memory_advice(recipe_for(photos)):
        raise RuntimeError("another fault keeps its name")


def test_patches_smaller_than_a_window_are_refused(photos: Path) -> None:
    changes = ["student.network=swinir_lightweight", "data.patch=4"]
    with pytest.raises(SrkdError, match="needs at least 5 LR pixels"):
        prepare(recipe_for(photos, *changes), "cpu")


def test_unknown_devices() -> None:
    with pytest.raises(SrkdError, match="not supported"):
        pick_device("meta")
    with pytest.raises(SrkdError, match="unknown device"):
        pick_device("gpu")


def test_paths_are_made_absolute_and_names_are_not(
    photos: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    changes = [f"data.train={photos.name}", f"validate.sets=['{photos.name}']"]
    relative = os.path.relpath(teacher, photos.parent)
    changes += ["method.name=logits", f"teacher.models=['{relative}']"]
    recipe = prepare(recipe_for(photos, *changes), "cpu").recipe
    assert recipe.data.train == str(photos)
    assert recipe.validate.sets == (str(photos),)
    assert Path(recipe.teacher.models[0]).resolve() == teacher.resolve()
    builtin = prepare(load_recipe(None, ["student.network=edsr_tiny"]), "cpu").recipe
    assert (builtin.data.train, builtin.validate.sets) == ("builtin", ("builtin",))


def test_variables_in_paths_are_read_late(
    photos: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUIDES", str(teacher.parent))
    changes = ["method.name=logits", f"teacher.models=['$GUIDES/{teacher.name}']"]
    recipe = recipe_for(photos, *changes)
    assert load_teachers(recipe)[0].scale == 2
    assert prepare(recipe, "cpu").recipe.teacher.models == (f"$GUIDES/{teacher.name}",)


def test_json_has_no_infinite_numbers() -> None:
    assert plain({"a": [float("inf"), 1.0], "b": (float("nan"),)}) == {
        "a": [None, 1.0],
        "b": [None],
    }


def test_options_that_contradict(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--dry-run", "--overwrite"):
        assert run_command(main, ["--resume", "run", option]) == 2
        assert "drop --dry-run and --overwrite" in capsys.readouterr().err


def test_folder_names_of_any_letters(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "фото 😀 'q\""
    shutil.copytree(photos, folder)
    out = tmp_path / "run"
    arguments = [
        "--student",
        "edsr_tiny",
        "--scale",
        "2",
        "--data",
        str(folder),
        "--iterations",
        "1",
    ]
    small = ["--set", "data.patch=12", "--set", "train.batch=2"]
    assert main([*arguments, *small, "--out", str(out), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["interrupted"] is False
    assert load_recipe(out / "recipe.toml").data.train == str(folder)


def test_ctrl_c_in_the_first_run_does_not_start_the_baseline(photos: Path, tmp_path: Path) -> None:
    """The signal comes while the first run writes its last lines; the resume trains the twin."""
    changes = ["with_baseline=true", "train.iterations=60", "validate.every=0"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_for(photos, *changes, "train.save_every=60").to_toml())
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "scripts" / "distill.py"), str(recipe), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if " step 50/" in line:
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"--resume {out}" in output and f"--resume {out}/baseline" not in output + errors
    assert not (out / "baseline").exists()
    begin = time.monotonic()
    result = resume(out, quiet=True)
    assert [row["name"] for row in result.rows][1:] == [
        "student, from scratch",
        "student, from scratch",
    ]
    assert tensors_of(out).keys() == tensors_of(out / "baseline").keys()
    assert time.monotonic() - begin < 60
