"""What a step costs with teachers online and from the cache, as a ratio to a step without any teacher.

    python benchmarks/teacher_cache.py
    python benchmarks/teacher_cache.py --student edsr_baseline --batch 16 --patch 48

The whole step of our loop (forward of all networks, loss, backward, Adam, weight average) on fixed random crops,
with untrained networks: scratch, logits with the first teacher, mtkd with all of them behind the aggregation
network of the paper. The rows take turns, one step each per round. Cached crops come as the sampler gives them,
float16 on the CPU.

With SRKD_DATA set, --targets compares cached targets with the teacher's own output on the crop.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srkd.training import Training

TEACHERS = "smfanet_plus,bsrn,rlfn"
LIMIT = 1.3  # cached mtkd over scratch
# For --targets.
TARGET_TEACHERS = ("smfanet_plus_x4_df2k", "bsrn_x4_official", "rlfn_x4_bytedance")
PHOTOGRAPHS, CROPS, PATCH = 6, 4, 48
EDGE_PX = 8  # LR pixels left out along the edges of a crop


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--student", default="rcan_a")
    p.add_argument("--teachers", default=TEACHERS, help="networks of the zoo, comma-separated")
    p.add_argument("--scale", type=int, default=4)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--patch", type=int, default=24)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", default="auto", choices=("fp32", "bf16", "auto"))
    p.add_argument("--targets", action="store_true", help="compare targets instead of steps")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    from srkd.files import write_json

    if args.threads:
        torch.set_num_threads(args.threads)
    result = compare_targets() if args.targets else measure(args)
    if args.json:
        write_json(args.json, result)
    return 0


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Interleaved steps of every row."""
    import statistics
    import tempfile
    import time
    from functools import partial

    import torch

    from deploy.speed import take_turns
    from srkd.devices import bf16_units, wait_for
    from srkd.models import save_model
    from srkd.networks import build
    from srkd.recipe import load_recipe
    from srkd.step import train_step
    from srkd.training import prepare

    names = args.teachers.split(",")
    random = torch.Generator().manual_seed(0)
    size = (args.batch, 3, args.patch, args.patch)
    lr = torch.randint(256, size, generator=random, dtype=torch.uint8)
    hr = lr.repeat_interleave(args.scale, 2).repeat_interleave(args.scale, 3)
    crop = hr.to(torch.float16) / 255

    rows = {
        "scratch": ("scratch", 0, False),
        "logits": ("logits", 1, False),
        "logits, cached": ("logits", 1, True),
        "mtkd": ("mtkd", len(names), False),
        "mtkd, cached": ("mtkd", len(names), True),
    }
    trainings = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in names]
        for path, name in zip(paths, names, strict=True):
            save_model(path, build(name, args.scale), {})
        for row, (method, count, cached) in rows.items():
            changes = [
                f"student.network={args.student}",
                f"student.scale={args.scale}",
                f"teacher.models={json.dumps([str(p) for p in paths[:count]])}",
                f"teacher.cache={json.dumps(cached)}",
                f"method.name={method}",
                f"data.patch={args.patch}",
                f"train.batch={args.batch}",
                f"train.precision={args.precision}",
                "train.iterations=100000",
            ]
            trainings[row] = prepare(load_recipe(None, changes), args.device), cached

    def turn(training: Training, cached: bool) -> float:
        begin = time.perf_counter()
        train_step(training, lr, hr, (crop,) if cached else ())
        wait_for(training.device)
        return time.perf_counter() - begin

    def say(passes: int) -> None:
        print(f"round {passes - 1}/{args.rounds}", file=sys.stderr)

    turns = {row: partial(turn, *one) for row, one in trainings.items()}
    # The first round is a warm-up.
    times = {row: t[1:] for row, t in take_turns(turns, args.rounds + 1, say).items()}
    scratch = statistics.median(times["scratch"])
    found = {
        row: {
            "ms_median": 1000 * statistics.median(t),
            "ms_min": 1000 * min(t),
            "ms_max": 1000 * max(t),
            "ratio": statistics.median(t) / scratch,
        }
        for row, t in times.items()
    }
    facts = {
        "student": f"{args.student} x{args.scale}",
        "teachers": ", ".join(names),
        "batch": args.batch,
        "patch": args.patch,
        "precision": trainings["scratch"][0].precision,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "torch": torch.__version__,
        "bf16 units": bf16_units() or "none",
    }
    print(" · ".join(f"{k} {v}" for k, v in facts.items()))
    print(f"{'step':<16} {'ms median':>9} {'min':>8} {'max':>8} {'ratio':>7}")
    for row, r in found.items():
        print(
            f"{row:<16} {r['ms_median']:>9.1f} {r['ms_min']:>8.1f} {r['ms_max']:>8.1f} {r['ratio']:>7.2f}"
        )
    ratio = found["mtkd, cached"]["ratio"]
    print(f"mtkd with cached teachers over scratch: {ratio:.2f} (goal: at most {LIMIT})")
    return {**facts, "rows": found}


