"""The page's handlers without a browser: what comes in is checked, what goes out is the service's result."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from live_server import record
from PIL import Image
from tiny_service import held, picture, pixels, write_runs

from demo import markup
from demo.asked import choices_of, tile_of
from demo.handlers import UNEXPECTED, Handlers, Kept, guarded
from demo.jobs import Choice
from demo.scores import Table
from demo.service import Service
from demo.settings import first_models, from_query
from demo.speedtest import SpeedResult, SpeedRow
from demo.uploads import upload_of
from demo.workspace import Workspace
from srkd.errors import SrkdError

NETWORKS = ["tiny_teacher", "tiny_scratch", "tiny_distilled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def handlers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Handlers:
    runs = write_runs(tmp_path_factory.mktemp("runs"))
    return Handlers(Service(runs, workspace=Workspace(folder / "results")), folder)


@pytest.fixture(scope="module")
def photo(folder: Path) -> dict[str, Any]:
    return record(str(picture(folder / "photo.png")), "my photo.png")


def values(photo: dict[str, Any], **other: Any) -> list[Any]:
    """Of `demo.asked.Asked`, as the page sends them."""
    sent = {
        "picture": photo,
        "truth": None,
        "shrink": False,
        "models": NETWORKS[1:],
        "engine": "torch",
        "precision": "fp32",
        "reference": "tiny_scratch",
    }
    return list({**sent, **other}.values())


# --- what goes out ------------------------------------------------------------------------------


def test_a_comparison_fills_viewer_table_and_downloads(
    handlers: Handlers, photo: dict[str, Any]
) -> None:
    last: list[Any] = [None] * 6
    for outputs in handlers.compare(*values(photo)):
        last = [
            old if isinstance(new, dict) and "__type__" in new else new
            for old, new in zip(last, outputs, strict=True)
        ]
    status, viewer, table, kept, files, wanted = last
    assert "Done" in status
    assert [image["key"] for image in viewer["images"]] == ["nearest", "bicubic", *NETWORKS[1:]]
    for image, pane in zip(viewer["images"], kept.result.panes, strict=True):
        assert image["file"]["path"] == str(pane.file)
    assert "agreement" in table
    names = [file["orig_name"] for file in files["files"]]
    assert "my photo_x2_tiny_scratch_torch-fp32.png".replace(" ", "_") in [
        name.replace(" ", "_") for name in names
    ]
    assert wanted == "png"
    copy = next(file for file in files["files"] if "tiny_scratch" in file["orig_name"])
    assert Path(copy["path"]).read_bytes() == kept.result.panes[2].file.read_bytes()
    document = next(file for file in files["files"] if file["orig_name"].endswith(".json"))
    assert len(json.loads(Path(document["path"]).read_text())["panes"]) == 4


def test_closing_a_comparison_frees_the_device(handlers: Handlers, photo: dict[str, Any]) -> None:
    run = handlers.compare(*values(photo))
    next(run)
    next(run)
    run.close()
    assert any(isinstance(kept, Kept) for *_, kept, _, _ in handlers.compare(*values(photo)))


def test_what_a_stopped_comparison_had_finished_can_be_downloaded(
    handlers: Handlers, photo: dict[str, Any]
) -> None:
    run = handlers.compare(*values(photo))
    table, kept = next(outputs[2:4] for outputs in run if isinstance(outputs[3], Kept))
    assert "not finished" not in table
    run.close()
    assert not kept.result.complete
    ((_, table, files, wanted),) = handlers.stopped(kept)
    assert wanted == "png"
    assert "not finished" in table
    names = [file["orig_name"] for file in files["files"]]
    assert [name.rsplit("_", 1)[1] for name in names] == ["nearest.png", "table.json", "table.csv"]
    ((said, _, nothing, _),) = handlers.stopped(None)
    assert "Stopped" in said
    assert nothing is None


def test_stopping_ends_the_jobs_of_this_page_and_waits_for_them(
    handlers: Handlers, photo: dict[str, Any]
) -> None:
    mine, other = SimpleNamespace(session_hash="mine"), SimpleNamespace(session_hash="other")
    compare = handlers.job(handlers.compare, 6)
    run = compare(mine, *values(photo))
    next(run)
    ended: list[float] = []

    def stop() -> None:
        list(handlers.stopping(mine))
        ended.append(time.monotonic())

    waiting = threading.Thread(target=stop)
    waiting.start()
    list(handlers.stopping(other))
    time.sleep(0.1)
    assert waiting.is_alive()
    last = time.monotonic()
    assert list(run) == []  # asked to stop, it tells nothing more
    waiting.join(10)
    assert ended[0] >= last
    assert len(list(compare(mine, *values(photo)))) > 4


def test_pictures_that_were_removed_are_not_offered(
    handlers: Handlers, photo: dict[str, Any]
) -> None:
    kept = next(o[3] for o in handlers.compare(*values(photo)) if isinstance(o[3], Kept))
    kept.result.panes[0].file.unlink()
    with pytest.raises(SrkdError, match="no longer keeps"):
        list(handlers.files(kept, "png"))
    with pytest.raises(SrkdError, match="no longer keeps"):
        next(handlers.speed(kept, NETWORKS[1:], "torch", "fp32"))


@pytest.fixture(scope="module")
def of_a_jpeg(handlers: Handlers, folder: Path) -> Kept:
    """A comparison of a picture that was uploaded as JPEG."""
    Image.fromarray(pixels(12, 16)).save(folder / "photo.jpg")
    sent = record(str(folder / "photo.jpg"), "photo.jpg")
    *_, kept = (o[3] for o in handlers.compare(*values(sent)) if isinstance(o[3], Kept))
    return kept


def test_files_are_converted_as_a_job_of_the_device(handlers: Handlers, of_a_jpeg: Kept) -> None:
    with held(handlers.service.lane):
        ((_, copied),) = handlers.files(of_a_jpeg, "png")  # which computes nothing
        converting = handlers.files(of_a_jpeg, "original")
        assert "waiting for the device" in next(converting)[0]
    *_, (status, converted) = converting
    assert "Done" in status
    for files, suffix in ((copied, ".png"), (converted, ".jpg")):
        assert [f["orig_name"].endswith(suffix) for f in files["files"]] == [True] * 4 + [False] * 2


def test_only_the_format_chosen_last_is_delivered(handlers: Handlers, of_a_jpeg: Kept) -> None:
    mine, write = SimpleNamespace(session_hash="mine"), handlers.files_job()
    with held(handlers.service.lane):
        early = write(mine, of_a_jpeg, "original")
        next(early)
        ((_, late),) = write(mine, of_a_jpeg, "png")
    assert late is not None
    assert list(early) == []
    with held(handlers.service.lane):
        again = write(mine, of_a_jpeg, "original")
        next(again)
        list(handlers.stopping(mine))
    assert list(again) == []


def test_downloads_have_the_times_that_were_measured(
    handlers: Handlers, photo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> Iterator[SpeedResult]:
        choice = Choice("tiny_scratch")
        yield SpeedResult((SpeedRow(choice, "", 12.5, 13.0, 30, None),), (24, 36))

    *_, kept = (o[3] for o in handlers.compare(*values(photo)) if isinstance(o[3], Kept))
    monkeypatch.setattr("demo.handlers.measure", measured)
    *_, (_, _, _, kept, files, _) = handlers.speed(kept, ["tiny_scratch"], "torch", "fp32")
    document = next(file for file in files["files"] if file["orig_name"].endswith(".json"))
    panes = json.loads(Path(document["path"]).read_text())["panes"]
    assert [pane["numbers"]["p50_ms"] for pane in panes] == [None, None, 12.5, None]


def test_a_batch_ends_with_its_zip(handlers: Handlers, photo: dict[str, Any], folder: Path) -> None:
    bad = folder / "notes.txt"
    bad.write_text("no picture")
    files = [photo, record(str(bad), "notes.txt")]
    *_, (status, zipped) = handlers.batch(files, "tiny_scratch", "torch", "fp32", "png")
    assert "1 of 2" in status
    assert Path(zipped["files"][0]["path"]).stat().st_size == zipped["files"][0]["size"]
    assert zipped["notes"][0].startswith("notes.txt is no picture")


# --- what comes in ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"picture": None}, "no picture"),
        ({"picture": "/etc/hostname"}, "upload it again"),
        ({"picture": {"path": "/etc/hostname"}}, "upload it again"),
        ({"picture": {"path": ["a"]}}, "upload it again"),
        ({"models": []}, "No network"),
        ({"models": "tiny_scratch"}, "No network"),
        ({"models": [1]}, "not a name"),
        ({"models": ["tiny_scratch"] * 7}, "7 networks"),
        ({"models": ["tiny_scratch", "tiny_scratch"]}, "twice"),
        ({"models": ["../../etc"]}, "etc"),
        ({"engine": "cuda"}, "cuda"),
        ({"engine": None}, "not a name"),
        ({"precision": "fp7"}, "fp7"),
    ],
)
def test_what_no_widget_would_send_is_refused(
    handlers: Handlers, photo: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(SrkdError, match=said):
        list(handlers.compare(*values(photo, **change)))


def test_a_file_outside_the_upload_folder_is_no_upload(tmp_path: Path, folder: Path) -> None:
    outside = picture(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(outside)
    for path in (outside, folder / "link.png", folder / ".." / tmp_path.name / "secret.png"):
        with pytest.raises(SrkdError, match="upload it again"):
            upload_of(record(str(path)), folder)


@pytest.mark.parametrize("tile", [0, 15, 1025, 1.5, "64", True, [64]])
def test_a_tile_that_is_no_size_is_refused(tile: Any) -> None:
    with pytest.raises(SrkdError, match="16 to 1024"):
        tile_of(tile)
    assert tile_of(None) == tile_of("auto") == "auto"


def test_an_exported_file_goes_on_its_own_engine(handlers: Handlers) -> None:
    from dataclasses import replace

    entry = replace(handlers.service.models()[0], key="own", engine="ort", precision="fp16")
    assert choices_of([entry], ["own", "other"], "torch", "fp32") == (
        Choice("own", "ort", "fp16"),
        Choice("other", "torch", "fp32"),
    )


def test_a_link_that_names_nothing_here_is_as_a_fresh_page(handlers: Handlers) -> None:
    models, engines = handlers.service.models(), handlers.service.engines()
    fresh = from_query({}, models, engines)
    nonsense = {
        "scale": "9",
        "models": "<b>,x",
        "engine": "trt",
        "precision": "x",
        "reference": "y",
    }
    assert from_query(nonsense, models, engines) == fresh
    asked = from_query({"scale": "2", "models": "tiny_distilled,tiny_scratch"}, models, engines)
    assert asked.models == ("tiny_distilled", "tiny_scratch")
    assert first_models(models, 2) == tuple(NETWORKS)


# --- errors -------------------------------------------------------------------------------------


def failing(error: Exception) -> Any:
    def handler() -> Iterator[tuple[Any, ...]]:
        yield ("started", None)
        raise error

    return handler


def messages(error: Exception, folder: Path, outputs: int = 2) -> tuple[list[Any], str]:
    """What is shown before the error, and the error's message."""
    run = guarded(failing(error), outputs, folder)()
    shown = [next(run)[0]]
    with pytest.raises(gr.Error) as raised:
        shown += [said for said, *_ in run]
    return shown, raised.value.message


