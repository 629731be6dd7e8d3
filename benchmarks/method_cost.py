"""What a training step of every method costs, as a ratio to a logits step of the same pair.

    python benchmarks/method_cost.py
    python benchmarks/method_cost.py --student edsr_c64b32 --teacher edsr --scale 2 --batch 16 --patch 48

The whole step of our loop (views, forward of all networks, loss, backward, Adam, weight average) on fixed
random crops, with untrained networks. The methods take turns, one step each per round. MiPKD draws which
networks it runs at every step, so the mean over the rounds is its cost; the first tenth of its training,
with the auto-encoder term, is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srkd.training import Training

METHODS = "scratch,logits,fitnet,at,rkd,vid,ickd,fakd,crosskd,dukd,mipkd,dukd+mipkd,l2tww,mkd"
WARM_UP = ", first tenth"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--student", default="rcan_a")
    p.add_argument("--teacher", default="rcan_c", help="a network of the zoo, with fresh weights")
    p.add_argument("--scale", type=int, default=4)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--patch", type=int, default=24)
    p.add_argument("--methods", default=METHODS, help="comma-separated; logits is always measured")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="recipe keys; method.PART.KEY for one method",
    )
    p.add_argument("--rounds", type=int, default=16)
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="auto", choices=("fp32", "bf16", "auto"))
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import statistics
    import tempfile
    import time
    from functools import partial

    import torch

    from deploy.speed import take_turns
    from srkd.devices import bf16_units, wait_for
    from srkd.errors import SrkdError
    from srkd.files import write_json
    from srkd.models import save_model
    from srkd.networks import build
    from srkd.recipe import load_recipe
    from srkd.step import train_step
    from srkd.training import prepare

    if args.rounds < 1:
        raise SrkdError(f"--rounds {args.rounds}, but 1 or more are needed.")
    if args.threads:
        torch.set_num_threads(args.threads)
    random = torch.Generator().manual_seed(0)
    size = (args.batch, 3, args.patch, args.patch)
    lr = torch.randint(256, size, generator=random, dtype=torch.uint8)
    hr = lr.repeat_interleave(args.scale, 2).repeat_interleave(args.scale, 3)
    iterations = 100_000

    def own(change: str, method: str) -> bool:
        """method.PART.KEY=VALUE is for the methods that have the part, everything else for all."""
        key = change.split("=")[0].split(".")
        return key[0] != "method" or key[1] in method.split("+")

    def training(method: str, teacher: Path, done: int):
        models = [] if method == "scratch" else [str(teacher)]
        changes = [
            f"student.network={args.student}",
            f"student.scale={args.scale}",
            f"teacher.models={json.dumps(models)}",
            f"method.name={method}",
            f"data.patch={args.patch}",
            f"train.batch={args.batch}",
            f"train.precision={args.precision}",
            f"train.iterations={iterations}",
        ]
        options = [change for change in args.set if own(change, method)]
        made = prepare(load_recipe(None, [*changes, *options]), args.device)
        made.done = done
        return made

    trainings = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / args.teacher
        save_model(teacher, build(args.teacher, args.scale), {})
        for method in dict.fromkeys(["logits", *(m.strip() for m in args.methods.split(","))]):
            trainings[method] = training(method, teacher, iterations // 2)
            if "mipkd" in method:
                trainings[method + WARM_UP] = training(method, teacher, 0)

    def turn(one: Training) -> float:
        begin = time.perf_counter()
        train_step(one, lr, hr)
        wait_for(one.device)
        return time.perf_counter() - begin

    def say(passes: int) -> None:
        print(f"round {passes - 1}/{args.rounds}", file=sys.stderr)

    turns = {name: partial(turn, one) for name, one in trainings.items()}
    # The first round is a warm-up.
    times = {name: t[1:] for name, t in take_turns(turns, args.rounds + 1, say).items()}
    first = statistics.mean(times["logits"])
    rows = {
        name: {
            "ms_mean": 1000 * statistics.mean(t),
            "ms_median": 1000 * statistics.median(t),
            "ms_min": 1000 * min(t),
            "ms_max": 1000 * max(t),
            "ratio": statistics.mean(t) / first,
        }
        for name, t in times.items()
    }
    facts = {
        "pair": f"{args.teacher} -> {args.student} x{args.scale}",
        "batch": args.batch,
        "patch": args.patch,
        "precision": next(iter(trainings.values())).precision,
        "options": args.set,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "torch": torch.__version__,
        "bf16 units": bf16_units() or "none",
    }
    print(" · ".join(f"{k} {v}" for k, v in facts.items()))
    print(f"{'method':<26} {'ms mean':>8} {'median':>8} {'min':>8} {'max':>8} {'ratio':>6}")
    for name, r in rows.items():
        print(
            f"{name:<26} {r['ms_mean']:>8.0f} {r['ms_median']:>8.0f} {r['ms_min']:>8.0f} "
            f"{r['ms_max']:>8.0f} {r['ratio']:>6.2f}"
        )
    if args.json:
        write_json(args.json, {**facts, "rows": rows})
        print(json.dumps(str(args.json)))
    return 0


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
