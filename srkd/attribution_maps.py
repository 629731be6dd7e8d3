"""Pictures and files of attributions: heat maps, overlays, side by side, the JSON document."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from srkd.data.degradation import upscale_uint8
from srkd.files import sha256, write_json
from srkd.images import write_png
from srkd.report import save_strips
from srkd.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from srkd.attribution import BlurPath, Heat, Row, Window
    from srkd.loaded import LoadedModel

# Black to pale yellow, about 20 of CIE lightness from one to the next: twice the value looks twice as light.
RAMP = ((0, 0, 0), (64, 24, 112), (150, 40, 108), (226, 84, 56), (250, 170, 40), (255, 250, 200))
WINDOW_COLOUR = (0, 255, 255)  # not on the ramp
BLEND = 0.5  # share of the heat in an overlay, as in the paper's demo


def colours(heat: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1] -> (h, w, 3) uint8 along the ramp."""
    at = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(heat, at, channel) for channel in zip(*RAMP, strict=True)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def heat_picture(row: Row) -> np.ndarray:
    """(H, W, 3) uint8: the map; a pixel of an LR image is a square of scale x scale."""
    side = _side_px(row)
    return colours(row.heat.map.numpy()).repeat(side, 0).repeat(side, 1)


def overlay_picture(row: Row) -> np.ndarray:
    """(H, W, 3) uint8: what the map is of in grey, the map over it, a frame around the window."""
    # Grey beneath, so that every colour is heat.
    grey = Image.fromarray(_enlarged(row.image, _side_px(row))).convert("L").convert("RGB")
    return _framed(Image.blend(grey, Image.fromarray(heat_picture(row)), BLEND), row.window)


def input_picture(row: Row) -> np.ndarray:
    """(H, W, 3) uint8: the model's input by bicubic interpolation, a frame around the window."""
    return _framed(Image.fromarray(_enlarged(row.lr, row.model.scale)), row.window)


def _side_px(row: Row) -> int:
    """Output pixels along the side of a pixel of the map: of the teacher's SR image, or of the LR image."""
    return 1 if row.teacher else row.model.scale


def _enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    return image if factor == 1 else upscale_uint8(image, factor)


def _framed(image: Image.Image, window: Window) -> np.ndarray:
    x, y, size = window
    ImageDraw.Draw(image).rectangle((x - 1, y - 1, x + size, y + size), outline=WINDOW_COLOUR)
    return np.asarray(image)


def document(rows: Sequence[Row], image: str, path: BlurPath, *, hr: bool) -> dict[str, Any]:
    """Everything as plain values for JSON; an index of null means that no pixel takes part.

    Of a teacher, `rise` and `undefined_gradients` are those of the whole aggregation network.
    """
    h, w = rows[0].lr.shape[:2]
    return {
        "image": image,
        "made_smaller": hr,
        "input_size": [h, w],
        "window": rows[0].window._asdict(),
        "path": asdict(path),
        "srkd": __version__,
        "torch": torch.__version__,
        "models": [
            {
                "model": row.label,
                **({"teacher": row.teacher, "share": row.heat.share} if row.teacher else {}),
                "source": str(row.model.source),
                "weights_sha256": _weights_hash(row.model),
                "scale": row.model.scale,
                "diffusion_index": row.heat.diffusion_index,
                "gini": row.heat.gini,
                "rise": row.attribution.rise,
                "attributed": row.attribution.signed.sum().item(),
                "undefined_gradients": row.attribution.undefined,
                "notes": list(row.model.notes),
            }
            for row in rows
        ],
    }


def _weights_hash(model: LoadedModel) -> str | None:
    """None for a network that was built in memory."""
    source = model.source
    file = source / "weights.safetensors" if source.is_dir() else source
    return sha256(file) if file.is_file() else None


def write_maps(folder: Path, rows: Sequence[Row], described: dict[str, Any]) -> list[Path]:
    """Write the pictures of every row, all side by side if there are several, and the numbers."""
    written = []
    for row in rows:
        name = file_name(row.label)
        for what, picture in (("map", heat_picture(row)), ("overlay", overlay_picture(row))):
            written.append(folder / f"{name}_{what}.png")
            write_png(written[-1], picture)
    if len(rows) > 1:
        titles = [f"{row.label}, DI {index_text(row.heat)}" for row in rows]
        panels = [input_picture(rows[0]), *map(overlay_picture, rows)]
        written.append(folder / "side_by_side.png")
        save_strips(written[-1], [panels], ["input", *titles])
    written.append(folder / "attribution.json")
    write_json(written[-1], described)
    return written


def index_text(heat: Heat) -> str:
    """The diffusion index, or a dash where there is none."""
    return f"{heat.diffusion_index:.2f}" if heat.known else "-"


def file_name(label: str) -> str:
    """A label (it may be a path) as part of a file's name, which a file system wants below 256 bytes."""
    return re.sub(r"[^\w.+-]+", "_", label)[-80:].strip("._")
