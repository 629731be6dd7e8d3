"""Compare finished runs: quality, size and cost of methods over seeds, and the papers' gains beside.

RUN is a run folder, or a folder that holds run folders at any depth.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  python scripts/compare.py runs/compare --html compare.html
      every finished run below runs/compare, as tables here and as a page with charts
  python scripts/compare.py runs/scratch_0 runs/fakd_0 --cost method_cost.json --out out/
      two runs, with measured costs per step; writes out/compare.md, .json and .svg
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    p.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page with tables and charts"
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="write compare.md, compare.json and compare.svg"
    )
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument(
        "--cost",
        type=Path,
        metavar="FILE",
        help="times per step, as benchmarks/method_cost.py records them (default: from the logs)",
    )
    p.add_argument(
        "--baseline", metavar="METHOD", help="the method whose step costs 1 (default: logits)"
    )
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from srkd.compare import compare
    from srkd.compare_pages import html, print_comparison, write_folder
    from srkd.files import write_text
    from srkd.finished import find_runs

    finding = find_runs(args.runs)
    for folder, reason in finding.skipped.items():
        print(f"skipped {folder}: {reason}", file=sys.stderr)
    for folder, reason in finding.failed.items():
        print(f"FAILED {folder}: {reason}", file=sys.stderr)
    comparison = compare(finding, baseline=args.baseline, cost=args.cost)
    written = write_folder(args.out, comparison) if args.out else []
    if args.html:
        write_text(args.html, html(comparison))
        written.append(args.html)
    if args.json:
        print(json.dumps(comparison.to_dict()))
    else:
        print_comparison(comparison)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return 1 if finding.failed else 0


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
