"""Parameters, multiply-adds, memory and receptive field of a network."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from srkd.console import run_command
from srkd.errors import SrkdError, nearest

if TYPE_CHECKING:
    from srkd.cost import Cost
    from srkd.models import LoadedModel


EXAMPLES = """\
examples:
  python scripts/cost.py edsr --scale 4
  python scripts/cost.py runs/mine --size 720x1280
  python scripts/cost.py rcan_c --rule mkd --size 512x512 --json
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cost.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="NETWORK_OR_MODEL", help="name of the zoo, run folder or weights file"
    )
    parser.add_argument(
        "--scale", type=int, choices=(2, 3, 4), help="default: 4, or the scale of the model"
    )
    parser.add_argument(
        "--size", default="256x256", metavar="HxW", help="LR image (default: %(default)s)"
    )
    parser.add_argument(
        "--rule",
        choices=("fvcore", "mkd"),
        default="fvcore",
        help="how to count: fvcore (DUKD, MiPKD) or MKD's table (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def parse_size(text: str) -> tuple[int, int]:
    """`720x1280` -> (720, 1280): height first."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise SrkdError(
            f"--size '{text}' is no height and width; give HxW in pixels, e.g. 256x256."
        )
    return int(parts[0]), int(parts[1])


def load(name: str, scale: int | None) -> LoadedModel:
    """A network of the zoo (its cost needs no weights), else a model."""
    from pathlib import Path

    from srkd.models import LoadedModel, load_model
    from srkd.networks import ZOO, build

    if Path(name).exists():
        return load_model(name, scale)
    if name not in ZOO:
        try:
            return load_model(name, scale)
        except SrkdError as error:
            raise SrkdError(f"{error} Networks of the zoo: {nearest(name, list(ZOO))}") from error
    scales = ZOO[name].scales
    network = build(name, scale or (4 if 4 in scales else scales[0]))
    return LoadedModel(network, name, Path(name), network.facts)


def table(name: str, cost: Cost) -> str:
    h, w = cost.size
    reach, memory = cost.receptive_field_px, cost.activation_mib
    peak = (
        "not known: it needs data"
        if memory is None
        else f"{memory:,.1f} MiB at the peak (estimated)"
    )
    around = "the whole image" if reach is None else f"{reach} px around each LR pixel"
    uncounted = (
        f"{name.removeprefix('aten::')} x{times}" for name, times in cost.uncounted.items()
    )
    rows = [
        ("network", f"{name}, x{cost.scale}"),
        ("input", f"3 x {h} x {w}, output 3 x {cost.scale * h} x {cost.scale * w}"),
        ("parameters", f"{cost.parameters:,}"),
        ("multiply-adds", f"{cost.macs_g:,.2f} G ({cost.rule} rule)"),
        *((f"  {kind}", f"{count / 1e9:,.3f} G") for kind, count in cost.by_operator.items()),
        ("weights", f"{cost.weights_mib:,.1f} MiB"),
        ("activations", peak),
        ("receptive field", around),
        ("not counted", ", ".join(uncounted)),
    ]
    return "\n".join(f"{key:<22} {value}" for key, value in rows)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    size = parse_size(args.size)

    from srkd.cost import cost

    model = load(args.model, args.scale)
    result = cost(model.network, size, args.rule, model.facts)
    for note in model.notes:
        print(note, file=sys.stderr)
    print(
        json.dumps({"name": model.name, **result.to_json()}, indent=2)
        if args.json
        else table(model.name, result)
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
