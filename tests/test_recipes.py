"""Every shipped recipe loads and trains: two steps with its networks and crops made small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from srkd.data.degradation import downscale_uint8
from srkd.errors import SrkdError
from srkd.first_stage import first_stage_of, trains_first_stage
from srkd.models import save_model
from srkd.networks import ZOO, ZooEntry, build
from srkd.recipe import Recipe, load_recipe
from srkd.step import train_step
from srkd.train import distill
from srkd.training import Training, learning_rate_at, prepare

ROOT = Path(__file__).resolve().parents[1]
# csd needs a VGG19 file: its recipe trains in tests/methods/test_csd.py, which makes one.
RECIPES = sorted(
    p
    for p in (ROOT / "recipes").rglob("*.toml")
    if p.stem != "csd_edsr" and not p.match("*.matrix.toml")
)
PATCH, BATCH = 16, 2
# They differ from a recipe that is trained here in numbers alone, not in methods, networks or options.
NUMBERS = {
    *("ablations/dukd_full", "ablations/dukd_scratch", "ablations/dukd_teacher"),
    *("ablations/mipkd_both", "ablations/mipkd_weights_01_01", "ablations/mipkd_weights_01_1"),
    *("ablations/mipkd_weights_1_1", "ablations/mipkd_neither", "ablations/mipkd_teacher"),
    *("ablations/mkd_co16", "ablations/mkd_co144", "papers/mkd_rcan", "papers/mipkd_edsr_c64b16"),
    *("cpu/edsr_c16b32_x4", "cpu/rcan_a_x4", "cpu/rcan_b_x4", "cpu/rcan_c_x4", "cpu/mkd_rcan_a_x4"),
    "rcan_a_x4_logits",
}

# Teacher file -> network of the zoo; what a user downloads or trains first.
TEACHERS = {
    "rcan_c": "rcan_c",
    "edsr_x": "edsr",
    "RCAN_BIX": "rcan",
    "001_classicalSR": "swinir",
    "dukd_teacher": "edsr_c64b32",
    "mipkd_teacher": "rcan_c32b6g10",
    "smfanet_x": "smfanet",
    "rdn_x": "rdn",
    "SAN_BIX": "san",
    "HAN_BIX": "han",
    "bsrn": "bsrn",
    "rlfn": "rlfn",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


def shrunken(entry: ZooEntry) -> ZooEntry:
    """The same family and proportions of width with two blocks."""
    a = dict(entry.arguments)
    if entry.family == "swinir":
        a |= {"channels": a["channels"] // 5, "depths": (2,) * len(a["depths"]), "heads": 6}
    elif entry.family == "rcan":
        a |= {"channels": a["channels"] // 2, "blocks": 1, "reduction": 4}
    else:
        least = 16 if entry.family in ("bsrn", "san", "han") else 4  # attentions keep one in 16
        a |= {"channels": max(least, a["channels"] // 8), "blocks": min(a["blocks"], 5)}
    return replace(entry, arguments=a)


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(ZOO):
        monkeypatch.setitem(ZOO, name, shrunken(ZOO[name]))


def small(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with small crops and with teachers that exist."""
    models, first = [], recipe.stage1
    for spec in recipe.teacher.models:
        network = next(name for key, name in TEACHERS.items() if key in spec)
        path = folder / f"{network}-{len(models)}"
        save_model(path, build(network, recipe.student.scale), {})
        models.append(str(path))
    return replace(
        recipe,
        teacher=replace(recipe.teacher, models=tuple(models)),
        data=replace(recipe.data, patch=PATCH),
        train=replace(
            recipe.train,
            batch=BATCH,
            iterations=2,
            distil_iterations=min(recipe.train.distil_iterations, 1),
            precision="fp32",
        ),
        stage1=first and replace(first, patch=PATCH, batch=BATCH, iterations=2, precision="fp32"),
    )


def marked(path: Path) -> Any:
    return pytest.param(path, marks=pytest.mark.slow if name_of(path) in NUMBERS else ())


@pytest.mark.parametrize("path", [marked(path) for path in RECIPES], ids=map(name_of, RECIPES))
def test_recipe_trains(path: Path, small_zoo: None, tmp_path: Path) -> None:
    recipe = small(load_recipe(path), tmp_path)
    takes_two_steps(prepare(recipe, "cpu"))
    if trains_first_stage(recipe):
        takes_two_steps(prepare(first_stage_of(recipe), "cpu"))


def takes_two_steps(training: Training) -> None:
    before = [p.detach().clone() for p in training.student.parameters()]
    scale = training.recipe.student.scale
    random = torch.Generator().manual_seed(0)
    lr = torch.randint(256, (BATCH, 3, PATCH, PATCH), generator=random, dtype=torch.uint8)
    hr = lr.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    for _ in range(2):
        terms = train_step(training, lr, hr)
        assert all(torch.isfinite(value) for value in terms.values()), terms
    moved = [
        not torch.equal(a, b) for a, b in zip(before, training.student.parameters(), strict=True)
    ]
    # From the first convolution to the last; a dead ReLU in an attention of two channels may hold a few.
    assert moved[0] and moved[-1] and sum(moved) > 0.6 * len(moved)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", ["dukd_edsr", "dukd_rcan", "dukd_swinir", "mipkd_edsr"])
