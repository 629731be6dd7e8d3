"""The page on a free port, with tiny networks: started once per process by the first test that needs it."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from tiny_service import write_runs

if TYPE_CHECKING:
    import gradio as gr

    from demo.service import Service


@dataclass(frozen=True)
class Live:
    """The running page: its address without a slash at the end, its upload folder, the runs it shows, what serves it."""

    address: str
    folder: Path
    runs: Path
    service: Service
    page: gr.Blocks
    http: httpx.Client

    def upload(self, data: bytes, name: str = "photo.png") -> dict[str, Any]:
        """Gradio's record of an uploaded file."""
        reply = self.http.post("/gradio_api/upload", files={"files": (name, data)})
        reply.raise_for_status()
        return record(reply.json()[0], name)

    def post(self, endpoint: str, data: list[Any]) -> httpx.Response:
        return self.http.post(f"/gradio_api/call/{endpoint}", json={"data": data})

    def call(self, endpoint: str, *data: Any) -> str:
        """The whole reply of an endpoint as it comes over the wire."""
        event = self.post(endpoint, list(data)).json()["event_id"]
        return self.http.get(f"/gradio_api/call/{endpoint}/{event}").text

    def upscale(self, file: Any, model: Any = "tiny_scratch", **other: Any) -> str:
        sent = {"engine": "torch", "precision": "fp32", "tile": None, **other}
        return self.call("upscale", file, model, *sent.values())

    def compare(self, file: Any, models: Any, **other: Any) -> str:
        sent = {"engine": "torch", "precision": "fp32", "truth": None, "shrink": False}
        sent |= {"reference": None, "tile": None, **other}
        return self.call("compare", file, models, *sent.values())


def record(path: str, name: str = "photo.png") -> dict[str, Any]:
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


@functools.cache
def live() -> Live:
    root = Path(tempfile.mkdtemp(prefix="srkd-live-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / "uploads"
    folder.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)

    from demo.app import free_port
    from demo.page import build
    from demo.server import serve
    from demo.service import Service
    from demo.widgets import head
    from demo.workspace import Workspace

    service = Service(write_runs(root / "runs"), workspace=Workspace(folder / "results"))
    page = build(service, folder)
    address = serve(
        page,
        limits=service.limits,
        folder=folder,
        head=head(),
        host="127.0.0.1",
        port=free_port("127.0.0.1", 0),
        waiting=16,
    )
    atexit.register(page.close, verbose=False)
    address = address.rstrip("/")
    http = httpx.Client(base_url=address, timeout=60, trust_env=False)
    return Live(address, folder, root / "runs", service, page, http)
