"""Comparisons from request to result: the pictures, their order, their numbers, stopping, failing."""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny_service import CHOICES, last, picture, pixels, request, write_runs

from demo.jobs import Choice, Progress
from demo.service import Service
from demo.workspace import Workspace
from deploy.engines import EngineRunError
from srkd.errors import CheckFailedError, MissingError, SrkdError
from srkd.images import read_rgb8, write_png
from srkd.infer import upscale

PATIENCE_S = 20


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    made = Service(
        write_runs(tmp_path_factory.mktemp("runs")),
        workspace=Workspace(tmp_path_factory.mktemp("work")),
    )
    yield made
    made.close()


@pytest.fixture
def photo(tmp_path):
    return picture(tmp_path / "upload-1f.png")


def source(service, key):
    return service.shelf.sources[key]


def test_panes_come_in_order_and_are_what_upscale_makes(service, photo):
    result = last(service.compare(request(photo)))
    assert [pane.key for pane in result.panes] == [
        "nearest",
        "bicubic",
        "tiny_scratch",
        "tiny_distilled",
    ]
    assert [pane.role for pane in result.panes] == ["nearest", "bicubic", "model", "model"]
    assert (result.lr_size, result.scale, result.name) == ((24, 36), 2, "photo.png")
    for pane in result.panes:
        assert pane.size == read_rgb8(pane.file).shape[:2] == (48, 72)
    for pane in result.panes[2:]:
        assert np.array_equal(read_rgb8(pane.file), upscale(photo, source(service, pane.key)))


def test_a_shipped_network_gives_the_same_picture_here(service, tmp_path):
    photo = picture(tmp_path / "a.png", 17, 31)
    (pane,) = last(service.upscale(photo, "a.png", Choice("rcan_c_x4"))).panes
    assert np.array_equal(read_rgb8(pane.file), upscale(photo, "rcan_c"))


def test_tiles_do_not_show(service, tmp_path):
    photo = picture(tmp_path / "a.png", 70, 90)
    whole, tiled = (
        last(service.upscale(photo, "a.png", CHOICES[0], tile)).panes[0] for tile in ("auto", 16)
    )
    assert np.array_equal(read_rgb8(whole.file), read_rgb8(tiled.file))


def test_scores_say_how_a_picture_was_made(service, photo):
    for _ in range(2):  # the second time everything is open
        (pane,) = last(service.upscale(photo, "a.png", CHOICES[0])).panes
    n = pane.numbers
    assert 0 < n.model_s < n.total_s
    assert (n.engine, n.precision, n.device, n.parity) == ("torch", "fp32", "CPU", "REFERENCE")
    assert n.warm is True
    assert n.parameters == 31_043
    assert n.macs_g == pytest.approx(31_043 * 24 * 36 / 1e9, rel=0.5)
    assert n.peak_mib is None or n.peak_mib > 50


def test_the_first_run_is_cold(service, photo):
    service.shelf._open.clear()
    (cold,) = last(service.upscale(photo, "a.png", CHOICES[0])).panes
    assert cold.numbers.warm is False


def test_upscale_makes_one_pane_without_scores(service, photo):
    result = last(service.upscale(photo, "a.png", CHOICES[0]))
    (pane,) = result.panes
    assert pane.key == "tiny_scratch"
    assert pane.numbers.consistency_db is pane.numbers.agreement_db is result.reference is None
    assert [p.name for p in pane.file.parent.iterdir()] == ["tiny_scratch.png"]


