"""The folder of a run: recipe, states for exact resume, log, result. A file is complete or absent.

recipe.toml            everything resolved
model.json             what the result is, with training facts and scores
weights.safetensors    the student alone (the average weights if EMA was on)
state/step_00001000.pt the last two states, and best.pt; tensors and plain values only
log.jsonl  tensorboard/  samples/*.png  report.md
baseline/  stage1/             runs of their own: the student from scratch, the method's first stage
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import srkd.ranks as ranks
from srkd.errors import SrkdError
from srkd.files import plain, replacing, write_text
from srkd.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Self

    from torch.utils.tensorboard import SummaryWriter

STATE_FORMAT = 1
KEEP_STATES = 2


class Run:
    """One run folder, held by one process at a time (a lock file says so)."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.recipe = recipe
        self._lock: int | None = None

    @staticmethod
    def check(folder: Path, *, overwrite: bool = False) -> None:
        """Refuse a folder that cannot become a run: somebody else's, or a run that is not to be lost."""
        if not folder.exists():
            return
        # What a process that was killed at once leaves is nothing.
        contents = (
            [p for p in folder.iterdir() if p.name != ".lock" and ".part" not in p.name]
            if folder.is_dir()
            else None
        )
        is_run = contents is not None and (folder / "recipe.toml").is_file()
        if contents is None or (contents and not is_run):
            raise SrkdError(f"{folder} exists and is no run folder; choose another --out.")
        if is_run and not overwrite:
            raise SrkdError(
                f"{folder} already holds a run; continue it with --resume {folder}, replace it "
                "with --overwrite, or choose another --out."
            )

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, *, overwrite: bool = False) -> Self:
        """Make a new run folder; an existing one is refused unless `overwrite`."""
        cls.check(folder, overwrite=overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SrkdError(
                f"cannot make the run folder {folder}: {error.strerror}; choose another --out."
            ) from error
        run = cls(folder, recipe)
        run._acquire()
        run._clear()
        write_text(folder / "recipe.toml", recipe.to_toml())
        return run

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open an existing run to continue it."""
        recipe = folder / "recipe.toml"
        if not recipe.is_file():
            raise SrkdError(
                f"{folder} is no run folder (it has no recipe.toml); give the folder that --out named."
            )
        run = cls(folder, load_recipe(recipe))
        run._acquire()
        return run

    @classmethod
    def shared(cls, make: Callable[[], Run]) -> Run:
        """The run that `make` creates or opens on the first process; the others look on."""
        own = ranks.together(lambda: make() if ranks.is_first() else None)
        known = ranks.first_says(None if own is None else (own.folder, own.recipe))
        if own is not None:
            return own
        assert known is not None
        return Onlooker(*known)

    def _acquire(self) -> None:
        """Two processes writing one run would ruin it; the lock goes when this process ends."""
        try:
            self._lock = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock or 0)
            raise SrkdError(
                f"another process is training in {self.folder}; wait for it or choose another --out."
            ) from None
        except OSError as error:
            raise SrkdError(
                f"cannot write in {self.folder}: {error.strerror}; choose another --out."
            ) from error

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for name in ("state", "tensorboard", "samples", "baseline", "stage1", "deploy"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("model.json", "weights.safetensors", "log.jsonl", "report.md", "scores.json"):
            (self.folder / name).unlink(missing_ok=True)

    # -- states ---------------------------------------------------------------------------------

    def states(self) -> list[Path]:
        """States by step, oldest first."""
        return sorted((self.folder / "state").glob("step_*.pt"))

    def save_state(self, state: dict[str, Any], *, best: bool = False) -> Path:
        """Write the state of `state["step"]` completed steps; keep the last two and the best."""
        import io

        import torch

        path = self.folder / "state" / f"step_{state['step']:08d}.pt"
        # Through memory: torch reports a full disk as an error of its own, Python as an OSError.
        packed = io.BytesIO()
        torch.save({"format": STATE_FORMAT, **state}, packed)
        with replacing(path) as temporary:
            temporary.write_bytes(packed.getbuffer())
        if best:
            with replacing(path.with_name("best.pt")) as temporary:
                os.link(path, temporary)
        for old in self.states()[:-KEEP_STATES]:
            old.unlink(missing_ok=True)
        return path

    def load_state(self) -> dict[str, Any] | None:
        """The newest state, None when the run has none yet. Never runs pickled code."""
        import torch

        found = self.states()
        if not found:
            return None
        path = found[-1]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own words about a foreign file
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no common class for what a damaged file raises
            raise SrkdError(
                f"{path} is damaged ({error.__class__.__name__}); delete it to continue from the state "
                "before it."
            ) from error
        written = state.get("format") if isinstance(state, dict) else type(state).__name__
        if written != STATE_FORMAT:
            raise SrkdError(
                f"{path} has format {written!r}, this version reads {STATE_FORMAT}; continue "
                "with the srkd version that wrote it."
            )
        return state

    # -- log ------------------------------------------------------------------------------------

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        try:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain(record)) + "\n")
        except OSError as error:
            raise SrkdError(
                f"cannot write {self.folder}/log.jsonl: {error.strerror}; free space and continue with "
                f"--resume {self.folder}."
            ) from error

    def log_records(self) -> list[dict[str, Any]]:
        """All complete lines of the log (a killed process may leave a half line at the end)."""
        path = self.folder / "log.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        records = []
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after `step` by a process that went further and was killed."""
        if not (self.folder / "log.jsonl").exists():
            return
        kept = [r for r in self.log_records() if r["step"] <= step]
        write_text(self.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in kept))

    def tensorboard(self, step: int) -> AbstractContextManager[SummaryWriter | Silence]:
        """A writer that continues after `step`."""
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard"
        try:
            return SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise SrkdError(f"cannot write {folder}: {error.strerror}; make room there.") from error


class Onlooker(Run):
    """The run as the other processes of a training see it: nothing is written, no state is read."""

    def save_state(self, state: dict[str, Any], *, best: bool = False) -> Path:
        return self.folder

    def load_state(self) -> dict[str, Any] | None:
        return None

    def log(self, record: dict[str, Any]) -> None: ...

    def rewind_log(self, step: int) -> None: ...

    def tensorboard(self, step: int) -> AbstractContextManager[Silence]:
        return nullcontext(Silence())


class Silence:
    def add_scalar(self, name: str, value: float, step: int) -> None: ...
