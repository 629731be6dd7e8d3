"""What reaches the page's server at all: this host, this page's own requests, its own routes, small bodies.

Gradio offers more routes than the page uses (a proxy, fetching of addresses, recordings, saved pages), and
an event that the page hides stays reachable over HTTP. This ASGI middleware stands before all of them.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse

from demo.workspace import make_upload_room

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# "/" and these are what the page and `gradio_client` ask for; the rest of Gradio's routes answer 404.
READS = (
    "/assets/",
    "/static/",
    "/theme.css",
    "/favicon.ico",
    "/robots.txt",
    "/manifest.json",
    "/config",
    "/gradio_api/info",
    "/gradio_api/startup-events",
    "/gradio_api/app_id",
    "/gradio_api/heartbeat/",
    "/gradio_api/upload_progress",
    "/gradio_api/queue/data",
    "/gradio_api/queue/status",
    "/gradio_api/call/",
    "/gradio_api/file=",
)
# Gradio's panel "Use via API" asks how long each endpoint takes, which is measured for nobody. (It asks for MCP tools too,
# and learns from a 404 that there are none.)
TIMES, NO_TIMES = "/monitoring/summary", {"functions": {}}
UPLOAD = "/gradio_api/upload"
JOIN = "/gradio_api/queue/join"
CALL = "/gradio_api/call/"
NAMED = "v2/"  # before an endpoint's name: its values come by name, not in order
WRITES = (
    UPLOAD,
    JOIN,
    CALL,
    "/gradio_api/cancel",
    "/gradio_api/reset",
)
# Settings, keys and paths of uploads; no event of the page carries more.
MOST_JSON_BYTES = 256 * 1024
# Form boundaries and file names around the uploaded bytes.
FORM_BYTES = 64 * 1024
LEAST_FREE_BYTES = 1 << 30
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Gradio's page needs inline script and `new Function`; nothing of it may come from, or go to, elsewhere.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


@dataclass(frozen=True)
class Takes:
    """What an event wants: `values` of them at least, in order.

    names    of the values of an endpoint for programs, None for the page's own events
    needed   those that have no default
    """

    values: int
    names: tuple[str, ...] | None = None
    needed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """`uploads` is the only folder that a request may name.

    most_upload_bytes   of one request together
    most_held_bytes     of all uploads that the server keeps
    hosts               the names this server answers to; None: any, for a server that is not on the loopback
    takes               by the name of an endpoint, and by the number of an event as text
    """

    uploads: Path
    most_upload_bytes: int
    most_held_bytes: int
    hosts: tuple[str, ...] | None = LOOPBACK
    takes: Mapping[str, Takes] = field(default_factory=dict)


class Guard:
    """ASGI middleware: refuses with a status and one sentence, or passes the request on unchanged."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app = app
        self.rules = rules
        self.coming = 0  # bytes of the uploads that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and scope["method"] == "POST" and scope["path"] != UPLOAD:
            body = await _body(receive)
            if names_strange_file(body, self.rules.uploads):
                refusal = 422, "Files come by upload to this page only; upload the picture first."
            elif scope["path"].startswith((JOIN, CALL)):
                refusal = wrong_call(scope["path"], body, self.rules.takes)
            receive = _replay(body, receive)
        if refusal is not None:
            await _refuse(*refusal, scope, receive, send)
        elif scope["path"] == TIMES:
            await JSONResponse(NO_TIMES)(scope, receive, _with_headers(send))
        elif scope["method"] == "POST" and scope["path"] == UPLOAD:
            await self._upload(scope, receive, _with_headers(send))
        else:
            await self.app(scope, receive, _with_headers(send))

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Receive files if there is room for them beside those that are kept and those that come meanwhile."""
        length = int(Headers(scope=scope)["content-length"])
        self.coming += length
        try:
            folder, most = self.rules.uploads, self.rules.most_held_bytes
            if await asyncio.to_thread(make_upload_room, folder, self.coming, most):
                await self.app(scope, receive, send)
            else:
                said = "The server keeps as many uploads as it has room for; try again in a quarter of an hour."
                await _refuse(507, said, scope, receive, send)
        finally:
            self.coming -= length

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.rules.hosts is not None and _parts(f"//{host}").hostname not in self.rules.hosts:
            # A name of another site that resolves to this machine would share its pages with that site.
            return 421, "This page answers on this machine's own address only."
        origin = headers.get("origin")
        if origin is not None and _parts(origin).netloc != host:
            return 403, "Requests from pages of other sites are refused."
        return self._wrong_route(scope["method"], scope["path"]) or self._wrong_size(scope, headers)

    def _wrong_route(self, method: str, path: str) -> tuple[int, str] | None:
        allowed = {"GET": READS, "HEAD": READS, "POST": WRITES}.get(method, ())
        if path == TIMES and method == "GET":
            return None
        if (path != "/" or method == "POST") and not path.startswith(allowed):
            return 404, "There is no such page here."
        if path.startswith("/gradio_api/file=") and "://" in path:
            return 403, "This server fetches nothing from other addresses."
        return None

    def _wrong_size(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if scope["method"] != "POST":
            return None
        if not headers.get("content-length", "").isdecimal():
            return 411, "Say the length of the request (Content-Length)."
        length = int(headers["content-length"])
        if scope["path"] != UPLOAD:
            too_long = length > MOST_JSON_BYTES
            return (413, "The request is too long.") if too_long else None
        if length > self.rules.most_upload_bytes + FORM_BYTES:
            most_mb = self.rules.most_upload_bytes // 1_000_000
            return 413, f"Upload at most {most_mb} MB at once."
        if shutil.disk_usage(self.rules.uploads).free < LEAST_FREE_BYTES + length:
            return 507, "The server's disk is full; try again later."
        return None


def names_strange_file(body: bytes, uploads: Path) -> bool:
    """True if the JSON of an event names a file outside `uploads`, an address included, or is nested too deep to tell.

    Gradio fetches what looks like an address before any handler sees it.
    """
    try:
        waiting: list[Any] = [json.loads(body)]
    except ValueError:
        return False  # Gradio answers what is no JSON
    except RecursionError:
        return True
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if (
                "path" in value
                and value["path"] is not None
                and not lies_in(value["path"], uploads)
            ):
                return True
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return False


def wrong_call(path: str, body: bytes, takes: Mapping[str, Takes]) -> tuple[int, str] | None:
    """Status and sentence for a call of nothing, or with too few values, which Gradio answers with an error without words."""
    try:
        sent = json.loads(body)
    except ValueError:
        return None  # Gradio answers what is no JSON
    sent = sent if isinstance(sent, dict) else {}
    name = path.removeprefix(CALL).strip("/") if path.startswith(CALL) else ""
    by_name = name.startswith(NAMED)
    name = name.removeprefix(NAMED)
    wanted = takes.get(name or str(sent.get("fn_index")))
    if wanted is None or (by_name and wanted.names is None):
        return 404, "There is no such endpoint; /gradio_api/info lists those that there are."
    data, names = sent.get("data"), wanted.names or ()
    if by_name:
        said = _wrong_names(sent, names, wanted.needed)
    elif isinstance(data, list) and len(data) >= wanted.values:
        said = None
    else:
        got = f"{len(data)} came" if isinstance(data, list) else "none came"
        listed = f" ({', '.join(names)})" if names else ""
        said = f'takes a list of {wanted.values} values{listed} as "data", but {got}; send all of them.'
    return (422, f"/{name} {said}" if name else f"This event {said}") if said else None


def _wrong_names(
    sent: dict[str, Any], names: tuple[str, ...], needed: tuple[str, ...]
) -> str | None:
    if missing := [key for key in needed if key not in sent]:
        return f"needs {' and '.join(missing)}; its values are {', '.join(names)}."
    if strange := [key for key in sent if key not in names]:
        return f"has no value '{strange[0][:40]}'; its values are {', '.join(names) or 'none'}."
    return None


def lies_in(path: object, folder: Path) -> bool:
    """True for the absolute path of something below `folder`, links and `..` followed."""
    if not isinstance(path, str) or not Path(path).is_absolute():
        return False
    try:
        return Path(path).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a loop of links, a NUL byte
        return False


async def _refuse(status: int, sentence: str, scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse(sentence, status)(scope, receive, send)


def _parts(address: str) -> SplitResult:
    """All empty where it is no address, such as "http://["."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


async def _body(receive: Receive) -> bytes:
    """The whole body; its length was checked against the header, which the server enforces."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
        await send(message)

    return sending
