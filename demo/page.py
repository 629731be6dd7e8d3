"""The page: which part stands where, and which handler each widget starts. No computing happens here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from demo import api, markup
from demo.handlers import Handlers, guarded
from demo.server import DELETE_CACHE_S, DEVICE
from demo.settings import from_query, model_label, precisions_of, usable
from demo.widgets import (
    FORMATS,
    PLAIN,
    batch_limits_text,
    choosing,
    downloads,
    engine_choosers,
    settings_updates,
    showing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from demo.service import Service
    from demo.widgets import Choosing, Example, Showing

TITLE = "srkd: super-resolution, side by side"
INTRO = """\
# Super-resolution, side by side
A teacher, a student trained alone and the same student distilled, next to bicubic and nearest neighbour."""
# Events of the page's own widgets are no interface; `demo.api` has the endpoints for programs.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# Values come as sent: `demo.asked` checks them, also those that no widget of the page would send.
# A stopped job ends with its tile; by Gradio's default a press before that would be ignored without a word.
JOB: dict[str, Any] = {
    **PRIVATE,
    **DEVICE,
    "preprocess": False,
    "show_progress": "minimal",
    "trigger_mode": "multiple",
}
QUICK: dict[str, Any] = {**PRIVATE, "preprocess": False, "show_progress": "hidden"}
TO_RESULT = "(...values) => SrkdPage.toResult(values)"
ENDED = "() => SrkdPage.ended('{}')"


def build(service: Service, folder: Path) -> gr.Blocks:
    """The page for the networks and engines of `service`; uploads and results lie in `folder`."""
    handlers = Handlers(service, folder)
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=DELETE_CACHE_S, fill_width=True
    ) as page:
        # First: an event of the page that came before would take the endpoint's name.
        api.add(handlers)
        gr.Markdown(INTRO, elem_id="srkd-intro")
        with gr.Tab("Compare"):
            _compare_tab(page, handlers)
        with gr.Tab("Several files"):
            _batch_tab(handlers)
    return page


def _compare_tab(page: gr.Blocks, handlers: Handlers) -> None:
    service = handlers.service
    first = from_query({}, service.models(), service.engines())
    kept = gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=300, elem_id="srkd-left"):
            c = choosing(service, first)
        with gr.Column(scale=8, min_width=320, elem_id="srkd-right"):
            s = showing()
    _settings_events(page, service, c)
    jobs = _comparing(handlers, c, s, kept)
    timed = s.speed.click(
        handlers.job(handlers.speed, 6),
        [kept, c.models, c.engine, c.precision],
        [s.status, s.viewer, s.table, kept, s.files, s.wanted],
        show_progress_on=[s.status],
        **JOB,
    )
    _frees("compare", timed)
    # Gradio's cancelling takes what still waits out of the queue.
    c.stop.click(handlers.stopping, None, [s.status], cancels=[*jobs, timed], **QUICK).then(
        guarded(handlers.stopped, 4, handlers.folder),
        [kept],
        [s.status, s.table, s.files, s.wanted],
        **QUICK,
    )
    s.wanted.change(handlers.files_job(), [kept, s.wanted], [s.status, s.files], **QUICK)


def _comparing(handlers: Handlers, c: Choosing, s: Showing, kept: gr.State) -> list[Any]:
    """The jobs that compare: by the button, and by a click on an example."""
    compare = handlers.job(handlers.compare, 6)
    outputs = [s.status, s.viewer, s.table, kept, s.files, s.wanted]
    how = {"inputs": c.asked(), "outputs": outputs, "show_progress_on": [s.status], **JOB}
    from_example = gr.State(False)
    picked = c.gallery.select(
        _picker(c.examples, handlers.folder),
        [c.scale],
        [c.picture, c.truth, c.shrink, from_example],
        **QUICK,
    )
    c.picture.upload(own_picture, [from_example], [c.truth, c.shrink, from_example], **QUICK)
    picked.failure(None, None, None, js=ENDED.format("compare"), **PRIVATE)
    jobs = [c.go.click(compare, js=TO_RESULT, **how), picked.success(compare, js=TO_RESULT, **how)]
    _frees("compare", *jobs)
    return jobs


def _frees(kind: str, *jobs: Any) -> None:
    """The buttons that start jobs of this kind work again when one is over, however it ended."""
    for job in jobs:
        for over in (job.then, job.failure):  # `then` alone is not called after a failure
            over(None, None, None, js=ENDED.format(kind), **PRIVATE)


def own_picture(from_example: Any) -> list[Any]:
    """Truth and "shrink it first" that an example set, in a closed box, say nothing about an uploaded picture."""
    return [None, False, False] if from_example is True else [gr.skip(), gr.skip(), gr.skip()]


def _picker(examples: Sequence[Example], folder: Path) -> Callable[[Any, gr.EventData], list[Any]]:
    """The clicked example as picture, ground truth, whether the picture is the ground truth itself, and True.

    Gradio shows files only from below the working directory or its own folder, so they are copied there.
    """

    def picked(scale: Any, event: gr.EventData) -> list[Any]:
        number = (event._data or {}).get("index")  # where Gradio puts the details
        if not isinstance(number, int) or not 0 <= number < len(examples):
            raise gr.Error("There is no such example.", print_exception=False)
        example = examples[number]
        if example.truth is not None and scale != example.scale:
            return [save_file_to_cache(example.truth, str(folder)), None, True, True]
        files = [example.picture, example.truth]
        return [
            *(None if f is None else save_file_to_cache(f, str(folder)) for f in files),
            False,
            True,
        ]

    return picked


def _settings_events(page: gr.Blocks, service: Service, c: Choosing) -> None:
    """Settings follow each other and the link; a value that no table knows changes nothing."""

    def settings_of(query: dict[str, str]) -> list[Any]:
        return settings_updates(service, from_query(query, service.models(), service.engines()))

    def from_link(request: gr.Request) -> list[Any]:
        return settings_of({str(k): str(v) for k, v in request.query_params.items()})

    def rescaled(scale: Any, engine: Any, precision: Any) -> list[Any]:
        return settings_of(
            {"scale": str(scale), "engine": str(engine), "precision": str(precision)}
        )

    every = [*c.linked(), c.limits]
    c.scale.input(rescaled, [c.scale, c.engine, c.precision], every, **QUICK)
    _precision_follows(service, c.engine, c.precision)
    page.load(from_link, None, every, **QUICK)
    for widget in c.linked():
        widget.change(None, c.linked(), None, js="(...values) => SrkdPage.link(values)", **PRIVATE)


def _precision_follows(service: Service, engine: gr.Dropdown, precision: gr.Dropdown) -> None:
    def follow(chosen: Any) -> Any:
        engines = service.engines()
        known = [entry.key for entry in usable(engines)]
        names = precisions_of(engines, chosen if chosen in known else known[0])
        return gr.Dropdown(list(names), value=names[0])

    engine.input(follow, [engine], [precision], **QUICK)


def _batch_tab(handlers: Handlers) -> None:
    service = handlers.service
    first = from_query({}, service.models(), service.engines())
    gr.HTML(batch_limits_text(service, first.scale), **PLAIN)
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            files = gr.File(
                label="Pictures", file_count="multiple", height=220, elem_id="srkd-batch-files"
            )
        with gr.Column(scale=4, min_width=300):
            model = gr.Dropdown(
                [
                    (f"{model_label(entry)}, x{entry.scale}", entry.key)
                    for entry in service.models()
                ],
                value=first.models[0],
                label="Network",
                filterable=False,
            )
            engine, precision = engine_choosers(service, first)
            wanted = gr.Radio(FORMATS, value="png", label="Write as")
            with gr.Row(elem_classes="srkd-page-tight"):
                go = gr.Button("Upscale all", variant="primary", elem_id="srkd-batch-go")
                stop = gr.Button("Stop", elem_id="srkd-batch-stop")
            status = gr.HTML(markup.status(""), elem_id="srkd-batch-status", **PLAIN)
            archive = downloads("srkd-batch-zip")
    _precision_follows(service, engine, precision)
    job = go.click(
        handlers.job(handlers.batch, 2),
        [files, model, engine, precision, wanted],
        [status, archive],
        show_progress_on=[status],
        **JOB,
    )
    _frees("batch", job)
    stop.click(handlers.stopping, None, [status], cancels=[job], **QUICK).then(
        lambda: markup.status("Stopped; nothing was kept."), None, [status], **QUICK
    )
