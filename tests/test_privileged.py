"""The teacher that is given HR: its network, its folder, and runs of the two stages of pisr."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tiny_pair import images, student_of, teacher_of
from tiny_run import recipe_for, same_result, tensors_of, write_photos

from srkd.data.sets import EvaluationImage, EvaluationSet, given_hr
from srkd.dryrun import dry_run
from srkd.errors import SrkdError
from srkd.finished import find_runs
from srkd.first_stage import first_stage_of
from srkd.inputs import open_inputs
from srkd.listing import methods
from srkd.models import load_aggregate, load_model, load_privileged, save_model, save_privileged
from srkd.networks.privileged import IMITATED_LR, PrivilegedTeacher, encoder
from srkd.recipe import load_recipe
from srkd.runs import Run
from srkd.step import train_step
from srkd.train import distill, resume
from srkd.training import prepare

if TYPE_CHECKING:
    from torch import nn

    from srkd.recipe import Recipe


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def pisr(photos: Path, *changes: str) -> Recipe:
    return recipe_for(
        photos,
        "method.name=pisr",
        "train.iterations=3",
        "train.save_every=2",
        "train.batch=2",
        "data.patch=8",
        "validate.every=0",
        "validate.sets=[]",
        "stage1.iterations=3",
        *changes,
    )


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    distill(pisr(photos, f"validate.sets=['{photos}']"), out, quiet=True)
    return out


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# -- the network -----------------------------------------------------------------------------------


def test_parameters_of_the_encoder() -> None:
    # 3*56*25 + 56, 56*56*25 + 56, 56*12*9 + 12, 12*3*9 + 3, and three slopes.
    assert parameters(encoder(2)) == 4256 + 78456 + 6060 + 327 + 3 == 89102
    student = student_of("rcan")
    assert parameters(PrivilegedTeacher(student)) == 89102 + parameters(student)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_hr_to_lr_size_and_back(scale: int) -> None:
    network = PrivilegedTeacher(teacher_of("edsr", scale=scale))
    hr = torch.rand(1, 3, 5 * scale, 7 * scale)
    seen = network.run(hr, ["body", IMITATED_LR])
    assert seen.taps[IMITATED_LR].shape == (1, 3, 5, 7)
    assert seen.sr.shape == hr.shape
    assert torch.equal(seen.sr, network(hr))
    assert torch.equal(
        network.decoder.run(network.encoder(hr), ["body"]).taps["body"], seen.taps["body"]
    )
    assert set(network.run(hr, ["block1"]).taps) == {"block1"}
    assert network.facts == network.decoder.facts and network.scale == scale


# -- the folder ------------------------------------------------------------------------------------


def test_the_folder_gives_the_same_teacher_and_is_no_model(tmp_path: Path) -> None:
    network = PrivilegedTeacher(student_of("swinir"))
    save_privileged(tmp_path / "t", network, {})
    model = load_privileged(tmp_path / "t", 2)
    _, hr = images()
    with torch.no_grad():
        assert torch.equal(model.network(hr), network.eval()(hr))
    assert not model.network.training and not model.is_ours
    info = json.loads((tmp_path / "t/model.json").read_text())
    assert (info["family"], info["input"]) == ("privileged", "the HR image")
    with pytest.raises(SrkdError, match="given the HR image itself and upscales nothing"):
        load_model(tmp_path / "t")
    with pytest.raises(SrkdError, match=r"family 'privileged'.*not an aggregated teacher"):
        load_aggregate(tmp_path / "t")
    with pytest.raises(SrkdError, match="is x2, but x4 was asked for"):
        load_privileged(tmp_path / "t", 4)
    del info["arguments"]["decoder"]["family"]
    (tmp_path / "t/model.json").write_text(json.dumps(info))
    with pytest.raises(SrkdError, match=r"model\.json is damaged .*family"):
        load_privileged(tmp_path / "t")
    save_model(tmp_path / "edsr", student_of("edsr"), {})
    with pytest.raises(SrkdError, match=r"family 'edsr'.*not a teacher that sees HR images"):
        load_privileged(tmp_path / "edsr")


def test_a_set_with_hr_in_place_of_lr() -> None:
    lr, hr = np.zeros((2, 2, 3), np.uint8), np.ones((4, 4, 3), np.uint8)
    given = given_hr(EvaluationSet("a", 2, "files", (lambda: EvaluationImage("i", lr, hr),)))
    (image,) = given
    assert image.lr is hr and image.hr is hr
    assert (given.name, given.scale, given.lr_origin) == ("a", 2, "the HR image itself")


# -- runs ------------------------------------------------------------------------------------------


def test_one_command_leaves_both_stages(run: Path) -> None:
    first = load_privileged(run / "stage1").network
    assert isinstance(first, PrivilegedTeacher)
    assert load_model(run).is_ours
    logs = [Run(f, load_recipe(f / "recipe.toml")).log_records() for f in (run / "stage1", run)]
    assert [set(log[0]["terms"]) for log in logs] == [
        {"pixel", "imitation"},
        {"pixel", "pisr.information"},
    ]
    report = (run / "stage1/report.md").read_text()
    assert "| privileged teacher, given HR | 120,145 |" in report
    assert "nothing about upscaling" in report
    assert not list((run / "stage1/samples").glob("*"))
    report = (run / "report.md").read_text()
    assert "Its teacher was trained beforehand: 3 iterations" in report
    for row in ("bicubic", "student, pisr", "privileged teacher, given HR"):
        assert f"| {row} |" in report, row
    # The score of the first stage is the one of HR as its input.
    scores = json.loads((run / "stage1/model.json").read_text())["scores"]
    assert list(scores) and scores == [r["scores"] for r in logs[0] if "scores" in r][-1]
    (taught,) = json.loads((run / "model.json").read_text())["training"]["teachers"]
    assert taught["name"] == "privileged teacher"


def test_runs_of_several_seeds_have_one_teacher_in_a_comparison(run: Path) -> None:
    (found,) = find_runs([run]).runs
    assert found.teachers == (("privileged teacher, own first stage", ""),)


def test_the_student_starts_with_the_decoder_and_is_shown_lr(run: Path, photos: Path) -> None:
    training = prepare(pisr(photos, f"stage1.run={run}"), "cpu")
    (model,) = training.teachers
    assert isinstance(model.network, PrivilegedTeacher)
    decoder = model.network.decoder
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    assert not any(p.requires_grad for p in model.network.parameters())
    for own, given in zip(training.student.parameters(), decoder.parameters(), strict=True):
        assert torch.equal(own, given)
    crops = open_inputs(training.recipe).sampler.batch(0)
    terms = train_step(training, *crops)
    # Its first step: the decoder on true LR images.
    lr, hr = (c.float() / 255 for c in crops[:2])
    with torch.no_grad():
        expected = (decoder(lr) - hr).abs().mean().item()
    assert terms["pixel"].item() == pytest.approx(expected, rel=1e-5)
    after = model.network.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    # Weights that are asked for are where it starts instead.
    fresh = prepare(pisr(photos, f"stage1.run={run}", f"student.weights={run}"), "cpu")
    kept = tensors_of(run)
    assert all(torch.equal(v, kept[k]) for k, v in fresh.student.state_dict().items())


def test_killed_in_either_stage_and_resumed_is_bit_for_bit_the_same(
    run: Path, tmp_path: Path
) -> None:
    """What a run leaves that was killed after two of three steps of either stage."""
    for stage in ("first", "second"):
        killed = tmp_path / stage
        shutil.copytree(run, killed)
        (killed / "model.json").unlink()
        unfinished = killed
        if stage == "first":
            shutil.rmtree(killed / "state")
            unfinished = killed / "stage1"
            (unfinished / "model.json").unlink()
            (unfinished / "report.md").unlink()
        (unfinished / "weights.safetensors").unlink()
        (unfinished / "state/step_00000003.pt").unlink()
        resume(killed, quiet=True)
        assert same_result(run, killed), stage
        assert same_result(run / "stage1", killed / "stage1"), stage


def test_a_first_stage_alone_serves_another_run(run: Path, photos: Path, tmp_path: Path) -> None:
    distill(pisr(photos, "stages=first"), tmp_path / "a", quiet=True)
    alone, inside = tensors_of(tmp_path / "a"), tensors_of(run / "stage1")
    assert all(torch.equal(alone[k], inside[k]) for k in inside)
    distill(pisr(photos, f"stage1.run={tmp_path / 'a'}"), tmp_path / "b", quiet=True)
    assert not (tmp_path / "b/stage1").exists()
    ours, theirs = tensors_of(tmp_path / "b"), tensors_of(run)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_stage_wise_the_features_come_first(run: Path, photos: Path) -> None:
    recipe = pisr(photos, "train.distil_iterations=2", f"stage1.run={run}")
    assert recipe.stage1 is not None and recipe.stage1.distil_iterations == 0
    training, inputs = prepare(recipe, "cpu"), open_inputs(recipe)
    names = [set(train_step(training, *inputs.sampler.batch(i))) for i in range(3)]
    assert names == [{"pisr.information"}] * 2 + [{"pixel"}]
    # The first stage is one, whatever the second is.
    first = prepare(first_stage_of(pisr(photos, "train.distil_iterations=2")), "cpu")
    assert set(train_step(first, *inputs.sampler.batch(0))) == {"pixel", "imitation"}


def test_dry_run_speaks_of_the_first_stage(photos: Path) -> None:
    facts = dry_run(pisr(photos), "cpu")
    assert facts["first stage"].startswith("a teacher of edsr_tiny that sees the HR image, 120,145")
    assert facts["teachers"] == "privileged teacher (120,145)"


def test_listed_as_needing_no_teacher() -> None:
    assert methods()["pisr"]["needs"] == "no teacher: it trains its own"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["teacher.models=['x']"], "there is no file"),
        (["stage1.run={run}", "teacher.models=['x']"], "trains its own teacher, but 1 were given"),
        (["stage1.run={run}", "student.network=rcan_a"], "for a student edsr_tiny, .* is rcan_a"),
        (["stage1.run={run}", "student.scale=4"], "is x2, but x4 was asked for"),
        (["teacher.cache=true"], "reads features inside it"),
        (["stages=first", "teacher.cache=true"], "reads no teacher"),
        (["stage1.distil_iterations=1"], r"stage1\.distil_iterations = 1, but a first stage"),
        (["stage1.patch=0"], r"stage1\.patch = 0"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: list[str], message: str, run: Path, photos: Path
) -> None:
    with pytest.raises(SrkdError, match=message):
        prepare(pisr(photos, *(change.format(run=run) for change in changes)), "cpu")


def test_the_teacher_teaches_no_other_method(run: Path, photos: Path) -> None:
    recipe = recipe_for(photos, "method.name=logits", f"teacher.models=['{run / 'stage1'}']")
    with pytest.raises(SrkdError, match="given the HR image itself"):
        prepare(recipe, "cpu")
