"""Where the time of a training step goes: operators by their own time, as shares.

    python benchmarks/training_profile.py
    python benchmarks/training_profile.py --networks rcan_a --shapes --json profile.json

The whole step of our loop on fixed random crops (forward, loss, backward, Adam, weight average), after one that does
not count. Shares bear a busy machine better than times do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

NETWORKS = "edsr_baseline,rcan_a,swinir_lightweight"
FEW = {"swinir_lightweight": 4}  # crops of a batch, where 16 take very long


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--networks", default=NETWORKS, help="of the zoo, comma-separated")
    p.add_argument("--scale", type=int, default=4)
    p.add_argument("--batch", type=int, help="default: 16, of SwinIR 4")
    p.add_argument("--patch", type=int, default=48)
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--rows", type=int, default=8, help="operators shown")
    p.add_argument("--shapes", action="store_true", help="each shape of inputs by itself")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe keys")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    from srkd.files import write_json

    result: dict[str, Any] = {
        "patch": args.patch,
        "options": args.set,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "torch": torch.__version__,
        "networks": {},
    }
    for name in args.networks.split(","):
        found = result["networks"][name] = profile(name, args)
        print(f"{name} x{args.scale}, batch {found['batch']}, {found['precision']}")
        for row in found["operators"]:
            print(f"  {100 * row['share']:>5.1f} %  {row['calls']:>5} x  {row['operator']}")
    if args.json:
        write_json(args.json, result)
    return 0


def profile(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Shares of the operators of a step, the largest first."""
    import torch
    from torch.profiler import ProfilerActivity

    from srkd.devices import wait_for
    from srkd.recipe import load_recipe
    from srkd.step import train_step
    from srkd.training import prepare

    batch = args.batch or FEW.get(name, 16)
    changes = [
        f"student.network={name}",
        f"student.scale={args.scale}",
        f"train.batch={batch}",
        f"data.patch={args.patch}",
    ]
    training = prepare(load_recipe(None, [*changes, *args.set]), args.device)
    random = torch.Generator().manual_seed(0)
    size = (batch, 3, args.patch, args.patch)
    lr = torch.randint(256, size, generator=random, dtype=torch.uint8)
    hr = lr.repeat_interleave(args.scale, 2).repeat_interleave(args.scale, 3)
    train_step(training, lr, hr)
    on_gpu = training.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds, record_shapes=args.shapes) as seen:
        for _ in range(args.steps):
            train_step(training, lr, hr)
        wait_for(training.device)

    def own_time(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    events = seen.key_averages(group_by_input_shape=args.shapes)
    total = sum(map(own_time, events))
    largest = sorted(events, key=own_time, reverse=True)[: args.rows]
    operators = [
        {
            "operator": e.key + (f" {[s for s in e.input_shapes if s]}" if args.shapes else ""),
            "share": own_time(e) / total,
            "calls": e.count // args.steps,
        }
        for e in largest
    ]
    return {"batch": batch, "precision": training.precision, "operators": operators}


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
