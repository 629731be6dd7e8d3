"""Measure how fast models and exported engines are: the speed card, with the evidence for it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.environment import (
    Others,
    check_gpus,
    describe,
    snapshot,
    throttled,
    wait_until_quiet,
)
from srkd.errors import SrkdError
from srkd.files import plain, write_json
from srkd.progress import StatusLine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploy.speed import Limits
    from deploy.speed_card import Quantity, SpeedCard
    from srkd.loaded import LoadedModel

CARD_FILE = "speed.json"
DEFAULT_QUANTITIES = "compute,latency,throughput"
LONGEST = 4  # a slow row is given so many times --seconds

EXAMPLES = f"""\
three times of every engine, never one:
  compute      the engine alone; tensors stay on the device
  latency      one picture, bytes to bytes
  throughput   a pipeline, bytes to bytes, while the neighbours are converted

every row is warmed up until it settles, then timed 200 times and 5 s at least, the engines taking turns. A row
that would need more than {LONGEST} times --seconds is timed less often (ten times at least), and says so. A busy machine,
an exported file without the parity verdict PASS, and a watch that is off are refused.

examples:
  python deploy/benchmark.py runs/rcan_a
  python deploy/benchmark.py rcan_c --scale 4 --engine torch,ort --size 270x480 --threads 2
  python deploy/benchmark.py runs/rcan_a/deploy/rcan_a_fp32.onnx --batch 4 --json

exit codes:
  0 measured     1 INCONCLUSIVE, or refused because of what was found
  2 the request is wrong                            3 a library is missing here
"""


def benchmark(
    targets: Sequence[str | Path | LoadedModel],
    engines: Sequence[tuple[str, str]] = (("torch", "fp32"),),
    *,
    size: tuple[int, int] = (256, 256),
    scale: int | None = None,
    threads: int = 0,
    batch: int = 1,
    quantities: Sequence[Quantity] | None = None,
    limits: Limits | None = None,
    out: Path | None = None,
    quiet: bool = False,
    others: Callable[[], float | None] | None = None,
) -> tuple[SpeedCard, Path]:
    """Measure, and write the card to `out`, else to the folder of the first engine; returns it and its file.

    `engines` are (name, precision) for every model in `targets`; an exported file has its own. `size` is (h, w) in LR
    pixels. `threads` inside one operator; 0 leaves them as they are. `batch` is for compute and throughput; latency is of one
    picture. `others` tells the share of the processors that other work took since its last call.
    """
    import torch

    from deploy.speed import Limits
    from deploy.speed_card import (
        QUANTITIES,
        SpeedCard,
        check_watches,
        measure_rows,
        pictures,
        to_floats,
    )
    from deploy.subjects import checked, open_targets

    targets = checked(targets, engines, scale)
    line = StatusLine(quiet=quiet)
    others = others or Others()
    limits = limits or Limits()
    if threads:
        torch.set_num_threads(threads)
    line.show("waiting for a quiet machine")
    before = {"others": wait_until_quiet(others), **snapshot()}
    check_gpus(before["gpus"])
    subjects = open_targets(
        targets, engines, lambda s: to_floats(pictures(size, s, 1)), scale, threads
    )
    self_test = check_watches(subjects)
    during: list[dict[str, Any]] = []
    rows, comparisons = measure_rows(
        subjects,
        size,
        batch,
        limits,
        others,
        line.show,
        quantities or QUANTITIES,
        lambda: during.append(snapshot()),
    )
    line.close()
    card = SpeedCard(
        rows=rows,
        comparisons=comparisons,
        subjects=subjects,
        limits=limits,
        self_test=self_test,
        environment={
            "machine": describe(),
            "before": before,
            "during": during,
            "after": snapshot(),
        },
        notes=tuple(dict.fromkeys(note for s in during for note in throttled(s["gpus"]))),
    )
    file = (out or subjects[0].folder) / CARD_FILE
    write_json(file, card.to_json())
    return card, file


# --- the command --------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "targets",
        nargs="+",
        metavar="MODEL_OR_ENGINE",
        help="run folder, weights file, shipped name, or a file of deploy/export.py",
    )
    p.add_argument(
        "--engine",
        default="torch",
        metavar="NAMES",
        help="for models: NAME[:PRECISION], comma-separated (default: torch, in fp32)",
    )
    p.add_argument("--scale", type=int, choices=(2, 3, 4), help="which scale of a shipped name")
    p.add_argument("--size", default="256x256", metavar="HxW", help="LR (default: %(default)s)")
    p.add_argument("--threads", type=int, default=0, metavar="N", help="default: as recorded")
    p.add_argument("--batch", type=int, default=1, metavar="B", help="of compute and throughput")
    p.add_argument(
        "--quantity",
        default=DEFAULT_QUANTITIES,
        metavar="NAMES",
        help="comma-separated (default: %(default)s)",
    )
    p.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="a row at least (default: 5)"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="default: the first engine's folder")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def parse_size(text: str) -> tuple[int, int]:
    """`270x480` -> (270, 480): height first."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise SrkdError(
            f"--size {text} is no height and width; give HxW in LR pixels, e.g. 256x256."
        )
    return int(parts[0]), int(parts[1])


