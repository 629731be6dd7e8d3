"""A comparison as the viewer in demo/viewer/ takes it, and that viewer's own files. Text only, no HTML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from demo.jobs import Numbers, Pane, Result

FOLDER = Path(__file__).resolve().parent / "viewer"
# In the order in which they need each other.
SCRIPTS = (
    "viewer_geometry.js",
    "viewer_pictures.js",
    "viewer_difference.js",
    "viewer_controls.js",
    "viewer_input.js",
    "viewer_drawing.js",
    "viewer.js",
)


def assets() -> tuple[str, str, str]:
    """The viewer's markup, style and script. The markup goes into the element given to `SrkdViewer.mount`."""
    html = (FOLDER / "viewer.html").read_text(encoding="utf-8")
    css = (FOLDER / "viewer.css").read_text(encoding="utf-8")
    js = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return html, css, js


def viewer_data(result: Result, url: Callable[[Path], str]) -> dict[str, Any]:
    """What `SrkdViewer.mount` and `update` take; plain JSON values. `url` gives a file's address for the browser."""
    labels = {pane.key: pane.label for pane in result.panes}
    truth = next((pane.key for pane in result.panes if pane.role == "truth"), None)
    reference = labels.get(result.reference) if result.reference else None
    return {
        "scale": result.scale,
        "lr": list(result.lr_size),
        "name": result.name,
        "protocol": result.protocol,
        "truth": truth,
        "reference": result.reference if reference else None,
        "images": [image(pane, url(pane.file), reference) for pane in result.panes],
    }


def image(pane: Pane, url: str, reference: str | None) -> dict[str, Any]:
    """One picture; `reference` is the label of the model that agreement is counted against."""
    height, width = pane.size
    lines = metric_lines(pane.numbers, reference)
    return {
        "key": pane.key,
        "label": pane.label,
        "role": pane.role,
        "url": url,
        "w": width,
        "h": height,
        "alt": ", ".join([f"{pane.label}, {width}×{height} pixels", *lines]),
        "lines": lines,
    }


def metric_lines(numbers: Numbers, reference: str | None) -> list[str]:
    """Quality first, then time. Without a truth there is no PSNR, only agreement with a named model."""
    lines = []
    if numbers.psnr_y is not None:
        lines.append(f"PSNR-Y {decibel(numbers.psnr_y)}")
    if numbers.ssim_y is not None:
        lines.append(f"SSIM-Y {numbers.ssim_y:.4f}")
    if numbers.agreement_db is not None and reference is not None:
        lines.append(f"agrees with {reference}: {decibel(numbers.agreement_db)}")
    if numbers.p50_ms is not None:
        busy = ", on a busy machine" if numbers.busy else ""
        lines.append(f"model {numbers.p50_ms:.1f} ms (p50, warm{busy})")
    elif numbers.model_s is not None:
        run = "one warm run" if numbers.warm else "first run, with loading"
        lines.append(f"model {1000 * numbers.model_s:.0f} ms ({run})")
    return lines


def decibel(value: float) -> str:
    """PSNR of identical pictures is infinite."""
    return "∞ dB (identical)" if math.isinf(value) else f"{value:.2f} dB"
