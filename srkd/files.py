"""Files that are complete or absent, never half: write beside, sync, rename."""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    On any error the temporary file is removed and `path` is as it was. A full disk or a read-only
    folder becomes an `SrkdError` that names the file.
    """
    # The suffix stays last: writers choose a format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(
            0o666 & ~_umask()
        )  # some writers leave files that only their owner can read
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise SrkdError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another place."
        ) from error
    finally:
        with suppress(OSError):  # gone already, or a parent of it is no folder
            temporary.unlink()


def make_folder(path: Path) -> None:
    """Make a folder that files can be written in, or say why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SrkdError(
            f"cannot write in {path}: {error.strerror or error}. Choose another place."
        ) from error


def _umask() -> int:
    """The process's mask of permissions (it can only be read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: infinite numbers (PSNR of equal pictures) and NaN become null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a damaged file is named, not tracebacked."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SrkdError(
            f"cannot read {path}: {error}. Restore the file or make it again."
        ) from error
    if not isinstance(value, dict):
        raise SrkdError(f"{path} holds {type(value).__name__}, not a JSON object; make it again.")
    return value


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
