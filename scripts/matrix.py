"""Train methods x students x scales x seeds with one budget, and report what each method gives.

MATRIX is a TOML file (recipes/evidence/tiny_x4.matrix.toml). Runs lie in OUT/runs/xSCALE/STUDENT/ROW-SEED: what is
finished is left alone, what was interrupted goes on, and a folder that holds another run is refused with the
difference. Then OUT/report.html, report.md and results.json are written: gains over scratch with their spread, quality
against size, multiply-adds and time, learning curves, the papers' gains beside.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srkd.compare import Speed
    from srkd.matrix import PlannedRun, Standing
    from srkd.matrix_run import Outcome, Pace

SPEED_SIZE = (256, 256)  # LR pixels (h, w), the size at which multiply-adds are counted
EXAMPLES = """\
examples:
  python scripts/matrix.py recipes/evidence/tiny_x4.matrix.toml --out results/tiny_x4 --dry-run
      the plan: every run folder, what is done, how long the rest takes
  python scripts/matrix.py recipes/evidence/tiny_x4.matrix.toml --out results/tiny_x4 --jobs 2
      trains, measures, reports; Ctrl-C saves, and the same command goes on
  python scripts/matrix.py recipes/evidence/tiny_x4.matrix.toml --out results/tiny_x4 --share 2/3
      the second of three machines; afterwards copy the folders results/tiny_x4/runs together and run it once more
  python scripts/matrix.py recipes/evidence/tiny_x4.matrix.toml --out results/tiny_x4 --only scratch --only fitnet

exit codes:
  0 all runs finished   1 a run failed, budgets are unequal, or times could not be measured
  2 the request is wrong   130 interrupted
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="matrix.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("matrix", type=Path, metavar="MATRIX.toml")
    p.add_argument("--out", type=Path, help="folder of runs and report (default: results/NAME)")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    p.add_argument("--share", metavar="I/N", help="every N-th run, from the I-th on")
    p.add_argument(
        "--only", action="append", default=[], metavar="ROW", help="a row, or x4/rcan_a/ROW-0"
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan, train nothing")
    p.add_argument(
        "--no-speed", action="store_true", help="measure no times when all runs are finished"
    )
    p.add_argument("--device", default="auto", help="for training (default: cuda if there is one)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from srkd.errors import SrkdError
    from srkd.matrix import load_matrix, only, share_of, standing
    from srkd.matrix_run import Outcome, paces

    if args.jobs < 1:
        raise SrkdError(f"--jobs {args.jobs} trains nothing; give 1 or more.")
    out = args.out or Path("results") / args.matrix.name.removesuffix(".toml").removesuffix(
        ".matrix"
    )
    every = load_matrix(args.matrix, out)
    runs = share_of(every, args.share) if args.share else every
    runs = only(runs, args.only) if args.only else runs
    standings = [standing(run) for run in runs]
    pace = paces(every)
    if args.dry_run:
        return show_plan(args, runs, standings, pace)
    todo = [run for run, s in zip(runs, standings, strict=True) if s.state != "done"]
    outcome = train(args, todo, pace) if todo else Outcome()
    if outcome.interrupted:
        from srkd.console import INTERRUPTED

        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return report(args, out, every, outcome)


def show_plan(
    args: argparse.Namespace,
    runs: Sequence[PlannedRun],
    standings: Sequence[Standing],
    pace: Pace,
) -> int:
    """A row that never ran is prepared, and a step of it timed."""
    from srkd.errors import SrkdError
    from srkd.matrix_results import plan_lines, plan_table
    from srkd.matrix_run import measure_pace
    from srkd.progress import counter

    new = {run.kind: run for run in runs if (run.kind, "") not in pace}
    tick, refused = counter("timing a step of each new row", quiet=args.quiet), {}
    for i, run in enumerate(new.values(), 1):
        try:
            pace = pace | measure_pace(run, args.device)
        except SrkdError as error:
            refused[run.name] = str(error)
        tick(i, len(new))
    lines = plan_lines(runs, standings, pace)
    if args.json:
        print(json.dumps({"runs": [line.to_dict() for line in lines], "refused": refused}))
    else:
        print(plan_table(lines, args.jobs))
    for name, why in refused.items():
        print(f"REFUSED {name}: {why}", file=sys.stderr)
    return 1 if refused else 0


def train(args: argparse.Namespace, todo: Sequence[PlannedRun], pace: Pace) -> Outcome:
    from srkd.matrix_run import train_all

    launcher = [sys.executable, str(Path(__file__).resolve().parent / "distill.py")]
    options = ["--device", args.device]
    return train_all(todo, launcher, jobs=args.jobs, options=options, pace=pace, quiet=args.quiet)


def report(
    args: argparse.Namespace, out: Path, every: Sequence[PlannedRun], outcome: Outcome
) -> int:
    from srkd.compare_pages import print_comparison
    from srkd.matrix_results import RESULTS, check_any, write_results

    check_any(every, outcome.failed)
    speed, timed = (None, True) if args.no_speed else measured(out, every, args.quiet)
    results = write_results(out, args.matrix, every, outcome.failed, speed)
    if args.json:
        print((out / RESULTS).read_text(encoding="utf-8"), end="")
    else:
        print_comparison(results.comparison)
    for path in results.written:
        print(f"wrote {path}", file=sys.stderr)
    damaged = results.comparison.finding.failed
    problems = [
        *(f"FAILED {name}: {said}" for name, said in (outcome.failed | damaged).items()),
        *results.unequal,
        *([] if timed or speed is None else [speed.note]),
    ]
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


def measured(out: Path, every: Sequence[PlannedRun], quiet: bool) -> tuple[Speed, bool]:
    """Times of one network of each student and scale, side by side; whether they could be measured."""
    from dataclasses import replace

    from deploy.benchmark import benchmark
    from srkd.compare import Speed
    from srkd.errors import SrkdError
    from srkd.matrix_results import known_speed
    from srkd.models import load_model

    if not all((run.folder / "report.md").is_file() for run in every):
        return Speed({}, "Times are measured when all runs are finished."), True
    chosen = {run.kind[1:]: run for run in every}
    if known := known_speed(out, [*chosen]):
        return known, True
    networks = [
        replace(load_model(run.folder), name=f"{student}_x{scale}")
        for (student, scale), run in chosen.items()
    ]
    try:
        card, file = benchmark(
            networks, size=SPEED_SIZE, quantities=("compute",), out=out, quiet=quiet
        )
    except SrkdError as error:
        return Speed({}, f"Times were not measured: {error}"), False
    rows = [row.to_json() for row in card.rows]
    ms = {pair: row["p50_ms"] for pair, row in zip(chosen, rows, strict=True) if "p50_ms" in row}
    subject = card.subjects[0]
    where = card.environment["machine"]["cpu"] if subject.device == "cpu" else subject.device
    threads = f", threads: {subject.threads}" if subject.device == "cpu" else ""
    h, w = SPEED_SIZE
    note = (
        f"Times: median of a {h}x{w} LR picture, {subject.engine} {subject.precision} on {where}{threads}, the networks "
        f"taking turns; the whole record is {file.name}."
    )
    return Speed(ms, note), len(ms) == len(chosen)


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
