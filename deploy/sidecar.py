"""`<file>.json` beside every exported file: what it is, what it was made from, what was proved of it.

name_fp32.onnx        the graph, or name_fp16.plan: an engine that was built from the graph
name_fp32.onnx.json   this record; never a prefix inside the file, so that other tools can read it
parity.json           the measurements behind the verdict (a record per exported file)
report.md             the same, to read

No path of the machine that exported stands in them: a shipped network goes by its name, what else is named lies
relative to their folder, with a dot before it (`portable`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from srkd.errors import SrkdError
from srkd.files import read_json, write_json, write_text
from srkd.types import Facts, OutputRange

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = 3
PARITY_FORMAT = 1
PARITY_FILE = "parity.json"
REPORT_FILE = "report.md"
LOCK_FILE = ".lock"

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNVERIFIED", "BUILT, NOT VERIFIED"]


@dataclass(frozen=True)
class Sidecar:
    """The record. Sizes are [h, w] in LR pixels; dims are names, expressions or numbers. A `static` file takes one
    picture of the only size at a time.

    `engine_sha256` is the hash of `file`; `graph_sha256` that of the graph it was built from, which is
    the file itself where nothing is built. `precision_plan` says what was done to fit the precision:
    {"fp32_islands": blocks kept in float32, "rescale": k}. `settings` are what the engine must be opened
    with (provider, threads). `build` are the facts of a built engine, None for a graph: at least
    {"library", "version", "gpu": the one it was built on or None, "compute_capabilities": those that it
    runs on, none for any that the library supports}. `parity` holds the verdict and the
    hash of the record in parity.json that it rests on (None for UNVERIFIED). `rebuild` is the command that makes
    the file again, for `how_to_rebuild` to print; its paths and `model["source"]` are `portable`.
    """

    engine: str
    precision: str
    file: str
    engine_sha256: str
    graph_sha256: str
    weights_sha256: str
    precision_plan: dict[str, Any]
    model: dict[str, Any]
    facts: dict[str, Any]
    input: dict[str, Any]
    output: dict[str, Any]
    sizes: dict[str, list[int]]
    static: bool
    settings: dict[str, Any]
    build: dict[str, Any] | None
    versions: dict[str, str]
    machine: str
    rebuild: str
    parity: dict[str, Any]
    format: int = FORMAT

    @property
    def verdict(self) -> Verdict:
        return self.parity["verdict"]

    @property
    def network_facts(self) -> Facts:
        return Facts(**self.facts)


def sidecar_path(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def write_sidecar(file: Path, sidecar: Sidecar) -> Path:
    """Write the record of `file` beside it."""
    path = sidecar_path(file)
    write_json(path, asdict(sidecar))
    return path


def read_sidecar(file: Path) -> Sidecar:
    """The record of `file`; absent, damaged and newer ones are refused with what to do."""
    path = sidecar_path(file)
    if not path.is_file():
        raise SrkdError(
            f"{file} has no sidecar {path.name}, so nothing is known of its scale or its parity; "
            "copy both files together, or export again."
        )
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise SrkdError(
            f"{path} has format {record.get('format')!r}, this version reads {FORMAT}; use the srkd "
            "version that wrote it, or export again."
        )
    known = {f.name for f in fields(Sidecar)}
    damage = sorted(known ^ record.keys())
    if damage:
        raise SrkdError(
            f"{path} is damaged ({', '.join(damage)} missing or unknown); export again."
        )
    sidecar = Sidecar(**record)
    try:
        _check_values(sidecar)
    except (TypeError, KeyError, ValueError) as error:
        raise SrkdError(f"{path} is damaged ({error}); export again.") from error
    return sidecar


def _check_values(sidecar: Sidecar) -> None:
    """Raise ValueError, TypeError or KeyError for values that no export writes."""
    for name, hint in get_type_hints(Sidecar).items():
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if not isinstance(getattr(sidecar, name), tuple(get_origin(t) or t for t in options)):
            raise ValueError(f"{name} is {getattr(sidecar, name)!r}")
    facts = sidecar.network_facts
    if not (_whole(facts.scale, 2) and facts.scale <= 8):
        raise ValueError(f"scale {facts.scale!r}")
    if facts.receptive_field_px is not None and not _whole(facts.receptive_field_px):
        raise ValueError(f"receptive_field_px {facts.receptive_field_px!r}")
    for key in ("size_multiple", "minimum_px"):
        if not _whole(getattr(facts, key)):
            raise ValueError(f"{key} {getattr(facts, key)!r}")
    if not isinstance(facts.exact_tiling, bool):
        raise ValueError(f"exact_tiling {facts.exact_tiling!r}")
    if facts.output_range not in get_args(OutputRange):
        raise ValueError(f"output_range {facts.output_range!r}")
    for which in ("min", "opt", "max"):
        size = sidecar.sizes[which]
        if not (isinstance(size, list) and len(size) == 2 and all(map(_whole, size))):
            raise ValueError(f"the size {which} is {size!r}, not [h, w]")
    if sidecar.static and sidecar.sizes["min"] != sidecar.sizes["max"]:
        raise ValueError("it is static and has several sizes")
    if sidecar.verdict not in get_args(Verdict):
        raise ValueError(f"verdict {sidecar.verdict!r}")
    if "name" not in sidecar.model:
        raise ValueError("the model has no name")
    if not isinstance(sidecar.model.get("arguments"), dict | None):
        raise ValueError(f"the model's arguments are {sidecar.model['arguments']!r}")
    if sidecar.build is not None:
        facts_of_build = {"library", "version", "gpu", "compute_capabilities"}
        if missing := sorted(facts_of_build - sidecar.build.keys()):
            raise ValueError(f"the build says no {', '.join(missing)}")
        meant = sidecar.build["compute_capabilities"]
        if not (isinstance(meant, list) and all(isinstance(c, str) for c in meant)):
            raise ValueError(f"the build's compute_capabilities are {meant!r}")


def portable(path: str | Path, folder: Path) -> str:
    """How a record in `folder` names a path: ./x or ../x from there, a network of weights/ by its name."""
    from srkd.models import shipped_name

    if name := shipped_name(Path(path)):
        return name
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith(".") else f"./{relative}"


def how_to_rebuild(file: Path, sidecar: Sidecar) -> str:
    """The command that makes `file` again, as it must be typed here: its portable paths seen from `file`."""
    words = shlex.split(sidecar.rebuild)
    return shlex.join(os.path.normpath(file.parent / w) if w.startswith(".") else w for w in words)


def _whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def record_hash(record: dict[str, Any]) -> str:
    """sha256 of a parity record, independent of layout and order of keys."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_parity(folder: Path) -> dict[str, Any]:
    """All parity records of a folder by file name; none yet is an empty dictionary."""
    path = folder / PARITY_FILE
    if not path.is_file():
        return {}
    document = read_json(path)
    if document.get("format") != PARITY_FORMAT or not isinstance(document.get("files"), dict):
        raise SrkdError(
            f"{path} is no parity record of format {PARITY_FORMAT}; move it away or give another --out."
        )
    return document["files"]


def write_parity(folder: Path, file: str, record: dict[str, Any]) -> None:
    """Add or replace the record of one file, in parity.json and in report.md."""
    with _alone(folder):
        _write_records(folder, {**read_parity(folder), file: record})


def drop_parity(folder: Path, file: str) -> None:
    """Forget the record of a file that is about to be replaced."""
    if not (folder / PARITY_FILE).is_file():
        return
    with _alone(folder):
        records = read_parity(folder)
        if records.pop(file, None) is not None:
            _write_records(folder, records)


def _write_records(folder: Path, records: dict[str, Any]) -> None:
    from deploy.report import render

    write_json(folder / PARITY_FILE, {"format": PARITY_FORMAT, "files": records})
    write_text(folder / REPORT_FILE, render(records))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other export changes the records of this folder: the later one would undo the earlier."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise SrkdError(
            f"cannot write to {folder}: {error.strerror or error}. Choose another --out."
        ) from error
    with lock:  # closing it releases it
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
