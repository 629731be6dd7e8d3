"""What a run shows at its end: the table, the pictures, report.md."""

from __future__ import annotations

import sys
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from srkd.aggregate import AGGREGATED, Aggregate
from srkd.data.degradation import upscale_uint8
from srkd.data.sets import given_hr
from srkd.evaluate import score, score_bicubic, score_parts
from srkd.files import replacing, write_text
from srkd.first_stage import kind_of
from srkd.images import to_tensor, to_uint8
from srkd.models import load_model
from srkd.networks.privileged import PrivilegedTeacher

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from srkd.data.sets import EvaluationSet
    from srkd.models import LoadedModel
    from srkd.runs import Run

CROP_PX = 96  # HR pixels shown of each picture in a sample, before enlargement
ENLARGE = 2
ABOUT_HR = (
    "The teacher is given the HR image: its score says what an image of LR size that it makes itself can keep, and "
    "nothing about upscaling.\n"
)


def write_report(
    run: Run,
    teachers: Sequence[LoadedModel],
    sets: Sequence[EvaluationSet],
    scores: dict[str, dict[str, float]],
    baseline: Path | None,
) -> list[dict[str, Any]]:
    """Score everything that belongs in the table, write report.md, and return the table's rows.

    `scores` are the student's, measured a moment ago on these sets. A row: {"name", "parameters", "scores":
    {set: {"psnr_y", "ssim_y"}}}. The student is read back from the file that the run leaves, so the report
    speaks of that file.
    """
    student = load_model(run.folder)
    rows: list[dict[str, Any]] = [
        {
            "name": "bicubic",
            "parameters": 0,
            "scores": {s.name: _plain(score_bicubic(s)) for s in sets},
        }
    ]
    if baseline is not None:
        rows.append(_row("student, from scratch", load_model(baseline), sets))
    distilled = run.recipe.method.name != "scratch"
    name = f"student, {run.recipe.method.name}" if distilled else "student, from scratch"
    count = student.info["parameters"]
    rows.append({"name": name, "parameters": count, "scores": scores})
    if run.recipe.validate.teachers:
        for teacher in teachers:
            rows += teacher_rows(teacher, sets)
    write_text(run.folder / "report.md", _markdown(run, student, rows, sets, teachers))
    return rows


def write_first_report(
    run: Run, sets: Sequence[EvaluationSet], device: torch.device
) -> list[dict[str, Any]]:
    """The same for a first stage, whose rows are those of the teacher that it made."""
    model = kind_of(run.recipe).trained(run.recipe, run.folder)
    model.network.to(device)
    bicubic = {s.name: _plain(score_bicubic(s)) for s in sets}
    rows = [{"name": "bicubic", "parameters": 0, "scores": bicubic}, *teacher_rows(model, sets)]
    remark = ABOUT_HR if isinstance(model.network, PrivilegedTeacher) else below_best(rows)
    write_text(run.folder / "report.md", _markdown(run, model, rows, sets, remark=remark))
    return rows


def below_best(rows: list[dict[str, Any]]) -> str:
    """A line when the aggregated teacher is worse than the best single one, which helps no student."""
    if not rows[-1]["scores"]:
        return ""
    mean = {r["name"]: fmean(s["psnr_y"] for s in r["scores"].values()) for r in rows[1:]}
    best, own = max(mean, key=mean.__getitem__), mean[rows[-1]["name"]]
    if mean[best] <= own:
        return ""
    return (
        f"The {AGGREGATED} ({own:.2f} dB) is below {best} ({mean[best]:.2f} dB): train the first stage longer "
        "(stage1.iterations), or let it start at the mean of the teachers (method.image_skip=mean).\n"
    )


def teacher_rows(model: LoadedModel, sets: Sequence[EvaluationSet]) -> list[dict[str, Any]]:
    """The rows of a teacher: one, or those of everything that an aggregated one is made of."""
    if isinstance(model.network, Aggregate):
        return aggregate_rows(model, sets)
    if isinstance(model.network, PrivilegedTeacher):
        return [_row(f"{model.name}, given HR", model, [given_hr(s) for s in sets])]
    return [_row(f"teacher {model.name}", model, sets)]


def aggregate_rows(model: LoadedModel, sets: Sequence[EvaluationSet]) -> list[dict[str, Any]]:
    """A row per single teacher, one for the mean of their images, one for the aggregated teacher.

    Every teacher runs once per image.
    """
    network = model.network
    assert isinstance(network, Aggregate)
    found = {s.name: score_parts(network, network.parts, s) for s in sets}
    counts = network.part_parameters()
    return [
        {
            "name": part,
            "parameters": counts[part],
            "scores": {name: _plain(scores[part]) for name, scores in found.items()},
        }
        for part in counts
    ]


def _row(name: str, model: LoadedModel, sets: Sequence[EvaluationSet]) -> dict[str, Any]:
    count = sum(p.numel() for p in model.network.parameters())
    scores = {s.name: _plain(score(model.network, s)) for s in sets}
    return {"name": name, "parameters": count, "scores": scores}


def _plain(result: Any) -> dict[str, float]:
    return {"psnr_y": result.psnr, "ssim_y": result.ssim}


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the papers' table: PSNR-Y with two decimals, SSIM-Y with four."""
    sets = list(rows[0]["scores"]) if rows else []
    header = ["", "parameters", *(f"{s} PSNR-Y / SSIM-Y" for s in sets), *_extra(rows)]
    cells = [
        [
            r["name"],
            f"{r['parameters']:,}" if r["parameters"] else "-",
            *(f"{r['scores'][s]['psnr_y']:.2f} / {r['scores'][s]['ssim_y']:.4f}" for s in sets),
            *(str(r.get(key, "")) for key in _extra(rows)),
        ]
        for r in rows
    ]
    return header, cells


