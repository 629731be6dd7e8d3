"""The training loop: exact resume, frozen teachers, schedules, what stops a run and what it leaves."""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import distil_until_killed, in_child, told_by
from tiny_run import recipe_for, same_result, tensors_of, write_photos

from scripts.distill import main
from srkd.console import run_command
from srkd.errors import CheckFailedError, SrkdError
from srkd.images import write_png
from srkd.inputs import open_inputs
from srkd.methods import METHODS, MethodEntry
from srkd.methods.base import Method, l1
from srkd.models import load_model
from srkd.networks import ZOO
from srkd.recipe import Recipe, TrainConfig, load_recipe
from srkd.runs import Run
from srkd.step import train_step, update_average
from srkd.train import distill, resume
from srkd.training import ema_decay_at, learning_rate_at, prepare

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def teacher(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    distill(recipe_for(photos, "train.iterations=2", "student.network=edsr_tiny"), out, quiet=True)
    return out


# -- exact resume --------------------------------------------------------------------------------


def test_killed_at_random_steps_and_resumed_is_bit_for_bit_the_same(
    photos: Path, teacher: Path, tmp_path: Path
) -> None:
    changes = ["method.name=logits", f"teacher.models=['{teacher}']", "train.iterations=40"]
    changes += ["validate.every=0"]
    whole = recipe_for(photos, *changes)
    distill(whole, tmp_path / "whole", quiet=True)

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(whole.to_toml())
    killed = tmp_path / "killed"
    arguments = [str(recipe), "--out", str(killed)]
    chance = random.Random(7)
    for _ in range(2):
        distil_until_killed(arguments, chance.randint(5, 12))
        assert not (killed / "model.json").exists()
        arguments = ["--resume", str(killed)]
    assert main([*arguments, "--quiet"]) == 0
    assert same_result(tmp_path / "whole", killed)
    steps = [r["step"] for r in Run(killed, whole).log_records() if "terms" in r]
    assert steps == list(range(1, 41))  # nothing twice, nothing lost


def test_resume_replays_random_layers_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SwinIR drops paths at random while it trains; the state keeps those random numbers."""
    small = {"channels": 12, "depths": (2, 2), "drop_path": 0.5}
    entry = replace(ZOO["swinir_lightweight"], arguments=small)
    monkeypatch.setitem(ZOO, "swinir_lightweight", entry)
    changes = ["student.network=swinir_lightweight", "data.patch=8", "train.batch=1"]
    recipe = recipe_for(photos, *changes, "train.iterations=4", "train.save_every=2")
    distill(recipe, tmp_path / "a", quiet=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "state" / "step_00000004.pt").unlink()
    (tmp_path / "b" / "weights.safetensors").unlink()
    torch.rand(100)  # somebody else draws numbers in between
    resume(tmp_path / "b", quiet=True)
    assert same_result(tmp_path / "a", tmp_path / "b")


def test_a_finished_run_resumes_to_itself(teacher: Path) -> None:
    before = (teacher / "weights.safetensors").read_bytes()
    result = resume(teacher, quiet=True)
    assert (teacher / "weights.safetensors").read_bytes() == before
    assert result.rows[0]["name"] == "bicubic"


def test_changed_data_or_teacher_refuses_to_resume(
    photos: Path, teacher: Path, tmp_path: Path
) -> None:
    data, guide = tmp_path / "data", tmp_path / "guide"
    shutil.copytree(photos, data)
    shutil.copytree(teacher, guide)
    changes = ["method.name=logits", f"teacher.models=['{guide}']", "train.iterations=3"]
    distill(recipe_for(data, *changes), tmp_path / "run", quiet=True)
    write_png(data / "p0.png", np.zeros((60, 60, 3), np.uint8))
    with pytest.raises(SrkdError, match="other data"):
        resume(tmp_path / "run", quiet=True)
    shutil.rmtree(data)
    shutil.copytree(photos, data)
    distill(recipe_for(photos, "train.iterations=1", "seed=5"), guide, overwrite=True, quiet=True)
    with pytest.raises(SrkdError, match="other teachers"):
        resume(tmp_path / "run", quiet=True)


def test_damaged_state_is_named(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "run")
    state = sorted((tmp_path / "run" / "state").glob("step_*.pt"))[-1]
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(SrkdError, match=r"step_\d+\.pt is damaged"):
        resume(tmp_path / "run", quiet=True)


def test_a_new_method_trains_resumes_and_leaves_the_bare_student(
    photos: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toy with an extra layer, composed with logits: one line in the table is all it needs."""
    monkeypatch.setitem(METHODS, "edge", MethodEntry("toy:Edge", "a toy", needs_groups=True))
    changes = ["method.name=logits+edge", f"teacher.models=['{teacher}']", "train.iterations=4"]
    recipe = recipe_for(photos, *changes, "train.save_every=2", "validate.every=0")
    distill(recipe, tmp_path / "a", quiet=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "state" / "step_00000004.pt").unlink()
    resume(tmp_path / "b", quiet=True)
    assert same_result(tmp_path / "a", tmp_path / "b")
    first, last = (
        torch.load(p, weights_only=True)["method"] for p in Run(tmp_path / "a", recipe).states()
    )
    layer = "parts.edge.match.weight"
    assert not torch.equal(first[layer], last[layer])  # the extra layer is trained,
    assert tensors_of(tmp_path / "a").keys() == tensors_of(teacher).keys()  # and not kept
    terms = Run(tmp_path / "a", recipe).log_records()[0]["terms"]
    assert set(terms) == {"pixel", "logits", "edge.feature"}


# -- one step ------------------------------------------------------------------------------------


def test_teacher_stays_frozen(photos: Path, teacher: Path) -> None:
    recipe = recipe_for(photos, "method.name=logits", f"teacher.models=['{teacher}']")
    training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
    network = training.teachers[0].network
    before = copy.deepcopy(network.state_dict())
    student = copy.deepcopy(training.student.state_dict())
    for step in range(3):
        train_step(training, *inputs.sampler.batch(step))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.modules())
    assert training.student.training
    assert any(not torch.equal(student[k], v) for k, v in training.student.state_dict().items())


