"""Which pictures an upscaling does: a file or a folder as jobs, and the share of each process.

One process does all. Of several, started by torchrun, each does a part with about the same number of pixels, and
the first one tells what all have done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srkd.errors import SrkdError
from srkd.images import SUFFIXES, picture_size
from srkd.infer import check_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from srkd.infer import UpscaleReport


@dataclass(frozen=True)
class Job:
    """One picture to do; `pixels` by its header, 0 when that cannot be read."""

    source: Path
    target: Path
    pixels: int


@dataclass(frozen=True)
class Done:
    """What became of the job with this number: a report, or why there is none."""

    number: int
    source: str
    report: UpscaleReport | None = None
    error: str = ""


def shares(jobs: Sequence[Job], world: int) -> list[list[int]]:
    """Numbers of the jobs of every process: the largest first, each to whom has the fewest pixels so far."""
    parts: list[list[int]] = [[] for _ in range(world)]
    pixels = [0] * world
    for number in sorted(range(len(jobs)), key=lambda n: (-jobs[n].pixels, n)):
        least = pixels.index(min(pixels))
        parts[least].append(number)
        pixels[least] += jobs[number].pixels + 1  # pictures that cannot be read count as well
    return [sorted(part) for part in parts]


def totals(done: Sequence[Done], seconds: float, processes: int) -> dict[str, Any]:
    """Numbers of pictures and exact sums of their pixels; `seconds` of the clock."""
    reports = [d.report for d in done if d.report is not None]

    def pixels(sizes: list[tuple[int, int]]) -> int:
        return sum(height * width for height, width in sizes)

    return {
        "pictures": len(reports),
        "failed": len(done) - len(reports),
        "lr_pixels": pixels([r.lr_size for r in reports]),
        "sr_pixels": pixels([r.sr_size for r in reports]),
        "seconds": seconds,
        "processes": processes,
    }


def totals_line(sums: dict[str, Any]) -> str:
    lr, sr = sums["lr_pixels"] / 1e6, sums["sr_pixels"] / 1e6
    failed = f", {sums['failed']} failed" if sums["failed"] else ""
    by = f" by {sums['processes']} processes" if sums["processes"] > 1 else ""
    return f"{sums['pictures']} pictures{failed}, {lr:.2f} -> {sr:.2f} megapixels, {sums['seconds']:.1f} s{by}"


def plan_jobs(
    source: Path, target: Path, *, keep_format: bool = False, overwrite: bool = False
) -> tuple[list[Job], list[str]]:
    """The jobs of a file or of a folder (not of its sub-folders), and the names that are no pictures.

    A folder goes to a folder, names kept, as PNG unless `keep_format`. Everything that can be refused
    beforehand is: a target that exists, is the source, or would be written twice.
    """
    if not source.exists():
        raise SrkdError(f"there is no {source}; name a picture or a folder of pictures.")
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
        pictures = [p for p in found if p.suffix.lower() in SUFFIXES]
        others = [p.name for p in found if p.suffix.lower() not in SUFFIXES]
        if not pictures:
            raise SrkdError(
                f"{source} holds no pictures ({', '.join(s[1:] for s in SUFFIXES)}); name another folder."
            )
        if target.exists() and not target.is_dir():
            raise SrkdError(f"{target} is a file, but the input is a folder; name a folder.")
        pairs = [(p, target / (p.name if keep_format else f"{p.stem}.png")) for p in pictures]
    else:
        others = []
        inside = target / (source.name if keep_format else f"{source.stem}.png")
        pairs = [(source, inside if target.is_dir() else target)]
    _check_unique(pairs)
    taken = [to for _, to in pairs if to.exists()]
    for one, to in pairs:
        check_target(one, to, overwrite=overwrite or len(taken) > 1)
    if taken and not overwrite:
        raise SrkdError(
            f"{len(taken)} of {len(pairs)} outputs exist in {target} (first: {taken[0].name}); "
            "add --overwrite or name another folder."
        )
    return [Job(one, to, _pixels(one)) for one, to in pairs], others


def _check_unique(pairs: list[tuple[Path, Path]]) -> None:
    first: dict[Path, Path] = {}
    for one, to in pairs:
        other = first.setdefault(to, one)
        if other is not one:
            raise SrkdError(
                f"{other.name} and {one.name} would both become {to}; rename one or add --keep-format."
            )


def _pixels(path: Path) -> int:
    try:
        h, w = picture_size(path)
    except SrkdError:
        return 0  # told in full when its turn comes
    return h * w
