"""Many pictures through one network, into one zip with a manifest of what was done and what was not.

The zip is complete or absent, whatever happens. Its pictures are stored as they are: PNG, JPEG and WebP do not
shrink any further.
"""

from __future__ import annotations

import json
import time
import unicodedata
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast
from zipfile import ZIP_STORED, ZipFile

from demo.downloads import DISK, converts, save_as
from demo.jobs import BatchFile, BatchResult, CompareRequest, Progress
from demo.meter import rough_time
from demo.saying import in_words, reworded
from demo.scores import made_on, shown_name
from srkd.errors import SrkdError
from srkd.files import replacing
from srkd.images import picture_format, picture_size

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from demo.downloads import Saved, Wanted
    from demo.jobs import Choice, Result
    from demo.service import Service

E = TypeVar("E")

MANIFEST = "manifest.json"
FORMAT = 1
MOST_SR_PX = 200_000_000  # of all pictures of a batch: up to 600 MB where they are noise
SR_PX_BYTES = 4  # RGB and alpha; the headers do not tell of 16 bits, which are rare
TOLD = 3  # reasons in the sentence about a batch of which nothing came


@dataclass(frozen=True)
class Job:
    """One file: `pixels` of its LR by the header, 0 where `error` says why it is not tried."""

    path: Path
    name: str
    pixels: int = 0
    error: str | None = None


def batch(
    service: Service,
    files: Sequence[tuple[Path, str]],
    choice: Choice,
    tile: int | Literal["auto"],
    wanted: Wanted,
) -> Iterator[Progress | BatchResult]:
    """Enlarge (file, user's name of it) one after the other; the last event has the zip, in the service's workspace.

    A file that cannot be enlarged is listed with its reason, and the others go on; if none can, that is an error.
    Closing the generator stops within one tile and leaves nothing.
    """
    jobs = _planned(service, files, choice, tile)
    scale = next(m.scale for m in service.models() if m.key == choice.model)
    _check_total(jobs, scale)
    with service.workspace.job(_room(jobs, scale)) as folder, in_words({folder: DISK}):
        archive = folder / f"srkd_x{scale}_{choice.model}_{choice.engine}-{choice.precision}.zip"
        done = yield from _zipped(service, jobs, choice, tile, wanted, archive)
    yield BatchResult(archive, tuple(done))


