"""Many pictures into one zip: complete or absent, every file accounted for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pytest
from PIL import Image
from tiny_service import held

import demo.batch
from demo.batch import MANIFEST, batch
from demo.jobs import BatchResult, Choice, CompareRequest, Numbers, Pane, Progress, Result
from demo.lane import Lane
from demo.limits import Limits
from demo.service import Service
from demo.workspace import Workspace
from srkd import load_model, upscale
from srkd.errors import MissingError, SrkdError
from srkd.images import picture_size, read_picture, write_png

if TYPE_CHECKING:
    from collections.abc import Iterator

SCALE = 2
CHOICE = Choice("tiny", "ort", "fp16")


@dataclass
class StandIn:
    """Enlarges by repetition, row by row; a picture of one pixel fails half way."""

    folder: Path
    workspace: Workspace
    limits: Limits = field(default_factory=Limits)
    lane: Lane = field(default_factory=Lane)
    closed: int = 0

    def models(self) -> list[Any]:
        return [SimpleNamespace(key="tiny", label="Tiny", scale=SCALE, parameters=7)]

    def check(self, request: CompareRequest) -> None:
        assert request.choices == (CHOICE,)
        picture_size(request.picture)

    def upscale(self, picture: Path, name: str, choice: Choice, tile: Any) -> Iterator[Any]:
        try:
            rgb = read_picture(picture).rgb
            for done in (0.0, 0.5, 1.0):
                yield Progress(done, f"model 1/1 · tile {done} · ~9 s")
                if rgb.shape[0] == 1:
                    raise SrkdError(f"{picture} has one row.")
            sr = rgb.repeat(SCALE, 0).repeat(SCALE, 1)
            file = self.folder / f"{picture.name}.made.png"
            write_png(file, sr)
            numbers = Numbers(total_s=0.5, engine="ort", precision="fp16")
            pane = Pane("tiny", "Tiny", "model", file, sr.shape[:2], numbers, ("a note",))
            yield Result((pane,), name, SCALE, rgb.shape[:2], "")
        finally:
            self.closed += 1


@pytest.fixture
def service(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path, Workspace(tmp_path / "out"))


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def uploads(folder: Path, *sizes: tuple[int, int]) -> list[tuple[Path, str]]:
    """Pictures under names of the server's own, called p0.png, p1.png and so on by the user."""
    files = []
    for i, size in enumerate(sizes):
        write_png(folder / f"upload{i}", noise(*size, seed=i))
        files.append((folder / f"upload{i}", f"p{i}.png"))
    return files


def finish(events: Iterator[Any]) -> tuple[list[Progress], BatchResult]:
    *told, last = events
    assert isinstance(last, BatchResult)
    return told, last


def made_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_zip_holds_the_pictures_and_their_story(service: StandIn, tmp_path: Path) -> None:
    files = uploads(tmp_path, (6, 8), (5, 4))
    _, done = finish(batch(service, files, CHOICE, "auto", "png"))
    with ZipFile(done.zip) as zipped:
        assert zipped.testzip() is None
        assert zipped.namelist() == ["p0_x2_tiny_ort-fp16.png", "p1_x2_tiny_ort-fp16.png", MANIFEST]
        assert {info.compress_type for info in zipped.infolist()} == {ZIP_STORED}
        zipped.extractall(tmp_path / "back")
    for i, (h, w) in enumerate([(6, 8), (5, 4)]):
        back = read_picture(tmp_path / "back" / f"p{i}_x2_tiny_ort-fp16.png").rgb
        assert np.array_equal(back, noise(h, w, seed=i).repeat(2, 0).repeat(2, 1))
    story = json.loads((tmp_path / "back" / MANIFEST).read_text())
    assert story["model"] == {"key": "tiny", "label": "Tiny", "scale": 2, "parameters": 7}
    assert (story["engine"], story["precision"], story["tile"]) == ("ort", "fp16", "auto")
    assert story["srkd"] and story["environment"]["versions"]["python"]
    assert story["files"][1] == {
        "name": "p1.png",
        "entry": "p1_x2_tiny_ort-fp16.png",
        "lr_size": [5, 4],
        "sr_size": [10, 8],
        "seconds": 0.5,
        "notes": ["a note"],
        "error": None,
    }
    assert str(tmp_path) not in json.dumps(story)
    # What the zip was made from is not kept twice.
    assert made_in(done.zip.parent) == {done.zip.name}
    assert made_in(service.workspace.root) == {done.zip.parent.name}
    assert not [p for p in tmp_path.iterdir() if "made" in p.name]


