"""Draws are a function of (seed, step, sample); patches are aligned; the thread ends as told."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import torch

from srkd.data.sampling import Crops, PatchSampler, Prefetcher, _mix, apply_symmetry, draw
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from srkd.data.cache import TrainingSet
    from srkd.teacher_cache import TaughtImages

SCALE = 3
MASK = 2**64 - 1


class Images:
    """The part of a TrainingSet that sampling reads. HR is LR with every pixel repeated."""

    scale = SCALE

    def __init__(self, *lr_sizes: tuple[int, int]) -> None:
        rng = np.random.default_rng(0)
        self._lr = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in lr_sizes]
        self._hr = [lr.repeat(SCALE, 0).repeat(SCALE, 1) for lr in self._lr]
        self.names = tuple(f"image{n}" for n in range(len(lr_sizes)))

    def __len__(self) -> int:
        return len(self._lr)

    def size(self, i: int) -> tuple[int, int]:
        return self._hr[i].shape[0], self._hr[i].shape[1]

    @property
    def cache_bytes(self) -> int:
        return sum(image.size for image in (*self._lr, *self._hr))

    def lr(self, i: int) -> np.ndarray:
        return self._lr[i]

    def hr(self, i: int) -> np.ndarray:
        return self._hr[i]


class Outputs:
    """The part of TaughtImages that sampling reads: HR divided by `levels`."""

    def __init__(self, images: Images, levels: int) -> None:
        self._sr = [(images.hr(i) / levels).astype(np.float16) for i in range(len(images))]

    def __len__(self) -> int:
        return len(self._sr)

    @property
    def bytes(self) -> int:
        return sum(image.nbytes for image in self._sr)

    def sr(self, i: int) -> np.ndarray:
        return self._sr[i]


def outputs(*lr_sizes: tuple[int, int], levels: int = 256) -> TaughtImages:
    return cast("TaughtImages", Outputs(Images(*lr_sizes), levels))


def sampler(patch: int = 5, batch: int = 8, seed: int = 7, **more) -> PatchSampler:
    images = cast("TrainingSet", Images((9, 14), (20, 6), (5, 5)))
    return PatchSampler(images, patch, batch, seed, **more)


def mix(x: int) -> int:
    """splitmix64 in Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_hash_is_splitmix64() -> None:
    # First output of the reference implementation from states 0 and 1234567.
    reference = [0xE220A8397B1DCDAF, 6457827717110365317]
    assert _mix(np.array([0, 1234567], np.uint64)).tolist() == reference
    assert [mix(0), mix(1234567)] == reference


def test_draw_is_the_hash_of_seed_step_and_sample() -> None:
    sizes = np.array([[48, 100], [333, 60], [64, 64]])
    expected = []
    for sample in (0, 5, 1000):
        state = mix(mix(mix(42) ^ 123_456) ^ sample)
        image, top, left, symmetry = (mix(state ^ stream) for stream in range(4))
        i = (image >> 32) * 3 >> 32
        h, w = sizes[i].tolist()
        row = [i, (top >> 32) * (h - 47) >> 32, (left >> 32) * (w - 47) >> 32, symmetry >> 61]
        expected.append(row)
    assert draw(42, 123_456, [0, 5, 1000], sizes, 48).tolist() == expected


def test_seed_and_step_matter_and_any_seed_works() -> None:
    sizes = np.full((100, 2), 500)
    tables = [draw(*key, range(4), sizes, 48).tolist() for key in ((0, 0), (0, 1), (1, 0), (-1, 0))]
    assert all(a != b for n, a in enumerate(tables) for b in tables[:n])
    assert draw(2**70, 2**40, range(4), sizes, 48).shape == (4, 4)


def test_draws_are_uniform_and_reach_both_ends() -> None:
    sizes = np.array([[10, 12]] * 5)
    table = np.concatenate([draw(3, step, range(16), sizes, 8) for step in range(2000)])
    assert table.dtype == np.int64
    for column, kinds in enumerate((5, 3, 5, 8)):
        counts = np.bincount(table[:, column], minlength=kinds)
        assert len(counts) == kinds
        expected = len(table) / kinds
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert chi_squared < 30  # 7 degrees of freedom at most: chance of 1e-4
    # Independent columns: every combination of crop and symmetry turns up.
    assert len(np.unique(table, axis=0)) == 5 * 3 * 5 * 8


def test_no_augmentation_is_symmetry_zero_and_the_same_crops() -> None:
    sizes = np.full((9, 2), 100)
    plain, augmented = (draw(0, 0, range(64), sizes, 48, augment=a) for a in (False, True))
    assert not plain[:, 3].any()
    assert augmented[:, 3].any()
    assert np.array_equal(plain[:, :3], augmented[:, :3])


def test_symmetries_by_hand() -> None:
    patch = np.array([[0, 1], [2, 3]])[..., None]
    flat = [apply_symmetry(patch, code).ravel().tolist() for code in range(8)]
    assert flat == [
        [0, 1, 2, 3],
        [1, 0, 3, 2],
        [2, 3, 0, 1],
        [3, 2, 1, 0],
        [0, 2, 1, 3],
        [1, 3, 0, 2],
        [2, 0, 3, 1],
        [3, 1, 2, 0],
    ]


