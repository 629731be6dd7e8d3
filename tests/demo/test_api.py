"""The endpoints for programs, called over HTTP on a running page."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from live_server import Live, live
from tiny_service import picture, pixels

from srkd.images import read_picture
from srkd.infer import upscale_file

UPSCALE = 1  # the number of the event: endpoints come first on the page, in the order of `demo.api`
DOCS = Path(__file__).parents[2] / "docs" / "demo_api.md"


@pytest.fixture(scope="module")
def server() -> Live:
    return live()


def answer(reply: str) -> Any:
    """The data of the last complete event."""
    found = re.findall(r"event: complete\ndata: (.*)", reply)
    assert found, reply[-300:]
    return json.loads(found[-1])


def fetched(server: Live, file: dict[str, Any]) -> bytes:
    return server.http.get(file["url"]).content


def test_the_documented_calls_work(
    server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio_client")
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    picture(tmp_path / "photo.png", 48, 48)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(said):
        exec(code.replace("http://127.0.0.1:7860", server.address), names)
    assert "tiny_distilled" in said.getvalue()
    assert names["numbers"]["panes"][0]["size"] == [192, 192]
    kinds = [pane["role"] for pane in names["table"]["panes"]]
    assert kinds == ["truth", "nearest", "bicubic", "model"]
    assert len(names["pictures"]) == 4
    assert all(pane["numbers"]["psnr_y"] for pane in names["table"]["panes"][1:])


def test_the_png_has_the_bytes_of_the_command(server: Live, tmp_path: Path) -> None:
    source = picture(tmp_path / "photo.png")
    file = server.upload(source.read_bytes())
    upscaled, numbers = answer(server.upscale(file))
    upscale_file(source, tmp_path / "own.png", server.runs / "tiny_scratch")
    assert fetched(server, upscaled) == (tmp_path / "own.png").read_bytes()
    assert numbers["scale"] == 2
    assert numbers["panes"][0]["numbers"]["engine"] == "torch"


def test_two_users_at_once_each_get_their_own(server: Live, tmp_path: Path) -> None:
    sizes = {f"user{n}.png": (12 + 2 * n, 20 + n) for n in range(6)}
    got: dict[str, Any] = {}

    def user(name: str, size: tuple[int, int]) -> None:
        data = picture(tmp_path / name, *size).read_bytes()
        file = server.upload(data, name)
        got[name] = answer(server.compare(file, ["tiny_scratch", "tiny_distilled"]))

    users = [threading.Thread(target=user, args=item) for item in sizes.items()]
    for one in users:
        one.start()
    for one in users:
        one.join()
    for name, (h, w) in sizes.items():
        files, table = got[name]
        assert table["name"] == name
        assert table["lr_size"] == [h, w]
        (tmp_path / "nearest.png").write_bytes(fetched(server, files[0]))
        nearest = read_picture(tmp_path / "nearest.png").rgb
        assert (nearest[::2, ::2] == pixels(h, w)).all()


def test_a_refusal_is_one_sentence(server: Live, tmp_path: Path) -> None:
    file = server.upload(picture(tmp_path / "a.png").read_bytes())
    cases = {
        "nonsense": {"model": "nonsense"},
        "cuda": {"engine": "cuda"},
        "fp7": {"precision": "fp7"},
        "tile": {"tile": 3},
    }
    for said, settings in cases.items():
        reply = server.upscale(file, **settings)
        assert "event: error" in reply
        message = json.loads(reply.rsplit("data: ", 1)[1])["error"]
        assert said in message
        assert str(server.folder) not in message


def test_values_may_come_by_name_and_missing_ones_are_named(server: Live, tmp_path: Path) -> None:
    file = server.upload(picture(tmp_path / "a.png").read_bytes())
    sent = {"file": file, "model": "tiny_scratch"}
    event = server.http.post("/gradio_api/call/v2/upscale", json=sent).json()["event_id"]
    upscaled, _ = answer(server.http.get(f"/gradio_api/call/upscale/{event}").text)
    assert fetched(server, upscaled).startswith(b"\x89PNG")
    for reply, said in (
        (server.http.post("/gradio_api/call/v2/upscale", json={"file": file}), "needs model"),
        (server.post("upscale", [file, "tiny_scratch"]), "takes a list of 5 values (file, model, "),
        (
            server.http.post("/gradio_api/queue/join", json={"fn_index": UPSCALE, "data": []}),
            "This event",
        ),
    ):
        assert reply.status_code == 422
        assert said in reply.text


def test_stopping_ends_an_export_and_frees_the_device(
    server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path / "cache"))
    # What exports is another program here, which tells its process and takes a minute.
    slow = tmp_path / "slow"
    slow.write_text(
        f'#!/bin/sh\necho $$ > "{tmp_path}/process"; echo "[1/4] load" >&2; exec sleep 60\n'
    )
    slow.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(slow))
    file = server.upload(picture(tmp_path / "a.png").read_bytes())
    sent = {
        "fn_index": UPSCALE,
        "session_hash": "stopping",
        "data": [file, "tiny_scratch", "ort", "fp32", None],
    }
    event = server.http.post("/gradio_api/queue/join", json=sent).json()["event_id"]
    with server.http.stream("GET", "/gradio_api/queue/data?session_hash=stopping") as told:
        next(line for line in told.iter_lines() if "[1/4] load" in line)
        process = int((tmp_path / "process").read_text())
        begin = time.monotonic()
        stop = {"session_hash": "stopping", "fn_index": UPSCALE, "event_id": event}
        assert server.http.post("/gradio_api/cancel", json=stop).json() == {"success": True}
        answer(server.upscale(file))  # in torch, which had to wait for the device
        assert time.monotonic() - begin < 20
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert list((tmp_path / "cache" / "demo" / "exports").iterdir()) == []


def test_models_tells_what_there_is(server: Live) -> None:
    (known,) = answer(server.call("models"))
    assert {"tiny_teacher", "tiny_scratch", "tiny_distilled"} <= {m["key"] for m in known["models"]}
    torch = next(engine for engine in known["engines"] if engine["key"] == "torch")
    assert torch["reason"] is None
    assert known["limits"]["max_bytes"] == server.service.limits.max_bytes


def test_only_these_endpoints_are_public(server: Live) -> None:
    info = server.http.get("/gradio_api/info").json()
    assert sorted(info["named_endpoints"]) == ["/compare", "/models", "/upscale"]
    assert info["unnamed_endpoints"] == {}
    names = [p["parameter_name"] for p in info["named_endpoints"]["/upscale"]["parameters"]]
    assert names == ["file", "model", "engine", "precision", "tile"]