def test_bad_files_are_listed_and_the_others_go_on(service: StandIn, tmp_path: Path) -> None:
    files = uploads(tmp_path, (6, 8), (1, 9), (5, 4))
    broken = tmp_path / "upload9"
    broken.write_text("<svg>")
    files.insert(1, (broken, "drawing.svg"))
    _, done = finish(batch(service, files, CHOICE, "auto", "png"))
    told = {f.name: f.error for f in done.files}
    assert (
        told["drawing.svg"] is not None and "drawing.svg is an SVG drawing" in told["drawing.svg"]
    )
    assert told["p1.png"] == "p1.png has one row."  # failed while it ran
    assert told["p0.png"] is None and told["p2.png"] is None
    assert service.closed == 3
    with ZipFile(done.zip) as zipped:
        assert len(zipped.namelist()) == 3
        assert [f["name"] for f in json.loads(zipped.read(MANIFEST))["files"]] == list(told)


def test_batch_of_which_nothing_comes_is_an_error(service: StandIn, tmp_path: Path) -> None:
    files = uploads(tmp_path, (1, 9), (1, 4))
    with pytest.raises(SrkdError, match=r"None of the files.* p0.png: p0.png has one row. p1.png:"):
        list(batch(service, files, CHOICE, "auto", "png"))
    assert made_in(service.workspace.root) == set()
    broken = [(tmp_path / "none", f"n{i}.png") for i in range(5)]
    with pytest.raises(SrkdError, match=r"n2.png: .* And 2 more\.") as told:
        list(batch(service, broken, CHOICE, "auto", "png"))
    assert str(tmp_path) not in str(told.value)


def test_progress_never_falls_and_counts_pixels(service: StandIn, tmp_path: Path) -> None:
    files = uploads(tmp_path, (10, 10), (1, 100), (20, 20))
    told, _ = finish(batch(service, files, CHOICE, "auto", "png"))
    done = [event.done for event in told]
    assert all(a <= b for a, b in pairwise(done))
    # 100 pixels of 600 are the first file, 100 the one that fails, 400 the last.
    assert done == pytest.approx([0, 50 / 600, 100 / 600, 100 / 600, 200 / 600, 400 / 600, 1])
    assert told[1].text.startswith("file 1/3 · p0.png · model 1/1 · tile 0.5 · ~")
    assert "9 s" not in told[1].text  # of the file alone
    assert told[-1].left_s == 0


@pytest.mark.parametrize("after", range(1, 7))
def test_cancelled_batch_leaves_no_file(service: StandIn, tmp_path: Path, after: int) -> None:
    files = uploads(tmp_path, (6, 8), (5, 4))
    events = batch(service, files, CHOICE, "auto", "png")
    for _ in range(after):
        next(events)
    events.close()
    assert made_in(service.workspace.root) == set()
    assert service.closed == (1 if after <= 3 else 2)  # the running job was closed at once


def test_full_disk_leaves_no_file(
    service: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ZipFile, "writestr", full)
    with pytest.raises(SrkdError, match=r"the server's disk.*No space left on device") as told:
        list(batch(service, uploads(tmp_path, (6, 8)), CHOICE, "auto", "png"))
    assert str(tmp_path) not in str(told.value)
    assert made_in(service.workspace.root) == set()


def test_entries_are_unique_on_systems_that_see_no_case(service: StandIn, tmp_path: Path) -> None:
    files = uploads(tmp_path, *[(4, 4)] * 4)
    names = ["a.png", "A.png", "../a.jpg", "\uff41.png"]
    files = [(path, name) for (path, _), name in zip(files, names, strict=True)]
    _, done = finish(batch(service, files, CHOICE, "auto", "png"))
    end = "_x2_tiny_ort-fp16"
    assert [f.entry for f in done.files] == [
        f"a{end}.png",
        f"A{end}_2.png",
        f"a{end}_3.png",
        f"\uff41{end}_4.png",
    ]


