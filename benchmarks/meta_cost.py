"""What MKD's meta part costs: time beside a real step on L_kd, peak memory, and where the time goes.

    python benchmarks/meta_cost.py
    python benchmarks/meta_cost.py --student rcan_b --set method.positions=... --json meta_cost.json

Same student, KRNets, teacher, batch and precision in every row, one after the other in every round:

    step on L_kd      one real step: student's features, KRNets, L_kd, backward, Adam; the teacher's features given
    teacher           its features of the batch, which an iteration computes once for all its steps
    meta part         T virtual steps, the gradient through them, Adam of the KRNets; always in fp32
    iteration         a whole one of the loop without the meta part: T steps on L_kd, one on HR, weight average
    with meta, 1 of N the mean over N iterations of which one has the meta part

Memory is the growth of the process's peak, each row in a process of its own. Networks have fresh weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = ("step on L_kd", "teacher", "meta part", "iteration", "with meta")
SHOWN_OPERATORS = 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--student", default="rcan_a")
    p.add_argument("--teacher", default="rcan_c", help="a network of the zoo, with fresh weights")
    p.add_argument("--scale", type=int, default=4)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--patch", type=int, default=24)
    p.add_argument("--meta-every", type=int, default=4, metavar="N")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe keys")
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "auto"))
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--memory-of", choices=ROWS, help=argparse.SUPPRESS)  # the process of a row
    return p.parse_args(argv)


def pieces(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The rows as functions, all on one training."""
    import tempfile

    import torch

    from srkd.bilevel import knowledge_step, meta_gradient, split
    from srkd.models import save_model
    from srkd.networks import build
    from srkd.recipe import load_recipe
    from srkd.step import look, to_image, train_step
    from srkd.training import prepare

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / args.teacher
        save_model(teacher, build(args.teacher, args.scale), {})
        changes = [
            f"student.network={args.student}",
            f"student.scale={args.scale}",
            f"teacher.models={json.dumps([str(teacher)])}",
            "method.name=mkd",
            f"method.meta_every={args.meta_every}",
            f"data.patch={args.patch}",
            f"train.batch={args.batch}",
            f"train.precision={args.precision}",
            "train.iterations=100000",
        ]
        t = prepare(load_recipe(None, [*changes, *args.set]), "cpu")
    random = torch.Generator().manual_seed(0)
    size = (args.batch, 3, args.patch, args.patch)
    lr = torch.randint(256, size, generator=random, dtype=torch.uint8)
    hr = lr.repeat_interleave(args.scale, 2).repeat_interleave(args.scale, 3)
    seen = look(t, to_image(lr, t), to_image(hr, t))
    taught = {name: feature.float() for name, feature in seen.features.items()}
    assert t.bilevel is not None and t.method.bilevel_part is not None
    method, state = t.method.bilevel_part[1], t.bilevel
    plan, bf16 = method.bilevel, t.precision == "bf16"
    rate = t.recipe.train.learning_rate

    def meta() -> None:
        gradients, _ = meta_gradient(
            t.student, method, plan, seen.batch.lr, seen.batch.hr, taught, rate
        )
        for p, gradient in zip(split(method, plan)[1].values(), gradients, strict=True):
            p.grad = gradient
        assert state.meta is not None
        state.meta.step()
        state.meta.zero_grad(set_to_none=True)

    def iterations(count: int) -> None:
        """`count` whole iterations, the first of which has the meta part where `done` says so."""
        for _ in range(count):
            train_step(t, lr, hr)

    def plain() -> None:
        t.done = 1
        iterations(1)

    def with_meta() -> None:
        t.done = 0
        iterations(args.meta_every)

    return {
        "step on L_kd": lambda: knowledge_step(
            t.student, method, state, seen.batch.lr, taught, bf16
        ),
        "teacher": lambda: look(t, seen.batch.lr, seen.batch.hr),
        "meta part": meta,
        "iteration": plain,
        "with meta": with_meta,
    }


def memory(args: argparse.Namespace) -> int:
    """Print by how many bytes the row raised the peak of this process."""
    work = pieces(args)
    before = _status("VmRSS:")
    # The peak starts again from what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        work[args.memory_of]()
    print(_status("VmHWM:") - before)
    return 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.memory_of:
        return memory(args)
    import statistics
    import time

    import torch

    from srkd.files import write_json

    work = pieces(args)
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for number in range(args.rounds + 1):  # the first round is a warm-up
        for name in ROWS:
            begin = time.perf_counter()
            work[name]()
            share = args.meta_every if name == "with meta" else 1
            if number:
                times[name].append((time.perf_counter() - begin) / share)
        print(f"round {number}/{args.rounds}", file=sys.stderr)
    own = [*(argv if argv is not None else sys.argv[1:])]
    peaks = {}
    for name in ROWS:
        command = [sys.executable, __file__, *own, "--memory-of", name]
        peaks[name] = int(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
    first = statistics.median(times["step on L_kd"])
    rows = {
        name: {
            "ms_median": 1000 * statistics.median(t),
            "ms_min": 1000 * min(t),
            "ratio": statistics.median(t) / first,
            "peak_bytes": peaks[name],
        }
        for name, t in times.items()
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work["meta part"]()
    spent = {e.key: e.self_cpu_time_total for e in profile.key_averages()}
    total = sum(spent.values())
    operators = sorted(spent.items(), key=lambda item: -item[1])[:SHOWN_OPERATORS]
    facts = {
        "pair": f"{args.teacher} -> {args.student} x{args.scale}",
        "batch": args.batch,
        "patch": args.patch,
        "precision": args.precision,
        "options": args.set,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(" · ".join(f"{k} {v}" for k, v in facts.items()))
    print(f"{'':<20} {'ms median':>9} {'min':>8} {'ratio':>6} {'peak MB':>8}")
    for name, r in rows.items():
        shown = f"with meta, 1 of {args.meta_every}" if name == "with meta" else name
        print(
            f"{shown:<20} {r['ms_median']:>9.0f} {r['ms_min']:>8.0f} {r['ratio']:>6.2f} "
            f"{r['peak_bytes'] / 1e6:>8.0f}"
        )
    print("where the meta part's time goes, operators by their own time:")
    for name, micros in operators:
        print(f"  {100 * micros / total:>4.0f} %  {name}")
    if args.json:
        shares = {name: micros / total for name, micros in operators}
        write_json(args.json, {**facts, "rows": rows, "meta part, operators": shares})
    return 0


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
