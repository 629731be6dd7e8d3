"""A running page against strangers: what is closed by default, what is refused, what survives."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hostile import hostile_files, mutated
from live_server import Live, live, record
from tiny_service import picture

from demo.guard import MOST_JSON_BYTES, names_strange_file

SECRET = b"nobody may read this"


@pytest.fixture(scope="module")
def server() -> Live:
    return live()


@pytest.fixture(scope="module")
def secret(server: Live) -> Path:
    """A file beside the upload folder."""
    path = server.folder.parent / "secret.png"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def listener() -> Iterator[tuple[int, list[Any]]]:
    """A port of this machine, and who connected to it."""
    callers: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    callers.append(listening.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()[1], callers
        listening.shutdown(socket.SHUT_RDWR)


def get(server: Live, path: str, **headers: str) -> httpx.Response:
    return server.http.get(path, headers=headers)


def resident_mib() -> float:
    """Of this process, which serves."""
    (pages,) = re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(pages) / 1024


# --- defaults -----------------------------------------------------------------------------------


def test_defaults(server: Live) -> None:
    page = server.page
    assert page.server_name == "127.0.0.1"
    assert page.max_file_size == server.service.limits.max_bytes == 20_000_000
    assert page.allowed_paths == []
    assert not page.share
    assert not page.show_error
    assert not page.analytics_enabled
    assert not page.ssr_mode
    assert not page.enable_monitoring
    assert not page.run_history
    assert page.api_open is False
    assert page._queue.max_size == 16
    assert page.delete_cache == (3600, 7200)
    assert page.mcp_server_obj is None


def test_it_listens_on_the_loopback_only(server: Live) -> None:
    port = int(server.address.rsplit(":", 1)[1])
    with socket.socket() as elsewhere:
        # Taken if the page listened on all addresses.
        elsewhere.bind(("127.0.0.2", port))


def test_the_page_asks_no_other_host(server: Live) -> None:
    reply = get(server, "/")
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)', reply.text)
    assert [address for address in loaded if not address.startswith(server.address)] == []


@pytest.mark.parametrize(
    "path",
    [
        "/monitoring",
        "/monitoring/summary/",
        "/monitoring/a-key",
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/proxy=https://example.hf.space/",
        "/gradio_api/mcp/sse",
        "/gradio_api/runs",
        "/gradio_api/vibe-code/",
        "/docs",
        "/openapi.json",
    ],
)
def test_routes_that_the_page_does_not_use_are_closed(server: Live, path: str) -> None:
    assert get(server, path).status_code == 404


def test_the_panel_about_the_endpoints_gets_what_it_asks_for(server: Live) -> None:
    assert get(server, "/gradio_api/info").json()["named_endpoints"]
    assert get(server, "/monitoring/summary").json() == {"functions": {}}
    assert server.http.post("/monitoring/summary").status_code == 404
    assert get(server, "/monitoring/summary", Origin="http://evil.example").status_code == 403
    # Anything else would make it offer MCP.
    assert get(server, "/gradio_api/mcp/schema").status_code == 404


@pytest.mark.parametrize("route", ["run", "api"])
def test_no_call_passes_the_queue_by(server: Live, route: str) -> None:
    reply = server.http.post(f"/gradio_api/{route}/models", json={"data": []})
    assert reply.status_code == 404


# --- other sites --------------------------------------------------------------------------------


def test_pages_of_other_sites_are_refused(server: Live) -> None:
    assert get(server, "/", Origin=server.address).status_code == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        "https://localhost.evil.example",
        "http://[",
    ):
        assert get(server, "/config", Origin=origin).status_code == 403
        posted = server.http.post(
            "/gradio_api/call/models",
            content=b'{"data": []}',
            headers={"Origin": origin, "Content-Type": "text/plain"},
        )
        assert posted.status_code == 403
    for origin in ("http://evil.example", "null"):
        preflight = server.http.options(
            "/gradio_api/upload",
            headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
        )
        assert "access-control-allow-origin" not in preflight.headers


def test_a_name_that_only_points_here_is_refused(server: Live) -> None:
    assert get(server, "/", Host="evil.example").status_code == 421
    assert get(server, "/", Host="[").status_code == 421
    assert get(server, "/", Host="localhost").status_code == 200


# --- files of the server ------------------------------------------------------------------------


def test_no_file_outside_the_upload_folder_is_served(server: Live, secret: Path) -> None:
    folder = server.folder
    tries = [
        str(secret),
        f"{folder}/../{secret.name}",
        f"{folder}/%2e%2e/{secret.name}",
        f"{folder}/..%2f{secret.name}",
        f"{folder}/..%252f{secret.name}",
        f"file://{secret}",
        f"//{secret}",
        f"../../{secret}",
        str(Path(__file__)),
        "/proc/self/environ",
        "demo/app.py",
        "",
    ]
    for path in tries:
        # httpx would tidy "..", an attacker would not.
        raw = f"/gradio_api/file={path}".encode()
        reply = server.http.get(httpx.URL(server.address).copy_with(raw_path=raw))
        assert reply.status_code in (403, 404), path
        assert SECRET not in reply.content


def test_no_event_names_a_file_that_was_not_uploaded(server: Live, secret: Path) -> None:
    inside = server.upload(b"no picture")
    for path in (
        str(secret),
        f"{server.folder}/../secret.png",
        "secret.png",
        "file:///etc/passwd",
        5,
    ):
        for file in (record(str(path)), {"path": path}, [{"a": record(str(path))}]):
            for endpoint, data in {
                "upscale": [file, "tiny_scratch"],
                "compare": [inside, ["tiny_scratch"], "torch", "fp32", file],
            }.items():
                reply = server.post(endpoint, data)
                assert reply.status_code == 422, (path, endpoint)
    for index in server.page.fns:
        body = {"fn_index": index, "session_hash": "stranger", "data": [record(str(secret))] * 7}
        reply = server.http.post("/gradio_api/queue/join", json=body)
        assert reply.status_code == 422


def test_a_file_that_is_no_upload_is_seen_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    mine, other = json.dumps(str(tmp_path / "mine" / "a.png")), '"/etc/passwd"'
    for strange, path in ((False, mine), (True, other)):
        deep = f'{{"data": [1, {{"x": [{{"path": {path}}}]}}]}}'.encode()
        assert names_strange_file(deep, tmp_path / "mine") is strange
    assert names_strange_file(b"[" * 200_000, tmp_path)
    assert not names_strange_file(b"no json", tmp_path)


def test_it_fetches_nothing_for_anybody(
    server: Live, listener: tuple[int, list[Any]], tmp_path: Path
) -> None:
    port, callers = listener
    inside = server.upload(picture(tmp_path / "a.png").read_bytes())
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.1", "0.0.0.0"):
        address = f"http://{host}:{port}/a.png"
        assert get(server, f"/gradio_api/file={address}").status_code in (403, 404)
        assert get(server, f"/gradio_api/file={quote(address, safe='')}").status_code in (403, 404)
        assert get(server, f"/gradio_api/proxy={address}").status_code == 404
        assert server.post("upscale", [record(address), "tiny_scratch"]).status_code == 422
        assert (
            server.post("upscale", [{**inside, "path": address}, "tiny_scratch"]).status_code == 422
        )
        reply = server.upscale({**inside, "url": address})
        assert "event: complete" in reply
    assert callers == []


# --- sizes --------------------------------------------------------------------------------------


def test_requests_that_are_too_long_are_refused(server: Live) -> None:
    long = server.http.post("/gradio_api/call/upscale", content=b" " * (MOST_JSON_BYTES + 1))
    assert long.status_code == 413

    def endless() -> Iterator[bytes]:
        yield b"{"

    unknown = server.http.post("/gradio_api/call/upscale", content=endless())
    assert unknown.status_code == 411
    headers = {"Content-Length": str(10**12), "Content-Type": "multipart/form-data; boundary=x"}
    with socket.create_connection(("127.0.0.1", int(server.address.rsplit(":", 1)[1]))) as line:
        head = "\r\n".join(f"{k}: {v}" for k, v in headers.items())
        line.sendall(
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode()
        )
        assert b" 413 " in line.recv(100)


def test_a_file_that_is_too_large_is_refused(server: Live) -> None:
    data = bytes(server.service.limits.max_bytes + 1)
    reply = server.http.post("/gradio_api/upload", files={"files": ("a.png", data)})
    assert reply.status_code == 413


@pytest.mark.parametrize("name", ["bomb.png", "bomb.tif", "bomb.webp", "bomb.bmp"])
def test_a_bomb_is_refused_by_its_header(server: Live, name: str) -> None:
    reply = server.upscale(server.upload(hostile_files()[name], name))
    assert "event: error" in reply
    assert ("16384x16384" if name.endswith("webp") else "30000x30000") in reply


# --- hostile pictures ---------------------------------------------------------------------------


def survives(server: Live, files: dict[str, bytes], may_open: bool = False) -> None:
    """Every file gets one sentence, or a picture where it may, and nothing of the server is told."""
    for name, data in files.items():
        file = server.upload(data, name)
        for reply in (
            server.upscale(file),
            server.compare(file, ["tiny_scratch"], shrink=True),
        ):
            assert "Traceback" not in reply
            assert 'File "' not in reply
            if "event: error" in reply:
                message = json.loads(reply.rsplit("data: ", 1)[1])["error"]
                assert message, name
                assert str(server.folder) not in message
            else:
                assert may_open, name
    assert "event: complete" in server.call("models")


def test_hostile_files_get_a_sentence(server: Live) -> None:
    before = resident_mib()
    survives(server, hostile_files())
    assert resident_mib() - before < 150


@pytest.mark.slow
def test_two_hundred_hostile_files(server: Live) -> None:
    survives(server, hostile_files())
    before = resident_mib()
    survives(server, {**hostile_files(), **mutated(2, 176)}, may_open=True)
    assert resident_mib() - before < 150


def test_values_of_any_kind_get_an_answer(server: Live, tmp_path: Path) -> None:
    file = server.upload(picture(tmp_path / "a.png").read_bytes())
    strange: list[Any] = [None, True, 10**40, "x" * 5000, [[]], {"a": None}]
    for value in strange:
        replies = {
            "file": server.upscale(value),
            "model": server.upscale(file, value),
            "engine": server.upscale(file, engine=value),
        }
        for name, reply in replies.items():
            assert "Traceback" not in reply
            assert "event: error" in reply, (name, value)