def test_accumulated_micro_batches_equal_the_whole_batch(photos: Path) -> None:
    results = []
    for parts in (1, 4):
        recipe = recipe_for(photos, f"train.accumulate={parts}")
        training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
        terms = train_step(training, *inputs.sampler.batch(0))
        gradients = [p.grad.clone() for p in training.student.parameters() if p.grad is not None]
        results.append((terms["pixel"], torch.cat([g.flatten() for g in gradients])))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-8)


def test_average_by_hand() -> None:
    average, network = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        average.weight.fill_(1.0)
        network.weight.fill_(3.0)
    update_average(average, network, decay=0.75)
    assert average.weight.item() == 1.5  # 0.75 * 1 + 0.25 * 3
    assert ema_decay_at(0.999, 0) == pytest.approx(0.1)
    assert ema_decay_at(0.999, 10**6) == 0.999


@pytest.mark.parametrize(
    ("config", "step", "rate"),
    [
        (TrainConfig(learning_rate=1e-4, milestone_every=100), 99, 1e-4),
        (TrainConfig(learning_rate=1e-4, milestone_every=100), 100, 1e-5),
        (TrainConfig(learning_rate=1e-4, milestone_every=100), 250, 1e-6),
        (TrainConfig(learning_rate=1.0, schedule="cosine", iterations=100), 0, 1.0),
        (TrainConfig(learning_rate=1.0, schedule="cosine", iterations=100), 50, 0.5),
        (TrainConfig(learning_rate=1.0, schedule="cosine", iterations=100), 100, 0.0),
        (
            TrainConfig(
                learning_rate=1.0, schedule="cosine", iterations=100, final_learning_rate=0.2
            ),
            50,
            0.6,
        ),
        (TrainConfig(learning_rate=1.0, schedule="constant", warmup=4), 0, 0.25),
        (TrainConfig(learning_rate=1.0, schedule="constant", warmup=4), 3, 1.0),
    ],
)
def test_schedules_by_hand(config: TrainConfig, step: int, rate: float) -> None:
    assert learning_rate_at(config, step) == pytest.approx(rate)


