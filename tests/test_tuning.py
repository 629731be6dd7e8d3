"""The fastest settings are found, kept and said; what was given by hand stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_run import recipe_for, write_photos

import srkd.tuning as tuning
from scripts.distill import main
from srkd.errors import SrkdError
from srkd.probe import state_bytes
from srkd.recipe import load_recipe
from srkd.training import prepare
from srkd.tuning import Settings, groups, search, tuned

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")
START = Settings("bf16", True, False, 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def around(*changes: str, fixed: set[str] | None = None) -> list[Callable]:
    return groups(load_recipe(None, ["train.iterations=5000", *changes]), CPU, fixed or set())


def test_every_group_goes_on_from_the_best_so_far() -> None:
    asked: list[Settings] = []

    def measure(s: Settings) -> float:
        asked.append(s)
        faster = 0.5 if s.precision == "fp32" else 1.0
        faster *= 0.8 if s.compile else 1.0
        return faster * (0.7 if s.threads == 1 else 1.0) * (1.0 if s.channels_last else 1.4)

    found = search(START, around(), measure)
    assert found.settings == Settings("fp32", True, True, 1)
    assert found.times[found.settings] == pytest.approx(0.5 * 0.8 * 0.7)
    assert len(found.times) == 6  # four of the first group, one of each other
    assert not any(s.compile and s.precision == "bf16" for s in asked)


def test_what_is_not_clearly_faster_changes_nothing() -> None:
    found = search(START, around(), lambda s: 1.0 if s == START else 0.98)
    assert found.settings == START


def test_one_disturbance_does_not_decide() -> None:
    """The start is disturbed the first time it is measured: seen again it is the fastest."""
    seen: list[Settings] = []

    def measure(s: Settings) -> float:
        seen.append(s)
        return 1.2 if seen.count(START) == 1 and s == START else 1.0 if s == START else 1.1

    assert search(START, around(), measure).settings == START


def test_hopeless_candidates_are_measured_once() -> None:
    seen: list[Settings] = []

    def measure(s: Settings) -> float:
        seen.append(s)
        return 1.0 if s.precision == "bf16" else 9.0

    search(START, around(), measure)
    assert {seen.count(s) for s in seen if s.precision == "fp32"} == {1}
    assert seen.count(START) > 1


def test_a_candidate_that_cannot_run_is_passed_over() -> None:
    found = search(START, around(), lambda s: "no compiler" if s.compile else 1.0)
    assert found.settings == START and "no compiler" in found.times.values()
    moved = search(START, around(), lambda s: "out of memory" if s.precision == "bf16" else 1.0)
    assert moved.settings.precision == "fp32"
    with pytest.raises(SrkdError, match="no setting of this training could be measured: broken"):
        search(START, around(), lambda s: "broken")


def test_what_was_given_by_hand_stays() -> None:
    fixed = {"channels_last", "compile"}
    options = around("train.precision=bf16", "train.threads=2", fixed=fixed)
    assert [s for group in options for s in group(START)] == [START]
    short = around("train.iterations=4999")
    assert not any(s.compile for group in short for s in group(START))


def test_measured_once_on_a_machine(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The first time it measures and remembers; the second time, and only then, it does not."""
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path))
    recipe = recipe_for(photos, "train.precision=auto")
    fixed = ["train.channels_last"]
    found = tuned(recipe, "cpu", fixed)
    said = capsys.readouterr().err
    assert found.train.precision in ("fp32", "bf16") and found.train.channels_last
    assert said.count(" ms") >= 2 and "--set train.precision=" in said
    assert "12 iterations" in said and "of decoded images" in said
    (file,) = (tmp_path / "tuning").iterdir()
    assert json.loads(file.read_text())["key"]["patch"] == 12

    monkeypatch.setattr(tuning, "search", None)  # another measurement would fail
    assert tuned(recipe, "cpu", fixed) == found
    assert "measured before" in capsys.readouterr().err
    with pytest.raises(TypeError):  # other conditions are measured anew
        tuned(recipe_for(photos, "train.precision=auto", "train.batch=2"), "cpu", fixed)
    monkeypatch.undo()
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path))
    file.write_text('{"settings": {}}')
    assert tuned(recipe, "cpu", fixed, quiet=True).train.channels_last


def test_tuned_from_the_command_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_for(photos, "train.iterations=1").to_toml())
    out = tmp_path / "run"
    settings = ["--set", "train.channels_last=false", "--set", "train.precision=fp32"]
    assert main([str(path), "--out", str(out), "--tune", *settings, "--device", "cpu"]) == 0
    assert "taken: --set train.precision=fp32" in capsys.readouterr().err
    saved = load_recipe(out / "recipe.toml")
    assert not saved.train.channels_last and saved.train.precision == "fp32"
    with pytest.raises(SrkdError, match="drop --tune"):
        main(["--resume", str(out), "--tune"])


def test_states_are_as_large_as_said(photos: Path, tmp_path: Path) -> None:
    """By hand for 31,043 weights: three states of weights, average and two moments, and the result."""
    assert state_bytes(prepare(recipe_for(photos), "cpu")) == 4 * 31_043 * (3 * 4 + 1)
