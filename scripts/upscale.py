"""Upscale a picture, or every picture of a folder, with a network.

Output rows stream to the disk as PNG, so a picture of any size fits; JPEG, WebP, BMP and TIFF are written
when OUTPUT ends so. Depth, grey, transparency, orientation and colour profile are kept, or the
conversion is said in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from srkd.console import run_command
from srkd.errors import CheckFailedError, SrkdError

if TYPE_CHECKING:
    from srkd.infer import Job, TileChoice, UpscaleReport
    from srkd.progress import StatusLine

EXAMPLES = """\
examples:
  python scripts/upscale.py photo.jpg photo_x4.png --model runs/mine
  python scripts/upscale.py photos/ enlarged/ --model rcan_a_x4 --device cuda
  python scripts/upscale.py photo.jpg photo_x4.png --model runs/mine --engine ort
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="upscale.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("input", type=Path, metavar="INPUT", help="a picture or a folder of pictures")
    p.add_argument("output", type=Path, metavar="OUTPUT", help="a picture or a folder")
    p.add_argument(
        "--model",
        required=True,
        help="run folder, weights file, official checkpoint, exported file, or a name from weights/",
    )
    p.add_argument(
        "--engine",
        metavar="E",
        help="run the file that deploy/export.py made for this engine (default: the network in torch)",
    )
    p.add_argument("--scale", type=int, choices=(2, 3, 4), help="needed by ambiguous model names")
    p.add_argument(
        "--tile",
        type=tile_choice,
        default="auto",
        metavar="N|auto|none",
        help="side of a tile in input pixels (default: auto, by the memory that is free)",
    )
    p.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: cuda if there is one)"
    )
    p.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse inputs whose header promises more pixels (default: 100 million)",
    )
    p.add_argument("--keep-format", action="store_true", help="folder: not PNG, but as the input")
    p.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress, no result lines")
    return p.parse_args(argv)


def tile_choice(text: str) -> TileChoice:
    if text == "auto":
        return "auto"
    if text == "none":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no tile; give a number of pixels, auto or none")


def positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")


class Progress:
    """One share of the whole job's input pixels, which never goes back, with an estimate."""

    def __init__(self, status: StatusLine, jobs: list[Job]) -> None:
        self.status, self.jobs = status, jobs
        self.total = max(1, sum(job.pixels for job in jobs))
        self.before = self.best = 0
        self.start = self.shown = time.monotonic()

    def update(self, number: int, pixels: int) -> None:
        """`pixels` of picture `number` are done."""
        from srkd.progress import duration

        self.best = max(self.best, self.before + pixels)
        now = time.monotonic()
        pause = 0.2 if self.status.live else 10.0
        if now - self.start < 1 or now - self.shown < pause:
            return
        self.shown = now
        left = (now - self.start) / self.best * max(0, self.total - self.best)
        share = 100 * self.best // self.total
        name = self.jobs[number].source.name
        text = f"{number + 1}/{len(self.jobs)} {name} · {share} % · ETA {duration(left)}"
        self.status.show(text)

    def finish(self, number: int) -> None:
        self.before += self.jobs[number].pixels

    def clear(self) -> None:
        """Take the live line away, so that a result can be printed in its place."""
        if self.status.live:
            self.status.show("")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from deploy.engine_model import device_for, load_any
    from srkd.images import MAX_PIXELS
    from srkd.infer import plan_jobs, upscale_file
    from srkd.progress import StatusLine

    jobs, others = plan_jobs(
        args.input, args.output, keep_format=args.keep_format, overwrite=args.overwrite
    )
    model = load_any(args.model, args.scale, args.engine, args.device)
    device = device_for(model, args.device)
    for note in model.notes:
        print(f"note: {args.model}: {note}", file=sys.stderr)
    if others:
        print(f"note: skipped, not named as pictures: {', '.join(others)}", file=sys.stderr)
    done: list[UpscaleReport] = []
    failed: list[dict[str, str]] = []
    progress = Progress(StatusLine(quiet=args.quiet), jobs)
    for number, job in enumerate(jobs):
        try:
            report = upscale_file(
                job.source,
                job.target,
                model,
                tile=args.tile,
                device=device,
                overwrite=args.overwrite,
                max_pixels=args.max_pixels or MAX_PIXELS,
                progress=partial(progress.update, number),
            )
        except SrkdError as error:
            if not args.input.is_dir():
                raise
            progress.clear()
            print(f"failed: {error}", file=sys.stderr)
            failed.append({"source": str(job.source), "error": str(error)})
        else:
            progress.clear()
            done.append(report)
            if not (args.quiet or args.json):
                print(report.line(), flush=True)
            for note in report.notes:
                print(f"note: {report.source}: {note}", file=sys.stderr)
        progress.finish(number)
    if args.json:
        document = {
            "model": str(model.source),
            "scale": model.scale,
            "engine": model.info.get("engine", "torch"),
            "device": device,
            "pictures": [report.to_dict() for report in done],
            "failed": failed,
        }
        print(json.dumps(document, indent=2))
    if failed:
        raise CheckFailedError(
            f"{len(failed)} of {len(jobs)} pictures failed; each has its reason above."
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