def compare_targets() -> dict[str, object]:
    """PSNR over RGB between the teacher's output on a crop and the crop of its output, and to the photograph."""
    import os
    import shutil
    import tempfile

    import torch

    from srkd.data.cache import open_training_set
    from srkd.errors import SrkdError
    from srkd.models import load_model, weights_hash
    from srkd.teacher_cache import open_teacher_cache

    root = Path(os.environ.get("SRKD_DATA", ""))
    photographs = sorted((root / "train" / "BSDS400").glob("*.jpg"))[:PHOTOGRAPHS]
    if not photographs:
        raise SrkdError("--targets reads $SRKD_DATA/train/BSDS400 and weights/; set SRKD_DATA.")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photographs"
        folder.mkdir()
        for path in photographs:
            shutil.copy(path, folder)
        for name in TARGET_TEACHERS:
            model = load_model(root / "weights" / f"{name}.safetensors")
            data = open_training_set(folder, model.scale, cache=Path(temporary))
            taught = open_teacher_cache(
                model, weights_hash(model), data, Path(temporary), torch.device("cpu")
            )
            rows[name] = targets_of(model.network, data, taught)
            print(name, "  ".join(f"{kind} {value:.2f} dB" for kind, value in rows[name].items()))
    facts = {"photographs": PHOTOGRAPHS, "crops": CROPS, "patch": PATCH, "edge": EDGE_PX}
    return {**facts, "rows": rows}


def targets_of(network: Any, data: Any, taught: Any) -> dict[str, float]:
    """The comparison for one teacher over random crops and all symmetries."""
    import numpy as np
    import torch

    from srkd.data.sampling import apply_symmetry
    from srkd.images import to_tensor

    s, random = data.scale, np.random.default_rng(0)
    errors: dict[str, list[float]] = {}

    def add(kind: str, a: Any, b: Any) -> None:
        errors.setdefault(kind, []).append(float(np.mean((a - b) ** 2)))

    inside = np.s_[s * EDGE_PX : -s * EDGE_PX, s * EDGE_PX : -s * EDGE_PX]
    for i in range(len(data)):
        for _ in range(CROPS):
            top, left = (int(random.integers(side - PATCH + 1)) for side in data.lr(i).shape[:2])
            here = np.s_[s * top : s * (top + PATCH), s * left : s * (left + PATCH)]
            cached = taught.sr(i)[here].astype(np.float32)
            hr = data.hr(i)[here] / np.float32(255)
            lr = data.lr(i)[top : top + PATCH, left : left + PATCH]
            add("cached to HR", cached, hr)
            for code in range(8):
                with torch.no_grad():
                    crop = to_tensor(np.ascontiguousarray(apply_symmetry(lr, code)))
                    online = network(crop)[0].permute(1, 2, 0).numpy()
                known, kind = apply_symmetry(cached, code), "symmetry" if code else "crop"
                add(kind, online, known)
                add(f"{kind}, inside", online[inside], known[inside])
                add("online to HR", online, apply_symmetry(hr, code))
    return {kind: -10 * float(np.log10(np.mean(values))) for kind, values in errors.items()}


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
