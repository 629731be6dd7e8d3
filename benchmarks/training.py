"""How fast a whole training runs: data, step, weight average and log, beside the same training in BasicSR.

    python benchmarks/training.py --peer ENV/bin/python --json training.json --markdown training.md --svg training.svg
    python benchmarks/training.py --networks rcan_a --methods scratch,logits,dukd,mipkd,mkd
    python benchmarks/training.py --processes 2    the same batch shared by two processes of half the threads each
    python benchmarks/training.py --quick          a rehearsal: a tiny network, few steps, a busy machine is accepted

Every row is a training of its own in a process of its own, begun anew in every round; rows take turns. Times are laps
between lines of the log, the first of each training left out. Rows: the method `scratch` in fp32 and in what this
machine does best, every other method in the latter, and BasicSR (ENV is made by benchmarks/peers/basicsr_run.py) on
the same image pairs, which it decodes per crop as it always does. FLOP are those of convolutions and matrix products,
forward and backward; the ceiling is a product of two 2048 x 2048 matrices on the same threads in the same precision.
Memory is the peak of the process (of several: of the largest), on a GPU that of the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

FP32, BEST, PEER = "fp32", "auto", "BasicSR"
SUB_IMAGE = (
    480  # HR px: BasicSR's advice is to cut images beforehand, so that less is decoded per crop
)
TEACHER = "rcan_c"
MATRIX = 2048


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--networks", default="edsr_baseline,rcan_a", help="students, comma-separated")
    p.add_argument("--methods", default="scratch", help="comma-separated; scratch is always there")
    p.add_argument("--teacher", default=TEACHER, help="a network of the zoo, with fresh weights")
    p.add_argument("--scale", type=int, default=4)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--patch", type=int, default=48)
    p.add_argument("--images", type=int, default=24, help=f"sub-images of {SUB_IMAGE} px at most")
    p.add_argument("--steps", type=int, default=8, help="of a lap")
    p.add_argument(
        "--laps", type=int, default=4, help="of a training in a round, without the first"
    )
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, help="default: all cores")
    p.add_argument("--processes", type=int, metavar="N", help="a further row: torchrun with N")
    p.add_argument("--device", default="cpu")
    p.add_argument("--peer", type=Path, metavar="PYTHON", help="of BasicSR's environment")
    p.add_argument("--quick", action="store_true", help="a rehearsal; its figures mean nothing")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--markdown", type=Path, metavar="FILE")
    p.add_argument("--svg", type=Path, metavar="FILE")
    p.add_argument("--row", help=argparse.SUPPRESS)  # the process of a row: its folder
    p.add_argument("--ceiling", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.quick:
        small = {"networks": "rcan_a", "batch": 2, "patch": 16, "images": 4, "steps": 2, "laps": 2}
        vars(args).update(small, rounds=1)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.ceiling:
        print(json.dumps(ceiling(args.device)))
        return 0
    if args.row:
        found = run_row(Path(args.row), args.device)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return 0
    from deploy.environment import Others, affinity, describe, snapshot, wait_until_quiet
    from srkd.errors import SrkdError
    from srkd.files import write_json, write_text

    if args.steps < 1 or args.laps < 1 or args.rounds < 1:
        raise SrkdError("--steps, --laps and --rounds must be at least 1.")
    threads = args.threads or len(affinity())
    if args.processes is not None and not 2 <= args.processes <= threads:
        raise SrkdError(f"--processes shares {threads} threads out; give 2 to {threads}.")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def quiet() -> float | None:
        return 0.0 if args.quick else wait_until_quiet(Others())

    before = {"others": quiet(), **snapshot()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = {
            f"{network}/{row}": run
            for network in args.networks.split(",")
            for row, run in rows_of(network, args, folder, environment).items()
        }
        found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
        for number in range(args.rounds):
            for row in list(rows)[:: -1 if number % 2 else 1]:
                quiet()
                found[row].append(rows[row]())
                print(f"round {number + 1}/{args.rounds}: {row}", file=sys.stderr)
        own = [sys.executable, __file__, "--ceiling", "--device", args.device]
        peak = json.loads(output_of(own, environment)[0])
    result = {
        "rehearsal": args.quick,
        **{
            key: getattr(args, key)
            for key in ("scale", "batch", "patch", "steps", "rounds", "device")
        },
        "threads": threads,
        "teacher": args.teacher,
        "environment": {"machine": describe(), "before": before, "after": snapshot()},
        "ceiling_gflop_per_s": peak,
        "peer": "not installed" if args.peer is None else "BasicSR 1.4.2",
        "rows": {row: summary(runs, peak) for row, runs in found.items()},
    }
    text = markdown(result)
    print(text)
    if args.markdown:
        write_text(args.markdown, text)
    if args.json:
        write_json(args.json, result)
    if args.svg:
        write_text(args.svg, figure(result))
    return 0


# --- rows -----------------------------------------------------------------------------------------


def rows_of(
    network: str, args: argparse.Namespace, folder: Path, environment: dict[str, str]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The trainings of a network; each is run anew whenever it is called."""
    from peers.basicsr_run import command, laps, network_of, options, parameters

    from srkd.devices import pick_device, pick_precision
    from srkd.errors import SrkdError
    from srkd.models import save_model
    from srkd.networks import build

    data = folder / "data"
    if not data.exists():
        save_pairs(data, args)
        save_model(folder / "teacher", build(args.teacher, args.scale), {})
    iterations = args.steps * (args.laps + 1)
    best = pick_precision(BEST, pick_device(args.device))[0]
    wanted = [("scratch", FP32)] + ([("scratch", best)] if best != FP32 else [])
    methods = [m.strip() for m in args.methods.split(",")]
    wanted += [(method, best) for method in methods if method != "scratch"]

    def ours(method: str, precision: str, processes: int = 1) -> dict[str, Any]:
        place = Path(tempfile.mkdtemp(dir=folder))
        models = [] if method == "scratch" else [str(folder / "teacher")]
        changes = [
            f"student.network={network}",
            f"student.scale={args.scale}",
            f"teacher.models={json.dumps(models)}",
            f"method.name={method}",
            f"data.train={data / 'hr'}",
            f"data.lr={data / 'lr'}",
            f"data.cache={folder / 'cache'}",
            f"data.patch={args.patch}",
            f"train.batch={args.batch}",
            f"train.precision={precision}",
            f"train.iterations={iterations}",
            f"train.log_every={args.steps}",
            f"validate.sets={json.dumps([str(data / 'validation')])}",
            "validate.teachers=false",
        ]
        (place / "changes.json").write_text(json.dumps(changes))
        own = [__file__, "--row", str(place), "--device", args.device]
        if processes > 1:
            own = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", *own]
        threads = str(int(environment["OMP_NUM_THREADS"]) // processes)
        said, memory = output_of(
            [sys.executable, *own], {**environment, "OMP_NUM_THREADS": threads}
        )
        found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
        return {"precision": precision, "memory_mib": memory, **found}

    def theirs() -> dict[str, Any]:
        place = Path(tempfile.mkdtemp(dir=folder))
        built = build(network, args.scale)
        layers = network_of(built.family, built.arguments)
        if layers is None:
            raise SrkdError(
                f"BasicSR has no {network}; leave --peer out, or choose other --networks."
            )
        chosen = options(layers, data, args.scale, args.patch, args.batch, iterations, args.steps)
        said, memory = output_of(command(args.peer, place, chosen), environment)
        own = sum(p.numel() for p in built.parameters())
        if parameters(said) != own:
            raise SrkdError(
                f"BasicSR's network has {parameters(said):,} weights and {network} {own:,}; they do not compare."
            )
        return {"precision": FP32, "memory_mib": memory, "laps": laps(said)}

    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for method, precision in wanted:
        rows[f"{method} {precision}"] = lambda m=method, p=precision: ours(m, p)
    if args.processes is not None:
        row = f"scratch {best}, {args.processes} processes"
        rows[row] = lambda: ours("scratch", best, args.processes)
    if args.peer is not None:
        rows[PEER] = theirs
    return rows


def save_pairs(data: Path, args: argparse.Namespace) -> None:
    """HR sub-images and their LR images as PNG files, and one small pair to end a training with."""
    from srkd.data.builtin import training_images
    from srkd.data.degradation import downscale_uint8
    from srkd.data.folders import list_images
    from srkd.errors import SrkdError
    from srkd.images import read_rgb8, write_png

    scale, side = args.scale, SUB_IMAGE - SUB_IMAGE % args.scale
    train = Path(os.environ.get("SRKD_DATA", "")) / "train"
    if os.environ.get("SRKD_DATA") and train.is_dir():
        images = (read_rgb8(path) for path in list_images(sorted(train.iterdir())[0]))
    else:
        images = (image for _, image in training_images())
    crops = [image[:side, :side] for _, image in zip(range(args.images), images, strict=False)]
    for n, crop in enumerate(crops):
        height, width = (length - length % scale for length in crop.shape[:2])
        if min(height, width) < scale * args.patch:
            raise SrkdError(
                f"an image of {width}x{height} px is smaller than a crop; lower --patch."
            )
        hr = crop[:height, :width]
        write_png(data / "hr" / f"{n:03d}.png", hr)
        write_png(data / "lr" / f"{n:03d}x{scale}.png", downscale_uint8(hr, scale))
    small = 32 * scale
    write_png(data / "validation" / "one.png", crops[0][:small, :small])


def output_of(command: list[str], environment: dict[str, str]) -> tuple[str, float]:
    """Standard output of a process and the peak of its memory in MiB."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        said, complaint = out.read(), errors.read()
    if process.returncode:
        from srkd.errors import CheckFailedError

        raise CheckFailedError(
            f"{' '.join(command[:3])} ... failed:\n{(complaint or said)[-2000:]}"
        )
    return said + complaint, used.ru_maxrss / 1024  # BasicSR logs on stderr


def run_row(folder: Path, device: str) -> dict[str, Any]:
    """One training of ours: its laps, the FLOP of a step, and the peak of a GPU's memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from srkd.inputs import open_inputs
    from srkd.recipe import load_recipe
    from srkd.runs import Run
    from srkd.step import train_step
    from srkd.train import distill
    from srkd.training import prepare

    recipe = load_recipe(None, json.loads((folder / "changes.json").read_text()))
    distill(recipe, folder / "run", device=device, quiet=True)
    if os.environ.get("RANK", "0") != "0":
        return {}  # the first process has the log
    records = [r for r in Run(folder / "run", recipe).log_records() if "terms" in r]
    laps = [(1 / r["steps_per_s"], r["data_wait"]) for r in records[1:]]
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else None
    # In the plain layout every layer runs as it is defined; elsewhere some do more products in less time.
    plain = replace(recipe, train=replace(recipe.train, channels_last=False))
    training, inputs = prepare(plain, device), open_inputs(plain)
    counter = FlopCounterMode(display=False)
    with counter:
        train_step(training, *inputs.sampler.batch(0))
    found = {"laps": laps, "flop": counter.get_total_flops()}
    return found if gpu is None else {**found, "memory_mib": gpu}


def ceiling(device: str) -> dict[str, float]:
    """GFLOP/s of a product of two matrices, the best of ten, in each precision."""
    import time

    import torch

    from srkd.devices import pick_device, wait_for

    target = pick_device(device)
    rates = {}
    for name, dtype in ((FP32, torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.rand(MATRIX, MATRIX, device=target).to(dtype) for _ in "ab")
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            torch.mm(a, b)
            wait_for(target)
            times.append(time.perf_counter() - begin)
        rates[name] = 2 * MATRIX**3 / min(times[2:]) / 1e9
    return rates


# --- what was found -------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]], peak: dict[str, float]) -> dict[str, Any]:
    """The figures of a row over all its rounds."""
    laps = [lap for run in runs for lap in run["laps"]]
    seconds = median(s for s, _ in laps)
    flop, precision = runs[0].get("flop"), runs[0]["precision"]
    rate = None if flop is None else flop / seconds / 1e9
    return {
        "precision": precision,
        "steps_per_s": 1 / seconds,
        "ms_median": 1000 * seconds,
        "ms_min": 1000 * min(s for s, _ in laps),
        "ms_max": 1000 * max(s for s, _ in laps),
        "laps": len(laps),
        "data_wait": median(wait for _, wait in laps),
        "gflop_per_step": None if flop is None else flop / 1e9,
        "gflop_per_s": rate,
        "of_ceiling": None if rate is None else rate / peak[precision],
        "memory_mib": max(run["memory_mib"] for run in runs),
    }


def against(result: dict[str, Any], row: str) -> float | None:
    """How many times as fast as BasicSR, or as our fp32 where BasicSR is not there."""
    rows, network = result["rows"], row.split("/")[0]
    other = rows.get(f"{network}/{PEER}") or rows[f"{network}/scratch {FP32}"]
    return rows[row]["steps_per_s"] / other["steps_per_s"]


def markdown(result: dict[str, Any]) -> str:
    peak = result["ceiling_gflop_per_s"]
    over = "fp32 of ours" if result["peer"] == "not installed" else PEER
    lines = [
        f"x{result['scale']}, batch {result['batch']}, LR patch {result['patch']}, {result['threads']} threads, "
        f"{result['device']}; whole iterations with data, weight average and log; ceiling (matrix product): "
        f"fp32 {peak[FP32]:.0f}, bf16 {peak['bf16']:.0f} GFLOP/s; BasicSR: {result['peer']}",
        "",
        f"| network | training | steps/s | ms (min to max) | x {over} | data wait | GFLOP/s | of ceiling | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if result["rehearsal"]:
        lines.insert(0, "A REHEARSAL: these figures mean nothing.\n")
    for name, r in result["rows"].items():
        network, row = name.split("/")
        rate = (
            ("", "")
            if r["gflop_per_s"] is None
            else (f"{r['gflop_per_s']:.0f}", f"{100 * r['of_ceiling']:.0f} %")
        )
        lines.append(
            f"| {network} | {row} | {r['steps_per_s']:.2f} | {r['ms_median']:.0f} ({r['ms_min']:.0f} to "
            f"{r['ms_max']:.0f}) | {against(result, name):.2f} | {100 * r['data_wait']:.1f} % | {rate[0]} | "
            f"{rate[1]} | {r['memory_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def figure(result: dict[str, Any]) -> str:
    """Speed over memory, a chart for each network."""
    from srkd.plots import Point, heading, plane, svg

    rows = {tuple(name.split("/")): r for name, r in result["rows"].items()}
    order = list(dict.fromkeys(row for _, row in rows))
    title = f"Training x{result['scale']}, batch {result['batch']}, LR patch {result['patch']}, {result['threads']} threads"
    charts = [heading(f"A rehearsal: {title}" if result["rehearsal"] else title)]
    for network in dict.fromkeys(network for network, _ in rows):
        points = [
            Point(row, r["memory_mib"], r["steps_per_s"])
            for (name, row), r in rows.items()
            if name == network
        ]
        charts.append(plane(network, points, "peak memory, MiB", "steps per second", order))
    return svg(charts, title)


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
