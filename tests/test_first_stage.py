"""Runs of two stages: teachers are aggregated, the student is taught; resume, reuse, cache, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from forked import distil_until_killed
from tiny_pair import student_of
from tiny_run import recipe_for, same_result, tensors_of, write_photos

from srkd.aggregate import Aggregate
from srkd.dryrun import dry_run
from srkd.errors import SrkdError
from srkd.finished import find_runs
from srkd.first_stage import first_stage_of
from srkd.inputs import open_inputs
from srkd.models import load_model, save_model
from srkd.recipe import load_recipe
from srkd.runs import Run
from srkd.step import loss_terms, to_image
from srkd.taught import StoppedError, with_cached_teachers
from srkd.train import distill, resume
from srkd.training import prepare

if TYPE_CHECKING:
    from srkd.recipe import Recipe


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two families; the second draws its weights from another seed."""
    folder = tmp_path_factory.mktemp("teachers")
    for family, seed in (("edsr", 1), ("rcan", 2)):
        save_model(folder / family, student_of(family, seed), {})
    return [folder / "edsr", folder / "rcan"]


def mtkd(photos: Path, teachers: list[Path], *changes: str) -> Recipe:
    models = [str(t) for t in teachers]
    small = ["channels=6", "heads=2", "blocks=1", "window=4"]
    return recipe_for(
        photos,
        "method.name=mtkd",
        f"teacher.models={models}",
        "train.iterations=6",
        "train.batch=2",
        "validate.every=0",
        "stage1.iterations=4",
        "stage1.save_every=2",
        *(f"method.{option}" for option in small),
        *changes,
    )


