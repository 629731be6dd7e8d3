"""Show how close a network comes to the end of half precision, and what an exact rescale makes of it.

Two things are measured: the range of every block in fp32, and the parity of the float16 graph with the fp32 one in
the faithful emulation, before islands are planned. Both with and without the rescale.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.ranges import BlockRange

EXAMPLES = """\
columns: the largest magnitude of each block, its share of 65504 (the largest half), the operator that
stored it, the picture it did so on, and how many of the block's non-zero values a half rounds to 0.
fp16: PSNR of the float16 graph on the worst photograph, change of the task's PSNR, and how many values of all
pictures are NaN or infinite.

examples:
  python deploy/audit.py rcan_c --scale 4
  python deploy/audit.py runs/edsr --data photos/ --json

exit codes:
  0 audited; where the network is rescaled, the copy gives the same output bit for bit
  1 it does not            2 the request is wrong
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", metavar="MODEL", help="run folder, weights file, or a shipped name")
    p.add_argument("--scale", type=int, choices=(2, 3, 4), help="which scale of a shipped name")
    p.add_argument(
        "--data",
        default="builtin",
        metavar="FOLDER_OR_SET",
        help="photographs to run (default: the built-in ones)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from deploy.half_audit import half_parity
    from deploy.inputs import build_inputs
    from deploy.photographs import load_photographs
    from deploy.ranges import table
    from deploy.rescale import check_rescale, recentred
    from deploy.sizes import DEFAULT_SIZES
    from deploy.torch_engines import TorchEngine
    from deploy.verdict import EdgeResult, edge_json, read_gates
    from srkd.models import load_model

    model = load_model(args.model, args.scale)
    photos = load_photographs(args.data, model.scale)
    inputs = build_inputs(photos, DEFAULT_SIZES, model.facts)
    found = recentred(model.network, inputs)
    edge = EdgeResult("E0", "NOT RUN", "the network stays as it is")
    if found.k > 1:
        trained, deployed = (TorchEngine(n, model.scale) for n in (model.network, found.network))
        edge = check_rescale(trained, deployed, inputs, read_gates()["E0"])
    halves = {"as trained": half_parity(model, model.network, inputs)}
    if found.k > 1:
        halves[f"divided by {found.k}"] = half_parity(model, found.network, inputs)
    if args.json:
        told = {
            "k": found.k,
            "reason": found.reason,
            "edge": edge_json(edge),
            "before": table(found.before),
            "after": table(found.after),
            "fp16": {name: half.to_json() for name, half in halves.items()},
        }
        print(json.dumps(told))  # noqa: T201
    else:
        print(_lines(found.before))  # noqa: T201
        if found.k > 1:
            print(f"\nafter division by {found.k}\n{_lines(found.after)}")  # noqa: T201
        print(f"\nk = {found.k}: {found.reason}\nE0 {edge.status}: {edge.reason}")  # noqa: T201
        for name, half in halves.items():
            print(f"fp16 {name}: {half}")  # noqa: T201
    return 0 if edge.status in ("PASS", "NOT RUN") else 1


def _lines(ranges: Sequence[BlockRange]) -> str:
    width = max(len(r.block) for r in ranges)
    head = f"{'block':<{width}}  {'largest':>9}  {'of 65504':>10}  {'flushed':>7}  by, on"
    rows = [
        f"{r.block:<{width}}  {r.largest:>9.4g}  {r.share:>10.2%}  {r.flushed:>7.2%}  {r.operation}"
        + (f", {r.picture}" if r.picture else "")
        for r in ranges
    ]
    return "\n".join([head, *rows])


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
