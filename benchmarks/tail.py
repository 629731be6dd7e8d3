"""What a network gains where its tail runs as one convolution: passes with and without, turn by turn in one process.

    python benchmarks/tail.py                        forward and backward, batch 16, LR patch 48
    python benchmarks/tail.py --batch 1 --patch 256 --no-grad      a picture, forward alone
    python benchmarks/tail.py --quick                a rehearsal; its figures mean nothing

Networks of the zoo with fresh weights in channels_last; without means srkd/networks/subpixel.py as it is for tails that it
does not collapse. Medians of the turns and their range; the ratio is that of the medians. A busy machine is refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--networks", default="edsr_baseline,rcan_a,rcan_c", help="comma-separated")
    p.add_argument("--scale", type=int, default=4, choices=(3, 4))
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--patch", type=int, default=48, help="LR side")
    p.add_argument("--turns", type=int, default=11)
    p.add_argument("--no-grad", action="store_true", help="forward alone")
    p.add_argument("--quick", action="store_true", help="a rehearsal; its figures mean nothing")
    args = p.parse_args(argv)
    if args.quick:
        vars(args).update(networks="rcan_a", batch=1, turns=2)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from deploy.environment import Others, wait_until_quiet
    from srkd.networks.subpixel import LEAST_SIDE

    if args.patch < LEAST_SIDE:
        from srkd.errors import SrkdError

        raise SrkdError(
            f"tails are collapsed from {LEAST_SIDE} LR pixels on; give a larger --patch."
        )
    if not args.quick:
        wait_until_quiet(Others())
    print(
        f"{'A REHEARSAL. ' if args.quick else ''}x{args.scale}, batch {args.batch}, LR {args.patch}x{args.patch}, "
        f"{'forward' if args.no_grad else 'forward and backward'}; ms: median (min to max)\n\n"
        "| network | precision | one convolution | stages | ratio |\n|---|---|---|---|---|"
    )
    for network in args.networks.split(","):
        for precision in ("fp32", "bf16"):
            whole, staged = measure(network, precision, args)
            print(
                f"| {network} | {precision} | {told(whole)} | {told(staged)} | "
                f"{median(staged) / median(whole):.2f} |"
            )
    return 0


def measure(
    network: str, precision: str, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Milliseconds of every turn: collapsed, in stages. The first turn of both does not count."""
    run = passes(network, precision, args)
    turns: tuple[list[float], list[float]] = ([], [])
    for number in range(args.turns + 1):
        for staged, found in enumerate(turns):
            with patch("srkd.networks.subpixel.LEAST_SIDE", sys.maxsize if staged else args.patch):
                begin = time.perf_counter()
                run()
                if number:
                    found.append(1000 * (time.perf_counter() - begin))
    return turns


def passes(network: str, precision: str, args: argparse.Namespace) -> Callable[[], None]:
    import torch

    from srkd.devices import place
    from srkd.networks import build

    torch.manual_seed(0)
    model = build(network, args.scale)
    place(model, torch.device("cpu"), channels_last=True)
    lr, hr = (
        torch.rand(args.batch, 3, side, side).contiguous(memory_format=torch.channels_last)
        for side in (args.patch, args.scale * args.patch)
    )

    def run() -> None:
        with (
            torch.set_grad_enabled(not args.no_grad),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            sr = model(lr)
        if not args.no_grad:
            (sr.float() - hr).abs().mean().backward()

    return run


def told(turns: list[float]) -> str:
    return f"{median(turns):.0f} ({min(turns):.0f} to {max(turns):.0f})"


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