@pytest.fixture(scope="module")
def run(photos: Path, teachers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    distill(mtkd(photos, teachers), out, quiet=True)
    return out


def test_one_command_leaves_both_stages(run: Path, teachers: list[Path]) -> None:
    first = load_model(run / "stage1")
    assert isinstance(first.network, Aggregate)
    assert first.network.names == ("edsr", "rcan")
    assert load_recipe(run / "stage1/recipe.toml").train.iterations == 4
    assert load_recipe(run / "recipe.toml").train.iterations == 6
    # The report of the first stage has the aggregated teacher beside every single one.
    report = (run / "stage1/report.md").read_text()
    for row in ("bicubic", "teacher edsr", "teacher rcan", "mean of the teachers", "aggregated"):
        assert f"| {row}" in report, row
    # Four steps make no better teacher: said, with what helps.
    assert "is below" in report
    assert "image_skip=mean" in report
    both = (run / "report.md").read_text()
    for row in ("bicubic", "student, mtkd", "teacher edsr", "mean of the teachers", "aggregated"):
        assert f"| {row}" in both, row
    (taught,) = json.loads((run / "model.json").read_text())["training"]["teachers"]
    assert [m["name"] for m in taught["aggregates"]] == ["edsr", "rcan"]
    terms = Run(run, load_recipe(run / "recipe.toml")).log_records()[0]["terms"]
    assert set(terms) == {"pixel", "mtkd.wavelet"}


def test_the_first_stage_trains_the_aggregation_network_alone(
    run: Path, teachers: list[Path]
) -> None:
    network = load_model(run / "stage1").network
    assert isinstance(network, Aggregate)
    for own, given in zip(network.teacher_networks, teachers, strict=True):
        kept = load_model(given).network.state_dict()
        assert all(torch.equal(v, kept[k]) for k, v in own.state_dict().items())
    states = [
        torch.load(p, weights_only=True) for p in sorted((run / "stage1/state").glob("step*"))
    ]
    assert [s["step"] for s in states] == [2, 4]
    early, late = (s["student"] for s in states)
    assert any(not torch.equal(early[k], late[k]) for k in early)
    assert late.keys() == network.network.state_dict().keys()


@pytest.mark.parametrize("stage", ["first", "second"])
def test_killed_in_either_stage_and_resumed_is_bit_for_bit_the_same(
    stage: str, run: Path, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    """Killed for good: the process is gone between two steps of the stage."""
    recipe, killed = tmp_path / "recipe.toml", tmp_path / "killed"
    recipe.write_text(mtkd(photos, teachers).to_toml())
    distil_until_killed([str(recipe), "--out", str(killed)], 3 if stage == "first" else 4 + 4)
    assert (killed / "stage1/model.json").exists() == (stage == "second")
    assert not (killed / "model.json").exists()
    resume(killed, quiet=True)
    assert same_result(run, killed)
    assert same_result(run / "stage1", killed / "stage1")
    steps = [r["step"] for r in Run(killed, mtkd(photos, teachers)).log_records() if "terms" in r]
    assert steps == list(range(1, 7))


def test_stage1_of_another_run_is_used_and_gives_the_same_student(
    run: Path, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    for name, given in (("whole", run), ("alone", run / "stage1")):
        distill(mtkd(photos, teachers, f"stage1.run={given}"), tmp_path / name, quiet=True)
        assert not (tmp_path / name / "stage1").exists()
        ours, theirs = tensors_of(tmp_path / name), tensors_of(run)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    # The teachers need not be named again.
    recipe = mtkd(photos, [], f"stage1.run={run}", "train.iterations=1")
    distill(recipe, tmp_path / "unnamed", quiet=True)


def test_first_stage_alone(photos: Path, teachers: list[Path], run: Path, tmp_path: Path) -> None:
    result = distill(mtkd(photos, teachers, "stages=first"), tmp_path / "a", quiet=True)
    assert [row["name"] for row in result.rows][-1] == "aggregated teacher"
    # Its iterations are those of [stage1], as in a run of both stages.
    recipe = load_recipe(tmp_path / "a/recipe.toml")
    assert recipe.train.iterations == 4
    ours, theirs = tensors_of(tmp_path / "a"), tensors_of(run / "stage1")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    found = find_runs([tmp_path / "a", run])
    assert [r.folder for r in found.runs] == [run]
    assert "first stage alone" in found.skipped[str(tmp_path / "a")]


def test_an_aggregated_teacher_teaches_other_methods(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(
        photos,
        "method.name=dukd",
        f"teacher.models=['{run / 'stage1'}']",
        "train.iterations=2",
        "validate.every=0",
        "method.zoom_out=off",
    )
    distill(recipe, tmp_path / "dukd", quiet=True)
    terms = Run(tmp_path / "dukd", recipe).log_records()[0]["terms"]
    assert set(terms) == {"pixel", "logits", "dukd.zoom_in"}
    with pytest.raises(SrkdError, match="outputs only"):
        prepare(recipe_for(photos, "method.name=fitnet", f"teacher.models=['{run / 'stage1'}']"))


def test_composed_with_dukd_its_views_are_seen_by_the_aggregated_teacher(
    run: Path, photos: Path, teachers: list[Path]
) -> None:
    recipe = mtkd(
        photos, teachers, "method.name=mtkd+dukd", f"stage1.run={run}", "method.dukd.zoom_out=off"
    )
    training = prepare(recipe, "cpu")
    inputs = open_inputs(recipe)
    lr, hr, _ = inputs.sampler.batch(0)
    terms = loss_terms(training, to_image(lr, training), to_image(hr, training))
    assert set(terms) == {"pixel", "mtkd.wavelet", "logits", "dukd.zoom_in"}
    (teacher,) = training.teachers
    assert isinstance(teacher.network, Aggregate)


@pytest.mark.parametrize("method", ["mtkd+dukd", "dukd+mtkd"])
def test_dukd_leaves_out_zooms_that_an_aggregated_teacher_cannot_see(
    method: str, photos: Path, teachers: list[Path]
) -> None:
    training = prepare(mtkd(photos, teachers, f"method.name={method}"), "cpu")
    assert any("no zoom-out" in note for note in training.notes)


# -- the teacher cache ---------------------------------------------------------------------------


def test_cached_teachers_are_not_run_in_the_step(
    photos: Path, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    stack = Aggregate.stack

    def counted(self: Aggregate, lr: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(lr.shape[-2:]))
        return stack(self, lr)

    recipe = mtkd(photos, teachers, "teacher.cache=true", "validate.sets=[]")
    monkeypatch.setattr(Aggregate, "stack", counted)
    distill(recipe, tmp_path / "cached", quiet=True)
    # Two passes over crops estimate what the cache saves; the six steps made none.
    assert seen.count((12, 12)) == 2
    terms = Run(tmp_path / "cached", recipe).log_records()[0]["terms"]
    assert set(terms) == {"pixel", "mtkd.wavelet"}


def test_cached_run_resumes_exactly(photos: Path, teachers: list[Path], tmp_path: Path) -> None:
    recipe = mtkd(photos, teachers, "teacher.cache=true", "validate.sets=[]")
    distill(recipe, tmp_path / "a", quiet=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/state/step_00000006.pt").unlink()
    (tmp_path / "b/model.json").unlink()
    resume(tmp_path / "b", quiet=True)
    assert same_result(tmp_path / "a", tmp_path / "b")


def test_a_cached_target_does_not_depend_on_what_was_cached_before(
    run: Path, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    """Cached alone, and after its teachers were cached by another run."""
    own = [f"stage1.run={run}", "teacher.cache=true", "validate.sets=[]", "train.iterations=2"]
    for name in ("before", "after"):
        recipe = mtkd(photos, teachers, *own, f"data.cache={tmp_path / name}")
        if name == "after":
            first = ["stages=first", "teacher.cache=true", "validate.sets=[]"]
            other = mtkd(photos, teachers, *first, f"data.cache={tmp_path / name}")
            distill(other, tmp_path / "other", quiet=True)
        distill(recipe, tmp_path / f"run_{name}", quiet=True)
    before, after = tensors_of(tmp_path / "run_before"), tensors_of(tmp_path / "run_after")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_stop_while_caching_is_heeded_and_leaves_nothing_half(
    photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    recipe = mtkd(photos, teachers, "teacher.cache=true", f"data.cache={tmp_path / 'cache'}")
    training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
    first = prepare(first_stage_of(recipe), "cpu")
    with pytest.raises(StoppedError):
        with_cached_teachers(first, inputs, lambda: True, quiet=True)
    assert not list((tmp_path / "cache/teachers").glob("*/"))
    assert training.teachers  # the second stage's, untouched


@pytest.mark.parametrize("method", ["logits", "dukd"])
def test_cache_serves_the_crops_of_other_methods(
    method: str, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    """Without symmetries and away from the border of a crop its target is that of the online teacher."""
    changes = [f"method.name={method}", f"teacher.models=['{teachers[0]}']", "data.augment=false"]
    recipe = recipe_for(
        photos, *changes, "train.iterations=1", "teacher.cache=true", "validate.sets=[]"
    )
    distill(recipe, tmp_path / method, quiet=True)
    plain = replace(recipe, teacher=replace(recipe.teacher, cache=False))
    distill(plain, tmp_path / "online", quiet=True)
    cached, online = (
        Run(tmp_path / name, recipe).log_records()[0]["terms"] for name in (method, "online")
    )
    assert cached.keys() == online.keys()
    assert cached["pixel"] == online["pixel"]
    assert cached["logits"] == pytest.approx(online["logits"], rel=0.1)
    assert cached["logits"] != online["logits"]  # the borders of the crops


# -- moved, replaced, reused ---------------------------------------------------------------------


def test_teachers_that_moved_are_found_by_the_edited_recipe(
    run: Path, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    """Also by the first stage inside, which is a MODEL of its own."""
    old, new = tmp_path / "old", tmp_path / "new"
    for teacher in teachers:
        shutil.copytree(teacher, old / teacher.name)
    here = [old / t.name for t in teachers]
    shutil.copytree(run, tmp_path / "run")
    for recipe in (tmp_path / "run/recipe.toml", tmp_path / "run/stage1/recipe.toml"):
        text = recipe.read_text()
        for teacher, at in zip(teachers, here, strict=True):
            text = text.replace(str(teacher), str(at))
        recipe.write_text(text)
    (tmp_path / "run/stage1/report.md").unlink()
    old.rename(new)
    recipe = tmp_path / "run/recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(old), str(new)))
    resume(tmp_path / "run", quiet=True)
    assert load_model(tmp_path / "run/stage1").scale == 2


def test_overwrite_never_deletes_what_the_run_reads(
    run: Path, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    out = tmp_path / "run"
    recipes = [
        mtkd(photos, teachers, f"stage1.run={out}"),
        mtkd(photos, teachers, f"student.weights={out}"),
        recipe_for(photos, "method.name=logits", f"teacher.models=['{out / 'stage1'}']"),
    ]
    for recipe in recipes:
        with pytest.raises(SrkdError, match="choose another --out"):
            distill(recipe, out, overwrite=True, quiet=True)
    assert load_model(out / "stage1").scale == 2


def test_a_reused_network_is_what_the_recipe_says(
    run: Path, photos: Path, teachers: list[Path]
) -> None:
    plain = ["method.channels=24", "method.heads=6", "method.blocks=4", "method.window=8"]
    training = prepare(mtkd(photos, teachers, f"stage1.run={run}", *plain), "cpu")
    config = training.recipe.method.configs["mtkd"]
    assert (config.channels, config.heads, config.blocks, config.window) == (6, 2, 1, 4)


# -- refusals ------------------------------------------------------------------------------------


def test_other_teachers_or_another_order_are_refused(
    run: Path, photos: Path, teachers: list[Path]
) -> None:
    with pytest.raises(SrkdError, match="order"):
        prepare(mtkd(photos, teachers[::-1], f"stage1.run={run}"))
    with pytest.raises(SrkdError, match=r"got 1 teacher .* aggregates 2"):
        prepare(mtkd(photos, teachers[:1], f"stage1.run={run}"))


def test_another_network_than_the_trained_one_is_refused_not_ignored(
    run: Path, photos: Path, teachers: list[Path]
) -> None:
    changes = [f"stage1.run={run}", "method.channels=12"]
    with pytest.raises(SrkdError, match=r"channels = 6, but method\.mtkd asks for 12"):
        prepare(mtkd(photos, teachers, *changes))


def test_a_run_without_a_finished_first_stage_is_refused(
    photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(SrkdError, match="no finished run"):
        prepare(mtkd(photos, teachers, f"stage1.run={tmp_path}"))
    (tmp_path / "stage1").mkdir()
    with pytest.raises(SrkdError, match="first stage is not finished"):
        prepare(mtkd(photos, teachers, f"stage1.run={tmp_path}"))


def test_a_run_that_has_no_first_stage_of_its_own_is_refused(
    run: Path, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    distill(
        mtkd(photos, teachers, f"stage1.run={run}", "train.iterations=1"),
        tmp_path / "b",
        quiet=True,
    )
    with pytest.raises(SrkdError, match=f"used the first stage of {run}"):
        prepare(mtkd(photos, teachers, f"stage1.run={tmp_path / 'b'}"))
    distill(recipe_for(photos, "train.iterations=1"), tmp_path / "c", quiet=True)
    with pytest.raises(SrkdError, match="'scratch' has no first stage"):
        prepare(mtkd(photos, teachers, f"stage1.run={tmp_path / 'c'}"))
    with pytest.raises(SrkdError, match="is x2, but x4 was asked for"):
        prepare(mtkd(photos, [], f"stage1.run={run}", "student.scale=4"))


def test_what_the_second_stage_would_refuse_is_refused_before_the_first(
    photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(SrkdError, match="levels"):
        distill(mtkd(photos, teachers, "method.levels=6"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_edited_first_stage_is_refused_on_resume(
    run: Path, photos: Path, teachers: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run/recipe.toml"
    recipe.write_text(mtkd(photos, teachers, "stage1.learning_rate=0.5").to_toml())
    with pytest.raises(SrkdError, match=r"learning_rate: 0\.001 -> 0\.5"):
        resume(tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.name=mtkd+fitnet"], "the aggregated teacher of 'mtkd' has outputs only"),
        (["method.name=logits", "stage1.iterations=3"], r"\[stage1\] .*'logits' has none"),
        (["method.name=logits", "stages=first"], "no first stage"),
        (["method.name=mtkd", "stages=second"], "stages = 'second'"),
        (["method.name=mtkd", "stages=first", "stage1.run=x"], "drop one"),
        (["method.name=mtkd", "stage1.epochs=3"], "unknown key 'stage1.epochs'"),
        (["method.name=mtkd", "stage1.batch=0"], "stage1.batch = 0"),
        (["train.distil_iterations=250000"], "leave some for the second"),
        (["method.name=mtkd", "train.milestones=[5, 3]"], "increasing"),
    ],
)
def test_bad_recipes(changes: list[str], message: str) -> None:
    with pytest.raises(SrkdError, match=message):
        load_recipe(None, changes)


def test_cache_is_refused_where_it_cannot_help(photos: Path, teachers: list[Path]) -> None:
    one = f"teacher.models=['{teachers[0]}']"
    with pytest.raises(SrkdError, match="reads features inside it"):
        prepare(recipe_for(photos, "method.name=at", one, "teacher.cache=true"))
    with pytest.raises(SrkdError, match="reads no teacher"):
        prepare(recipe_for(photos, "method.name=scratch", "teacher.cache=true"))


def test_first_stage_takes_over_what_is_not_set() -> None:
    recipe = load_recipe(None, ["method.name=mtkd", "train.batch=6", "stage1.iterations=7"])
    assert recipe.stage1 is not None
    assert (recipe.stage1.batch, recipe.stage1.iterations) == (6, 7)
    assert recipe.stage1.patch == recipe.data.patch
    again = load_recipe(None, ["method.name=logits"])
    assert again.stage1 is None
    assert "stage1" not in again.to_toml()


def test_dry_run_speaks_of_both_stages(photos: Path, teachers: list[Path]) -> None:
    facts = dry_run(mtkd(photos, teachers), "cpu")
    assert facts["first stage"].startswith("aggregation of 2 teachers")
    assert "4 iterations" in facts["time of the first stage"]
    assert "6 iterations" in facts["time"]
