"""Crops gathered on a device are those that are sliced from the mapped file, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch
from test_sampling import Images, outputs
from tiny_run import recipe_for, same_result, write_photos

import srkd.data.resident as resident
from srkd.data.resident import ResidentSampler, gather, placed
from srkd.data.sampling import PatchSampler, apply_symmetry
from srkd.errors import SrkdError
from srkd.train import distill

if TYPE_CHECKING:
    from srkd.data.cache import TrainingSet

SIZES = (9, 14), (20, 6), (5, 5)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def sampler(**more) -> PatchSampler:
    images = Images(*SIZES)
    taught = [outputs(*SIZES, levels=300), outputs(*SIZES, levels=512)]
    return PatchSampler(cast("TrainingSet", images), 5, 8, 7, taught=taught, **more)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_equal_to_the_slices(augment: bool, world: int) -> None:
    for rank in range(world):
        slices = sampler(augment=augment, rank=rank, world=world)
        gathered = ResidentSampler(slices, CPU)
        for step in range(12):  # every image, and every symmetry of it
            one, other = slices.batch(step), gathered.batch(step)
            pairs = zip(
                (one.lr, one.hr, *one.taught), (other.lr, other.hr, *other.taught), strict=True
            )
            for expected, found in pairs:
                assert found.dtype == expected.dtype and torch.equal(found, expected)
                assert found.is_contiguous(memory_format=torch.channels_last)


def test_symmetries_as_numpy_views() -> None:
    image = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3)
    codes = torch.arange(8)
    first, width = torch.full((8,), 1 * 6 + 2), torch.full((8,), 6)
    found = gather(image.reshape(-1, 3), first, width, codes, 3)
    for code in range(8):
        expected = apply_symmetry(image[1:4, 2:5].numpy(), code)
        assert (found[code].permute(1, 2, 0).numpy() == expected).all()


def test_where_the_images_go(monkeypatch: pytest.MonkeyPatch) -> None:
    some = sampler()
    need = sum(9 * h * w * 3 + h * w * 3 for h, w in SIZES) + 2 * sum(
        2 * 9 * h * w * 3 for h, w in SIZES
    )
    assert some.decoded_bytes == need
    assert placed(some, CPU, "host")[0] is some
    assert placed(some, CPU, "auto") == (some, "")
    there, why = placed(some, CPU, "device")
    assert isinstance(there, ResidentSampler) and "on cpu: 0.00 GB" in why
    monkeypatch.setattr(resident, "memory_budget", lambda device: need - 1)
    kept, why = placed(some, GPU, "auto")
    assert kept is some and "half of it is kept" in why
    with pytest.raises(SrkdError, match=r"data\.place = device, but there are 0\.00 GB"):
        placed(some, CPU, "device")


def test_a_training_from_resident_images_is_the_same(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    short = ("train.iterations=3", "validate.every=0")
    for place in ("host", "device"):
        distill(
            recipe_for(photos, *short, f"data.place={place}"),
            tmp_path / place,
            device="cpu",
            quiet=True,
        )
    assert same_result(tmp_path / "host", tmp_path / "device")


@pytest.mark.gpu
def test_gathered_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: crops cannot be gathered on one")
    slices = sampler()
    there, why = placed(slices, torch.device("cuda"), "auto")
    assert isinstance(there, ResidentSampler) and why.startswith("on cuda")
    for step in range(12):
        for expected, found in zip(slices.batch(step)[:2], there.batch(step)[:2], strict=True):
            assert found.device.type == "cuda" and torch.equal(found.cpu(), expected)