def _zipped(
    service: Service,
    jobs: Sequence[Job],
    choice: Choice,
    tile: int | Literal["auto"],
    wanted: Wanted,
    archive: Path,
) -> Generator[Progress, None, list[BatchFile]]:
    """Yields how far the batch is, returns what became of every file once the zip is complete."""
    done: list[BatchFile] = []
    meter = _Meter(sum(job.pixels for job in jobs))
    with replacing(archive) as temporary, ZipFile(temporary, "w", ZIP_STORED) as zipped:
        for number, job in enumerate(jobs, start=1):
            if job.error is not None:
                done.append(BatchFile(shown_name(job.name), error=job.error))
                continue
            head = f"file {number}/{len(jobs)} · {shown_name(job.name)}"
            try:
                result = yield from _enlarge(service, job, choice, tile, head, meter)
                saved = yield from _write(service, result, job, wanted, archive.parent, head, meter)
            except SrkdError as error:
                done.append(BatchFile(shown_name(job.name), error=_told(error, job)))
            else:
                entry = _unique(saved.file.name, [f.entry for f in done if f.entry])
                zipped.write(saved.file, entry)
                saved.file.unlink()
                done.append(_record(result, entry, saved))
            meter.finish(job)
        if all(f.error for f in done):
            raise _nothing(done)
        manifest = _manifest(service, choice, tile, wanted, done)
        zipped.writestr(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return done


# --- before -------------------------------------------------------------------------------------


def _planned(
    service: Service,
    files: Sequence[tuple[Path, str]],
    choice: Choice,
    tile: int | Literal["auto"],
) -> list[Job]:
    """Every file checked by its header; refused when they are too many, or none can be enlarged."""
    most = service.limits.max_files
    if not 0 < len(files) <= most:
        raise SrkdError(f"A batch of {len(files)} files was asked for; give 1 to {most}.")
    jobs = []
    for path, name in files:
        job = Job(path, name)
        try:
            service.check(CompareRequest(path, name, (choice,), tile=tile))
            h, w = picture_size(path)
            jobs.append(Job(path, name, pixels=h * w))
        except SrkdError as error:
            jobs.append(Job(path, name, error=_told(error, job)))
    if all(job.error for job in jobs):
        raise _nothing([BatchFile(shown_name(job.name), error=job.error) for job in jobs])
    return jobs


def _check_total(jobs: Sequence[Job], scale: int) -> None:
    total = scale**2 * sum(job.pixels for job in jobs)
    if total > MOST_SR_PX:
        raise SrkdError(
            f"These files would become {total / 1e6:.0f} megapixels in all at x{scale}, but a batch makes at most "
            f"{MOST_SR_PX / 1e6:.0f}; give fewer or smaller ones at once."
        )


def _room(jobs: Sequence[Job], scale: int) -> int:
    """Bytes of the zip and of the picture that goes into it, about: PNG does not make noise any smaller."""
    pixels = [scale**2 * job.pixels for job in jobs]
    return SR_PX_BYTES * (sum(pixels) + max(pixels))


def _nothing(files: list[BatchFile]) -> SrkdError:
    reasons = [f"{f.name}: {f.error}" for f in files]
    more = f" And {len(reasons) - TOLD} more." if len(reasons) > TOLD else ""
    return SrkdError(f"None of the files could be enlarged. {' '.join(reasons[:TOLD])}{more}")


def _told(error: SrkdError, job: Job) -> str:
    """The sentence without places of the server."""
    return reworded(str(error), {job.path: shown_name(job.name)})


# --- one file -----------------------------------------------------------------------------------


class _Meter:
    """How far the whole batch is, by LR pixels; it never falls, because that of a file does not."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.finished = 0
        self.begin = time.monotonic()

    def progress(self, job: Job, part: float, text: str) -> Progress:
        """`part` in [0, 1] of this file."""
        done = (self.finished + part * job.pixels) / self.pixels
        if not done:
            return Progress(0.0, text)
        spent = time.monotonic() - self.begin
        left = spent / done - spent
        return Progress(done, f"{text} · ~{rough_time(left)}", left)

    def finish(self, job: Job) -> None:
        self.finished += job.pixels


def _metered(
    events: Iterator[Progress | E], job: Job, head: str, meter: _Meter, begin: float = 0.0
) -> Generator[Progress, None, E | None]:
    """Yields how far the batch is, returns the last event of another kind. `begin` of the file is done before."""
    last: E | None = None
    # Closed at once when this generator is: the garbage collector would free the device later.
    with closing(cast("Generator[Progress | E, None, None]", events)) as told:
        for event in told:
            if isinstance(event, Progress):
                # Its own estimate is of this file alone.
                text = event.text.split(" · ~")[0]
                yield meter.progress(job, max(begin, event.done), f"{head} · {text}")
            else:
                last = event
    return last


def _enlarge(
    service: Service,
    job: Job,
    choice: Choice,
    tile: int | Literal["auto"],
    head: str,
    meter: _Meter,
) -> Generator[Progress, None, Result]:
    """Yields how far the batch is, returns the finished `Result`."""
    result = yield from _metered(
        service.upscale(job.path, job.name, choice, tile), job, head, meter
    )
    if result is None or not result.complete:
        raise SrkdError(f"{shown_name(job.name)} was stopped before it was finished; try it again.")
    return result


def _write(
    service: Service,
    result: Result,
    job: Job,
    wanted: Wanted,
    folder: Path,
    head: str,
    meter: _Meter,
) -> Generator[Progress, None, Saved]:
    """Yields how far the batch is, returns the enlarged picture in the wanted format; the server's own copy is removed."""
    (pane,) = (pane for pane in result.panes if pane.role == "model")
    original = picture_format(job.path)

    def save() -> Saved:
        return save_as(pane, job.name, result.scale, original, wanted, folder)

    saved: Saved | None
    if converts(original, wanted):
        events = service.lane.one(f"writing {original}", lambda turn: save())
        saved = yield from _metered(events, job, head, meter, begin=1.0)
        assert saved is not None, "a job of one value ends with it"
    else:
        saved = save()
    with suppress(OSError):
        pane.file.unlink()
    return saved


def _record(result: Result, entry: str, saved: Saved) -> BatchFile:
    (pane,) = (pane for pane in result.panes if pane.role == "model")
    return BatchFile(
        name=shown_name(result.name),
        entry=entry,
        lr_size=result.lr_size,
        sr_size=pane.size,
        seconds=pane.numbers.total_s,
        notes=(*result.notes, *pane.notes, *saved.notes),
    )


def _unique(name: str, taken: list[str]) -> str:
    """`name`, numbered if there is one like it: some systems see no difference between a.png and A.png."""
    folded = {_folded(other) for other in taken}
    path, number, candidate = Path(name), 1, name
    while _folded(candidate) in folded:
        number += 1
        candidate = f"{path.stem}_{number}{path.suffix}"
    return candidate


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _manifest(
    service: Service,
    choice: Choice,
    tile: int | Literal["auto"],
    wanted: Wanted,
    files: list[BatchFile],
) -> dict[str, object]:
    model = next(m for m in service.models() if m.key == choice.model)
    return {
        "format": FORMAT,
        **made_on(),
        "model": {
            "key": model.key,
            "label": model.label,
            "scale": model.scale,
            "parameters": model.parameters,
        },
        "engine": choice.engine,
        "precision": choice.precision,
        "tile": tile,
        "pictures": wanted,
        "files": [asdict(file) for file in files],
    }