def test_bf16_and_compiled_layouts_train(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_for(photos, "train.precision=bf16", "train.iterations=3")
    result = distill(recipe, tmp_path / "run", device="cpu", quiet=True)
    assert all(math.isfinite(s["psnr_y"]) for s in result.scores.values())
    assert all(v.dtype == torch.float32 for v in tensors_of(tmp_path / "run").values())


@pytest.mark.slow
def test_compiled_passes_give_what_plain_ones_give(photos: Path, teacher: Path) -> None:
    changes = ["method.name=logits", f"teacher.models=['{teacher}']"]
    terms = []
    for compiled in ("false", "true"):
        recipe = recipe_for(photos, *changes, f"train.compile={compiled}")
        training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
        runs = (training.student.run, training.teachers[0].network.run)
        assert [hasattr(run, "_torchdynamo_orig_callable") for run in runs] == [
            compiled == "true"
        ] * 2
        terms.append([train_step(training, *inputs.sampler.batch(i)) for i in range(2)])
    for plain, fused in zip(*terms, strict=True):
        assert {k: v.item() for k, v in fused.items()} == pytest.approx(
            {k: v.item() for k, v in plain.items()}, rel=1e-4
        )


# -- a run folder --------------------------------------------------------------------------------


def test_what_a_run_leaves(photos: Path, teacher: Path, tmp_path: Path) -> None:
    changes = ["method.name=logits", f"teacher.models=['{teacher}']", "with_baseline=true"]
    out = tmp_path / "run"
    result = distill(recipe_for(photos, *changes), out, quiet=True)
    names = [row["name"] for row in result.rows]
    assert names == ["bicubic", "student, from scratch", "student, logits", "teacher run"]
    assert load_recipe(out / "recipe.toml").method.name == "logits"
    info = json.loads((out / "model.json").read_text())
    assert info["network"] == "edsr_tiny"
    assert info["training"]["iterations"] == 12
    assert info["scores"][photos.name]["psnr_y"] == result.scores[photos.name]["psnr_y"]
    states = sorted(p.name for p in (out / "state").iterdir())
    assert states[-2:] == ["step_00000009.pt", "step_00000012.pt"] and states[0] == "best.pt"
    assert list((out / "tensorboard").iterdir())
    assert len(list((out / "samples").glob("*.png"))) == 2
    assert "student, from scratch" in (out / "report.md").read_text()
    assert load_model(out).info["training"]["method"] == "logits"
    assert load_model(out / "baseline").info["training"]["method"] == "scratch"
    # The average weights are what is kept, and they are what was scored.
    state = Run(out, result_recipe(out)).load_state()
    assert state is not None
    kept = tensors_of(out)
    assert all(torch.equal(kept[k], v) for k, v in state["average"].items())
    assert not list(out.rglob("*.part*"))


def result_recipe(out: Path) -> Recipe:
    return load_recipe(out / "recipe.toml")


def test_existing_folders_are_respected(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = recipe_for(photos, "train.iterations=1")
    distill(recipe, out, quiet=True)
    with pytest.raises(SrkdError, match="already holds a run"):
        distill(recipe, out, quiet=True)
    distill(recipe, out, overwrite=True, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(SrkdError, match="is no run folder"):
        distill(recipe, tmp_path / "mine", overwrite=True, quiet=True)
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_one_process_at_a_time(photos: Path, tmp_path: Path) -> None:
    first = Run.create(tmp_path / "run", recipe_for(photos))
    with pytest.raises(SrkdError, match="another process"):
        Run.open(tmp_path / "run")
    first.close()
    Run.open(tmp_path / "run").close()


@dataclass(frozen=True)
class BrokenConfig:
    pixel_weight: float = 1.0


class Broken(Method):
    """Its extra term is no number from the fifth step on."""

    Config = BrokenConfig

    def loss(self, step: Any) -> dict[str, torch.Tensor]:
        pixel = l1(step.student.sr, step.hr)
        return {
            "pixel": pixel,
            "extra": pixel * (float("nan") if step.batch.iteration >= 4 else 1.0),
        }


def test_nan_stops_with_the_term_the_step_and_the_last_good_state(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = MethodEntry(f"{__name__}:Broken", "breaks", teachers=(0, 0))
    monkeypatch.setitem(METHODS, "broken", entry)
    recipe = recipe_for(photos, "method.name=broken", "train.log_every=10")
    with pytest.raises(
        CheckFailedError, match=r"broken\.extra became nan at step 5.*step_00000003"
    ):
        distill(recipe, tmp_path / "run", quiet=True)
    state = Run(tmp_path / "run", recipe).load_state()
    assert state is not None and state["step"] == 3
    assert all(torch.isfinite(v).all() for v in state["student"].values())
    assert not (tmp_path / "run" / "model.json").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_for(photos, "train.iterations=100000", "validate.every=0").to_toml())
    command = [sys.executable, str(ROOT / "scripts" / "distill.py"), str(recipe)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if " step 4/" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"--resume {tmp_path / 'run'}" in out
    assert "Traceback" not in err
    state = Run(tmp_path / "run", recipe_for(photos)).load_state()
    assert state is not None and state["step"] >= 4


def test_resume_with_another_recipe_shows_the_difference(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["--resume", str(teacher), "--set", "train.batch=8"]) == 2
    assert "train.batch: 4 -> 8" in capsys.readouterr().err


def _distil_on_a_full_disk(arguments: list[str]) -> tuple[int, str]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    return told_by(main, arguments)


def test_full_disk_is_one_sentence_and_leaves_nothing_half(photos: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the state does not fit."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_for(photos, "validate.every=0").to_toml())
    code, told = in_child(_distil_on_a_full_disk, [str(recipe), "--out", str(tmp_path / "run")])
    assert code == 2
    assert "cannot write" in told and "Traceback" not in told
    assert not list((tmp_path / "run").rglob("*.part*"))


def test_unwritable_out_is_one_sentence(photos: Path) -> None:
    with pytest.raises(SrkdError, match="cannot make the run folder"):
        distill(recipe_for(photos), "/proc/srkd/run", quiet=True)


def test_teacher_of_another_scale_is_refused(photos: Path, teacher: Path) -> None:
    changes = ["student.scale=4", "method.name=logits", f"teacher.models=['{teacher}']"]
    with pytest.raises(SrkdError, match="is a x2 network, but x4"):
        prepare(recipe_for(photos, *changes), "cpu")


def test_starting_weights(photos: Path, teacher: Path) -> None:
    training = prepare(recipe_for(photos, f"student.weights={teacher}"), "cpu")
    kept = tensors_of(teacher)
    assert all(torch.equal(kept[k], v) for k, v in training.student.state_dict().items())
    with pytest.raises(SrkdError, match="not a rcan_a"):
        prepare(recipe_for(photos, f"student.weights={teacher}", "student.network=rcan_a"), "cpu")


def test_fresh_weights_depend_on_the_seed_alone(photos: Path) -> None:
    torch.rand(3)
    a = prepare(recipe_for(photos), "cpu").student.state_dict()
    b = prepare(recipe_for(photos), "cpu").student.state_dict()
    c = prepare(recipe_for(photos, "seed=1"), "cpu").student.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_dry_run_measures_and_writes_nothing(
    photos: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.toml"
    changes = ["method.name=logits", f"teacher.models=['{teacher}']"]
    recipe.write_text(recipe_for(photos, *changes).to_toml())
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main([str(recipe), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["data"] == "4 training images"
    # By hand: (432 + 9 * 2304 + 9216) * 256^2 + 432 * 512^2 = 2.10 G.
    expected = "edsr_tiny x2, 31,043 parameters, 2.10 G multiply-adds at 256x256"
    assert facts["student"] == expected
    assert "12 iterations" in facts["time"] and "ms at batch 4" in facts["step"]
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()
