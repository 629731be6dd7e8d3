"""What happens when something is pressed: the page's values in, texts, pictures and files for the page out.

Every handler is a generator, so that Gradio can close it between two tiles. It yields one value per output;
`gr.skip()` leaves an output as it is. Nothing of a user is kept here: results go to that user's page.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator  # Gradio resolves the annotations of handlers
from contextlib import closing
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import gradio as gr

from demo import markup
from demo.asked import Asked, Format, batch_of, choices_of, compare_request, format_of
from demo.batch import batch
from demo.downloads import converts, safe_stem, save_as
from demo.jobs import BatchResult, Progress, Result
from demo.saying import reworded
from demo.scores import table as numbers_table
from demo.scores import to_csv, to_json
from demo.speedtest import measure, with_times
from demo.stops import Stops
from demo.uploads import file_record
from demo.viewer_data import viewer_data
from srkd.errors import SrkdError
from srkd.images import picture_format

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from demo.service import Service

UNEXPECTED = "Something went wrong on the server, and its log says what. Try again, or with another picture or network."
SHOWN_S = 20
SPEED_SECONDS = 20
PATIENCE_S = 120
log = logging.getLogger("srkd.demo")

Outputs = tuple[Any, ...]
E = TypeVar("E")


@dataclass(frozen=True)
class Kept:
    """What one user's page remembers: the pictures, and the format (png, jpg, ...) of the upload."""

    result: Result
    original: str