def parse_engines(text: str) -> list[tuple[str, str]]:
    """`torch,ort:fp16` -> [("torch", "fp32"), ("ort", "fp16")]."""
    pairs = [word.strip().partition(":") for word in text.split(",") if word.strip()]
    if not pairs:
        raise SrkdError(f"--engine '{text}' names no engine; for example --engine torch,ort.")
    return [(name, precision or "fp32") for name, _, precision in pairs]


def parse_quantities(text: str) -> list[Quantity]:
    from deploy.speed_card import QUANTITIES

    named = [word.strip() for word in text.split(",")]
    chosen: list[Quantity] = [q for q in QUANTITIES if q in named]
    if len(chosen) != len(named):
        wrong = next((n for n in named if n not in chosen), text)
        raise SrkdError(
            f"--quantity has '{wrong}', which is unknown or named twice; choose from {', '.join(QUANTITIES)}."
        )
    return chosen


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for option, value, least in (("threads", args.threads, 0), ("batch", args.batch, 1)):
        if value < least:
            raise SrkdError(f"--{option} {value} is too small; give {least} or more.")
    if not 0 < args.seconds < float("inf"):
        raise SrkdError(f"--seconds {args.seconds} is no duration; give a number above 0.")
    size, engines = parse_size(args.size), parse_engines(args.engine)

    from deploy.speed import Limits

    card, file = benchmark(
        args.targets,
        engines,
        size=size,
        scale=args.scale,
        threads=args.threads,
        batch=args.batch,
        quantities=parse_quantities(args.quantity),
        limits=replace(Limits(), seconds=args.seconds, longest_s=LONGEST * args.seconds),
        out=args.out,
        quiet=args.quiet,
    )
    if args.json:
        print(json.dumps(plain(card.to_json())))
        return card.exit_code
    print_card(card)
    print(file)
    print(card.verdict)
    return card.exit_code


# --- tables -------------------------------------------------------------------------------------


def speed_cells(card: SpeedCard) -> tuple[list[str], list[list[str]]]:
    """The header and a line per row of the card."""
    h, w = card.rows[0].size
    header = [
        "quantity",
        "engine",
        "scale",
        "batch",
        "threads",
        "FPS",
        "Mpx/s out",
        "p50 ms",
        "p90",
    ]
    header += ["p95", "p99", "min", "CoV", "n", f"against {card.subjects[0].name}"]
    lines = []
    for row in card.rows:
        r = row.to_json()
        head = [row.quantity, f"{r['name']}, LR {h}x{w}", f"x{r['scale']}", str(row.batch)]
        head.append(str(row.subject.threads) if row.subject.device == "cpu" else "cuda")
        if not row.measured.conclusive:
            lines.append([*head, "INCONCLUSIVE", *["-"] * (len(header) - len(head) - 1)])
            continue
        ms = [three_digits(r[f"{key}_ms"]) for key in ("p50", "p90", "p95", "p99", "min")]
        rates = [three_digits(r["fps"]), three_digits(r["output_mpx_per_s"])]
        lines.append(
            [*head, *rates, *ms, f"{100 * r['cov']:.1f} %", str(r["n"]), _against(card, row)]
        )
    return header, lines


def _against(card: SpeedCard, row: Any) -> str:
    found = card.against_first(row)
    if found is None:
        return "-"
    return f"{found.speed:.2f} [{found.low:.2f}, {found.high:.2f}] {found.judged}"


def opening_cells(card: SpeedCard) -> tuple[list[str], list[list[str]]]:
    """Cold start, memory and parity of every engine."""
    header = ["engine", "open s", "first run s", "file MiB", "host MiB", "device MiB", "parity"]
    lines = []
    for subject in card.subjects:
        s = subject.to_json()
        cold, memory, parity = s["cold_start_s"], s["memory_mib"], s["parity"]
        proof = parity["verdict"]
        proof += "" if parity["psnr_db"] is None else f", {parity['psnr_db']:.1f} dB"
        sizes = ["-" if v is None else f"{v:.1f}" for v in memory.values()]
        lines.append([s["name"], f"{cold['open']:.2f}", f"{cold['first_run']:.2f}", *sizes, proof])
    return header, lines


def three_digits(value: float) -> str:
    """At least three significant digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_card(card: SpeedCard) -> None:
    """Both tables and what a reader must know, on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=240, highlight=False)  # its natural width: rich would cut numbers off
    for header, lines in (speed_cells(card), opening_cells(card)):
        table = Table(box=SIMPLE_HEAD)
        for i, title in enumerate(header):
            table.add_column(title, justify="left" if i < 2 and title != "open s" else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table, markup=False)
    machine, before = card.environment["machine"], card.environment["before"]
    others = "not known" if before["others"] is None else f"{100 * before['others']:.0f} %"
    print(
        f"{machine['cpu']}, {len(machine['affinity'])} processors, other work before: {others}; "
        "FPS = pictures per run / p50; [95 % interval]; clocks not locked"
    )
    for gpu in before["gpus"]:
        print("GPU: " + ", ".join(f"{key} {value}" for key, value in gpu.items()))
    for row in card.rows:
        if row.measured.note:
            print(f"{row.quantity}, {row.subject.name}: {row.measured.note}")
    for note in card.notes:
        print(note)


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
