"""Recipes: unknown keys and wrong values are named, what is saved repeats the run, every file loads."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from srkd.errors import SrkdError
from srkd.recipe import load_recipe, recipe_from

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.bach=3", "unknown key 'train.bach'; did you mean 'batch'"),
        ("trian.batch=3", "unknown recipe key 'trian'; did you mean 'train'"),
        ("student.network=rcan_aa", "did you mean 'rcan_a'"),
        ("method.name=logts", "did you mean 'logits'"),
        ("train.betas=[0.9]", "two numbers"),
        ("train.batch=big", "int is needed"),
        ("train.batch=0", "must be above 0"),
        ("train.batch=5", "equal parts"),
        ("train.ema=1.0", "below 1"),
        ("train.schedule=cosin", "did you mean 'cosine'"),
        ("student.scale=5", "exists at scale 2, 3, 4, not 5"),
        ("seed=-1", "0 or above"),
        ("seed", "write key=value"),
        ("seed.a.b=1", "is needed"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    base = ["train.accumulate=2"] if override == "train.batch=5" else []
    with pytest.raises(SrkdError, match=message):
        load_recipe(None, [*base, override])


def test_numbers_and_bare_words() -> None:
    recipe = load_recipe(None, ["train.learning_rate=1e-4", "data.train=some/folder", "seed=3"])
    assert recipe.train.learning_rate == 1e-4
    assert recipe.data.train == "some/folder"
    assert recipe.seed == 3


def test_what_is_saved_repeats_the_recipe() -> None:
    recipe = load_recipe(
        None, ["method.name=logits", "method.pixel_weight=2", "train.betas=[0.9, 0.99]"]
    )
    again = recipe_from(tomllib.loads(recipe.to_toml()))
    assert again == recipe
    assert again.method.configs["logits"].pixel_weight == 2.0


def test_differences_name_key_and_both_values() -> None:
    a, b = load_recipe(None), load_recipe(None, ["train.batch=8"])
    assert a.differences(b) == ["train.batch: 16 -> 8"]
    assert a.differences(a) == []


def test_summary_shows_what_is_not_the_default() -> None:
    lines = load_recipe(None, ["train.batch=8"]).summary().splitlines()
    assert lines[1:] == ["  train.batch = 8"]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(SrkdError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nbatch=1")
    with pytest.raises(SrkdError, match="not valid TOML"):
        load_recipe(broken)


RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if not p.match("*.matrix.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).train.iterations > 0