class Handlers:
    """The service, and the folder in which uploads and results lie."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.folder = folder
        self.stops = Stops()
        self.converting = Stops()

    def job(self, handler: Callable[..., Iterator[Outputs]], outputs: int) -> Callable[..., Any]:
        """`handler`, guarded, as a job that `stopping` ends."""

        # Gradio gives the request to the parameter with this annotation.
        def run(request: gr.Request, *values: Any) -> Iterator[Outputs]:
            yield from self._stoppable(
                self.stops, request, guarded(handler, outputs, self.folder)(*values)
            )

        return run

    def files_job(self) -> Callable[..., Any]:
        """`files`, guarded, which `stopping` ends and, as its files would come too late, the page's next one."""

        def run(request: gr.Request, *values: Any) -> Iterator[Outputs]:
            self.converting.stop(page_of(request), 0.0)
            yield from self._stoppable(
                self.converting, request, guarded(self.files, 2, self.folder)(*values)
            )

        return run

    def stopping(self, request: gr.Request) -> Iterator[str]:
        """-> status, until the jobs of this page have ended."""
        yield markup.status("Stopping; the tile in work is finished first.")
        # What is being converted is no result that one could wait for.
        self.converting.stop(page_of(request), 0.0)
        self.stops.stop(page_of(request), PATIENCE_S)

    def _stoppable(
        self, stops: Stops, request: gr.Request, handler: Iterator[Outputs]
    ) -> Iterator[Outputs]:
        with stops.job(page_of(request)) as asked, until_closed(handler) as told:
            for one in told:
                if asked.is_set():
                    return
                yield one

    def compare(self, *values: Any) -> Iterator[Outputs]:
        """Values of `Asked` -> status, viewer, table, what is kept for this user, files, their format."""
        request = compare_request(Asked(*values), self.service.models(), self.folder)
        self.service.check(request)
        original = picture_format(request.picture)
        yield markup.status("starting", 0.0), gr.skip(), gr.skip(), None, None, "png"
        kept = None
        with until_closed(self.service.compare(request)) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield markup.progress(event), *[gr.skip()] * 5
                else:
                    kept = Kept(event, original)
                    # Not stopped, only not finished: `stopped` says the other.
                    table = markup.table(numbers_table(replace(event, complete=True)))
                    yield gr.skip(), shown(event), table, kept, gr.skip(), gr.skip()
        assert kept is not None, "a comparison ends with its result"
        files = self.downloads(kept, "png")
        yield markup.status("Done."), gr.skip(), gr.skip(), gr.skip(), files, gr.skip()

    def files(self, kept: Kept | None, wanted: Any) -> Iterator[Outputs]:
        """-> status, files: every picture in the wanted format, the table as JSON and CSV."""
        form = format_of(wanted)
        if kept is None or not converts(kept.original, form):
            yield gr.skip(), None if kept is None else self.downloads(kept, form)
            return
        with until_closed(
            self.service.lane.one(
                "writing the files", lambda turn: self.downloads(kept, form, turn.check)
            )
        ) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield markup.progress(event), gr.skip()
                else:
                    yield markup.status("Done."), event

    def stopped(self, kept: Kept | None) -> Iterator[Outputs]:
        """After `stopping` -> status, table, files of what was finished, their format."""
        if kept is None:
            yield markup.status("Stopped."), gr.skip(), None, gr.skip()
            return
        table = markup.table(numbers_table(kept.result))
        files = self.downloads(kept, "png")
        told = markup.status("Stopped; the pictures that were finished are shown.")
        yield told, table, files, "png"

    def downloads(
        self, kept: Kept, wanted: Format, check: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Files of a finished comparison in a new folder, and what was lost on the way into their format.

        `check` is called between two files and may raise to stop.
        """
        check_kept(kept)
        result = kept.result
        name = f"{safe_stem(result.name)}_x{result.scale}_table"
        notes: list[str] = []
        with self.service.workspace.job(sum(p.file.stat().st_size for p in result.panes)) as into:
            files: list[Path] = []
            for pane in result.panes:
                check()
                saved = save_as(pane, result.name, result.scale, kept.original, wanted, into)
                files.append(saved.file)
                notes += [f"{saved.file.name}: {note}" for note in saved.notes]
            for suffix, text in ((".json", to_json(result)), (".csv", to_csv(result))):
                files.append(into / f"{name}{suffix}")
                files[-1].write_text(text, encoding="utf-8", newline="")
        return {"files": [file_record(file) for file in files], "notes": notes}

    def speed(self, kept: Kept | None, *settings: Any) -> Iterator[Outputs]:
        """Networks, engine, precision -> status, viewer, table, kept with the times in it, files, their format."""
        if kept is None:
            raise SrkdError("Compare a picture first; the speed is measured at its size.")
        check_kept(kept)  # before minutes of measuring
        choices = choices_of(self.service.models(), *settings)
        result = kept.result
        with until_closed(measure(self.service, choices, result.lr_size, SPEED_SECONDS)) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield markup.progress(event), *[gr.skip()] * 5
                else:
                    result = with_times(result, event)
        kept = replace(kept, result=result)
        # JSON and CSV hold the times too.
        files = self.downloads(kept, "png")
        table = markup.table(numbers_table(result))
        yield markup.status("Speed measured."), shown(result), table, kept, files, "png"

    def batch(
        self, files: Any, model: Any, engine: Any, precision: Any, wanted: Any
    ) -> Iterator[Outputs]:
        """-> status, the zip."""
        (choice,) = choices_of(self.service.models(), [model], engine, precision)
        uploads = batch_of(files, self.folder, self.service.limits.max_files)
        yield markup.status("starting", 0.0), None
        named = [(upload.path, upload.name) for upload in uploads]
        with until_closed(batch(self.service, named, choice, "auto", format_of(wanted))) as events:
            for event in events:
                if isinstance(event, BatchResult):
                    yield batch_done(event)
                else:
                    yield markup.progress(event), gr.skip()


def check_kept(kept: Kept) -> None:
    if not all(pane.file.is_file() for pane in kept.result.panes):
        raise SrkdError("The server no longer keeps these pictures; compare again.")


def until_closed(events: Iterator[E]) -> closing[Generator[E, None, None]]:
    """A job that stops when its page's generator is closed, not when the garbage collector comes."""
    return closing(cast("Generator[E, None, None]", events))


def page_of(request: gr.Request) -> str:
    """The open tab that asks; a call without one shares "" with others like it, and stops their jobs at most."""
    return request.session_hash or ""


def batch_done(result: BatchResult) -> Outputs:
    """Status and the zip, with the reason for every file that is not in it."""
    failed = [file.error for file in result.files if file.error]
    enlarged = len(result.files) - len(failed)
    status = markup.status(f"Done: {enlarged} of {len(result.files)} pictures.")
    return status, {"files": [file_record(result.zip)], "notes": failed}


def shown(result: Result) -> dict[str, Any]:
    """What the viewer mounts; each picture's file becomes an address when Gradio sends it."""
    data = viewer_data(result, lambda path: "")
    for image, pane in zip(data["images"], result.panes, strict=True):
        image["file"] = file_record(pane.file)
    return data


def guarded(
    handler: Callable[..., Iterator[Outputs]], outputs: int, folder: Path
) -> Callable[..., Any]:
    """`handler` with every failure as one sentence: in its first output, the status, and as a message.

    An `SrkdError` is said as it is, any other is a fault of ours: a plain sentence, the rest to the log.
    `outputs` 0: an endpoint for programs, which has no status line.
    """

    @functools.wraps(handler)
    def run(*values: Any) -> Iterator[Outputs]:
        try:
            yield from handler(*values)
        except Exception as error:
            sentence = sentence_of(error, folder)
        else:
            return
        if outputs:
            yield markup.refusal(sentence), *[gr.skip()] * (outputs - 1)
        # The page shows the message as HTML; a program reads it as it is.
        text = escape(sentence) if outputs else sentence
        raise gr.Error(text, duration=SHOWN_S, title="Not done", print_exception=False)

    return run


def sentence_of(error: Exception, folder: Path) -> str:
    """What a user may read of an error: no path of the server."""
    if not isinstance(error, SrkdError):
        log.error("a request failed", exc_info=error)
        return UNEXPECTED
    return reworded(str(error), {folder: ""})