def test_original_formats(service: StandIn, tmp_path: Path) -> None:
    Image.fromarray(noise(6, 8)).save(tmp_path / "x.jpg")
    Image.fromarray(noise(6, 8)).save(tmp_path / "y.bmp")
    files = [(tmp_path / "x.jpg", "x.jpg"), (tmp_path / "y.bmp", "wrong.png")]
    _, done = finish(batch(service, files, CHOICE, "auto", "original"))
    assert [Path(f.entry or "").suffix for f in done.files] == [".jpg", ".bmp"]
    assert "JPEG of quality 95 is lossy" in done.files[0].notes[-1]


def test_a_batch_converts_as_a_job_of_the_device(service: StandIn, tmp_path: Path) -> None:
    """What ran beside the jobs would lengthen the times that one of them measures."""
    Image.fromarray(noise(6, 8)).save(tmp_path / "x.jpg")
    events = batch(service, [(tmp_path / "x.jpg", "x.jpg")], CHOICE, "auto", "original")
    while "tile 1.0" not in next(events).text:
        pass
    with held(service.lane):
        assert next(events).text.startswith(
            "file 1/1 · x.jpg · waiting for the device · 1 job before this one"
        )
    told, done = finish(events)
    assert [event.text.rpartition(" · ~")[0] for event in told] == [
        "file 1/1 · x.jpg · writing jpg"
    ]
    assert done.files[0].error is None


def test_limits(service: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = uploads(tmp_path, (6, 8), (5, 4))
    service.limits = Limits(max_files=1)
    for wrong in (files, []):
        with pytest.raises(
            SrkdError, match=f"batch of {len(wrong)} files was asked for; give 1 to 1"
        ):
            next(batch(service, wrong, CHOICE, "auto", "png"))
    service.limits = Limits()
    monkeypatch.setattr(demo.batch, "MOST_SR_PX", 4 * 67)
    with pytest.raises(SrkdError, match="a batch makes at most 0"):
        next(batch(service, files, CHOICE, "auto", "png"))
    monkeypatch.setattr(demo.batch, "MOST_SR_PX", 4 * 68)
    finish(batch(service, files, CHOICE, "auto", "png"))


def test_batch_without_room_is_refused_before_anything_is_made(
    service: StandIn, tmp_path: Path
) -> None:
    files = uploads(tmp_path, (600, 1000), (600, 1000))
    # A zip of two pictures of 9.2 MiB, and one of them beside it.
    service.workspace.max_bytes = 20 * 2**20
    with pytest.raises(MissingError, match=r"up to 27 MiB of disk.* fewer files"):
        list(batch(service, files, CHOICE, "auto", "png"))
    assert service.closed == 0
    assert made_in(service.workspace.root) == set()


def test_room_of_a_running_batch_is_its_own(service: StandIn, tmp_path: Path) -> None:
    files = uploads(tmp_path, (60, 100), (60, 100))
    service.workspace.max_bytes = 300_000
    events = batch(service, files, CHOICE, "auto", "png")
    next(events)
    with pytest.raises(MissingError, match="Other jobs hold"), service.workspace.job(20_000):
        pass
    events.close()
    with service.workspace.job(20_000):
        pass


def test_with_a_network_of_ours(tmp_path: Path) -> None:
    files = uploads(tmp_path, (8, 9), (7, 7))
    files.append((tmp_path / "missing", "missing.png"))
    made = Service()
    try:
        key = next(m.key for m in made.models() if m.key.startswith("rcan_c") and m.scale == 4)
        events = batch(made, files, Choice(key), "auto", "png")
        _, done = finish(events)
        with ZipFile(done.zip) as zipped:
            zipped.extractall(tmp_path / "back")
    finally:
        made.close()
    assert [f.error is None for f in done.files] == [True, True, False]
    for (path, _), told in zip(files[:2], done.files, strict=False):
        back = read_picture(tmp_path / "back" / str(told.entry)).rgb
        assert np.array_equal(back, upscale(path, load_model("rcan_c", 4)))
