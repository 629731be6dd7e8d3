"""The aggregated teacher: order, what trains, tiles, scores, its folder and what is said when that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pair import Nearest, student_of, teacher_of
from tiny_run import write_photos
from torch import nn

from srkd.aggregate import Aggregate
from srkd.data.sets import open_set
from srkd.errors import SrkdError
from srkd.evaluate import evaluate, score, score_parts
from srkd.infer import upscale
from srkd.loaded import LoadedModel
from srkd.models import load_aggregate, load_model, save_aggregate, save_model, weights_hash
from srkd.networks.base import Network
from srkd.networks.dctswin import DctSwin, DctSwinConfig
from srkd.tiling import plan_band, upscale_tiled
from srkd.types import Facts


def loaded(network: nn.Module, name: str = "tiny") -> LoadedModel:
    facts = network.facts if isinstance(network, Network) else Facts(2, 0, True)
    return LoadedModel(network, name, Path(), facts)


def aggregation(teachers: int = 2, seed: int = 5, **changes) -> DctSwin:
    sizes = {"channels": 4, "depths": (2,), "heads": 2, "window": 6, "scale": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DctSwin(DctSwinConfig(teachers=teachers, **{**sizes, **changes}))


def pair() -> list[LoadedModel]:
    return [loaded(teacher_of("edsr", 1), "edsr"), loaded(teacher_of("swinir", 2), "swinir")]


# --- the network ----------------------------------------------------------------------------------


def test_teachers_are_stacked_in_order_and_run_once():
    teachers = pair()
    aggregate = Aggregate(teachers, aggregation()).eval()
    lr = torch.rand(2, 3, 9, 8)
    edsr, swinir = (teacher.network(lr) for teacher in teachers)
    seen: list[nn.Module] = []
    for network in aggregate.teacher_networks:
        network.register_forward_hook(lambda module, *_: seen.append(module))
    aggregate.parts(lr)
    assert seen == list(aggregate.teacher_networks)
    stack = aggregate.stack(lr)
    assert torch.equal(stack, torch.cat([edsr, swinir], 1)) and stack.shape == (2, 6, 18, 16)
    assert torch.equal(aggregate(lr), aggregate.network(stack))
    assert not torch.equal(aggregate(lr), aggregate.network(torch.cat([swinir, edsr], 1)))


def test_parts_are_named_images_with_their_parameters():
    teachers = [loaded(Nearest(), "x2"), loaded(teacher_of("edsr"), "edsr")]
    teachers.append(loaded(teacher_of("edsr", 7), "x2"))
    aggregate = Aggregate(teachers, aggregation(3)).eval()
    lr = torch.rand(1, 3, 6, 7)
    parts, counts = aggregate.parts(lr), aggregate.part_parameters()
    images = [teacher.network(lr) for teacher in teachers]
    names = ["teacher 1 x2", "teacher edsr", "teacher 3 x2"]  # two have one name
    assert list(parts) == list(counts) == [*names, "mean of the teachers", "aggregated teacher"]
    assert all(torch.equal(parts[name], image) for name, image in zip(names, images, strict=True))
    torch.testing.assert_close(parts["mean of the teachers"], sum(images) / 3)
    assert torch.equal(parts["aggregated teacher"], aggregate(lr))
    edsr, own = (
        sum(p.numel() for p in part.parameters())
        for part in (teachers[1].network, aggregate.network)
    )
    assert list(counts.values()) == [0, edsr, edsr, 2 * edsr, 2 * edsr + own]


def test_the_network_alone_trains():
    teachers = [loaded(student_of("edsr"), "edsr"), loaded(student_of("swinir"), "swinir")]
    aggregate = Aggregate(teachers, aggregation())
    aggregate.train()
    assert aggregate.training and aggregate.network.groups[0].layers[0].training
    assert not any(m.training for m in aggregate.teacher_networks.modules())
    lr = torch.rand(1, 3, 8, 8, requires_grad=True)
    aggregate(lr).square().mean().backward()
    assert all(p.grad is not None for p in aggregate.network.parameters())
    assert all(p.grad is None for p in aggregate.teacher_networks.parameters())
    # The way back to the image stays open: attribution needs it.
    assert lr.grad is not None and lr.grad.abs().sum() > 0
    assert not aggregate.eval().network.training


def test_facts_join_those_of_all_parts():
    edsr, swinir = pair()
    swin = aggregation(layer="swin")
    facts = Aggregate([edsr, swinir], swin).facts
    parts = [m.facts.receptive_field_px for m in (edsr, swinir)]
    assert parts[0] != parts[1]
    assert facts.receptive_field_px == max(parts) + swin.facts.receptive_field_px
    assert facts == Facts(
        scale=2,
        receptive_field_px=facts.receptive_field_px,
        exact_tiling=True,
        size_multiple=12,  # windows of 4 and of 6
        minimum_px=4,
    )
    for network, teacher in ((swin, loaded(teacher_of("rcan"))), (aggregation(), edsr)):
        facts = Aggregate([teacher, swinir], network).facts
        assert facts.receptive_field_px is None and not facts.exact_tiling
    assert Aggregate([edsr, swinir], swin).channels == 4
    assert Aggregate([loaded(Nearest()), edsr], swin).channels is None


def test_tiles_do_not_show():
    aggregate = Aggregate(pair(), aggregation(layer="swin")).double().eval()
    lr, facts = torch.rand(1, 3, 65, 26, dtype=torch.float64), aggregate.facts
    tiles = [t for top in range(0, 65, 12) for t in plan_band(top, (65, 26), 12, facts)]
    assert len(tiles) == 18 and all(t.top % 12 == t.left % 12 == 0 for t in tiles)
    assert min(t.bottom - t.top for t in tiles) < 65
    with torch.no_grad():
        for parameter in aggregate.parameters():  # attention far from uniform
            parameter.mul_(2)
        whole = aggregate(lr)
        narrow = replace(facts, receptive_field_px=12)
        gaps = [
            float((upscale_tiled(aggregate, lr, own, 12) - whole).abs().max())
            for own in (facts, narrow)
        ]
    assert gaps[0] < 1e-9 and gaps[1] > 1e-3


def test_tiles_that_are_not_exact_are_said():
    aggregate = Aggregate(pair(), aggregation()).eval()
    model = LoadedModel(aggregate, "aggregate", Path(), aggregate.facts)
    with pytest.warns(UserWarning, match="aggregate looks at the whole image, so tiles of 12 px"):
        assert upscale(torch.rand(3, 30, 20), model, tile=12).shape == (60, 40, 3)


def test_scores_are_those_of_the_parts(tmp_path):
    photos = open_set(write_photos(tmp_path / "photos"), 2)
    teachers = pair()
    aggregate = Aggregate(teachers, aggregation())
    model = LoadedModel(aggregate, "aggregate", Path(), aggregate.facts)
    (whole,) = evaluate(model, [photos])
    parts = score_parts(aggregate, aggregate.parts, photos)
    assert whole.psnr == pytest.approx(parts["aggregated teacher"].psnr, abs=1e-4)
    for teacher in teachers:
        own = score(teacher.network, photos)
        assert parts[f"teacher {teacher.name}"].psnr == pytest.approx(own.psnr, abs=1e-4)


@pytest.mark.parametrize(
    ("teachers", "network", "message"),
    [
        (1, aggregation(2), r"got 1 teachers .edsr., but the aggregation network takes 2"),
        (2, aggregation(3), r"got 2 teachers .edsr, swinir., but .* takes 3; give 3"),
        (2, aggregation(scale=3), "teacher edsr is x2, but the aggregation network is x3; choose"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(teachers, network, message):
    with pytest.raises(SrkdError, match=message):
        Aggregate(pair()[:teachers], network)


# --- the folder -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A first stage of three teachers, as a run leaves it."""
    for family, seed in (("edsr", 1), ("rcan", 2), ("swinir", 3)):
        save_model(tmp_path / family, student_of(family, seed), {})
    places = [str(tmp_path / family) for family in ("edsr", "rcan", "swinir")]
    teachers = [load_model(place) for place in places]
    made = tmp_path / "stage1"
    save_aggregate(
        made, aggregation(3), teachers, [weights_hash(t) for t in teachers], {"scores": {"a": 1}}
    )
    name_teachers(made, places)
    return made


