"""Training images decoded once, as memory-mapped uint8 files that every process shares.

    <cache>/<digest>/hr.bin  lr.bin     (H, W, 3) and (h, w, 3) of image after image, no padding
                     index.json         names and sizes, which give the offsets
    <cache>/<digest>.lock               held while that folder is built
    <cache>/seen/<key>                  the digest of a folder whose files have these paths, sizes and
                                        times, so that unchanged folders are not read again

The digest is over the bytes of every file, the scale and the versions of this format and of the
degradation. A folder appears by a rename, complete or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

import numpy as np

from srkd.data.degradation import DEGRADATION_VERSION
from srkd.data.folders import complete_pair, list_pairs, read_pair
from srkd.errors import SrkdError
from srkd.files import read_json, sha256, write_text
from srkd.images import picture_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from srkd.data.folders import TrainingImage

CACHE_FORMAT = 1
BUILTIN = "builtin"
IMAGE_CACHE = "image cache"

Opened = TypeVar("Opened")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Entry:
    """One image to build: `read` gives (hr, lr) uint8 arrays, hr cropped to scale times lr."""

    name: str
    content: str  # hash of what `read` reads
    pixels: int  # of HR, for the free-space check
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


class TrainingSet:
    """Decoded images, opened from a cache folder. Arrays are read-only views of the mapped files."""

    def __init__(self, folder: Path) -> None:
        """Raises `SrkdError` when the folder is damaged."""
        index = read_json(folder / "index.json")
        try:
            self.scale = int(index["scale"])
            self.names: tuple[str, ...] = tuple(index["names"])
            self._sizes = [(int(H), int(W)) for H, W in index["sizes"]]
            if not 0 < len(self.names) == len(self._sizes):
                raise ValueError(f"{len(self.names)} names, {len(self._sizes)} sizes")
        except (KeyError, TypeError, ValueError) as error:
            raise SrkdError(f"{folder / 'index.json'} is damaged ({error!r})") from error
        self.digest = folder.name
        self._ends = np.cumsum([3 * H * W for H, W in self._sizes])
        size = int(self._ends[-1])
        self._hr = open_flat(folder / "hr.bin", size)
        self._lr = open_flat(folder / "lr.bin", size // self.scale**2)
        self.cache_bytes = self._hr.size + self._lr.size

    def __len__(self) -> int:
        return len(self.names)

    def size(self, i: int) -> tuple[int, int]:
        """(H, W) of the high-resolution image, multiples of the scale."""
        return self._sizes[i]

    def hr(self, i: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        height, width = self._sizes[i]
        end = int(self._ends[i])
        return self._hr[end - 3 * height * width : end].reshape(height, width, 3)

    def lr(self, i: int) -> np.ndarray:
        """(h, w, 3) uint8."""
        h, w = (side // self.scale for side in self._sizes[i])
        end = int(self._ends[i]) // self.scale**2
        return self._lr[end - 3 * h * w : end].reshape(h, w, 3)


def open_training_set(
    data: str | Path,
    scale: int,
    lr: str | Path | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingSet:
    """The training images of `data`, from the cache; built there first when it is not yet.

    data      "builtin", or a folder of HR images
    lr        folder of LR images; without it LR is made from HR (uint8 bicubic, symmetric border)
    cache     default: SRKD_CACHE, else ~/.cache/srkd
    progress  called with (images done, images in all) while building
    """
    if scale < 2:
        raise SrkdError(f"scale {scale} enlarges nothing; choose 2, 3 or 4.")
    cache = (cache or default_cache()).expanduser().absolute()
    try:
        (cache / "seen").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(IMAGE_CACHE, cache, error) from error
    key, entries_of = _source(data, scale, lr)
    seen, ready = _remembered(cache, scale, key)
    if ready is not None:
        return ready
    entries = entries_of()
    digest = _digest(entries, scale)
    # The note only saves reading everything again: a complete cache may lie on a read-only disk.
    with suppress(SrkdError):
        write_text(seen, digest)
    folder = cache / digest
    ready = open_if_whole(folder, TrainingSet, partial(say_damaged, IMAGE_CACHE))
    if ready is not None:
        return ready
    pixels = sum(entry.pixels for entry in entries)
    return build_once(
        folder,
        TrainingSet,
        lambda temporary: _write(temporary, entries, scale, progress),
        cache=IMAGE_CACHE,
        contents="the decoded images",
        needed=3 * pixels + 3 * pixels // scale**2,
    )


def is_cached(data: str | Path, scale: int, lr: str | Path | None, cache: Path | None) -> bool:
    """Whether `open_training_set` of the same arguments would find the images decoded."""
    key, _ = _source(data, scale, lr)
    folder = (cache or default_cache()).expanduser().absolute()
    return _remembered(folder, scale, key)[1] is not None


def _source(
    data: str | Path, scale: int, lr: str | Path | None
) -> tuple[object, Callable[[], list[_Entry]]]:
    """What tells these images from others without reading them, and a function that lists them."""
    if str(data) == BUILTIN:
        if lr is not None:
            raise SrkdError(
                "the built-in images have no LR folder; give --data FOLDER with --lr-data, or leave --lr-data away."
            )
        from srkd.data.builtin import causes

        return causes(), partial(_builtin_entries, scale)
    pairs = list_pairs(Path(data).expanduser(), Path(lr).expanduser() if lr else None, scale)
    return _stat_key(pairs), partial(_file_entries, pairs, scale)


def _remembered(cache: Path, scale: int, key: object) -> tuple[Path, TrainingSet | None]:
    """Where the digest of a source is noted, and its images where they are there and whole."""
    seen = cache / "seen" / hash_json([CACHE_FORMAT, DEGRADATION_VERSION, scale, key])
    digest = _remembered_digest(seen)
    return seen, open_if_whole(cache / digest, TrainingSet) if digest else None


def default_cache() -> Path:
    return Path(os.environ.get("SRKD_CACHE") or "~/.cache/srkd")


def open_flat(path: Path, size: int) -> np.ndarray:
    """The bytes of a file, mapped read-only; raises `SrkdError` when they are not `size` bytes."""
    found = path.stat().st_size if path.is_file() else -1
    if found != size:
        state = "is gone" if found < 0 else f"holds {found} bytes"
        raise SrkdError(f"{path} {state}, the index says {size} bytes")
    # A plain array over the map: slicing a np.memmap costs ten times as much.
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


# --- what a set is made of ------------------------------------------------------------------------


def _stat_key(pairs: Iterable[TrainingImage]) -> str:
    def facts(path: Path) -> tuple[str, int, int]:
        stat = path.stat()
        return str(path.resolve()), stat.st_size, stat.st_mtime_ns

    return hash_json([(p.name, facts(p.hr), facts(p.lr) if p.lr else None) for p in pairs])


def _remembered_digest(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    # A damaged note must not lead out of the cache folder.
    return text if len(text) == 64 and text.isalnum() else None


def _digest(entries: list[_Entry], scale: int) -> str:
    contents = [(entry.name, entry.content) for entry in entries]
    return hash_json([CACHE_FORMAT, DEGRADATION_VERSION, scale, contents])


def hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _builtin_entries(scale: int) -> list[_Entry]:
    from srkd.data.builtin import training_images

    def entry(name: str, image: np.ndarray) -> _Entry:
        content = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        pixels = image.shape[0] * image.shape[1]
        return _Entry(name, content, pixels, lambda: complete_pair(name, image, None, scale))

    return [entry(name, image) for name, image in training_images()]


def _file_entries(pairs: Iterable[TrainingImage], scale: int) -> list[_Entry]:
    def entry(pair: TrainingImage) -> _Entry:
        height, width = picture_size(pair.hr)
        content = sha256(pair.hr) + (sha256(pair.lr) if pair.lr else "")
        return _Entry(pair.name, content, height * width, lambda: read_pair(pair, scale))

    return [entry(pair) for pair in pairs]


# --- building -------------------------------------------------------------------------------------


def open_if_whole(
    folder: Path,
    open_folder: Callable[[Path], Opened],
    damaged: Callable[[SrkdError], None] = lambda error: None,
) -> Opened | None:
    """None when there is no such folder, or when `open_folder` finds it damaged, which `damaged` is told."""
    if not folder.is_dir():
        return None
    try:
        return open_folder(folder)
    except SrkdError as error:
        damaged(error)
        return None


def say_damaged(cache: str, error: SrkdError) -> None:
    _say(f"the {cache} is damaged and will be built again: {error}")


def build_once(
    folder: Path,
    open_folder: Callable[[Path], Opened],
    write: Callable[[Path], None],
    *,
    cache: str,
    contents: str,
    needed: int,
) -> Opened:
    """Build `folder` by a rename, complete or not at all, in one process while others wait for it.

    write            called with a temporary folder, which it fills
    cache, contents  what messages call the kind of cache, and what it is made of
    needed           bytes of the files that `write` will write
    """
    with _locked(folder.with_name(f"{folder.name}.lock"), cache):
        # Another process may have built it while we waited for the lock.
        ready = open_if_whole(folder, open_folder)
        if ready is not None:
            return ready
        temporary = folder.with_name(f"{folder.name}.building")
        try:
            _remove_leftovers(folder.parent, ours=folder.name)
            if folder.exists():
                shutil.rmtree(folder)
            check_space(folder.parent, contents, needed)
            temporary.mkdir()
            write(temporary)
            for path in temporary.iterdir():
                with path.open("rb") as written:
                    os.fsync(written.fileno())
            temporary.rename(folder)
        except OSError as error:
            raise cannot_write(cache, folder.parent, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return open_folder(folder)


@contextmanager
def _locked(path: Path, cache: str) -> Iterator[None]:
    """Hold an exclusive lock, which the system drops when this process ends in any way.

    The file stays: removing it would let two processes lock two files of one name.
    """
    try:
        file = path.open("w")
    except OSError as error:
        raise cannot_write(cache, path.parent, error) from error
    with file:
        try:
            if not _try_lock(file):
                _say(f"waiting for another process that builds the same {cache}")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise cannot_write(cache, path.parent, error) from error
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_leftovers(cache: Path, ours: str) -> None:
    """Remove what killed builders left: their lock is free. Our own lock is held by us."""
    for leftover in cache.glob("*.building"):
        digest = leftover.name.removesuffix(".building")
        with (cache / f"{digest}.lock").open("w") as lock:
            if digest == ours or _try_lock(lock):
                shutil.rmtree(leftover, ignore_errors=True)


def check_space(folder: Path, contents: str, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + 2**20:
        raise SrkdError(
            f"{contents} need {gigabytes(needed)} in {folder}, which has {gigabytes(free)} free; "
            "free some space or set SRKD_CACHE to a folder on a larger disk."
        )


def _write(
    folder: Path,
    entries: list[_Entry],
    scale: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    sizes: list[tuple[int, int]] = []
    with (folder / "hr.bin").open("wb") as hr_file, (folder / "lr.bin").open("wb") as lr_file:
        for hr, lr in _in_order(lambda entry: entry.read(), entries):
            hr_file.write(np.ascontiguousarray(hr).data)
            lr_file.write(np.ascontiguousarray(lr).data)
            sizes.append((hr.shape[0], hr.shape[1]))
            if progress is not None:
                progress(len(sizes), len(entries))
    index = {"scale": scale, "names": [entry.name for entry in entries], "sizes": sizes}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _in_order(function: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
    """Map in threads (decoding and resizing let others run) with few results waiting in memory."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def cannot_write(cache: str, folder: Path, error: OSError) -> SrkdError:
    if error.errno == errno.ENOSPC:
        return SrkdError(
            f"the disk filled up while writing the {cache} {folder}; "
            "free some space or set SRKD_CACHE to a folder on a larger disk."
        )
    return SrkdError(
        f"cannot write the {cache} {folder}: {error.strerror or error}. "
        "Set SRKD_CACHE to a folder that can be written."
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