def _extra(rows: list[dict[str, Any]]) -> list[str]:
    """Columns beyond the standing ones, e.g. "ms"."""
    return list(
        dict.fromkeys(k for r in rows for k in r if k not in ("name", "parameters", "scores"))
    )


def markdown_table(rows: list[dict[str, Any]]) -> str:
    header, cells = table(rows)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    header, cells = table(rows)
    shown = Table(*(escape(title) for title in header))  # names are no markup
    for column in shown.columns[1:]:
        column.justify = "right"
    for line in cells:
        shown.add_row(*(escape(cell) for cell in line))
    # A pipe has no width: rich would cut the columns to 80 characters.
    (Console() if sys.stdout.isatty() else Console(width=240)).print(shown)


def _markdown(
    run: Run,
    student: LoadedModel,
    rows: list[dict[str, Any]],
    sets: Sequence[EvaluationSet],
    teachers: Sequence[LoadedModel] = (),
    remark: str = "",
) -> str:
    training = student.info["training"]
    first = "first stage of " if run.recipe.stages == "first" else ""
    origins = "; ".join(f"{s.name} ({len(s)} images): {s.lr_origin}" for s in sets)
    lines = [
        f"# {run.folder.resolve().name}",
        "",
        f"{student.info['network'] or student.info['family']} x{student.scale}, {first}method "
        f"{training['method']}, {training['iterations']:,} iterations, batch {training['batch']}, LR "
        f"patch {training['patch']}, data {training['data']['name']} "
        f"({training['data']['images']} images), seed {training['seed']}, {training['precision']} on "
        f"{training['device']}, {training['seconds']:.0f} s.",
        "",
        *(
            _first_stage_line(teacher)
            for teacher in teachers
            if isinstance(teacher.network, Aggregate | PrivilegedTeacher)
        ),
        markdown_table(rows) + (f"\n{remark}" if remark else ""),
        f"Protocol paper-y: Y of BT.601, 8-bit output, border of {student.scale} px left out. LR: {origins}.",
        "",
        f"Weights: `weights.safetensors`, sha256 `{student.info['weights_sha256']}`.",
        "Repeat: `python scripts/distill.py recipe.toml --out ...` with the recipe.toml of this folder.",
        "",
    ]
    pictures = sorted((run.folder / "samples").glob("*.png"))
    if pictures:
        middle = "aggregated teacher" if first else "student"
        lines += [f"![LR by bicubic, {middle}, original](samples/{pictures[-1].name})", ""]
    return "\n".join(lines)


def _first_stage_line(teacher: LoadedModel) -> str:
    """What the first stage cost beforehand: it is not in the student's budget."""
    t = teacher.info["training"]
    made = "aggregated" if isinstance(teacher.network, Aggregate) else "trained"
    return (
        f"Its teacher was {made} beforehand: {t['iterations']:,} iterations of batch {t['batch']}, LR patch "
        f"{t['patch']}, {t['seconds']:.0f} s on {t['device']}, sha256 `{teacher.info['weights_sha256']}`.\n"
    )


def samples(folder: Path, network: nn.Module, evaluation_set: EvaluationSet, step: int) -> None:
    """Keep one picture per validation: crops of up to three images as bicubic | student | original."""
    strips = []
    for i, image in enumerate(evaluation_set):
        if i == 3:
            break
        top, left = busiest(image.hr, CROP_PX)
        columns = [
            upscale_uint8(image.lr, evaluation_set.scale),
            upscaled(network, image.lr),
            image.hr,
        ]
        strips.append([c[top : top + CROP_PX, left : left + CROP_PX] for c in columns])
    save_strips(folder / f"step_{step:08d}.png", strips, ["bicubic", "student", "original"])


@torch.inference_mode()
def upscaled(network: nn.Module, lr: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> (H, W, 3) uint8 by a network in eval mode, on its device."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    try:
        return to_uint8(network(to_tensor(lr).to(device)))
    finally:
        network.train(training)


def busiest(image: np.ndarray, size: int) -> tuple[int, int]:
    """Top left corner of the crop with the strongest gradients, on a grid of half crops."""
    grey = image.mean(axis=2)
    energy = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    best, corner = -1.0, (0, 0)
    for top in range(0, max(1, image.shape[0] - size + 1), size // 2):
        for left in range(0, max(1, image.shape[1] - size + 1), size // 2):
            value = float(energy[top : top + size, left : left + size].sum())
            if value > best:
                best, corner = value, (top, left)
    return corner


def save_strips(path: Path, strips: list[list[np.ndarray]], titles: list[str]) -> None:
    """One row per strip, one titled column per picture, enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    cell = max((p.shape[0] for row in strips for p in row), default=0) * ENLARGE
    wide = max((p.shape[1] for row in strips for p in row), default=0) * ENLARGE
    gap, bar = 8, 24
    font = ImageFont.load_default(size=14)
    width = gap + len(titles) * (wide + gap)
    sheet = Image.new("RGB", (width, bar + len(strips) * (cell + gap)), (118, 118, 118))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (wide + gap), 4), title, fill=(255, 255, 255), font=font)
    for row, strip in enumerate(strips):
        for column, picture in enumerate(strip):
            size = (picture.shape[1] * ENLARGE, picture.shape[0] * ENLARGE)
            shown = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
            sheet.paste(shown, (gap + column * (wide + gap), bar + row * (cell + gap)))
    with replacing(path) as temporary:
        sheet.save(temporary)
