"""Make a finished run a shipped network: its files, its model card, its row in the list of all.

RUN was scored on Set5, Set14 and BSD100. TARGET is weights/NETWORK_xSCALE, what the bare name NETWORK means, or
weights/NETWORK_xSCALE_HOW.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  python scripts/publish.py runs/rcan_a_fitnet weights/rcan_a_x4
      weights/rcan_a_x4/: weights, model.json, recipe.toml without this machine's paths, README.md; and the
      row in weights/README.md
  python scripts/publish.py runs/rcan_a_scratch weights/rcan_a_x4_scratch --half
      stored as float16, if that moves no score by more than 0.005 dB
  python scripts/publish.py weights/rcan_c_x4 weights/rcan_c_x4 --overwrite
      writes the pages of a shipped network again
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="publish.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, metavar="RUN", help="finished run folder")
    p.add_argument("target", type=Path, metavar="TARGET", help="folder to make, weights/NAME")
    p.add_argument("--licence", default="Apache-2.0", help="of the weights (default: Apache-2.0)")
    p.add_argument(
        "--terms",
        default="",
        metavar="TEXT",
        help="where the training images come from and their terms (known for BSDS400 and the built-in set)",
    )
    p.add_argument("--half", action="store_true", help="store float16, measured before it is done")
    p.add_argument("--overwrite", action="store_true", help="replace the network that TARGET holds")
    p.add_argument(
        "--device", default="auto", help="where --half is measured (default: cuda if there is one)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from dataclasses import asdict

    from srkd.progress import counter
    from srkd.publish import Options, publish

    options = Options(args.licence, args.terms, args.half, args.overwrite, args.device)
    progress = counter("scoring float16", quiet=args.quiet)
    card = publish(args.run, args.target, options, progress)
    if args.json:
        print(json.dumps({**asdict(card), "folder": str(card.folder)}))
    else:
        scores = " · ".join(
            f"{n} {s['psnr_y']:.2f} / {s['ssim_y']:.4f}" for n, s in card.scores.items()
        )
        print(f"{card.name}: {card.parameters:,} parameters, {card.size:,} bytes ({card.dtype})")
        print(f"{scores}  PSNR-Y in dB / SSIM-Y")
        print(f"{card.folder}/  weights.safetensors, model.json, recipe.toml, README.md")
    return 0


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
