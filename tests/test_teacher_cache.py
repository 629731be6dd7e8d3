"""The teacher cache: right values at the right place, computed once, refused or rebuilt when not right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pair import teacher_of
from torch import Tensor, nn

from srkd.aggregate import Aggregate
from srkd.data.cache import TrainingSet, open_training_set
from srkd.data.sampling import PatchSampler, apply_symmetry, draw
from srkd.errors import CheckFailedError, SrkdError
from srkd.images import to_tensor
from srkd.loaded import LoadedModel
from srkd.networks.dctswin import DctSwin, DctSwinConfig
from srkd.teacher_cache import TaughtImages, open_teacher_cache, plan_teacher_cache
from srkd.types import Facts

CPU = torch.device("cpu")
ROUNDING = 2**-12  # of float16 below 1; twice that below 2
LR_SIZES = ((40, 56), (32, 48), (25, 35))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n, (h, w) in enumerate(LR_SIZES):
        image = rng.integers(0, 256, (2 * h, 2 * w, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{n:04}.png")
    return folder


@pytest.fixture(scope="module")
def data(photos: Path) -> TrainingSet:
    return open_training_set(photos, 2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def loaded(network: Any = None, name: str = "tiny") -> LoadedModel:
    network = teacher_of("edsr") if network is None else network
    return LoadedModel(network, name, Path("tiny"), network.facts)


def passes_of(network: nn.Module) -> list[tuple[int, int]]:
    """(h, w) of every image that the network sees from now on."""
    seen: list[tuple[int, int]] = []
    network.register_forward_pre_hook(lambda _, lr: seen.append((lr[0].shape[2], lr[0].shape[3])))
    return seen


@torch.no_grad()
def output(network: nn.Module, lr: np.ndarray) -> np.ndarray:
    return network(to_tensor(lr))[0].permute(1, 2, 0).numpy()


def assert_right(taught: TaughtImages, network: nn.Module, data: TrainingSet) -> None:
    for i in range(len(data)):
        expected = output(network, data.lr(i))
        assert np.abs(expected).max() < 2  # where the rounding below holds, twice
        assert taught.sr(i) == pytest.approx(expected, abs=2 * ROUNDING)


def test_values_are_the_outputs_over_whole_images(data: TrainingSet, cache: Path) -> None:
    model = loaded()
    seen, counted = passes_of(model.network), []
    taught = open_teacher_cache(model, "hash", data, cache, CPU, lambda *done: counted.append(done))
    assert sorted(seen) == sorted(LR_SIZES)  # one pass each, the one that was timed included
    assert counted == [(1, 3), (2, 3), (3, 3)]
    assert len(taught) == 3
    assert taught.sr(2).shape == (50, 70, 3)
    assert taught.sr(2).dtype == np.float16
    assert_right(taught, model.network, data)
    with pytest.raises(ValueError, match="read-only"):
        taught.sr(0)[0, 0] = 0
    file = cache / "teachers" / taught.key / "sr.bin"
    assert taught.bytes == file.stat().st_size == 2 * 3 * 4 * (40 * 56 + 32 * 48 + 25 * 35)


def test_float32_without_graph_whatever_surrounds_it(data: TrainingSet, cache: Path) -> None:
    network = teacher_of("edsr").requires_grad_(True).train()
    with torch.autocast("cpu", torch.bfloat16):
        taught = open_teacher_cache(loaded(network), "hash", data, cache, CPU)
    assert not network.training
    assert_right(taught, network, data)


def test_batches_hold_crops_under_the_same_symmetry(data: TrainingSet, cache: Path) -> None:
    taught = open_teacher_cache(loaded(), "hash", data, cache, CPU)
    crops = PatchSampler(data, 8, 16, seed=3, taught=[taught]).batch(5)
    table = draw(3, 5, range(16), np.array(LR_SIZES), 8)
    assert len(set(table[:, 3])) > 4
    for n, (image, top, left, code) in enumerate(table.tolist()):
        piece = taught.sr(image)[2 * top : 2 * top + 16, 2 * left : 2 * left + 16]
        expected = apply_symmetry(piece, code)
        assert np.array_equal(crops.taught[0][n].permute(1, 2, 0).numpy(), expected)


def test_inside_the_receptive_field_a_crop_is_what_the_teacher_gives(
    data: TrainingSet, cache: Path
) -> None:
    network = teacher_of("edsr", blocks=1)
    reach = network.facts.receptive_field_px
    assert reach is not None and 2 * reach < 24
    taught = open_teacher_cache(loaded(network), "hash", data, cache, CPU)
    crops = PatchSampler(data, 24, 4, seed=0, augment=False, taught=[taught]).batch(0)
    with torch.no_grad():
        online = network(crops.lr.float() / 255)
    gap = (online - crops.taught[0].float()).abs()
    inside = gap[..., 2 * reach : -2 * reach, 2 * reach : -2 * reach]
    assert float(inside.max()) < 2 * ROUNDING
    assert float(gap.max()) > 20 * ROUNDING  # the target knows what lies beyond the edge


def test_the_target_of_a_mirrored_crop_is_the_mirrored_output(
    data: TrainingSet, cache: Path
) -> None:
    network = teacher_of("edsr")
    taught = open_teacher_cache(loaded(network), "hash", data, cache, CPU)
    mirrored = output(network, np.ascontiguousarray(data.lr(0)[:, ::-1]))
    assert np.abs(mirrored - taught.sr(0)[:, ::-1]).max() > 20 * ROUNDING


@pytest.mark.parametrize("family", ["edsr", "rcan"])
def test_tiles_when_memory_is_short(
    data: TrainingSet, cache: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    network, said = teacher_of(family), []
    monkeypatch.setattr("srkd.teacher_cache.memory_budget", lambda device: 1)
    seen = passes_of(network)
    taught = open_teacher_cache(loaded(network), "hash", data, cache, CPU, say=said.append)
    assert len(seen) > 3
    if family == "edsr":
        assert_right(taught, network, data)
        assert len(said) == 1
    else:  # channel attention: never exact in tiles, which is said once
        assert len(said) == 2
        assert said[0].startswith("tiny looks at the whole image, but '0001' does not fit")


def test_a_ready_cache_is_opened_without_a_pass(
    photos: Path, data: TrainingSet, cache: Path
) -> None:
    said: list[str] = []
    plan = plan_teacher_cache("hash", data, cache)
    assert (plan.ready, plan.images) == (False, 3)
    assert not cache.exists()
    first = open_teacher_cache(loaded(), "hash", data, cache, CPU, say=said.append)
    place = cache / "teachers"
    (notice,) = said
    start, end = "teacher cache: tiny over 3 images takes about ", f"s once and 0.00 GB in {place}"
    assert notice.startswith(start)
    assert notice.endswith(end)

    again = loaded()
    seen = passes_of(again.network)
    second = open_teacher_cache(
        again, "hash", open_training_set(photos, 2), cache, CPU, say=said.append
    )
    assert seen == []
    assert said[1:] == ["teacher cache: tiny, 0.00 GB, ready"]
    assert second.key == first.key
    assert np.array_equal(second.sr(1), first.sr(1))
    plan = plan_teacher_cache("hash", data, cache)
    assert plan.ready
    assert (plan.folder, plan.bytes) == (place / first.key, first.bytes)


def test_key_tells_weights_data_scale_and_stacks_apart(
    photos: Path, data: TrainingSet, cache: Path, tmp_path: Path
) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    shutil.copy(photos / "0000.png", fewer)
    keys = [
        plan_teacher_cache("hash", data, cache),
        plan_teacher_cache("other weights", data, cache),
        plan_teacher_cache("hash", open_training_set(fewer, 2), cache),
        plan_teacher_cache("hash", open_training_set(photos, 4), cache),
        plan_teacher_cache("hash", data, cache, stacked=True),
    ]
    assert len({plan.folder.name for plan in keys}) == 5


def test_default_place_is_srkd_cache(data: TrainingSet) -> None:
    taught = open_teacher_cache(loaded(), "default place", data, None, CPU)
    assert (Path(os.environ["SRKD_CACHE"]) / "teachers" / taught.key / "sr.bin").is_file()


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "sizes"])
def test_damage_is_said_and_mended(
    data: TrainingSet, cache: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    model = loaded()
    folder = cache / "teachers" / open_teacher_cache(model, "hash", data, cache, CPU).key
    if damage == "cut":
        os.truncate(folder / "sr.bin", 1000)
    elif damage == "gone":
        (folder / "sr.bin").unlink()
    elif damage == "index":
        (folder / "index.json").write_text('{"sizes": []}')
    else:  # as many bytes as before
        text = (folder / "index.json").read_text()
        (folder / "index.json").write_text(text.replace("80, 112", "112, 80"))
    assert not plan_teacher_cache("hash", data, cache).ready
    assert capsys.readouterr().err == ""
    taught = open_teacher_cache(model, "hash", data, cache, CPU)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("the teacher cache is damaged and will be built again")
    assert_right(taught, model.network, data)


def test_an_interrupted_build_leaves_nothing(data: TrainingSet, cache: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_teacher_cache(loaded(), "hash", data, cache, CPU, stop)
    assert [path.suffix for path in (cache / "teachers").iterdir()] == [".lock"]
    model = loaded()
    assert_right(open_teacher_cache(model, "hash", data, cache, CPU), model.network, data)


def test_full_and_unwritable_disks_are_refused_before_any_pass(
    data: TrainingSet, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded()
    seen = passes_of(model.network)
    (tmp_path / "file").write_text("")
    with pytest.raises(SrkdError, match=r"cannot write the teacher cache .* Set SRKD_CACHE"):
        open_teacher_cache(model, "hash", data, tmp_path / "file" / "cache", CPU)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(
        SrkdError, match=r"outputs of teacher tiny need 0.00 GB .* 0.00 GB free; .* SRKD_CACHE"
    ):
        open_teacher_cache(model, "hash", data, cache, CPU)
    assert seen == []
    assert [path.suffix for path in (cache / "teachers").iterdir()] == [".lock"]


class Constant(nn.Module):
    """A diverged foreign network: one value everywhere."""

    facts = Facts(scale=2, receptive_field_px=0, exact_tiling=True)

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, lr: Tensor) -> Tensor:
        n, _, h, w = lr.shape
        return torch.full((n, 3, 2 * h, 2 * w), self.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -101.0])
def test_values_that_are_no_image_are_refused(data: TrainingSet, cache: Path, value: float) -> None:
    with pytest.raises(
        CheckFailedError, match=r"teacher broken gives values up to (nan|inf|101) over .* '0001'"
    ):
        open_teacher_cache(loaded(Constant(value), "broken"), "hash", data, cache, CPU)
    assert not plan_teacher_cache("hash", data, cache).ready


def test_values_outside_an_image_by_a_little_are_kept(data: TrainingSet, cache: Path) -> None:
    taught = open_teacher_cache(loaded(Constant(-99.0)), "hash", data, cache, CPU)
    assert np.all(taught.sr(0) == -99)


def test_a_teacher_of_another_scale_is_refused(data: TrainingSet, cache: Path) -> None:
    with pytest.raises(SrkdError, match="teacher tiny is x3, the training images are x2"):
        open_teacher_cache(loaded(teacher_of("edsr", scale=3)), "hash", data, cache, CPU)


def aggregate_of(teachers: list[nn.Module]) -> Aggregate:
    """Without DCT, so that tiles are exact."""
    config = DctSwinConfig(2, 2, channels=6, depths=(2,), heads=2, window=4, layer="swin")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return (
            Aggregate([loaded(t) for t in teachers], DctSwin(config)).requires_grad_(False).eval()
        )


@pytest.mark.parametrize("budget", [2**30, 1])
def test_an_aggregate_works_on_the_cached_outputs_of_its_teachers(
    data: TrainingSet, cache: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr("srkd.teacher_cache.memory_budget", lambda device: budget)
    teachers = [teacher_of("edsr", seed) for seed in (1, 2)]
    stacked = [
        open_teacher_cache(loaded(teacher), f"hash{n}", data, cache, CPU)
        for n, teacher in enumerate(teachers)
    ]
    second = aggregate_of(teachers)
    passes = [passes_of(teacher) for teacher in teachers]
    taught = open_teacher_cache(loaded(second), "hash", data, cache, CPU, stacked=stacked)
    assert passes == [[], []]
    for i in range(3):
        stack = np.concatenate([outputs.sr(i) for outputs in stacked], axis=2).astype(np.float32)
        expected = second.network(torch.from_numpy(stack).permute(2, 0, 1)[None])[0]
        assert taught.sr(i) == pytest.approx(expected.permute(1, 2, 0).numpy(), abs=2 * ROUNDING)
    assert plan_teacher_cache("hash", data, cache, stacked=True).folder.name == taught.key
