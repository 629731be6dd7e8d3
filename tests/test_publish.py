"""Published networks: what is copied, what the pages say, which names are found, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scored_run import write_run

import srkd
import srkd.publish as publishing
from scripts.publish import main
from srkd import models
from srkd.cards import BENCHMARKS, index_page, list_models
from srkd.errors import CheckFailedError, SrkdError
from srkd.evaluate import evaluate
from srkd.files import read_json, write_text
from srkd.models import load_model
from srkd.publish import Options, check_cast, publish
from srkd.recipe import load_recipe

SCORES = {"Set5": 30.123456, "Set14": 27.5, "BSD100": 26.25}


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights/ folder."""
    folder = tmp_path / "weights"
    monkeypatch.setattr(models, "WEIGHTS_FOLDER", folder)
    return folder


def make_run(folder: Path, *changes: str, scores: dict[str, float] = SCORES, **facts: Any) -> Path:
    """A finished run of a tiny student on the built-in set."""
    recipe = load_recipe(None, ["student.network=edsr_tiny", "seed=3", *changes])
    data = {"name": "builtin", "images": 20, "digest": "d" * 64}
    return write_run(folder, recipe, scores, **{"data": data, **facts})


def test_published_run_is_listed_loaded_and_described(tmp_path: Path, weights: Path) -> None:
    run = make_run(tmp_path / "run")
    card = publish(run, weights / "edsr_tiny_x4", Options(licence="CC0"))
    assert srkd.list_models() == [card]
    assert (card.network, card.scale, card.parameters) == ("edsr_tiny", 4, 40323)
    assert (card.method, card.teachers, card.licence, card.dtype) == (
        "scratch",
        (),
        "CC0",
        "float32",
    )
    assert card.size == (weights / "edsr_tiny_x4" / "weights.safetensors").stat().st_size
    ours, theirs = (load_model(place).network.state_dict() for place in (run, "edsr_tiny"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)

    page = (weights / "edsr_tiny_x4" / "README.md").read_text()
    assert "30.12 / 0.3012 | 27.50 / 0.2750 | 26.25 / 0.2625" in page
    assert card.weights_sha256 in page and "CC0 (the weights)" in page and "scikit-image" in page
    command = "python scripts/distill.py weights/edsr_tiny_x4/recipe.toml --out runs/edsr_tiny_x4"
    assert command in page
    assert (
        "| [`edsr_tiny_x4`](edsr_tiny_x4/README.md) | 40,323 |"
        in (weights / "README.md").read_text()
    )


def test_several_weights_of_one_network_and_a_bare_name(tmp_path: Path, weights: Path) -> None:
    for name in ("edsr_tiny_x4", "edsr_tiny_x4_scratch", "edsr_tiny_x4_mkd_long"):
        publish(make_run(tmp_path / name), weights / name)
    names = [card.name for card in list_models()]
    assert names == ["edsr_tiny_x4", "edsr_tiny_x4_mkd_long", "edsr_tiny_x4_scratch"]
    assert load_model("edsr_tiny", 4).name == load_model("edsr_tiny").name == "edsr_tiny_x4"
    assert load_model("edsr_tiny_x4_scratch", 4).name == "edsr_tiny_x4_scratch"
    with pytest.raises(SrkdError, match="no file, run folder or shipped model 'edsr_tiny_scratch'"):
        load_model("edsr_tiny_scratch", 4)


@pytest.mark.parametrize(
    "name", ["mine", "edsr_tiny", "edsr_tiny_x2", "edsr_tiny_x4_", "rcan_a_x4"]
)
def test_a_name_tells_network_and_scale(name: str, tmp_path: Path, weights: Path) -> None:
    with pytest.raises(SrkdError, match=r"call it edsr_tiny_x4, .*or edsr_tiny_x4_HOW"):
        publish(make_run(tmp_path / "run"), weights / name)


def test_recipe_loses_the_paths_of_this_machine(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    monkeypatch.setenv("SRKD_DATA", str(data))
    teacher = publish(make_run(tmp_path / "teacher"), weights / "edsr_tiny_x4")
    (data / "photos").mkdir(parents=True)
    run = make_run(
        tmp_path / "run",
        "method.name=logits",
        f"teacher.models=['{tmp_path}/teacher']",
        f"data.train={data}/photos",
        f"data.cache={tmp_path}/cache",
        teachers=[{"name": "teacher", "weights_sha256": teacher.weights_sha256}],
    )
    publish(run, weights / "edsr_tiny_x4_logits")
    recipe = load_recipe(weights / "edsr_tiny_x4_logits" / "recipe.toml")
    assert recipe.data.train == "$SRKD_DATA/photos" and recipe.data.cache == ""
    assert recipe.teacher.models == ("edsr_tiny_x4",)  # a shipped network with these weights
    page = (weights / "edsr_tiny_x4_logits" / "README.md").read_text()
    assert "terms of the teacher `edsr_tiny_x4`: Apache-2.0" in page

    foreign = data / "theirs.safetensors"
    foreign.write_bytes(b"weights")
    write_text(foreign.with_suffix(".json"), '{"licence": "MIT", "source": {"repository": "them"}}')
    change = ("method.name=logits", f"teacher.models=['{foreign}']")
    taught = [{"name": "theirs", "weights_sha256": "f" * 64}]
    publish(make_run(tmp_path / "b", *change, teachers=taught), weights / "edsr_tiny_x4_b")
    page = (weights / "edsr_tiny_x4_b" / "README.md").read_text()
    assert "taught by theirs, sha256 `ffff" in page
    assert "terms of the teacher `$SRKD_DATA/theirs.safetensors`: MIT, them" in page

    outside = make_run(tmp_path / "outside", f"data.train={tmp_path}/photos")
    with pytest.raises(SrkdError, match=r"data.train = .*/photos, which no other machine has"):
        publish(outside, weights / "edsr_tiny_x4_outside")


def test_runs_without_the_benchmarks_are_refused(tmp_path: Path, weights: Path) -> None:
    run = make_run(tmp_path / "run", scores={"Set5": 30.0, "builtin": 28.0})
    with pytest.raises(SrkdError, match="was not scored on Set14, BSD100"):
        publish(run, weights / "edsr_tiny_x4")
    with pytest.raises(SrkdError, match="is no finished run"):
        publish(tmp_path, weights / "edsr_tiny_x4")
    assert not weights.exists()


def test_terms_of_unknown_images_have_to_be_said(tmp_path: Path, weights: Path) -> None:
    data = {"name": "holiday", "images": 7, "digest": "e" * 64}
    run = make_run(tmp_path / "run", data=data)
    with pytest.raises(
        SrkdError, match="nothing is known of the terms of the training images 'holiday'"
    ):
        publish(run, weights / "edsr_tiny_x4")
    publish(run, weights / "edsr_tiny_x4", Options(terms="My own photographs."))
    assert "My own photographs." in (weights / "edsr_tiny_x4" / "README.md").read_text()


def test_nothing_is_replaced_unasked(tmp_path: Path, weights: Path) -> None:
    run, target = make_run(tmp_path / "run"), weights / "edsr_tiny_x4"
    publish(run, target)
    with pytest.raises(SrkdError, match="replace it with --overwrite"):
        publish(run, target)
    publish(target, target, Options(licence="MIT", overwrite=True))  # its pages again
    assert read_json(target / "model.json")["published"]["licence"] == "MIT"
    write_text(weights / "README.md", "# My notes\n")
    with pytest.raises(SrkdError, match="is a page of somebody's own"):
        publish(run, weights / "edsr_tiny_x4_b")
    write_text(tmp_path / "other" / "edsr_tiny_x4" / "notes.txt", "mine")
    with pytest.raises(SrkdError, match="holds something else than a network"):
        publish(run, tmp_path / "other" / "edsr_tiny_x4", Options(overwrite=True))


def test_half_is_measured_and_refused_where_a_table_would_show_it(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Path
) -> None:
    monkeypatch.setattr(publishing, "BENCHMARKS", ("Set5",))  # the others take long
    run = make_run(tmp_path / "run")
    (measured,) = evaluate(load_model(run), ["Set5"])
    info = read_json(run / "model.json")
    info["scores"]["Set5"] = {"psnr_y": measured.psnr, "ssim_y": measured.ssim}
    write_text(run / "model.json", json.dumps(info))
    card = publish(run, weights / "edsr_tiny_x4", Options(half=True))
    tensors = load_file(weights / "edsr_tiny_x4" / "weights.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16} and card.dtype == "float16"
    assert 0 < abs(card.scores["Set5"]["psnr_y"] - measured.psnr) <= publishing.HALF_TOLERANCE_DB
    (again,) = evaluate(load_model("edsr_tiny"), ["Set5"])
    assert again.psnr == card.scores["Set5"]["psnr_y"]  # those of the file that is shipped
    page = (weights / "edsr_tiny_x4" / "README.md").read_text()
    assert info["weights_sha256"] in page and card.weights_sha256 != info["weights_sha256"]

    info["scores"]["Set5"]["psnr_y"] += 0.0062
    write_text(run / "model.json", json.dumps(info))
    with pytest.raises(
        CheckFailedError, match=r"float16 weights move PSNR-Y of Set5 by -0\.00[567]"
    ):
        publish(run, weights / "edsr_tiny_x4_b", Options(half=True))
    assert not (weights / "edsr_tiny_x4_b").exists()


@pytest.mark.parametrize(
    ("after", "passes"), [(30.0049, True), (29.99, False), (float("nan"), False)]
)
def test_a_cast_that_moves_scores_is_refused(after: float, passes: bool) -> None:
    before, now = (
        {name: {"psnr_y": 30.0 if name != "BSD100" else value} for name in BENCHMARKS}
        for value in (30.0, after)
    )
    if passes:
        check_cast(before, now)
    else:
        with pytest.raises(CheckFailedError, match="move PSNR-Y"):
            check_cast(before, now)


def test_command_prints_the_card(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run), str(weights / "edsr_tiny_x4"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["scores"]["Set5"]["psnr_y"]) == ("edsr_tiny_x4", 30.123456)
    assert main([str(run), str(weights / "edsr_tiny_x4_b")]) == 0
    assert "edsr_tiny_x4_b: 40,323 parameters" in capsys.readouterr().out


def test_listing_needs_no_torch() -> None:
    code = "import sys, srkd; srkd.list_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_list_of_shipped_networks_is_current() -> None:
    folder = models.WEIGHTS_FOLDER
    cards = list_models()
    assert (folder / "README.md").read_text() == index_page(cards)
    for card in cards:
        assert card.licence and {*card.scores} >= {*BENCHMARKS}
        assert card.weights_sha256 in (card.folder / "README.md").read_text()
