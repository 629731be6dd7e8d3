"""report.md and the picture of the worst crop: parity records, to read. No numbers are made here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from deploy.verdict import Worst

CROP_PX = 96  # SR pixels of each side of the three panels
ENLARGE = 3
GAP_PX = 6
LARGEST_BLOCKS = 8
PANELS = {
    "E1": "torch, fp32 graph",
    "E2": "fp32 graph, fp16 graph (emulated)",
    "E3": "fp32 graph, engine",
}


def worst_picture(worst: Worst) -> tuple[np.ndarray, float]:
    """(H, W, 3) uint8: torch | engine | difference, around the largest error; and the gain of the last.

    The difference is |engine - torch| * gain, gain a power of two that brings it into view.
    """
    x, y = (_crop(sr[0], worst.y, worst.x) for sr in (worst.reference, worst.candidate))
    d = np.abs(np.nan_to_num(y, nan=1.0, posinf=1.0, neginf=1.0) - np.nan_to_num(x))
    peak = float(d.max())
    gain = 1.0 if peak == 0 else max(1.0, 2.0 ** math.floor(-math.log2(peak)))
    panels = [_levels(p) for p in (x, y, d * gain)]
    gap = np.full((panels[0].shape[0], GAP_PX, 3), 255, np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1), gain


def _crop(picture: np.ndarray, y: int, x: int) -> np.ndarray:
    """(3, H, W) -> up to CROP_PX a side around (y, x)."""
    starts = [
        max(0, min(at - CROP_PX // 2, size - CROP_PX))
        for at, size in zip((y, x), picture.shape[-2:], strict=True)
    ]
    return picture[:, starts[0] : starts[0] + CROP_PX, starts[1] : starts[1] + CROP_PX]


def _levels(picture: np.ndarray) -> np.ndarray:
    """(3, h, w) about [0, 1] -> (h', w', 3) uint8, enlarged without smoothing."""
    levels = np.rint(np.clip(np.nan_to_num(picture), 0, 1) * 255).astype(np.uint8)
    return levels.transpose(1, 2, 0).repeat(ENLARGE, 0).repeat(ENLARGE, 1)


def render(records: dict[str, Any]) -> str:
    """The page for all parity records of a folder (the content of parity.json)."""
    parts = ["# Parity", *(_section(file, records[file]) for file in sorted(records))]
    return "\n\n".join(parts) + "\n"


def _section(file: str, r: dict[str, Any]) -> str:
    verdict = f"**{r['verdict']}**" + (f", first failing edge: {r['blame']}" if r["blame"] else "")
    lines = [
        f"## {file}: {verdict}",
        "",
        f"{r['model']}, engine {r['engine']}, {r['precision']}; reference: {r['reference']}; "
        f"{r['photographs']} photographs from {r['data']}; sizes (LR, h x w) {r['sizes']}.",
        "",
    ]
    if (task := r["task"]) is not None:
        lines += [
            f"PSNR-Y against the originals, mean of {task['photographs']} crops: network "
            f"{task['torch_db']:.3f} dB, engine {task['engine_db']:.3f} dB, "
            f"difference {task['delta_db']:+.4f} dB.",
            "",
        ]
    lines += [
        "| edge | compares | verdict | why |",
        "|---|---|---|---|",
        *(f"| {e['name']} | {e['compares']} | {e['status']} | {e['reason']} |" for e in r["edges"]),
        "",
        "| edge | max abs | mean abs | p99.9 | PSNR | seam | bias R G B | levels changed, most | border, interior |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_numbers(e) for e in r["edges"] if e["numbers"] is not None),
        "",
        *(_place(e) for e in r["edges"] if e["numbers"] is not None),
    ]
    lines += _plan(r["plan"])
    if r["worst_picture"] is not None:
        worst = r["worst_picture"]
        lines += [
            "",
            f"![worst crop]({worst['file']})",
            "",
            f"Where {worst['edge']} differs most ({worst['input']}): {PANELS[worst['edge']]}, "
            f"difference x {worst['gain']:g}.",
        ]
    return "\n".join(lines)


def _plan(plan: dict[str, Any]) -> list[str]:
    """What float16 asked for: range, islands, and the blocks that were near its end."""
    if not plan["ranges_before"]:
        return []
    lines = ["", f"Range: {plan['reason']}.", ""]
    if plan["needed_islands"]:
        lines += [
            f"Float32 by measurement: {', '.join(plan['needed_islands'])}. PSNR of the worst input without them "
            f"{_decibels(plan['psnr_db_without_them'])}, with them {_decibels(plan['psnr_db_with_them'])}.",
            "",
        ]
    if plan["fp32_islands"]:
        lines += [f"All that stays float32: {', '.join(plan['fp32_islands'])}.", ""]
    lines += [
        "| block | largest value before | share of 65504 | after |",
        "|---|---|---|---|",
    ]
    after = {row["block"]: row["largest"] for row in plan["ranges_after"]}
    largest = sorted(plan["ranges_before"], key=lambda row: -row["largest"])[:LARGEST_BLOCKS]
    return lines + [
        f"| {row['block']} | {row['largest']:.5g} | {100 * row['share']:.2g} % | {after[row['block']]:.5g} |"
        for row in largest
    ]


def _decibels(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1f} dB"


def _numbers(edge: dict[str, Any]) -> str:
    n = edge["numbers"]
    seam = "-" if edge["seam"] is None else f"{edge['seam']:.2g}"
    bias = " ".join(f"{v:+.0e}" for v in n["bias_rgb"])
    return (
        f"| {edge['name']} | {_number(n['max_abs'])} | {n['mean_abs']:.1e} | {_number(n['p999_abs'])} "
        f"| {_psnr(n)} | {seam} | {bias} | {100 * n['changed_levels_share']:.3g} %, {n['max_levels']} "
        f"| {_number(n['border_max_abs'])}, {_number(n['interior_max_abs'])} |"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _psnr(n: dict[str, Any]) -> str:
    if n["psnr_db"] is not None:
        return f"{n['psnr_db']:.1f} dB"
    return "not finite" if n["nonfinite"] else "equal"


def _place(edge: dict[str, Any]) -> str:
    w = edge["numbers"]["worst"]
    return (
        f"- {edge['name']} worst at {w['input']}, image {w['image']}, channel {'RGB'[w['channel']]}, "
        f"row {w['y']}, column {w['x']}"
    )
