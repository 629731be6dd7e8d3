"""Endpoints for programs: /models, /upscale, /compare. docs/demo_api.md shows how they are called.

The types of a function's parameters and its docstring are what `gradio_client` and /gradio_api/info show.
"""

# No `from __future__ import annotations`: Gradio reads the types themselves and does not resolve their names.
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import api as register

from demo.asked import Asked, choices_of, compare_request, tile_of
from demo.handlers import Handlers, guarded, until_closed
from demo.jobs import Progress
from demo.scores import to_json
from demo.server import DEVICE
from demo.uploads import file_record, upload_of


def add(handlers: Handlers) -> None:
    """Register the three endpoints in the `gr.Blocks` that is being built."""
    service, folder = handlers.service, handlers.folder

    def models() -> dict[str, Any]:
        """The networks, engines and limits of this server; keys of networks and engines go into the other calls."""
        return {
            "models": [asdict(entry) for entry in service.models()],
            "engines": [asdict(entry) for entry in service.engines()],
            "limits": asdict(service.limits),
        }

    def upscale(
        file: gr.FileData,
        model: str,
        engine: str = "torch",
        precision: str = "fp32",
        tile: int | None = None,
    ) -> Iterator[tuple[gr.FileData | None, dict[str, Any]]]:
        """Enlarge one picture: the PNG and its numbers. `tile` is a side in LR pixels; null: chosen by the server."""
        picture = upload_of(file, folder)
        (choice,) = choices_of(service.models(), [model], engine, precision)
        with until_closed(
            service.upscale(picture.path, picture.name, choice, tile_of(tile))
        ) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield None, asdict(event)
                elif event.complete:
                    (pane,) = event.panes
                    yield file_record(pane.file), json.loads(to_json(event))

    def compare(
        file: gr.FileData,
        models: list[str],
        engine: str = "torch",
        precision: str = "fp32",
        truth: gr.FileData | None = None,
        shrink: bool = False,
        reference: str | None = None,
        tile: int | None = None,
    ) -> Iterator[tuple[list[gr.FileData], dict[str, Any]]]:
        """One picture through several networks: the PNGs, nearest and bicubic among them, and the numbers.

        `truth` is the HR picture; with `shrink` the file itself is, and its bicubic reduction is enlarged.
        """
        asked = Asked(file, truth, shrink, models, engine, precision, reference, tile)
        request = compare_request(asked, service.models(), folder)
        service.check(request)
        with until_closed(service.compare(request)) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield [], asdict(event)
                elif event.complete:
                    yield (
                        [file_record(pane.file) for pane in event.panes],
                        json.loads(to_json(event)),
                    )

    register(models, api_name="models", concurrency_limit=None)
    register(_endpoint(upscale, folder), api_name="upscale", **DEVICE)
    register(_endpoint(compare, folder), api_name="compare", **DEVICE)


def _endpoint(
    handler: Callable[..., Iterator[tuple[Any, ...]]], folder: Path
) -> Callable[..., Any]:
    """`handler` as Gradio wants it: annotated with what it gives, not with an iterator of it."""
    run: Any = guarded(handler, 0, folder)
    signature = inspect.signature(handler)
    (given,) = signature.return_annotation.__args__
    run.__signature__ = signature.replace(return_annotation=given)
    return run