def name_teachers(folder: Path, places: list[str]) -> None:
    """The part of a run's recipe that says where the teachers are."""
    (folder / "recipe.toml").write_text(f"seed = 0\n[teacher]\nmodels = {json.dumps(places)}\n")


def change(folder: Path, **values) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_round_trip_gives_the_same_images(folder):
    teachers = [load_model(folder.parent / name) for name in ("edsr", "rcan", "swinir")]
    expected = Aggregate(teachers, aggregation(3)).eval()
    model = load_model(folder, 2)
    network = model.network
    assert isinstance(network, Aggregate) and not network.training and not model.is_ours
    assert (
        model.facts == network.facts
        and model.name == f"{folder.parent.name}/stage1"
        and model.source == folder
    )
    assert network.names == ("edsr", "rcan", "swinir")
    lr = torch.rand(1, 3, 9, 8)
    with torch.no_grad():
        assert torch.equal(network(lr), expected(lr))
        assert torch.equal(load_model(folder / "weights.safetensors").network(lr), network(lr))


def test_model_json_names_the_teachers_without_their_places(folder):
    info = load_model(folder).info
    assert info["family"] == "dctswin" and info["network"] is None and info["scores"] == {"a": 1}
    assert info["parameters"] == sum(p.numel() for p in aggregation(3).parameters())
    teachers = [load_model(folder.parent / name) for name in ("edsr", "rcan", "swinir")]
    assert info["aggregates"] == [
        {"name": t.name, "weights_sha256": t.info["weights_sha256"]} for t in teachers
    ]
    assert str(folder.parent) not in (folder / "model.json").read_text()


