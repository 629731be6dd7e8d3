"""The parts of the page, laid out but not yet wired; `demo.page` says what each of them starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from demo import markup
from demo.batch import MOST_SR_PX
from demo.settings import model_label, of_scale, precisions_of, scales, usable
from demo.uploads import FILE_META
from demo.viewer_data import assets

if TYPE_CHECKING:
    from demo.entries import EngineEntry
    from demo.service import Service
    from demo.settings import Settings

ASSETS = Path(__file__).parent / "assets"
EXAMPLES = Path(__file__).parent / "examples"
FORMATS = [("PNG, exact", "png"), ("the format uploaded", "original")]
# Plain blocks: Gradio's own text styles would reach into our tables and lists.
PLAIN: dict[str, Any] = {"apply_default_css": False, "elem_classes": "srkd-page-plain"}


@dataclass(frozen=True)
class Example:
    """A picture of demo/examples; `scale` is that of its LR, `truth` may be missing.

    `about` is what to look at, `source` who made it or where it was cropped from.
    """

    picture: Path
    truth: Path | None
    scale: int
    title: str
    about: str
    licence: str
    source: str


@dataclass(frozen=True)
class Choosing:
    """The widgets that say what is compared."""

    picture: gr.Image
    truth: gr.Image
    shrink: gr.Checkbox
    scale: gr.Dropdown
    models: gr.CheckboxGroup
    engine: gr.Dropdown
    precision: gr.Dropdown
    reference: gr.Dropdown
    limits: gr.HTML
    go: gr.Button
    stop: gr.Button
    gallery: gr.HTML
    examples: list[Example]

    def asked(self) -> list[Any]:
        """In the order of `demo.asked.Asked`."""
        return [
            self.picture,
            self.truth,
            self.shrink,
            self.models,
            self.engine,
            self.precision,
            self.reference,
        ]

    def linked(self) -> list[Any]:
        """Those that a link carries, in the order of `Settings`."""
        return [self.scale, self.models, self.engine, self.precision, self.reference]


@dataclass(frozen=True)
class Showing:
    """The widgets that show what came out."""

    status: gr.HTML
    viewer: gr.HTML
    table: gr.HTML
    speed: gr.Button
    files: gr.HTML
    wanted: gr.Radio


def head() -> str:
    """Style and script of the viewer and of the page, inline, so that the page asks nobody for anything."""
    _, viewer_css, viewer_js = assets()
    css = viewer_css + (ASSETS / "page.css").read_text(encoding="utf-8")
    js = viewer_js + (ASSETS / "page.js").read_text(encoding="utf-8")
    return f"<style>{css}</style><script>{js}</script>"


def choosing(service: Service, first: Settings) -> Choosing:
    """What to compare and with which networks."""
    limits = gr.HTML(limits_text(service, first.scale), **PLAIN)
    picture = _upload("Picture to enlarge", "srkd-picture", 190)
    examples = read_examples()
    gallery = _gallery(examples)
    origins = [(e.title, e.about, e.source, e.licence) for e in examples]
    gr.HTML(markup.origins(origins), elem_id="srkd-origins", **PLAIN)
    with gr.Accordion("Ground truth (optional)", open=False, elem_id="srkd-truth-box"):
        truth = _upload("Ground truth, scale times as large", "srkd-truth", 160)
        shrink = gr.Checkbox(
            label="The picture above is the ground truth: shrink it first",
            info="Its bicubic reduction is enlarged and compared with it.",
            elem_id="srkd-shrink",
        )
    models = gr.CheckboxGroup(
        model_choices(service, first.scale),
        value=list(first.models),
        label=f"Networks (up to {service.limits.max_choices})",
        elem_id="srkd-models",
    )
    with gr.Row(elem_classes="srkd-page-tight"):
        go = gr.Button("Compare", variant="primary", min_width=96, elem_id="srkd-go")
        stop = gr.Button("Stop", min_width=72, elem_id="srkd-stop")
    scale, engine, precision, reference = _how(service, first)
    return Choosing(
        picture,
        truth,
        shrink,
        scale,
        models,
        engine,
        precision,
        reference,
        limits,
        go,
        stop,
        gallery,
        examples,
    )


def _how(
    service: Service, first: Settings
) -> tuple[gr.Dropdown, gr.Dropdown, gr.Dropdown, gr.Dropdown]:
    """Scale, engine, precision, reference."""
    with gr.Accordion("Scale, engine, reference", open=True, elem_id="srkd-how"):
        scale = gr.Dropdown(
            [(f"x{factor}", factor) for factor in scales(service.models())],
            value=first.scale,
            label="Scale",
            filterable=False,
        )
        engine, precision = engine_choosers(service, first)
        reference = gr.Dropdown(
            reference_choices(service, first.scale),
            value=first.reference,
            label="Reference",
            info="Without a ground truth, agreement is counted against this network.",
            filterable=False,
        )
    return scale, engine, precision, reference


def _gallery(examples: list[Example]) -> gr.HTML:
    """Buttons with a picture and its title; a click triggers "select" with the number of the example."""
    shown = [
        {"title": e.title, "file": {"path": str(e.picture), "meta": FILE_META}} for e in examples
    ]
    return gr.HTML(
        shown,
        html_template='<p class="srkd-page-hint">Or an example; one click compares it.</p>'
        '<div class="srkd-page-examples"></div>',
        js_on_load="SrkdPage.examples(element, props, trigger, 'select');",
        elem_id="srkd-examples",
        **PLAIN,
    )


def engine_choosers(service: Service, first: Settings) -> tuple[gr.Dropdown, gr.Dropdown]:
    """Engine and precision of those that run here; the others are listed with the reason why not."""
    engines = service.engines()
    engine = gr.Dropdown(
        [(entry.label, entry.key) for entry in usable(engines)],
        value=first.engine,
        label="Engine",
        filterable=False,
    )
    precision = gr.Dropdown(
        list(precisions_of(engines, first.engine)),
        value=first.precision,
        label="Precision",
        filterable=False,
    )
    gr.HTML(unavailable_text(engines), **PLAIN)
    return engine, precision


def showing() -> Showing:
    """The right column below its status line: viewer, table, downloads."""
    markup_of_viewer, _, _ = assets()
    with gr.Row(elem_id="srkd-run"):
        status = gr.HTML(
            markup.status("Choose a picture or an example."), elem_id="srkd-status", **PLAIN
        )
    viewer = gr.HTML(
        None,
        html_template=f'<p class="srkd-page-empty">The pictures appear here, side by side.</p>'
        f'<div class="srkd-mount" hidden>{markup_of_viewer}</div>',
        js_on_load="SrkdPage.viewer(element, props, watch);",
        elem_id="srkd-viewer",
        **PLAIN,
    )
    table = gr.HTML("", elem_id="srkd-results", **PLAIN)
    speed = gr.Button("Measure the speed", size="sm", elem_id="srkd-speed")
    wanted = gr.Radio(FORMATS, value="png", label="Download as", elem_id="srkd-wanted")
    files = downloads("srkd-files")
    return Showing(status, viewer, table, speed, files, wanted)


def downloads(elem_id: str) -> gr.HTML:
    """Links with sizes; the value is {"files": [record of `uploads.file_record`, ...], "notes": [text, ...]}."""
    return gr.HTML(
        None,
        html_template='<div class="srkd-page-downloads"></div>',
        js_on_load="SrkdPage.downloads(element, props, watch);",
        elem_id=elem_id,
        **PLAIN,
    )


def _upload(label: str, elem_id: str, height: int) -> gr.Image:
    """The file stays as it is: decoding, orientation and depth are the service's work."""
    return gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        label=label,
        height=height,
        elem_id=elem_id,
    )


