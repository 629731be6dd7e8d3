"""Stage-wise training (MKD's protocol): first the distance of features alone, then HR alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_pair import student_of
from tiny_run import recipe_for, same_result, write_photos

from srkd.dryrun import dry_run
from srkd.errors import SrkdError
from srkd.inputs import open_inputs
from srkd.models import save_model
from srkd.recipe import TrainConfig
from srkd.step import train_step
from srkd.train import baseline_of, distill, resume
from srkd.training import learning_rate_at, prepare

if TYPE_CHECKING:
    from srkd.recipe import Recipe


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "edsr"
    save_model(folder, student_of("edsr", 1), {})
    return folder


def recipe_of(method: str, photos: Path, teacher: Path, *changes: str) -> Recipe:
    return recipe_for(
        photos,
        f"method.name={method}",
        f"teacher.models=['{teacher}']",
        "train.iterations=6",
        "train.distil_iterations=3",
        "train.batch=2",
        "validate.every=0",
        "train.save_every=1",
        *changes,
    )


def steps_of(recipe: Recipe) -> list[dict[str, float]]:
    training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
    return [
        {k: float(v) for k, v in train_step(training, *inputs.sampler.batch(i)).items()}
        for i in range(recipe.train.iterations)
    ]


def test_features_first_then_pixels_alone(photos: Path, teacher: Path) -> None:
    names = [set(terms) for terms in steps_of(recipe_of("fitnet", photos, teacher))]
    assert names == [{"fitnet.hint"}] * 3 + [{"pixel"}] * 3


def test_the_tail_waits_for_the_second_stage(photos: Path, teacher: Path) -> None:
    recipe = recipe_of("fitnet", photos, teacher)
    training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
    tail = [p.detach().clone() for p in training.student.tail.parameters()]
    head = [p.detach().clone() for p in training.student.head.parameters()]

    def moved(before: list[torch.Tensor], part: str) -> bool:
        now = getattr(training.student, part).parameters()
        return any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))

    for i in range(3):
        train_step(training, *inputs.sampler.batch(i))
    assert moved(head, "head")
    assert not moved(tail, "tail")
    train_step(training, *inputs.sampler.batch(3))
    assert moved(tail, "tail")


def test_a_bilevel_method_keeps_its_own_loop_in_the_first_stage(
    photos: Path, teacher: Path
) -> None:
    terms = steps_of(recipe_of("mkd", photos, teacher, "method.channels_out=4"))
    assert {"pixel", "mkd.kd", "mkd.meta"} == set(terms[0])
    assert [set(t) for t in terms[3:]] == [{"pixel"}] * 3


def test_each_stage_has_the_whole_schedule_and_fresh_moments(photos: Path, teacher: Path) -> None:
    train = TrainConfig(
        iterations=30, distil_iterations=10, schedule="cosine", learning_rate=1.0, warmup=2
    )
    alone = TrainConfig(iterations=20, schedule="cosine", learning_rate=1.0, warmup=2)
    second = [learning_rate_at(train, 10 + i) for i in range(20)]
    assert second == [learning_rate_at(alone, i) for i in range(20)]
    assert learning_rate_at(train, 9) < 0.1
    recipe = recipe_of("fitnet", photos, teacher)
    training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
    for i in range(4):
        train_step(training, *inputs.sampler.batch(i))
    counts = {int(s["step"]) for s in training.optimizer.state.values()}
    assert counts == {1}


@pytest.mark.parametrize(
    ("method", "kept"), [("fitnet", 2), ("fitnet", 3), ("fitnet", 4), ("mkd", 3)]
)
def test_resumed_before_at_and_after_the_change(
    method: str, kept: int, photos: Path, teacher: Path, tmp_path: Path
) -> None:
    changes = ["method.channels_out=4"] if method == "mkd" else []
    distill(recipe_of(method, photos, teacher, *changes), tmp_path / "a", quiet=True)
    # The states that a run killed after `kept` steps would have left.
    again = recipe_of(method, photos, teacher, *changes)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/state")
    (tmp_path / "b/state").mkdir()
    states = run_until(again, kept, tmp_path / "c")
    shutil.copy(states, tmp_path / "b/state" / states.name)
    (tmp_path / "b/model.json").unlink()
    resume(tmp_path / "b", quiet=True)
    assert same_result(tmp_path / "a", tmp_path / "b")


def run_until(recipe: Recipe, steps: int, folder: Path) -> Path:
    """The state after `steps` steps of a training, as a run keeps it."""
    from srkd.resuming import state_of
    from srkd.runs import Run

    training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
    run = Run.create(folder, training.recipe)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        for i in range(steps):
            train_step(training, *inputs.sampler.batch(i))
        path = run.save_state(state_of(training, inputs))
    run.close()
    return path


def test_logged_terms_change_with_the_stage(photos: Path, teacher: Path, tmp_path: Path) -> None:
    recipe = recipe_of("fitnet", photos, teacher, "train.log_every=4")
    distill(recipe, tmp_path / "run", quiet=True)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [set(r["terms"]) for r in log if "terms" in r] == [{"pixel"}, {"pixel"}]


def test_the_baseline_has_as_many_steps_on_hr(photos: Path, teacher: Path) -> None:
    stagewise = recipe_of("fitnet", photos, teacher, "with_baseline=true")
    assert stagewise.steps_on_hr == 3
    alone = baseline_of(stagewise)
    assert (alone.train.iterations, alone.train.distil_iterations) == (3, 0)
    assert prepare(alone, "cpu").method.teacher_taps == ()  # and it can be trained
    assert recipe_of("mkd", photos, teacher).steps_on_hr == 6


def test_dry_run_counts_both_stages(photos: Path, teacher: Path) -> None:
    facts = dry_run(recipe_of("mkd", photos, teacher, "method.channels_out=4"), "cpu")
    assert "ms at batch 2" in facts["step on features"]
    assert "6 iterations" in facts["time"]


@pytest.mark.parametrize("method", ["logits", "dukd", "mtkd", "fitnet+dukd"])
def test_methods_without_features_are_refused(method: str, photos: Path, teacher: Path) -> None:
    with pytest.raises(SrkdError, match=r"distance of features first, and '(logits|dukd|mtkd)'"):
        prepare(recipe_of(method, photos, teacher), "cpu")


def test_a_bilevel_step_cannot_be_split(photos: Path, teacher: Path) -> None:
    with pytest.raises(SrkdError, match=r"train\.accumulate = 2, but 'mkd'"):
        prepare(recipe_of("mkd", photos, teacher, "train.accumulate=2"), "cpu")
