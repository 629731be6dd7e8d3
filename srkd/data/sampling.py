"""Which patch every sample of every step is: a pure function of (seed, step, sample).

Neither worker threads nor the number of processes enter, so a resumed run, and the same run on more
machines, see the same patches.
"""

from __future__ import annotations

import queue
import threading
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from torch import Tensor

    from srkd.data.cache import TrainingSet
    from srkd.teacher_cache import TaughtImages

HFLIP, VFLIP, TRANSPOSE = 1, 2, 4

# Streams of random numbers of one sample.
_IMAGE, _TOP, _LEFT, _SYMMETRY = range(4)


def _mix(x: np.ndarray) -> np.ndarray:
    """One output of splitmix64 (Steele, Lea, Flood 2014) for every uint64 state; wraps on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _below(random: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Uniform integers in [0, bounds) from uint64 randoms; bounds < 2**31, bias below bounds/2**32."""
    high = random >> np.uint64(32)
    return ((high * bounds.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def draw(
    seed: int,
    step: int,
    samples: range | Sequence[int],
    sizes: np.ndarray,
    patch: int,
    augment: bool = True,
) -> np.ndarray:
    """(len(samples), 4) int64 of (image, top, left, symmetry), a function of its arguments alone.

    sizes    (n, 2) LR height and width of every image, each at least `patch`
    patch    side in LR px; top and left are LR px too
    symmetry 0..7 for `apply_symmetry`, each bit with probability 0.5; 0 without `augment`

    Images are drawn uniformly, whatever their size, then crops uniformly inside the image.
    """
    index = np.asarray(samples, dtype=np.int64).astype(np.uint64)
    state = _mix(np.array([seed % 2**64], np.uint64))
    state = _mix(state ^ np.uint64(step))
    state = _mix(state ^ index)[:, None]
    random = _mix(state ^ np.arange(4, dtype=np.uint64))

    image = _below(random[:, _IMAGE], np.array(len(sizes)))
    room = sizes[image] - patch + 1
    out = np.empty((len(index), 4), np.int64)
    out[:, 0] = image
    out[:, 1] = _below(random[:, _TOP], room[:, 0])
    out[:, 2] = _below(random[:, _LEFT], room[:, 1])
    out[:, 3] = (random[:, _SYMMETRY] >> np.uint64(61)).astype(np.int64) if augment else 0
    return out


def apply_symmetry(patch: np.ndarray, code: int) -> np.ndarray:
    """One of the 8 symmetries of the square, as a view of (H, W, C).

    Bits of `code`: 1 mirrors left and right, 2 mirrors top and bottom, 4 then swaps the two axes.
    """
    if code & HFLIP:
        patch = patch[:, ::-1]
    if code & VFLIP:
        patch = patch[::-1]
    if code & TRANSPOSE:
        patch = patch.swapaxes(0, 1)
    return patch


class Crops(NamedTuple):
    """The patches of one step, aligned and under the same symmetries; a `PatchSampler`'s are on the CPU.

    lr      (N, 3, p, p) uint8
    hr      (N, 3, scale*p, scale*p) uint8
    taught  of every cached teacher (N, 3, scale*p, scale*p) float16 in about [0, 1]
    """

    lr: Tensor
    hr: Tensor
    taught: tuple[Tensor, ...] = ()

    def pinned(self) -> Crops:
        """The same in page-locked memory."""
        taught = tuple(sr.pin_memory() for sr in self.taught)
        return Crops(self.lr.pin_memory(), self.hr.pin_memory(), taught)


class Sampler(Protocol):
    def batch(self, step: int) -> Crops:
        """The crops of this process's share of `step`."""
        ...


class PatchSampler:
    """Batches of aligned LR and HR patches, sliced from the decoded cache.

    patch   side of an LR patch in px; the HR patch is scale times it
    batch   samples of one step over all ranks; rank r gets samples r*batch/world and on
    taught  outputs of frozen teachers over the same images, cropped along with them

    `sizes` are the LR (h, w) of all images, (n, 2); `samples` the numbers of this rank's samples.
    """

    def __init__(
        self,
        training_set: TrainingSet,
        patch: int,
        batch: int,
        seed: int,
        augment: bool = True,
        rank: int = 0,
        world: int = 1,
        taught: Sequence[TaughtImages] = (),
    ) -> None:
        if patch < 1 or batch < 1:
            raise SrkdError(f"patch {patch} and batch {batch} must both be at least 1.")
        if batch % world:
            raise SrkdError(
                f"a batch of {batch} cannot be shared by {world} processes; "
                f"use a multiple of {world}."
            )
        scale = training_set.scale
        sizes = np.array([training_set.size(i) for i in range(len(training_set))]) // scale
        small = np.flatnonzero(sizes.min(axis=1) < patch)
        if len(small):
            name, (h, w) = training_set.names[small[0]], sizes[small[0]]
            raise SrkdError(
                f"{len(small)} of {len(sizes)} training images are smaller than the patch: '{name}' is "
                f"{w}x{h} px at low resolution, a patch {patch}x{patch}. Remove them, or set "
                f"data.patch to {sizes.min()} or less."
            )
        for outputs in taught:
            _check_aligned(outputs, training_set)
        self.training_set = training_set
        self.taught = tuple(taught)
        self.patch = patch
        self.seed = seed
        self.augment = augment
        self.sizes = sizes
        self.samples = range(rank * batch // world, (rank + 1) * batch // world)

    @property
    def decoded_bytes(self) -> int:
        """Of all images that crops are cut from."""
        return self.training_set.cache_bytes + sum(outputs.bytes for outputs in self.taught)

    def batch(self, step: int) -> Crops:
        """The crops of this rank's share of `step`."""
        data, p, scale = self.training_set, self.patch, self.training_set.scale
        P = scale * p  # noqa: N806
        table = draw(self.seed, step, self.samples, self.sizes, p, self.augment)
        lr = np.empty((len(table), 3, p, p), np.uint8)
        hr = np.empty((len(table), 3, P, P), np.uint8)
        taught = [np.empty((len(table), 3, P, P), np.float16) for _ in self.taught]
        # A slice per sample: one gather for the whole batch takes forty times as long.
        for n, (image, top, left, code) in enumerate(table.tolist()):
            y, x = scale * top, scale * left
            small = data.lr(image)[top : top + p, left : left + p]
            lr[n] = apply_symmetry(small, code).transpose(2, 0, 1)
            hr[n] = apply_symmetry(data.hr(image)[y : y + P, x : x + P], code).transpose(2, 0, 1)
            for outputs, sr in zip(self.taught, taught, strict=True):
                large = outputs.sr(image)[y : y + P, x : x + P]
                sr[n] = apply_symmetry(large, code).transpose(2, 0, 1)
        return Crops(
            torch.from_numpy(lr), torch.from_numpy(hr), tuple(map(torch.from_numpy, taught))
        )


def _check_aligned(taught: TaughtImages, training_set: TrainingSet) -> None:
    """Refuse outputs over other images: their crops would show another place."""
    if len(taught) != len(training_set):
        raise SrkdError(
            f"the teacher's outputs are over {len(taught)} images, the training set has "
            f"{len(training_set)}; open the outputs with this training set."
        )
    for i, name in enumerate(training_set.names):
        (height, width), (rows, columns) = training_set.size(i), taught.sr(i).shape[:2]
        if (rows, columns) != (height, width):
            raise SrkdError(
                f"the teacher's output over '{name}' is {columns}x{rows} px, the training image "
                f"{width}x{height}; open the outputs with this training set."
            )


class Prefetcher:
    """Steps `start` to `stop` - 1 as (step, crops) in order, prepared by one background thread.

        with Prefetcher(sampler, 0, 1000) as batches:
            for step, crops in batches: ...

    depth        batches prepared ahead
    pin          page-locked memory, so that copies to a GPU need not wait: one batch is copied while the
                 next is filled, and the allocator uses the same pages again
    waited_s     time the consumer has waited for batches so far

    An exception of the thread is raised in the consumer. Leaving the context ends the thread.
    """

    def __init__(
        self,
        sampler: Sampler,
        start: int,
        stop: int,
        depth: int = 2,
        pin: bool = False,
    ) -> None:
        self.waited_s = 0.0
        self._sampler = sampler
        self._steps = range(start, stop)
        self._pin = pin
        # None marks the end; an exception travels in the queue to the consumer.
        self._ready: queue.Queue[tuple[int, Crops] | BaseException | None] = queue.Queue(
            max(1, depth)
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="srkd-prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[int, Crops]]:
        if self._thread.ident is None:
            raise RuntimeError("enter the Prefetcher (with ... as batches) before reading from it")
        while not self._closed.is_set():
            before = perf_counter()
            item = self._ready.get()
            self.waited_s += perf_counter() - before
            if isinstance(item, tuple):
                yield item
                continue
            self._closed.set()  # nothing follows: reading on must end, not wait
            if item is not None:
                raise item

    def _produce(self) -> None:
        try:
            for step in self._steps:
                crops = self._sampler.batch(step)
                if self._pin:
                    crops = crops.pinned()
                if not self._put((step, crops)):
                    return
            self._put(None)
        except BaseException as error:  # whatever it is, the consumer must see it
            self._put(error)

    def _put(self, item: tuple[int, Crops] | BaseException | None) -> bool:
        """Wait for room; False once closed."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.05)
            except queue.Full:
                continue
            return True
        return False
