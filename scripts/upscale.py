"""Upscale a picture, or every picture of a folder, with a network.

Output rows stream to the disk as PNG, so a picture of any size fits; JPEG, WebP, BMP and TIFF are written
when OUTPUT ends so. Depth, grey, transparency, orientation and colour profile are kept, or the
conversion is said in one line. Started by torchrun, several processes share out a folder.
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
    from collections.abc import Callable

    from srkd.infer import TileChoice
    from srkd.jobs import Done, Job
    from srkd.loaded import LoadedModel
    from srkd.progress import StatusLine

EXAMPLES = """\
examples:
  python scripts/upscale.py photo.jpg photo_x4.png --model runs/mine
  python scripts/upscale.py photos/ enlarged/ --model rcan_a_x4 --device cuda
  python scripts/upscale.py photo.jpg photo_x4.png --model runs/mine --engine ort
  torchrun --nproc-per-node 2 scripts/upscale.py photos/ enlarged/ --model rcan_a_x4
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
    """One share of this process's input pixels, which never goes back, with an estimate.

    Of several processes each has about the same work, so the first one's line stands for all.
    """

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
    import srkd.ranks as ranks

    again = "The pictures that are done are whole; --overwrite does all of them again."
    with ranks.group(args.device, again):
        return upscale(args)


def upscale(args: argparse.Namespace) -> int:
    """Do this process's share of the pictures; the first process reports on all."""
    import srkd.ranks as ranks
    from deploy.engine_model import device_for, load_any
    from srkd.jobs import plan_jobs, shares, totals, totals_line
    from srkd.progress import StatusLine

    start, several = time.perf_counter(), ranks.world() > 1
    if several and args.input.is_file():
        if not ranks.is_first():
            raise ranks.SaidElsewhereError(SrkdError.exit_code)
        raise SrkdError(
            f"torchrun shares out a folder, and {args.input} is one picture; start it without torchrun."
        )
    jobs, others = ranks.together(
        lambda: plan_jobs(
            args.input, args.output, keep_format=args.keep_format, overwrite=args.overwrite
        )
    )
    model = ranks.together(lambda: load_any(args.model, args.scale, args.engine, args.device))
    device = ranks.together(lambda: device_for(model, args.device))
    first = ranks.is_first()
    for note in model.notes if first else ():
        print(f"note: {args.model}: {note}", file=sys.stderr)
    if others and first:
        print(f"note: skipped, not named as pictures: {', '.join(others)}", file=sys.stderr)
    mine = shares(jobs, ranks.world())[ranks.rank()]
    progress = Progress(StatusLine(quiet=args.quiet or not first), [jobs[n] for n in mine])
    done: list[Done] = []
    with ranks.ended_by_torchrun():
        for place, number in enumerate(mine):
            done.append(
                one(args, jobs[number], number, model, device, partial(progress.update, place))
            )
            progress.finish(place)
            progress.clear()
            if not several:
                say(done[-1], args)
    done = sorted((d for part in ranks.collected(done) for d in part), key=lambda d: d.number)
    sums = totals(done, time.perf_counter() - start, ranks.world())
    failed = [d for d in done if d.report is None]
    if first:
        for result in done if several else ():
            say(result, args)
        if args.json:
            document = {
                "model": str(model.source),
                "scale": model.scale,
                "engine": model.info.get("engine", "torch"),
                "device": device,
                "pictures": [d.report.to_dict() for d in done if d.report is not None],
                "failed": [{"source": d.source, "error": d.error} for d in failed],
                "totals": sums,
            }
            print(json.dumps(document, indent=2))
        elif args.input.is_dir() and not args.quiet:
            print(totals_line(sums))
    if not failed:
        return 0
    if not first:
        raise ranks.SaidElsewhereError(CheckFailedError.exit_code)
    raise CheckFailedError(
        f"{len(failed)} of {len(jobs)} pictures failed; each has its reason above."
    )


def one(
    args: argparse.Namespace,
    job: Job,
    number: int,
    model: LoadedModel,
    device: str,
    progress: Callable[[int], None],
) -> Done:
    """One picture. In a folder a bad one does not end the others."""
    from srkd.images import MAX_PIXELS
    from srkd.infer import upscale_file
    from srkd.jobs import Done

    try:
        report = upscale_file(
            job.source,
            job.target,
            model,
            tile=args.tile,
            device=device,
            overwrite=args.overwrite,
            max_pixels=args.max_pixels or MAX_PIXELS,
            progress=progress,
        )
    except SrkdError as error:
        if not args.input.is_dir():
            raise
        return Done(number, str(job.source), error=str(error))
    return Done(number, str(job.source), report)


def say(done: Done, args: argparse.Namespace) -> None:
    """The result of a picture on stdout, what is odd about it on stderr."""
    if done.report is None:
        print(f"failed: {done.error}", file=sys.stderr)
        return
    if not (args.quiet or args.json):
        print(done.report.line(), flush=True)
    for note in done.report.notes:
        print(f"note: {done.report.source}: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
