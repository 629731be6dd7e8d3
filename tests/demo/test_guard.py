"""The door of the server alone, before an application that takes everything."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from demo.guard import FORM_BYTES, Guard, Rules, Takes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

testclient = pytest.importorskip("starlette.testclient", reason="the page needs gradio: .[demo]")


class Taking:
    """Says yes to every request, after `wait` if there is something to wait for."""

    def __init__(self) -> None:
        self.wait: Callable[[], object] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.wait is not None:
            self.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"yes"})


@pytest.fixture
def rules(tmp_path: Path) -> Rules:
    return Rules(uploads=tmp_path, most_upload_bytes=1000, most_held_bytes=1500)


def client(app: Any, rules: Rules) -> Any:
    return testclient.TestClient(Guard(app, rules), base_url="http://localhost")


def upload(door: Any, length: int) -> Any:
    return door.post("/gradio_api/upload", content=bytes(length))


def test_uploads_together_are_bounded(rules: Rules, tmp_path: Path) -> None:
    door = client(Taking(), rules)
    assert upload(door, 900).status_code == 200
    (tmp_path / "tmp1").write_bytes(bytes(700))
    refused = upload(door, 900)
    assert refused.status_code == 507
    assert refused.text.startswith("The server keeps as many uploads as it has room for; try again")
    assert upload(door, 800).status_code == 200


def test_uploads_that_come_at_once_are_counted_together(rules: Rules) -> None:
    app, inside, go = Taking(), threading.Event(), threading.Event()
    door = client(app, rules)

    def wait() -> None:
        app.wait = None
        inside.set()
        assert go.wait(10)

    app.wait = wait
    first = threading.Thread(target=upload, args=(door, 900))
    first.start()
    assert inside.wait(10)
    try:
        assert upload(door, 900).status_code == 507
    finally:
        go.set()
        first.join(10)
    assert upload(door, 900).status_code == 200


def test_one_request_is_bounded_by_its_header(rules: Rules) -> None:
    door = client(Taking(), replace(rules, most_held_bytes=10**9))
    assert upload(door, 1000 + FORM_BYTES).status_code == 200
    assert upload(door, 1001 + FORM_BYTES).status_code == 413


# --- calls --------------------------------------------------------------------------------------

TAKES = {"upscale": Takes(3, ("file", "model", "tile"), ("file", "model")), "7": Takes(2)}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("call/upscale", {"data": [1, 2, 3]}, 200, "yes"),
        ("call/upscale", {"data": [1]}, 422, "takes a list of 3 values (file, model, tile)"),
        ("call/upscale", {"data": [1]}, 422, "but 1 came; send all of them."),
        ("call/upscale", {"data": {"file": 1}}, 422, "but none came"),
        ("call/upscale", [1, 2, 3], 422, "but none came"),
        ("call/nonsense", {"data": []}, 404, "no such endpoint"),
        ("call/v2/upscale", {"file": 1, "model": 2}, 200, "yes"),
        ("call/v2/upscale", {"tile": 1}, 422, "/upscale needs file and model; its values are"),
        ("call/v2/upscale", {"file": 1, "model": 2, "x": 3}, 422, "has no value 'x'"),
        ("call/v2/7", {}, 404, "no such endpoint"),
        ("queue/join", {"fn_index": 7, "data": [1, 2]}, 200, "yes"),
        ("queue/join", {"fn_index": 7, "data": [1]}, 422, "This event takes a list of 2 values"),
        ("queue/join", {"fn_index": [7], "data": [1]}, 404, "no such endpoint"),
        ("cancel", {"event_id": "x"}, 200, "yes"),
    ],
)
def test_a_call_without_its_values_is_refused_in_words(
    rules: Rules, path: str, body: Any, status: int, words: str
) -> None:
    door = client(Taking(), replace(rules, takes=TAKES))
    reply = door.post(f"/gradio_api/{path}", json=body)
    assert reply.status_code == status
    assert words in reply.text
