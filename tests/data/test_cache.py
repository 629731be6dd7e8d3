"""The decoded cache: right pixels, built once, whatever else runs, dies or changes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from forked import CONTEXT
from PIL import Image

from srkd.data.cache import TrainingSet, open_training_set
from srkd.data.degradation import downscale_uint8
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight images of odd sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(8):
        image = rng.integers(0, 256, (40 + 3 * n, 65 - 2 * n, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{n:04}.png")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


class Counter:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))


def assert_right(images: TrainingSet, folder: Path, scale: int) -> None:
    paths = sorted(folder.iterdir())
    assert images.names == tuple(path.stem for path in paths)
    for n, path in enumerate(paths):
        hr = pixels(path)
        H, W = (side - side % scale for side in hr.shape[:2])  # noqa: N806
        assert images.size(n) == (H, W)
        assert np.array_equal(images.hr(n), hr[:H, :W])
        assert np.array_equal(images.lr(n), downscale_uint8(hr, scale))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pixels_sizes_and_names(photos: Path, cache: Path, scale: int) -> None:
    counter = Counter()
    images = open_training_set(photos, scale, cache=cache, progress=counter)
    assert (len(images), images.scale) == (8, scale)
    assert_right(images, photos, scale)
    assert counter.calls == [(n, 8) for n in range(1, 9)]
    written = [cache / images.digest / name for name in ("hr.bin", "lr.bin")]
    assert images.cache_bytes == sum(path.stat().st_size for path in written)


def test_arrays_are_read_only_views(photos: Path, cache: Path) -> None:
    images = open_training_set(photos, 2, cache=cache)
    with pytest.raises(ValueError, match="read-only"):
        images.hr(0)[0, 0] = 0
    assert images.hr(0).base is not None


def test_second_opening_neither_builds_nor_reads_the_photos(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_training_set(photos, 2, cache=cache)

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("srkd.data.cache.sha256", refuse)
    counter = Counter()
    again = open_training_set(str(photos), 2, cache=cache, progress=counter)
    assert again.digest == first.digest
    assert counter.calls == []


def test_touched_or_moved_files_are_the_same_set(photos: Path, cache: Path, tmp_path: Path) -> None:
    first = open_training_set(photos, 2, cache=cache)
    os.utime(photos / "0003.png", (1, 1))
    counter = Counter()
    assert open_training_set(photos, 2, cache=cache, progress=counter).digest == first.digest
    moved = tmp_path / "elsewhere"
    shutil.copytree(photos, moved)
    assert open_training_set(moved, 2, cache=cache, progress=counter).digest == first.digest
    assert counter.calls == []


def test_changed_pixels_are_another_set(photos: Path, cache: Path) -> None:
    first = open_training_set(photos, 2, cache=cache)
    changed = pixels(photos / "0003.png").copy()
    changed[0, 0] ^= 255
    Image.fromarray(changed).save(photos / "0003.png")
    second = open_training_set(photos, 2, cache=cache)
    assert second.digest != first.digest
    assert_right(second, photos, 2)


def test_scale_name_and_lr_files_are_part_of_the_key(
    photos: Path, cache: Path, tmp_path: Path
) -> None:
    digests = {open_training_set(photos, scale, cache=cache).digest for scale in (2, 3)}
    lr = tmp_path / "lr"
    lr.mkdir()
    for path in photos.iterdir():
        Image.fromarray(downscale_uint8(pixels(path), 2)).save(lr / f"{path.stem}x2.png")
    digests.add(open_training_set(photos, 2, lr=lr, cache=cache).digest)
    (photos / "0000.png").rename(photos / "first.png")
    digests.add(open_training_set(photos, 2, cache=cache).digest)
    assert len(digests) == 4


def test_given_lr_files_are_used(photos: Path, cache: Path, tmp_path: Path) -> None:
    lr = tmp_path / "lr" / "X2"
    lr.mkdir(parents=True)
    for n, path in enumerate(sorted(photos.iterdir())):
        h, w = (side // 2 for side in pixels(path).shape[:2])
        Image.fromarray(np.full((h, w, 3), n, np.uint8)).save(lr / path.name)
    images = open_training_set(photos, 2, lr=lr.parent, cache=cache)
    assert all(np.all(images.lr(n) == n) for n in range(8))
    assert images.lr(7).shape == (30, 25, 3)


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_damage_is_said_and_mended(
    photos: Path, cache: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = cache / open_training_set(photos, 2, cache=cache).digest
    if damage == "cut":
        os.truncate(folder / "hr.bin", 1000)
    elif damage == "gone":
        (folder / "lr.bin").unlink()
    else:
        (folder / "index.json").write_text('{"scale": 2, "names": ["a"]')
    capsys.readouterr()
    counter = Counter()
    images = open_training_set(photos, 2, cache=cache, progress=counter)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("the image cache is damaged and will be built again")
    assert len(counter.calls) == 8
    assert_right(images, photos, 2)


def test_default_place_is_srkd_cache(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path / "from_env"))
    digest = open_training_set(photos, 2).digest
    assert (tmp_path / "from_env" / digest / "hr.bin").is_file()
    monkeypatch.delenv("SRKD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_training_set(photos, 2)
    assert (tmp_path / "home" / ".cache" / "srkd" / digest / "hr.bin").is_file()


def test_full_disk_is_refused_before_building(photos: Path, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(SrkdError, match=r"need 0.00 GB .* has 0.00 GB free; .* SRKD_CACHE"):
        open_training_set(photos, 2, cache=cache)
    assert not list(cache.glob("*.building"))


def test_unreadable_photo_leaves_nothing_half_built(photos: Path, cache: Path) -> None:
    content = (photos / "0005.png").read_bytes()
    (photos / "0005.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(SrkdError, match=r"0005\.png"):
        open_training_set(photos, 2, cache=cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == [cache / "seen"]


def test_bad_requests_are_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SrkdError, match=r"cannot write the image cache .* Set SRKD_CACHE"):
        open_training_set(photos, 2, cache=tmp_path / "file" / "cache")
    with pytest.raises(SrkdError, match="there is no folder"):
        open_training_set(tmp_path / "nowhere", 2, cache=tmp_path / "cache")
    with pytest.raises(SrkdError, match="built-in images have no LR folder"):
        open_training_set("builtin", 2, lr=photos, cache=tmp_path / "cache")
    with pytest.raises(SrkdError, match="scale 1 enlarges nothing"):
        open_training_set(photos, 1, cache=tmp_path / "cache")


def test_builtin(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srkd.data import builtin

    made = builtin.training_images()
    monkeypatch.setattr(builtin, "training_images", lambda: made)
    counter = Counter()
    images = open_training_set("builtin", 4, cache=cache, progress=counter)
    assert images.names == tuple(name for name, _ in made)
    for n, (_, image) in enumerate(made):
        assert np.array_equal(images.lr(n), downscale_uint8(image, 4))
    # The second time they are not even drawn; with another Pillow they are, and found to be the same.
    monkeypatch.setattr(builtin, "training_images", list)
    assert open_training_set("builtin", 4, cache=cache, progress=counter).digest == images.digest
    monkeypatch.setattr(builtin, "training_images", lambda: made)
    monkeypatch.setattr("PIL.__version__", "0.0")
    assert open_training_set("builtin", 4, cache=cache, progress=counter).digest == images.digest
    assert len(counter.calls) == len(made)


def build_when_told(
    photos: Path, cache: Path, signals: Path, scale: int, told: Connection, said: Path
) -> None:
    """Begins when the file "go" exists, stops after its first image until "on" exists."""

    def wait_for(name: str) -> None:
        while not (signals / name).exists():
            time.sleep(0.005)

    def progress(done: int, total: int) -> None:
        told.send(f"built {done} {total}")
        wait_for("on")

    with said.open("w") as stderr:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
    told.send("ready")
    wait_for("go")
    images = open_training_set(photos, scale, cache=cache, progress=progress)
    told.send(f"digest {images.digest} {images.hr(len(images) - 1).sum()}")


class Child:
    """A real second process that runs `build_when_told`."""

    def __init__(self, photos: Path, cache: Path, signals: Path, scale: int, name: str) -> None:
        self.said = signals / f"{name}.stderr"
        self.said.touch()
        self.reader, writer = CONTEXT.Pipe(duplex=False)
        given = (photos, cache, signals, scale, writer, self.said)
        self.process = CONTEXT.Process(target=build_when_told, args=given)
        self.process.start()
        writer.close()

    def line(self) -> str:
        return self.reader.recv()

    def finish(self) -> list[str]:
        lines = []
        with contextlib.suppress(EOFError):
            while True:
                lines.append(self.reader.recv())
        self.process.join(120)
        assert self.process.exitcode == 0
        return lines


@pytest.fixture
def signals(tmp_path: Path) -> Path:
    folder = tmp_path / "signals"
    folder.mkdir()
    return folder


def test_two_processes_at_once_build_once(photos: Path, cache: Path, signals: Path) -> None:
    children = [Child(photos, cache, signals, 2, name) for name in "ab"]
    assert [child.line() for child in children] == ["ready", "ready"]
    (signals / "go").touch()
    deadline = time.monotonic() + 120
    while not any(child.said.read_text() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    # One waits, the other holds the lock in the middle of its build.
    (signals / "on").touch()
    outputs = [child.finish() for child in children]
    assert sorted(len(output) for output in outputs) == [1, 1 + 8]
    said = sorted(child.said.read_text() for child in children)
    assert said == ["", "waiting for another process that builds the same image cache\n"]
    assert len({output[-1] for output in outputs}) == 1
    assert_right(open_training_set(photos, 2, cache=cache), photos, 2)


def test_a_killed_build_is_cleaned_up_and_done_again(
    photos: Path, cache: Path, signals: Path
) -> None:
    killed, running = (Child(photos, cache, signals, scale, f"x{scale}") for scale in (2, 3))
    (signals / "go").touch()
    for child in (killed, running):
        assert [child.line(), child.line()] == ["ready", "built 1 8"]
    killed.process.kill()
    killed.process.join(60)
    assert killed.process.exitcode == -signal.SIGKILL
    assert len(list(cache.glob("*.building"))) == 2
    # Whoever builds next, of whatever set, removes the one that nobody builds any more.
    assert_right(open_training_set(photos, 4, cache=cache), photos, 4)
    assert len(list(cache.glob("*.building"))) == 1
    assert_right(open_training_set(photos, 2, cache=cache), photos, 2)
    (signals / "on").touch()
    assert "built 8 8" in running.finish()
    assert running.said.read_text() == ""
    assert not list(cache.glob("*.building"))
    assert_right(open_training_set(photos, 3, cache=cache), photos, 3)