def test_an_error_of_the_user_is_said_as_one_escaped_sentence(tmp_path: Path) -> None:
    error = SrkdError(f"{tmp_path}/3f2a/<img src=x>.png is no picture; give another.")
    shown, message = messages(error, tmp_path)
    assert message == "&lt;img src=x&gt;.png is no picture; give another."
    assert str(tmp_path) not in shown[-1]
    assert "<img" not in shown[-1]


def test_no_error_tells_a_place_of_the_server(tmp_path: Path) -> None:
    said = "cannot read /srv/cache/x-ort/net.onnx (in '/srv/my own/x-ort'): run python deploy/export.py"
    _, message = messages(SrkdError(said), tmp_path, outputs=0)
    assert message == "cannot read net.onnx (in 'x-ort'): run python deploy/export.py"


def test_a_fault_of_ours_is_not_shown_but_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown, message = messages(ZeroDivisionError("secret detail"), tmp_path)
    assert message == UNEXPECTED
    assert "secret" not in "".join(shown)
    assert "secret detail" in caplog.text


def test_texts_of_the_table_stay_text() -> None:
    hostile = "<script>alert(1)</script>"
    content = Table(
        [hostile, "PSNR-Y"], [[hostile, hostile]], hostile, frozenset({(0, 1)}), (hostile,)
    )
    for html in (
        markup.table(content),
        markup.status(hostile),
        markup.unavailable([(hostile, hostile)]),
    ):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html
