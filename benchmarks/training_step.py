"""Steps per second of one network in three layouts, side by side in one run.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --network rcan_a --threads 1 --json step.json

The whole step of our loop (crops to floats, forward, loss, backward, Adam, weight average) on fixed random
crops. Rounds are interleaved; the table gives the median round and the ratio to the first row.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srkd.training import Training

MODES = {
    "fp32": ("fp32", False),
    "fp32 channels_last": ("fp32", True),
    "bf16 channels_last": ("bf16", True),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--network", default="edsr_baseline")
    p.add_argument("--scale", type=int, default=4)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--patch", type=int, default=48)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=1, help="steps per round and mode")
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import statistics
    import time
    from functools import partial

    import torch

    from deploy.speed import take_turns
    from srkd.devices import bf16_units, wait_for
    from srkd.files import write_json
    from srkd.recipe import load_recipe
    from srkd.step import train_step
    from srkd.training import prepare

    if args.threads:
        torch.set_num_threads(args.threads)
    random = torch.Generator().manual_seed(0)
    size = (args.batch, 3, args.patch, args.patch)
    lr = torch.randint(256, size, generator=random, dtype=torch.uint8)
    hr = lr.repeat_interleave(args.scale, 2).repeat_interleave(args.scale, 3)
    trainings = {}
    for mode, (precision, channels_last) in MODES.items():
        changes = [
            f"student.network={args.network}",
            f"student.scale={args.scale}",
            f"train.precision={precision}",
            f"train.channels_last={str(channels_last).lower()}",
            f"train.batch={args.batch}",
        ]
        trainings[mode] = prepare(load_recipe(None, changes), args.device)

    def turn(training: Training) -> float:
        begin = time.perf_counter()
        for _ in range(args.steps):
            train_step(training, lr, hr)
        wait_for(training.device)
        return (time.perf_counter() - begin) / args.steps

    def say(passes: int) -> None:
        print(f"round {passes - 1}/{args.rounds}", file=sys.stderr)

    turns = {mode: partial(turn, training) for mode, training in trainings.items()}
    # The first round is a warm-up.
    times = {mode: t[1:] for mode, t in take_turns(turns, args.rounds + 1, say).items()}
    first = statistics.median(times["fp32"])
    rows = {
        mode: {
            "steps_per_s": 1 / statistics.median(t),
            "ms_median": 1000 * statistics.median(t),
            "ms_min": 1000 * min(t),
            "ms_max": 1000 * max(t),
            "ratio": first / statistics.median(t),
        }
        for mode, t in times.items()
    }
    facts = {
        "network": f"{args.network} x{args.scale}",
        "batch": args.batch,
        "patch": args.patch,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "torch": torch.__version__,
        "bf16 units": bf16_units() or "none",
    }
    print(" · ".join(f"{k} {v}" for k, v in facts.items()))
    print(f"{'mode':<20} {'steps/s':>8} {'ms':>8} {'min':>8} {'max':>8} {'ratio':>6}")
    for mode, r in rows.items():
        print(
            f"{mode:<20} {r['steps_per_s']:>8.2f} {r['ms_median']:>8.0f} {r['ms_min']:>8.0f} "
            f"{r['ms_max']:>8.0f} {r['ratio']:>6.2f}"
        )
    if args.json:
        write_json(args.json, {**facts, "rows": rows})
        print(json.dumps(str(args.json)))
    return 0


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
