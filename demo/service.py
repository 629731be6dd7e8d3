"""What the demo can do, as plain functions without a browser: what there is, what is accepted, the jobs.

A job is a generator of `Progress` and `Result`; closing it stops the job within one tile. One job runs at a
time, others wait for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo.comparison import comparison
from demo.jobs import CompareRequest
from demo.lane import Lane
from demo.limits import Limits, check_pictures
from demo.shelf import Shelf
from demo.workspace import Workspace
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path
    from typing import Literal

    from demo.entries import EngineEntry, ModelEntry
    from demo.jobs import Choice, Event
    from demo.shelf import Ready


class Service:
    """The networks of weights/ and `extra_models` (run folders, weights files, exported files), ready to be compared.

    `workspace` holds the pictures that are made; by default a temporary folder of this process.
    """

    def __init__(
        self,
        extra_models: Sequence[str] = (),
        limits: Limits | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.shelf = Shelf(extra_models)
        self.workspace = workspace or Workspace()
        self.lane = Lane()
        self._pace: dict[Hashable, float] = {}

    def models(self) -> list[ModelEntry]:
        return list(self.shelf.models)

    def engines(self) -> list[EngineEntry]:
        """All that there are; `reason` says why one cannot be used here."""
        return list(self.shelf.engines)

    def check(self, request: CompareRequest) -> None:
        """Raise `SrkdError` for what is known to be refused; of pictures only the headers are read."""
        scale = self._check_choices(request)
        check_pictures(request, scale, self.limits)

    def compare(self, request: CompareRequest) -> Iterator[Event]:
        """Nearest, bicubic and every choice; the `Result` so far after each picture and, complete, at the end."""
        self.check(request)
        yield from self.lane.run(
            comparison(self.shelf, self.workspace, self.limits, request, self._pace)
        )

    def upscale(
        self, picture: Path, name: str, choice: Choice, tile: int | Literal["auto"] = "auto"
    ) -> Iterator[Event]:
        """One picture through one choice; the `Result` has one pane and no scores."""
        request = CompareRequest(picture, name, (choice,), tile=tile)
        self.check(request)
        yield from self.lane.run(
            comparison(self.shelf, self.workspace, self.limits, request, self._pace, alone=True)
        )

    def open(self, choice: Choice, say: Callable[[str], None] = lambda text: None) -> Ready:
        """A choice, open; for use inside a job of `lane`. `say` as of `Shelf.open`."""
        return self.shelf.open(choice, say)

    def close(self) -> None:
        """Stop all jobs and remove what they made."""
        self.lane.close()
        self.workspace.clear()

    def _check_choices(self, request: CompareRequest) -> int:
        """The scale of the choices, which all must have."""
        choices, most = request.choices, self.limits.max_choices
        if not 1 <= len(choices) <= most:
            raise SrkdError(f"{len(choices)} networks were chosen; choose 1 to {most}.")
        for choice in choices:
            self.shelf.check(choice)
        if len(set(choices)) < len(choices):
            raise SrkdError("A network was chosen twice on one engine; choose each once.")
        scales = {choice.model: self.shelf.entry(choice.model).scale for choice in choices}
        if len(set(scales.values())) > 1:
            told = ", ".join(f"{key} x{scale}" for key, scale in scales.items())
            raise SrkdError(f"The networks are of several scales ({told}); choose those of one.")
        if request.reference is not None and request.reference not in scales:
            raise SrkdError(
                f"The reference '{request.reference[:40]}' is not one of the networks chosen ({', '.join(scales)}); "
                "choose one of them."
            )
        return scales[choices[0].model]
