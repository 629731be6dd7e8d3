"""PSNR and SSIM of models on sets of images: the papers' table.

MODEL is a run folder, a weights file, an official checkpoint, an exported file, a name from weights/, or
"bicubic".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srkd.evaluate import Entry
    from srkd.metrics import Protocol

EXAMPLES = """\
examples:
  python scripts/evaluate.py bicubic rcan_a_x4 runs/mine --data Set5 Set14 BSD100
      a table of three models at x4; the sets are found through SRKD_DATA
  python scripts/evaluate.py bicubic runs/mine --data photos/ --save out/pictures --out out/
      your own photographs; keeps the upscaled pictures and the scores of every image
  python scripts/evaluate.py runs/mine runs/mine/deploy/mine_fp32.onnx --data Set5
      the network beside its export
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("models", nargs="+", metavar="MODEL", help='what to score; "bicubic" is one too')
    p.add_argument(
        "--data",
        nargs="+",
        default=["builtin"],
        metavar="SET_OR_FOLDER",
        help="Set5, Set14, BSD100, ... or a folder of HR images (default: the built-in photographs)",
    )
    p.add_argument(
        "--scale",
        type=int,
        choices=(2, 3, 4),
        help="needed by bicubic alone and by ambiguous names",
    )
    p.add_argument(
        "--protocol",
        choices=("paper-y", "rgb"),
        default="paper-y",
        help="how images are compared (default: paper-y, as the papers do)",
    )
    p.add_argument(
        "--self-ensemble",
        action="store_true",
        help="add a row per network: the mean over eight flips and rotations, eight times as slow",
    )
    p.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N (default: cuda if there is one); an exported file runs on its own",
    )
    p.add_argument("--save", type=Path, metavar="DIR", help="keep the upscaled images as PNG")
    p.add_argument("--out", type=Path, metavar="DIR", help="write the scores as JSON and CSV")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from deploy.engine_model import load_any
    from srkd.devices import pick_device
    from srkd.evaluate import document, evaluate_all, write_scores
    from srkd.metrics import find_protocol
    from srkd.progress import counter

    protocol = find_protocol(args.protocol)
    device = str(pick_device(args.device))
    entries = evaluate_all(
        args.models,
        args.data,
        scale=args.scale,
        protocol=protocol,
        self_ensemble=args.self_ensemble,
        device=device,
        save=args.save,
        progress=counter("scoring", quiet=args.quiet),
        load=load_any,
    )
    if args.json:
        print(json.dumps(document(entries, protocol, device)))
    else:
        print_table(entries, protocol)
    for note in dict.fromkeys(f"{e.source}: {note}" for e in entries for note in e.notes):
        print(f"note: {note}", file=sys.stderr)
    written = [*write_scores(args.out, entries, protocol, device)] if args.out else []
    for path in [*written, *([args.save] if args.save else [])]:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def print_table(entries: Sequence[Entry], protocol: Protocol) -> None:
    """Rows are models, columns are sets; beneath, how the numbers were made."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    sets = entries[0].scores
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    table.add_column("scale", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for s in sets:
        table.add_column(f"{s.name} ({len(s.images)})", justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry.label,
            f"x{entry.scale}",
            f"{entry.parameters:,}" if entry.parameters is not None else "-",
            *(f"{s.psnr:.2f} / {s.ssim:.4f}" for s in entry.scores),
        )
    # Its natural width, whatever the terminal: a narrow one wraps lines, rich would cut numbers off.
    console = Console(width=240, highlight=False)
    console.print(table, markup=False)
    y = protocol.channels
    print(f"PSNR-{y} in dB / SSIM-{y}. {protocol.name}: {protocol.about}")
    origins = dict.fromkeys(f"{s.name}: {s.lr_origin}" for e in entries for s in e.scores)
    print(f"LR images: {'; '.join(origins)}.")


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
