"""Which input pixels decide what a network draws in a window: local attribution map, diffusion index.

Gu and Dong, CVPR 2021, arXiv 2011.11036. MODEL is a run folder, a weights file, an official checkpoint or a
name from weights/. IMAGE is the network's (small) input. A higher diffusion index (0..100) means that
more pixels take part.

Of an aggregated teacher (runs/x/stage1 of method mtkd) the input is the SR images of its teachers: a map, an
index and a share of the attribution for each. Compare these indices among themselves: their maps count
SR pixels, those of other networks LR pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srkd.attribution import Row

WINDOW_PX = 16  # as in the paper's demo
EXAMPLES = """\
examples:
  python scripts/attribute.py rcan_c photo_small.png --window 120,80,16
      the map of the 16x16 output pixels whose left top corner is column 120, row 80
  python scripts/attribute.py runs/student runs/teacher photo.png --hr --window 120,80 --out out/
      two models of one scale on a picture that is made smaller first; also side by side
  python scripts/attribute.py runs/student/stage1 photo.png --hr --window 120,80
      what the aggregated teacher takes of the SR image of each of its teachers
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="attribute.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("models", nargs="+", metavar="MODEL", help="one, or several of one scale")
    p.add_argument("image", type=Path, metavar="IMAGE", help="a picture")
    p.add_argument(
        "--window",
        required=True,
        metavar="X,Y[,SIZE]",
        help=f"square in output pixels, columns and rows counted from 0 (size: {WINDOW_PX})",
    )
    p.add_argument(
        "--hr",
        action="store_true",
        help="IMAGE is large: make it smaller by the scale, as the benchmarks' LR images were made",
    )
    p.add_argument("--scale", type=int, choices=(2, 3, 4), help="needed by ambiguous model names")
    p.add_argument(
        "--sigma-max",
        type=float,
        default=1.2,
        metavar="PX",
        help="width of the strongest blur in pixels of what is blurred: of IMAGE, or of the SR images of the "
        "teachers of an aggregated one (default: %(default)s)",
    )
    p.add_argument(
        "--steps",
        type=int,
        default=50,
        metavar="M",
        help="from blurred to sharp (default: %(default)s)",
    )
    p.add_argument(
        "--kernel",
        type=int,
        default=9,
        metavar="PX",
        help="side of the blur kernel in the same pixels, odd (default: %(default)s)",
    )
    p.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="steps at once: more memory, faster on a GPU (default: %(default)s)",
    )
    p.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: cuda if there is one)"
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for the pictures and numbers (default: attribution/, below it a folder for this request)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def parse_window(text: str) -> tuple[int, int, int]:
    """`120,80,16` or `120,80` -> (x, y, size)."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (2, 3) or not all(p.isascii() and p.isdecimal() for p in parts):
        raise SrkdError(
            f"--window '{text}' is no window; give column, row and size in output pixels, "
            f"e.g. 120,80,{WINDOW_PX}."
        )
    x, y, *size = map(int, parts)
    return x, y, size[0] if size else WINDOW_PX


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    window = parse_window(args.window)
    from srkd.attribution import BlurPath, attribute_all
    from srkd.attribution_maps import document, file_name, write_maps
    from srkd.devices import pick_device
    from srkd.files import plain
    from srkd.progress import counter

    path = BlurPath(args.sigma_max, args.steps, args.kernel)
    device = str(pick_device(args.device))
    rows = attribute_all(
        list(dict.fromkeys(args.models)),
        args.image,
        window,
        scale=args.scale,
        hr=args.hr,
        path=path,
        batch=args.batch,
        device=device,
        progress=counter("attributing, step", quiet=args.quiet),
    )
    described = {**document(rows, args.image.name, path, hr=args.hr), "device": device}
    request = "_".join(
        [args.image.stem, *dict.fromkeys(row.name for row in rows), *map(str, window)]
    )
    folder = args.out or Path("attribution") / file_name(request)
    written = write_maps(folder, rows, described)
    if args.json:
        print(json.dumps(plain(described)))
    else:
        print_table(rows)
    for note in notes(rows):
        print(f"note: {note}", file=sys.stderr)
    for file in written:
        print(f"wrote {file}", file=sys.stderr)
    return 0


def notes(rows: Sequence[Row]) -> list[str]:
    """What the reader of the numbers should know, each with what it is about before it."""
    found: list[str] = []
    for row in rows:
        found += [f"{row.name}: {note}" for note in row.model.notes]
        if row.heat.share == 0:
            found.append(f"{row.label}: nothing of this image takes part, so there is no index")
        elif not row.heat.known:
            found.append(
                f"{row.name}: no pixel takes part, so there is no index; choose a window with some texture"
            )
        if row.attribution.undefined:
            found.append(
                f"{row.name}: {row.attribution.undefined} gradients were not finite and count as 0"
            )
    # What holds for a model is the same in the rows of its teachers.
    return list(dict.fromkeys(found))


def print_table(rows: Sequence[Row]) -> None:
    """A row per map; beneath, what the numbers are about."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from srkd.attribution_maps import index_text

    with_teachers = any(row.teacher for row in rows)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for column in ("scale", "diffusion index", "Gini", *(["share"] if with_teachers else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        heat = row.heat
        numbers = index_text(heat), f"{heat.gini:.4f}" if heat.known else "-"
        share = f"{heat.share:.3f}" if row.teacher and not math.isnan(heat.share) else "-"
        table.add_row(
            row.label, f"x{row.model.scale}", *numbers, *([share] if with_teachers else [])
        )
    Console(width=240, highlight=False).print(table, markup=False)
    (h, w), (x, y, size) = rows[0].lr.shape[:2], rows[0].window
    print(f"Input {w}x{h} px; window of {size}x{size} output pixels at column {x}, row {y}.")
    if with_teachers:
        print(
            "Of a teacher the map lies on its SR image: compare these indices among themselves. Share: its part of "
            "the sum of |attribution| over the teachers of the model."
        )


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