def test_the_share_never_falls_and_ends_at_the_whole(service, tmp_path):
    photo = picture(tmp_path / "a.png", 40, 50)
    told = [e for e in service.compare(request(photo, tile=16)) if isinstance(e, Progress)]
    shares = [event.done for event in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(1)
    texts = [event.text.split(" · ~")[0] for event in told]
    assert "model 1/2 · tile 7/12" in texts
    assert "model 2/2 · tile 12/12" in texts


def test_every_picture_is_told_as_soon_as_it_is_there(service, photo):
    results = [e for e in service.compare(request(photo)) if not isinstance(e, Progress)]
    assert [len(result.panes) for result in results] == [1, 2, 3, 4, 4]
    assert [result.complete for result in results] == [False] * 4 + [True]


# --- without a truth ----------------------------------------------------------------------------


def test_agreement_counts_against_the_reference_also_for_what_was_made_before(service, photo):
    result = last(service.compare(request(photo, reference="tiny_distilled")))
    assert result.reference == "tiny_distilled"
    agreement = {pane.key: pane.numbers.agreement_db for pane in result.panes}
    assert agreement.pop("tiny_distilled") is None
    assert all(value > 5 for value in agreement.values())
    assert all(pane.numbers.consistency_db > 5 for pane in result.panes)
    assert all(pane.numbers.psnr_y is None for pane in result.panes)


def test_the_first_choice_is_the_reference_by_default(service, photo):
    assert last(service.compare(request(photo))).reference == "tiny_scratch"


def test_transparent_pictures_are_shown_and_not_scored(service, tmp_path):
    write_png(tmp_path / "a.png", pixels(12, 12, channels=4))
    result = last(service.compare(request(tmp_path / "a.png")))
    assert all(pane.numbers.consistency_db is None for pane in result.panes)
    assert result.reference is None
    assert "the picture has transparent pixels, so nothing is scored" in result.notes


def test_one_network_on_several_engines_gets_a_key_and_a_label_for_each(service, photo):
    choices = (Choice("tiny_scratch"), Choice("tiny_scratch", "torch", "bf16"))
    result = last(service.compare(request(photo, *choices, reference="tiny_scratch")))
    exact, reduced = result.panes[2:]
    assert (exact.key, reduced.key) == ("tiny_scratch-torch-fp32", "tiny_scratch-torch-bf16")
    assert reduced.label == "EDSR-tiny, trained from scratch · PyTorch (CPU) bf16"
    assert result.reference == exact.key
    assert reduced.numbers.agreement_db > 30
    assert reduced.numbers.parity == "MEASURED"
    assert any(
        "PyTorch (CPU) bf16 is" in note and "dB from torch fp32" in note for note in reduced.notes
    )
    assert not np.array_equal(read_rgb8(exact.file), read_rgb8(reduced.file))


# --- several at once, stopping ------------------------------------------------------------------


def test_jobs_at_once_never_mix(service, tmp_path):
    found = {}

    def user(n):
        photo = picture(tmp_path / f"{n}.png", 20 + n, 24, seed=n)
        found[n] = photo, last(service.compare(request(photo, name=f"{n}.png")))

    threads = [threading.Thread(target=user, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len({result.panes[0].file.parent for _, result in found.values()}) == 4
    for n, (photo, result) in found.items():
        assert result.name == f"{n}.png"
        assert np.array_equal(read_rgb8(result.panes[0].file)[::2, ::2], read_rgb8(photo))
        assert np.array_equal(
            read_rgb8(result.panes[2].file), upscale(photo, source(service, "tiny_scratch"))
        )


def test_closing_stops_within_a_tile_and_leaves_whole_pictures_alone(service, tmp_path):
    photo = picture(tmp_path / "a.png", 60, 60)
    tiles = []
    counted = service.open(CHOICES[0]).timed.register_forward_hook(lambda *_: tiles.append(1))
    events = service.compare(request(photo, tile=16))
    result = None
    for event in events:
        if not isinstance(event, Progress):
            result = event
        elif "tile 2/16" in event.text:
            break
    done = len(tiles)
    events.close()
    assert len(tiles) <= done + 1
    assert [pane.key for pane in result.panes] == ["nearest", "bicubic"]
    assert not result.complete
    folder = result.panes[0].file.parent
    assert sorted(p.name for p in folder.iterdir()) == ["bicubic.png", "nearest.png"]
    counted.remove()
    after = last(service.compare(request(photo, tile=16)))
    assert np.array_equal(
        read_rgb8(after.panes[2].file), upscale(photo, source(service, "tiny_scratch"), tile=16)
    )


def test_closing_stops_scores_too(monkeypatch, service, photo):
    begun, steps = threading.Event(), []

    def endless(*_, **__):
        begun.set()
        for _ in range(2000):
            torch.zeros(1)
            steps.append(1)
            time.sleep(0.005)

    monkeypatch.setattr("demo.comparison.scores", endless)
    events = service.compare(request(photo))
    next(events)
    assert begun.wait(PATIENCE_S)
    events.close()
    assert len(steps) < 1000


def test_a_job_that_was_stopped_before_its_first_picture_leaves_no_folder(service, tmp_path):
    before = set(service.workspace.root.iterdir())
    events = service.upscale(picture(tmp_path / "a.png", 60, 60), "a.png", CHOICES[0], 16)
    next(events)
    events.close()
    assert set(service.workspace.root.iterdir()) == before


# --- failing ------------------------------------------------------------------------------------


def fail_with(monkeypatch, service, error):
    def forward(lr):
        raise error

    monkeypatch.setattr(service.open(CHOICES[0]).timed.network, "forward", forward)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MissingError, "out of memory"),
        (EngineRunError("the engine died"), EngineRunError, "the engine died"),
    ],
)
def test_what_ails_an_engine_is_one_sentence_and_the_next_job_runs(
    monkeypatch, service, photo, error, kind, words
):
    with monkeypatch.context() as patched:
        fail_with(patched, service, error)
        told = []
        with pytest.raises(kind, match=words):
            told.extend(service.compare(request(photo)))
        before = [event for event in told if not isinstance(event, Progress)][-1]
        assert [pane.key for pane in before.panes] == ["nearest", "bicubic"]
        assert not before.complete
    assert len(last(service.compare(request(photo))).panes) == 4