def settings_updates(service: Service, settings: Settings) -> list[Any]:
    """One update per widget of `Choosing.linked`, and the limits of that scale."""
    names = precisions_of(service.engines(), settings.engine)
    return [
        settings.scale,
        gr.CheckboxGroup(model_choices(service, settings.scale), value=list(settings.models)),
        settings.engine,
        gr.Dropdown(list(names), value=settings.precision),
        gr.Dropdown(reference_choices(service, settings.scale), value=settings.reference),
        limits_text(service, settings.scale),
    ]


def read_examples() -> list[Example]:
    """Those of demo/examples/index.json."""
    return [
        Example(
            EXAMPLES / entry["file"],
            EXAMPLES / entry["truth"] if entry["truth"] else None,
            entry["scale"],
            entry["title"],
            entry["about"],
            entry["licence"],
            entry["source"],
        )
        for entry in json.loads((EXAMPLES / "index.json").read_text(encoding="utf-8"))
    ]


def model_choices(service: Service, scale: int) -> list[tuple[str, str]]:
    return [(model_label(entry), entry.key) for entry in of_scale(service.models(), scale)]


def reference_choices(service: Service, scale: int) -> list[tuple[str, str]]:
    return [(entry.label, entry.key) for entry in of_scale(service.models(), scale)]


def unavailable_text(engines: list[EngineEntry]) -> str:
    return markup.unavailable(
        [(entry.label, entry.reason) for entry in engines if entry.reason is not None]
    )


def limits_text(service: Service, scale: int) -> str:
    return markup.hint(service.limits.sentence(scale))


def batch_limits_text(service: Service, scale: int) -> str:
    return markup.hint(
        f"Up to {service.limits.max_files} pictures through one network, as one zip with a list of what was done. "
        f"Each: {service.limits.sentence(scale)} "
        f"All enlargements of a batch together: at most {MOST_SR_PX / 1e6:.0f} megapixels."
    )
