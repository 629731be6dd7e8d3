"""Where the server keeps what it made: folders with unguessable names, together within a bound. Uploads have their own."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from demo.limits import MOST_RESULT_BYTES
from srkd.errors import MissingError
from srkd.files import make_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

HASH = re.compile(r"[0-9a-f]{64}")
SPARED_S = 900.0  # the job of an upload may still wait for its turn


class Workspace:
    """Folders below `root`, a temporary folder of its own by default, which is removed at the end of the process."""

    def __init__(self, root: Path | None = None, max_bytes: int = MOST_RESULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._folders: list[Path] = []  # oldest first
        self._used: dict[Path, int] = {}  # those that jobs work in, and the room of each
        if root is None:
            root = Path(tempfile.mkdtemp(prefix="srkd-demo-"))
            weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        make_folder(root)
        self.root = root

    @contextmanager
    def job(self, room: int = 0) -> Iterator[Path]:
        """A new folder, readable by this user alone, that stays while the job works in it and then until its room is needed.

        `room` is what the job may write, in bytes, and is its own until it ends. The oldest folders that no job works
        in are removed until that is within the bound. A job that leaves nothing leaves no folder either.
        """
        with self._lock:
            folder = self._new(room)
            self._used[folder] = room
        try:
            yield folder
        finally:
            with self._lock:
                del self._used[folder]
                if folder.is_dir() and not any(folder.iterdir()):
                    self._remove(folder)

    def clear(self) -> None:
        """Remove everything that no job works in."""
        with self._lock:
            for folder in self._finished():
                self._remove(folder)

    def _new(self, room: int) -> Path:
        if room > self.max_bytes:
            raise MissingError(
                f"The pictures of this job may take up to {_mib(room)} of disk, but the demo keeps at most "
                f"{_mib(self.max_bytes)}; choose fewer networks, fewer files or smaller pictures."
            )
        held = {f: max(_bytes(f), self._used.get(f, 0)) for f in self._folders}
        for folder in self._finished():
            if sum(held.values()) + room <= self.max_bytes:
                break
            self._remove(folder)
            del held[folder]
        if sum(held.values()) + room > self.max_bytes:
            raise MissingError(
                f"Other jobs hold the {_mib(self.max_bytes)} of disk that the demo keeps; try again when they "
                "are done."
            )
        folder = self.root / secrets.token_urlsafe(16)
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise MissingError(
                f"The server cannot write to its disk ({error.strerror}); try again later."
            ) from error
        self._folders.append(folder)
        return folder

    def _finished(self) -> list[Path]:
        return [folder for folder in self._folders if folder not in self._used]

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._folders.remove(folder)


def make_upload_room(folder: Path, length: int, most: int, spared_s: float = SPARED_S) -> bool:
    """Whether `length` bytes more are within the `most` that uploads in `folder` may take; the oldest give way for that.

    Gradio keeps a folder there for every file, named by its hash, and loose files: while they come in, and for good
    where a request had parts that the page never sends. Those younger than `spared_s` stay.
    """
    kept = [path for path in folder.iterdir() if HASH.fullmatch(path.name) or not path.is_dir()]
    held = [(_changed(path), _bytes(path), path) for path in kept]
    total, now = sum(count for _, count, _ in held) + length, time.time()
    for changed, count, path in sorted(held):
        if total <= most or changed > now - spared_s:
            break
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        total -= count
    return total <= most


def _changed(path: Path) -> float:
    """When `path`, or something in the folder `path`, last changed or was moved there; 0 for what is gone."""
    newest = 0.0
    for each in (path, *path.glob("*")):
        with suppress(FileNotFoundError):
            newest = max(newest, each.stat().st_ctime)
    return newest


def _bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder; one that is moved meanwhile is left out."""
    total = 0
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            total += 0 if each.is_dir() else each.stat().st_size
    return total


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