def test_patches_are_aligned_under_every_symmetry() -> None:
    some = sampler()
    seen = set()
    for step in range(30):
        lr, hr, taught = some.batch(step)
        assert taught == ()
        assert lr.shape == (8, 3, 5, 5)
        assert hr.shape == (8, 3, 15, 15)
        assert lr.dtype == hr.dtype == torch.uint8
        assert lr.is_contiguous()
        assert hr.is_contiguous()
        assert torch.equal(hr, lr.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3))
        seen |= set(draw(7, step, range(8), some.sizes, 5)[:, 3].tolist())
    assert seen == set(range(8))


def test_patches_are_what_the_draw_says() -> None:
    images = Images((9, 14), (20, 6), (5, 5))
    some = sampler()
    table = draw(7, 11, range(8), np.array([[9, 14], [20, 6], [5, 5]]), 5)
    lr = some.batch(11).lr
    for n, (image, top, left, code) in enumerate(table.tolist()):
        patch = apply_symmetry(images.lr(image)[top : top + 5, left : left + 5], code)
        assert np.array_equal(lr[n].permute(1, 2, 0).numpy(), patch)


def test_taught_crops_are_cut_with_the_images() -> None:
    sizes = (9, 14), (20, 6), (5, 5)
    some = sampler(taught=[outputs(*sizes), outputs(*sizes, levels=512)])
    for step in range(5):  # 40 samples: every image and most symmetries
        crops = some.batch(step)
        assert torch.equal(crops.hr, sampler().batch(step).hr)
        # A power of two as divisor: float16 holds the quotients exactly.
        for sr, levels in zip(crops.taught, (256, 512), strict=True):
            assert sr.dtype == torch.float16
            assert sr.is_contiguous()
            assert torch.equal(sr.float() * levels, crops.hr.float())


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_batch_of_one_process(world: int) -> None:
    whole = sampler().batch(5)
    shares = [sampler(rank=rank, world=world).batch(5) for rank in range(world)]
    assert torch.equal(torch.cat([share.lr for share in shares]), whole.lr)
    assert torch.equal(torch.cat([share.hr for share in shares]), whole.hr)


def test_bad_requests_are_named() -> None:
    with pytest.raises(
        SrkdError, match=r"'image2' is 5x5 px .* patch 6x6.*data.patch to 5 or less"
    ):
        sampler(patch=6)
    with pytest.raises(SrkdError, match="batch of 8 cannot be shared by 3 processes"):
        sampler(world=3)
    with pytest.raises(SrkdError, match="must both be at least 1"):
        sampler(batch=0)


def test_outputs_over_other_images_are_named() -> None:
    with pytest.raises(SrkdError, match="outputs are over 2 images, the training set has 3"):
        sampler(taught=[outputs((9, 14), (20, 6))])
    with pytest.raises(
        SrkdError, match=r"over 'image1' is 60x18 px, the training image 18x60; open the outputs"
    ):
        sampler(taught=[outputs((9, 14), (6, 20), (5, 5))])


def test_prefetcher_gives_every_step_in_order_and_then_ends() -> None:
    some = sampler()
    with Prefetcher(some, 3, 9) as batches:
        got = list(batches)
        assert list(batches) == []
    assert [step for step, _ in got] == list(range(3, 9))
    for step, crops in got:
        expected = some.batch(step)
        assert torch.equal(crops.lr, expected.lr)
        assert torch.equal(crops.hr, expected.hr)


def test_prefetcher_works_ahead_but_not_further_than_depth() -> None:
    asked: list[int] = []

    class Recording(PatchSampler):
        def batch(self, step: int) -> Crops:
            asked.append(step)
            return super().batch(step)

    images = cast("TrainingSet", Images((9, 9)))
    with Prefetcher(Recording(images, 5, 2, 0), 0, 100, depth=3) as batches:
        next(iter(batches))
        deadline = time.monotonic() + 20
        while len(asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        # One taken, three ready, one in the hands of the thread.
        assert asked == [0, 1, 2, 3, 4]


def test_prefetcher_closes_early_with_a_full_queue() -> None:
    with Prefetcher(sampler(), 0, 10_000) as batches:
        for step, _ in batches:
            if step == 2:
                break
    assert not [t for t in threading.enumerate() if t.name == "srkd-prefetch"]


def test_prefetcher_raises_the_threads_error_in_the_consumer() -> None:
    class Failing(PatchSampler):
        def batch(self, step: int) -> Crops:
            if step == 2:
                raise SrkdError("the disk went away")
            return super().batch(step)

    got = []
    images = cast("TrainingSet", Images((9, 9)))
    with (
        pytest.raises(SrkdError, match="the disk went away"),
        Prefetcher(Failing(images, 5, 2, 0), 0, 5) as batches,
    ):
        got.extend(step for step, _ in batches)
    assert got == [0, 1]


def test_prefetcher_measures_waiting() -> None:
    class Slow(PatchSampler):
        def batch(self, step: int) -> Crops:
            time.sleep(0.1)
            return super().batch(step)

    images = cast("TrainingSet", Images((9, 9)))
    with Prefetcher(Slow(images, 5, 2, 0), 0, 3) as batches:
        assert len(list(batches)) == 3
        assert batches.waited_s > 0.25
    with Prefetcher(sampler(), 0, 3, depth=3) as batches:
        time.sleep(0.5)  # all are ready
        before = batches.waited_s
        next(iter(batches))
        assert batches.waited_s - before < 0.2


@pytest.mark.gpu
def test_pinned_batches() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: page-locked memory cannot be tested")
    some = sampler(taught=[outputs((9, 14), (20, 6), (5, 5))])
    with Prefetcher(some, 0, 1, pin=True) as batches:
        ((_, crops),) = list(batches)
    assert all(images.is_pinned() for images in (crops.lr, crops.hr, *crops.taught))