def test_places_may_hold_an_environment_variable(folder, monkeypatch):
    monkeypatch.setenv("TEACHERS", str(folder.parent))
    name_teachers(folder, [f"$TEACHERS/{name}" for name in ("edsr", "rcan", "swinir")])
    assert load_model(folder).scale == 2


def test_moved_teachers_are_given_by_their_new_places(folder):
    moved = folder.parent / "elsewhere"
    (folder.parent / "rcan").rename(moved)
    message = (
        r"teacher 2 of 3 .rcan. of .*stage1 cannot be loaded from .*rcan: there is no file.*"
        r"named by teacher\.models"
    )
    with pytest.raises(SrkdError, match=message):
        load_model(folder)
    places = [str(folder.parent / "edsr"), str(moved), str(folder.parent / "swinir")]
    assert load_aggregate(folder, places).network.names == ("edsr", "elsewhere", "swinir")


def test_another_order_is_recognised(folder):
    order = [str(folder.parent / name) for name in ("swinir", "edsr", "rcan")]
    right = ", ".join(str(folder.parent / name) for name in ("edsr", "rcan", "swinir"))
    with pytest.raises(SrkdError, match=f"in another order than it was .*list them as {right}"):
        load_aggregate(folder, order)
    name_teachers(folder, order)
    with pytest.raises(SrkdError, match="in another order"):
        load_model(folder)


def test_changed_weights_of_a_teacher_are_named(folder):
    save_model(folder.parent / "swinir", student_of("swinir", 4), {})
    message = "teacher 3 of 3 of .*stage1 was swinir, but .*swinir holds other weights"
    with pytest.raises(SrkdError, match=message):
        load_model(folder)


def test_another_scale_or_number_of_teachers_is_refused(folder):
    save_model(folder.parent / "rcan", student_of("rcan", scale=3), {})
    with pytest.raises(SrkdError, match=r"teacher 2 of 3 .*is a x3 network, but x2 was asked for"):
        load_model(folder)
    with pytest.raises(SrkdError, match=r"got 1 teacher .*aggregates 3 .edsr, rcan, swinir."):
        load_aggregate(folder, [str(folder.parent / "edsr")])
    with pytest.raises(SrkdError, match=r"got 0 teachers .none."):
        load_aggregate(folder, [])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, r"recipe\.toml does not say where the teachers .* are .FileNotFoundError"),
        ("[teacher", r"recipe\.toml does not say .*TOMLDecodeError"),
        ("seed = 0", r"recipe\.toml does not say .*KeyError.'teacher'"),
        ("[teacher]\nmodels = 3", r"recipe\.toml does not say .*write \[teacher\] models"),
        ("[teacher]\nmodels = [3]", r"recipe\.toml does not say"),
    ],
)
def test_a_recipe_that_names_no_teachers(recipe, message, folder):
    path = folder / "recipe.toml"
    if recipe is None:
        path.unlink()
    else:
        path.write_text(recipe)
    with pytest.raises(SrkdError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aggregates": None}, r"model\.json is damaged .its list of teachers, 'aggregates'"),
        ({"aggregates": [{"name": "edsr"}]}, "'aggregates': 'weights_sha256'"),
        ({"arguments": {"scale": 2}}, "is damaged .'depths'"),
        ({"arguments": {"depths": [2], "chanels": 3}}, "is damaged .*'chanels'"),
        ({"scale": 4}, "is damaged .its scale or range contradicts"),
        ({"weights_sha256": "0" * 64}, "is not the file that .* describes"),
        ({"format": 2}, "has format 2, this version reads 1"),
    ],
)
def test_wrong_model_json_is_named(values, message, folder):
    change(folder, **values)
    with pytest.raises(SrkdError, match=message):
        load_model(folder)


def test_a_plain_network_is_no_aggregated_teacher(folder):
    with pytest.raises(SrkdError, match=r"holds a network .family 'edsr'., not an aggregated"):
        load_aggregate(folder.parent / "edsr")


def test_hash_of_an_aggregated_teacher_has_those_of_its_teachers(folder):
    model = load_model(folder)
    own = [model.info["weights_sha256"], *(m["weights_sha256"] for m in model.info["aggregates"])]
    assert weights_hash(model) == "+".join(own) and len(set(own)) == 4


def test_an_aggregated_teacher_can_be_a_teacher(folder):
    inner = load_model(folder)
    outer = folder.parent / "outer"
    save_aggregate(outer, aggregation(1), [inner], [weights_hash(inner)], {})
    name_teachers(outer, [str(folder)])
    lr = torch.rand(1, 3, 9, 8)
    with torch.no_grad():
        assert torch.equal(load_model(outer).network.stack(lr), inner.network(lr))