def test_one_recipe_serves_every_scale(name: str, scale: int) -> None:
    recipe = load_recipe(ROOT / f"recipes/papers/{name}.toml", [f"student.scale={scale}"])
    assert recipe.data.lr == f"DIV2K_train_LR_bicubic/X{scale}"
    (teacher,) = recipe.teacher.models
    assert f"{scale}." in teacher
    assert "{" not in recipe.to_toml()


def test_the_recipes_that_are_left_out_exist() -> None:
    assert {name_of(path) for path in RECIPES} > NUMBERS


def test_mtkd_protocol() -> None:
    # The paper's one list serves both stages (section 4.1).
    for name in ("mtkd_rcan", "mtkd_edsr", "mtkd_swinir"):
        r = load_recipe(ROOT / f"recipes/papers/{name}.toml")
        assert r.stage1 is not None
        for t, patch in ((r.train, r.data.patch), (r.stage1, r.stage1.patch)):
            assert (patch, t.batch, t.iterations, t.betas) == (64, 16, 250_000, (0.9, 0.999))
            assert (t.learning_rate, t.milestone_every, t.gamma) == (1e-4, 100_000, 0.1)
        c = r.method.configs["mtkd"]
        assert (c.channels, c.blocks, c.layers, c.pixel_weight, c.levels) == (24, 4, 2, 0.1, 1)
        assert [Path(m).name[:4] for m in r.teacher.models] == ["edsr", "RCAN", "001_"]
    released = load_recipe(ROOT / "recipes/papers/mtkd_edsr_released.toml")
    c, first = released.method.configs["mtkd"], released.stage1
    assert first is not None
    assert (c.channels, c.blocks, c.layers, c.distance) == (96, 2, 4, "l1")
    rates = [learning_rate_at(first, step) for step in (0, 250_000, 400_000, 450_000, 475_000)]
    assert rates == [2e-4 * 0.5**i for i in range(5)]


def test_papers_protocol() -> None:
    # The settings that both papers print (DUKD section 4.1, MiPKD section 4.1).
    for name in ("dukd_edsr", "mipkd_rcan", "dukd_swinir", "mipkd_edsr_c64b16"):
        r = load_recipe(ROOT / f"recipes/papers/{name}.toml")
        t = r.train
        assert (r.data.patch, t.batch, t.iterations, t.betas) == (48, 16, 250_000, (0.9, 0.99))
        assert (t.learning_rate, t.schedule, t.milestone_every, t.gamma) == (
            1e-4,
            "step",
            100_000,
            0.1,
        )


def test_extending_merges_sections_and_another_method_drops_the_options(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'seed = 3\n[train]\nbatch = 8\n[method]\nname = "dukd"\nprobability = 0.5\n'
    )
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.toml"
    child.write_text('extends = "../base.toml"\n[train]\niterations = 7\n[method]\ncrops = 2\n')
    recipe = load_recipe(child, ["train.iterations=9"])
    assert (recipe.seed, recipe.train.batch, recipe.train.iterations) == (3, 8, 9)
    dukd = recipe.method.configs["dukd"]
    assert (dukd.probability, dukd.crops) == (0.5, 2)
    child.write_text('extends = "../base.toml"\n[method]\nname = "logits"\n')
    assert load_recipe(child).method.name == "logits"


def test_another_method_over_a_recipe_drops_its_options_and_a_composition_keeps_them() -> None:
    tiny = ROOT / "recipes/cpu/edsr_tiny_x4.toml"
    assert load_recipe(tiny).method.configs["dukd"].zoom_out == "off"
    assert load_recipe(tiny, ["method.name=mipkd"]).method.name == "mipkd"
    both = load_recipe(tiny, ["method.drop=0.25", "method.name=dukd+mipkd"]).method.configs
    assert (both["dukd"].zoom_out, both["mipkd"].drop) == ("off", 0.25)
    with pytest.raises(SrkdError, match="no option 'zoom_out'"):
        load_recipe(tiny, ["method.name=mipkd", "method.zoom_out=on"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "child.toml"\n', "extends itself"),
        ('extends = "absent.toml"\n', "cannot read recipe .*absent.toml"),
        ("extends = 3\n", "the path of a recipe is needed"),
    ],
)
def test_bad_extends_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "child.toml").write_text(text)
    with pytest.raises(SrkdError, match=message):
        load_recipe(tmp_path / "child.toml")


def test_papers_recipe_runs_whole_on_a_folder_of_pairs(small_zoo: None, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for folder in ("HR", "LR/X4"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(2):
        hr = random.integers(256, size=(80, 96, 3), dtype=np.uint8)
        Image.fromarray(hr).save(tmp_path / f"HR/{i:04d}.png")
        Image.fromarray(downscale_uint8(hr, 4)).save(tmp_path / f"LR/X4/{i:04d}x4.png")
    changes = [
        f'data.train="{tmp_path}/HR"',
        f'data.lr="{tmp_path}/LR/X{{scale}}"',
        f'validate.sets=["{tmp_path}/HR"]',
        f'data.cache="{tmp_path}/cache"',
    ]
    recipe = load_recipe(ROOT / "recipes/papers/dukd_mipkd_rcan.toml", changes)
    result = distill(small(recipe, tmp_path), tmp_path / "run", device="cpu", quiet=True)
    assert [row["name"] for row in result.rows][:2] == ["bicubic", "student, dukd+mipkd"]
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    terms = next(record["terms"] for record in log if "terms" in record)
    assert {"pixel", "logits", "dukd.zoom_in", "dukd.zoom_out", "mipkd.feature"} <= set(terms)