def test_values_that_are_not_finite_are_no_picture(monkeypatch, service, photo):
    ready = service.open(CHOICES[0])
    monkeypatch.setattr(
        ready.timed.network, "forward", lambda lr: lr.repeat(1, 1, 2, 2) * float("nan")
    )
    with pytest.raises(CheckFailedError, match="not finite"):
        last(service.compare(request(photo)))


def test_a_full_disk_is_told_without_the_places_of_the_server(monkeypatch, service, photo):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("srkd.files.os.fsync", full)
    with pytest.raises(SrkdError) as refused:
        last(service.compare(request(photo)))
    assert str(refused.value).startswith("cannot write nearest.png: No space left on device.")
    assert str(service.workspace.root) not in str(refused.value)


def test_too_little_room_is_told_before_anything_is_made(tmp_path, service, photo):
    small = Service([str(source(service, key)) for key in ("tiny_scratch", "tiny_distilled")])
    small.workspace = Workspace(tmp_path / "work", max_bytes=10_000)
    with pytest.raises(
        MissingError, match="choose fewer networks, fewer files or smaller pictures"
    ):
        last(small.compare(request(photo)))
    assert not list(small.workspace.root.iterdir())
    small.close()


def test_a_closed_service_takes_no_jobs_and_holds_no_pictures(tmp_path, photo, service):
    own = Service([str(source(service, "tiny_scratch"))])
    kept = last(own.upscale(photo, "a.png", CHOICES[0])).panes[0].file
    own.close()
    assert not kept.exists()
    with pytest.raises(SrkdError, match="shut down"):
        last(own.upscale(photo, "a.png", CHOICES[0]))


def test_a_result_as_downloaded_names_no_place(service, photo):
    record = last(service.compare(request(photo))).to_json()
    assert str(service.workspace.root) not in str(record)
    assert asdict(last(service.compare(request(photo))))["complete"] is True
