"""The file that an engine opens: what deploy/export.py left beside the model, else one made and verified on first use.

A file made here goes to the demo's own folder in the cache, never beside the model. It is made by deploy/export.py in a
process of its own: the export can then be stopped, and its memory and crashes are not the server's. Several servers may
share the cache: folders come into it and leave it whole, by renaming.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import deploy
from deploy.engines import check_build, check_file, engine_kind
from deploy.graph import weights_file
from deploy.places import default_folder, export_file
from deploy.sidecar import sidecar_path
from srkd.errors import CheckFailedError, MissingError, SrkdError
from srkd.files import make_folder, sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploy.sidecar import Sidecar
    from srkd.loaded import LoadedModel

POLL_S = 0.2
PATIENCE_S = 5.0  # for an export to end by itself when it is told to


@dataclass(frozen=True)
class Wanted:
    """A network for an engine; `title` is what people call the engine."""

    model: LoadedModel
    engine: str
    precision: str
    device: str
    title: str


@dataclass(frozen=True)
class Found:
    """A file with its record, and where it comes from as a note for the pane."""

    file: Path
    sidecar: Sidecar
    note: str


def exported_file(wanted: Wanted, cache: Path, say: Callable[[str], None]) -> Found:
    """The file of a network for an engine, its parity checked: a FAIL is refused.

    `say` is called while an export runs, several times a second, and may raise to stop it.
    """
    weights = sha256(weights_file(wanted.model))
    found, left = _beside(wanted, weights), ""
    if found is not None and found.sidecar.weights_sha256 != weights:
        found, left = None, "; the export beside the model is of other weights and was left alone"
    if found is None:
        found = _own(wanted, cache / f"{weights[:16]}-{_kind(wanted)}", left, say)
    if found.sidecar.verdict == "FAIL":
        raise CheckFailedError(
            f"{wanted.title} in {wanted.precision} does not give the picture of this network (parity FAIL at "
            f"{found.sidecar.parity.get('blame') or 'an edge'}), so it is not shown; choose another precision or engine."
        )
    return found


def _kind(wanted: Wanted) -> str:
    return f"{wanted.engine}-{wanted.precision}-{wanted.device}"


def _file(wanted: Wanted, folder: Path) -> Path:
    kind = engine_kind(wanted.engine, wanted.precision, wanted.device)
    return export_file(
        folder, wanted.model.name, wanted.engine, wanted.precision, kind, wanted.device
    )


def _beside(wanted: Wanted, weights: str) -> Found | None:
    file = _file(wanted, default_folder(wanted.model))
    if not (file.is_file() and sidecar_path(file).is_file()):
        return None
    return Found(file, check_file(file), "the file that was exported beside the model")


def _own(wanted: Wanted, folder: Path, left: str, say: Callable[[str], None]) -> Found:
    """From the demo's own folder; made first where it is missing, damaged or built by another version."""
    note = f"exported for this demo and verified by the full check of deploy/export.py{left}"
    file = _file(wanted, folder)
    make_folder(folder.parent)
    if folder.exists():
        try:
            return Found(file, _usable(file), note)
        except SrkdError:
            _remove(folder)
    with _sibling(folder) as made:
        _export(wanted, made, say)
        check_file(_file(wanted, made))
        try:
            made.rename(folder)
        except OSError:
            # Another server was faster and may have its file open already, so that one is used.
            if not file.is_file():
                raise
    return Found(file, check_file(file), note)


def _usable(file: Path) -> Sidecar:
    sidecar = check_file(file)
    check_build(file, sidecar)
    return sidecar


def _remove(folder: Path) -> None:
    """Renamed first: another server would find a folder that is half removed."""
    with _sibling(folder) as away, suppress(FileNotFoundError):
        folder.rename(away)


@contextmanager
def _sibling(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, for renaming one to the other; removed at the end with what is in it.

    Records name the weights relative to their folder, so it lies as deep.
    """
    sibling = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    sibling.mkdir()
    try:
        yield sibling
    finally:
        shutil.rmtree(sibling, ignore_errors=True)


def _export(wanted: Wanted, folder: Path, say: Callable[[str], None]) -> None:
    """Run deploy/export.py; returns when it has left a file with a verdict, whichever that is."""
    source = wanted.model.source.resolve()
    words = [sys.executable, "-m", "deploy.export", str(source), "--engine", wanted.engine]
    words += ["--precision", wanted.precision, "--out", str(folder)]
    words += ["--device", wanted.device] if len(engine_kind(wanted.engine).runs) > 1 else []
    head = f"{wanted.title} {wanted.precision}: exporting and verifying, once"
    with tempfile.TemporaryDirectory() as temporary:
        told = Path(temporary) / "stderr.txt"
        with told.open("wb") as stderr:
            process = subprocess.Popen(
                words,
                cwd=Path(deploy.__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            while True:
                stage = _last(told, "[").split()[:2]  # "[2/4] onnx", the last one that is done
                say(" · ".join([head, " ".join(stage)]) if stage else head)
                try:
                    process.wait(POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            _end(process)
        judged = process.returncode in (0, CheckFailedError.exit_code)
        if not (judged and _file(wanted, folder).is_file()):
            said = _last(told, "error: ").removeprefix("error: ")
            raise MissingError(
                f"{wanted.title} in {wanted.precision} could not be prepared: "
                f"{said or f'its export ended with status {process.returncode}'}"
            )


def _last(told: Path, start: str) -> str:
    """The last line that starts like this; libraries have their say on stderr too."""
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.startswith(start)), "")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
