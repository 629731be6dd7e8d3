"""Outputs of frozen teachers over the training images, computed once, so that a step needs no teacher pass.

    <cache>/teachers/<key>/sr.bin       (H, W, 3) float16 of image after image, no padding
                           index.json   their sizes, which give the offsets
    <cache>/teachers/<key>.lock         held while that folder is built

The key is a hash of the training set, the scale, the teacher's weights and the version of this computation.
A folder appears by a rename, complete or not at all. float16 rounds values below 1 by at most 2**-12, a
sixteenth of an 8-bit level; 8-bit outputs would add the noise of half a level to every target.

What differs from running the teacher on the crop, T(crop(x)): crops are cut out of T(x), so

- near the edges of a crop the target knows the image beyond them, where T(crop(x)) sees padding: within
  `Facts.receptive_field_px` the two differ, further in they agree (networks that look at the whole image
  differ everywhere);
- a crop under the symmetry A has the target A T(x). A learned network does not commute with symmetries,
  T(A x) != A T(x), so this is another, equally good target: one member of the self-ensemble.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from srkd.aggregate import Aggregate
from srkd.data.cache import (
    build_once,
    cannot_write,
    default_cache,
    gigabytes,
    hash_json,
    open_flat,
    open_if_whole,
    say_damaged,
)
from srkd.errors import CheckFailedError, SrkdError
from srkd.evaluate import plain_float32
from srkd.files import read_json
from srkd.images import to_tensor
from srkd.infer import feature_channels
from srkd.progress import duration
from srkd.tiling import auto_tile, bands, memory_budget

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from srkd.data.cache import TrainingSet
    from srkd.loaded import LoadedModel

VERSION = 1  # of the layout and of the computation; a change of either needs another number
TEACHER_CACHE = "teacher cache"
LARGEST_VALUE = 100.0  # outputs are about [0, 1]; float16 would hold up to 65504


class TaughtImages:
    """Outputs of one teacher, opened from a cache folder. Arrays are read-only views of the mapped file."""

    def __init__(self, folder: Path) -> None:
        """Raises `SrkdError` when the folder is damaged."""
        index = read_json(folder / "index.json")
        try:
            self._sizes = [(int(H), int(W)) for H, W in index["sizes"]]
            if not self._sizes:
                raise ValueError("no sizes")
        except (KeyError, TypeError, ValueError) as error:
            raise SrkdError(f"{folder / 'index.json'} is damaged ({error!r})") from error
        self.key = folder.name
        self._ends = np.cumsum([3 * H * W for H, W in self._sizes])
        self.bytes = 2 * int(self._ends[-1])
        self._sr = open_flat(folder / "sr.bin", self.bytes).view(np.float16)

    def __len__(self) -> int:
        return len(self._sizes)

    def sr(self, i: int) -> np.ndarray:
        """(H, W, 3) float16 in about [0, 1], not clamped."""
        height, width = self._sizes[i]
        end = int(self._ends[i])
        return self._sr[end - 3 * height * width : end].reshape(height, width, 3)


@dataclass(frozen=True)
class CachePlan:
    """Where the outputs of a teacher lie or will lie, their size on the disk, and whether they are there."""

    folder: Path
    bytes: int
    ready: bool
    images: int


def plan_teacher_cache(
    teacher_hash: str, data: TrainingSet, cache: Path | None, *, stacked: bool = False
) -> CachePlan:
    """What `open_teacher_cache` would find; nothing is computed or written.

    teacher_hash   of the teacher's weights (`srkd.models.weights_hash`)
    cache          default: SRKD_CACHE, else ~/.cache/srkd
    stacked        the teacher will work on cached outputs of others, which are rounded to float16
    """
    cache = (cache or default_cache()).expanduser().absolute()
    key = hash_json([VERSION, data.digest, data.scale, teacher_hash, stacked])
    folder = cache / "teachers" / key
    size = sum(2 * 3 * H * W for H, W in _sizes_of(data))
    ready = open_if_whole(folder, partial(_open, data)) is not None
    return CachePlan(folder, size, ready, len(data))


def open_teacher_cache(
    model: LoadedModel,
    teacher_hash: str,
    data: TrainingSet,
    cache: Path | None,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    stacked: Sequence[TaughtImages] = (),
) -> TaughtImages:
    """The outputs of a frozen teacher over all training images; computed first when they are not there.

    progress   called with (images done, images in all) while computing
    say        called with one line on cost and place before anything is computed, or on what is there
    stacked    for an `Aggregate` that is not there: the outputs of its teachers, in its order

    The teacher runs on `device` in float32, on whole images where memory allows, else in tiles.
    """
    if model.scale != data.scale:
        raise SrkdError(
            f"teacher {model.name} is x{model.scale}, the training images are x{data.scale}; "
            f"choose a x{data.scale} teacher."
        )
    aggregated = isinstance(model.network, Aggregate)
    plan = plan_teacher_cache(teacher_hash, data, cache, stacked=aggregated)
    open_folder = partial(_open, data)
    ready = open_if_whole(plan.folder, open_folder, partial(say_damaged, TEACHER_CACHE))
    if ready is not None:
        say(f"teacher cache: {model.name}, {gigabytes(ready.bytes)}, ready")
        return ready
    try:
        plan.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(TEACHER_CACHE, plan.folder.parent, error) from error
    return build_once(
        plan.folder,
        open_folder,
        lambda folder: _write(folder, _Passes(model, data, device, say, stacked), plan, progress),
        cache=TEACHER_CACHE,
        contents=f"the outputs of teacher {model.name}",
        needed=plan.bytes,
    )


def _sizes_of(data: TrainingSet) -> list[tuple[int, int]]:
    return [data.size(i) for i in range(len(data))]


def _open(data: TrainingSet, folder: Path) -> TaughtImages:
    """Raises `SrkdError` also when the folder is whole but of other images."""
    taught = TaughtImages(folder)
    if [taught.sr(i).shape[:2] for i in range(len(taught))] != _sizes_of(data):
        raise SrkdError(f"{folder / 'index.json'} lists other sizes than the training images have")
    return taught


# --- computing ------------------------------------------------------------------------------------


@dataclass
class _Passes:
    """A teacher over the images of a set. `noted`: it was said that tiles are not exact."""

    model: LoadedModel
    data: TrainingSet
    device: torch.device
    say: Callable[[str], None]
    stacked: Sequence[TaughtImages]
    noted: bool = False

    def __post_init__(self) -> None:
        self.model.network.to(self.device).eval()

    def output(self, i: int) -> np.ndarray:
        """(H, W, 3) float16 of image `i`."""
        facts, network, scale = self.model.facts, self.model.network, self.model.scale
        run: Callable[[Tensor], Tensor] = network
        read = self._lr
        if self.stacked:
            # Bands and tiles are cut in LR pixels, so the stack travels with scale^2 pixels in each.
            second = cast("Any", network).network
            run, read = (lambda packed: second(F.pixel_shuffle(packed, scale))), self._packed_stack
        h, w = self.data.lr(i).shape[:2]
        tile_px = auto_tile(h, w, facts, feature_channels(network), memory_budget(self.device))
        if tile_px is not None:
            self._note(i, tile_px)
        with torch.no_grad(), plain_float32():
            rows = bands(
                run,
                partial(read, i),
                (h, w),
                facts,
                tile_px,
                partial(self._to_float16, i),
                on_shrink=partial(self._note, i),
            )
            return np.concatenate(list(rows))

    def _lr(self, i: int, top: int, bottom: int) -> Tensor:
        return to_tensor(self.data.lr(i)[top:bottom]).to(self.device)

    def _packed_stack(self, i: int, top: int, bottom: int) -> Tensor:
        """Rows of the teachers' outputs on channels, (1, 3 T s^2, bottom - top, w)."""
        scale = self.data.scale
        rows = [taught.sr(i)[scale * top : scale * bottom] for taught in self.stacked]
        stack = torch.from_numpy(np.concatenate(rows, axis=2)).to(self.device, torch.float32)
        return F.pixel_unshuffle(stack.permute(2, 0, 1)[None], scale)

    def _to_float16(self, i: int, sr: Tensor) -> np.ndarray:
        """(1, 3, H, W) -> (H, W, 3); values that cannot be an image are refused."""
        largest = float(sr.abs().max())
        if not largest <= LARGEST_VALUE:  # so written, NaN is refused too
            raise CheckFailedError(
                f"teacher {self.model.name} gives values up to {largest:.3g} over training image "
                f"'{self.data.names[i]}', but an output is about [0, 1]; its weights are damaged or "
                "training diverged. Choose another checkpoint."
            )
        return sr[0].permute(1, 2, 0).to(torch.float16).cpu().numpy()

    def _note(self, i: int, tile_px: int) -> None:
        if self.noted or self.model.facts.exact_tiling:
            return
        self.noted = True
        self.say(
            f"{self.model.name} looks at the whole image, but '{self.data.names[i]}' does not fit in memory: "
            f"its outputs come from tiles of {tile_px} px or less and are not exact"
        )


def _write(
    folder: Path, passes: _Passes, plan: CachePlan, progress: Callable[[int, int], None] | None
) -> None:
    sizes = _sizes_of(passes.data)
    pixels = [height * width for height, width in sizes]
    middle = sorted(range(len(pixels)), key=pixels.__getitem__)[len(pixels) // 2]
    if passes.device.type == "cuda":
        passes.output(middle)  # loads the kernels, which would count as time of every image
    start = time.perf_counter()
    timed = passes.output(middle)
    seconds = (time.perf_counter() - start) * sum(pixels) / pixels[middle]
    passes.say(
        f"teacher cache: {passes.model.name} over {len(sizes)} images takes about {duration(seconds)} once "
        f"and {gigabytes(plan.bytes)} in {plan.folder.parent}"
    )
    with (folder / "sr.bin").open("wb") as file:
        for i in range(len(sizes)):
            sr = timed if i == middle else passes.output(i)
            file.write(sr.data)
            if progress is not None:
                progress(i + 1, len(sizes))
    (folder / "index.json").write_text(json.dumps({"sizes": sizes}), encoding="utf-8")
