"""The quick start: distil, evaluate, export, verify, compare, with nothing to download.

A shipped teacher (RCAN-C) teaches a tiny student (RCAN-A) on the built-in images; the same student is
trained alone with the same budget. Ends with a table, a picture, an ONNX file and its verdict.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deploy.engines import require_engine
from deploy.export import export
from srkd.console import INTERRUPTED
from srkd.data.sets import open_set
from srkd.files import plain, write_json, write_text
from srkd.images import to_tensor
from srkd.infer import upscale
from srkd.models import load_model
from srkd.progress import duration
from srkd.report import busiest, markdown_table, print_table, save_strips
from srkd.train import INTERRUPTED_HINT, distill

if TYPE_CHECKING:
    import numpy as np

    from srkd.models import LoadedModel
    from srkd.recipe import Recipe

CROP_PX = 112
TIMED_RUNS = 5


def quickstart(
    recipe: Recipe,
    out: Path | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> int:
    """Run it all into `out` (default runs/quickstart, replaced); returns the exit code.

    `recipe` is recipes/quickstart.toml, or one with one teacher and `with_baseline` like it.
    """
    require_engine("onnx")
    folder = out or Path("runs/quickstart")
    start = time.monotonic()
    r = recipe
    if not quiet:
        say = f"quick start: {r.teacher.models[0]} teaches {r.student.network} at x{r.student.scale}, "
        say += (
            f"{r.train.iterations} steps, then the same student alone; a few minutes on two cores"
        )
        print(say, file=sys.stderr)
    # The default folder belongs to the quick start; one that the user named is replaced on demand only.
    result = distill(r, folder, device=device, overwrite=overwrite or out is None, quiet=quiet)
    if result.interrupted:
        if as_json:
            print(json.dumps(plain(result.to_dict())))
        print(INTERRUPTED_HINT.format(folder=result.folder), file=sys.stderr)
        return INTERRUPTED

    scale = r.student.scale
    models: dict[str, LoadedModel | None] = {
        "bicubic": None,
        "from scratch": load_model(folder / "baseline"),
        "distilled": load_model(folder),
        "teacher": load_model(r.teacher.models[0], scale),
    }
    held_out = list(open_set("builtin", scale))
    lr = held_out[0].lr
    for row, model in zip(result.rows, models.values(), strict=True):
        row[f"ms ({lr.shape[1]}x{lr.shape[0]})"] = f"{median_ms(model, lr, scale):.0f}"
    picture = folder / "quickstart.png"
    strips = [
        [*(show(model, image.lr, scale) for model in models.values()), image.hr]
        for image in held_out[:3]
    ]
    crops = []
    for strip in strips:
        top, left = busiest(strip[-1], CROP_PX)
        crops.append([p[top : top + CROP_PX, left : left + CROP_PX] for p in strip])
    save_strips(picture, crops, [*models, "original"])

    exported = export(folder, engine="onnx", quiet=quiet)
    seconds = time.monotonic() - start
    summary: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "table": result.rows,
        "picture": str(picture),
        "onnx": str(exported.file),
        "parity": exported.verdict,
    }
    write_json(folder / "quickstart.json", summary)
    write_text(folder / "quickstart.md", markdown_table(result.rows))
    if as_json:
        print(json.dumps(plain(summary)))
    else:
        print_table(result.rows)
        print(verdict(result.rows))
        print(f"picture  {picture}\nonnx     {exported.file}   parity {exported.verdict}")
        print(f"done in {duration(seconds)}\n\nnext:")
        for command in next_commands(folder):
            print(f"  {command}")
    return exported.exit_code


def verdict(rows: list[dict[str, Any]]) -> str:
    """One honest line: did the distilled student beat bicubic and its twin from scratch?"""
    psnr = {row["name"]: next(iter(row["scores"].values()))["psnr_y"] for row in rows}
    bicubic, scratch, distilled = list(psnr.values())[:3]
    over_scratch = distilled - scratch
    judged = "beats" if over_scratch > 0 else "DOES NOT BEAT"
    return (
        f"the distilled student {judged} the same student from scratch by {over_scratch:+.2f} dB and "
        f"bicubic by {distilled - bicubic:+.2f} dB on photographs that none was trained on"
    )


def show(model: LoadedModel | None, lr: np.ndarray, scale: int) -> np.ndarray:
    """(h, w, 3) uint8 -> (H, W, 3) uint8; None is bicubic."""
    from srkd.data.degradation import upscale_uint8

    return upscale_uint8(lr, scale) if model is None else upscale(lr, model)


@torch.inference_mode()
def median_ms(model: LoadedModel | None, lr: np.ndarray, scale: int) -> float:
    """Median time of one picture, warm, in milliseconds: the network alone, or bicubic whole."""
    if model is None:

        def run() -> object:
            return show(None, lr, scale)
    else:
        image = to_tensor(lr)
        network = model.network.cpu()

        def run() -> object:
            return network(image)

    run()
    times = []
    for _ in range(TIMED_RUNS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times)


def next_commands(folder: Path) -> list[str]:
    return [
        f"python scripts/upscale.py photo.jpg photo_x4.png --model {folder}",
        f"python scripts/evaluate.py {folder} {folder}/baseline bicubic --scale 4 --data builtin",
        "python scripts/distill.py --method logits --student rcan_b --scale 4 --teacher rcan_c "
        "--data YOUR_PHOTOS --iterations 20000 --with-baseline",
    ]
