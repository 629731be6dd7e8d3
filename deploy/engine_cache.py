"""Built engines kept for the next export: building costs seconds to minutes, and its result depends on its key alone.

<cache>/engines/<key>.plan        the engine
<cache>/engines/<key>.plan.json   its hash and the facts of its build
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srkd.data.cache import default_cache
from srkd.errors import SrkdError
from srkd.files import read_json, replacing, sha256, write_json

if TYPE_CHECKING:
    from collections.abc import Callable


def cached_engine(
    key: str,
    target: Path,
    build: Callable[[Path], dict[str, Any]],
    folder: Path | None = None,
) -> tuple[dict[str, Any], bool]:
    """Write the engine of `key` to `target`: from the cache where it is there and whole, else built.

    `key` names all that decides the engine: hash of the graph, sizes, settings, versions, GPU. `build`
    writes an engine to the path it is given and returns its facts. Returns the facts, and whether the
    cache had them. `folder` is `engines` in the cache folder unless given.
    """
    folder = folder or default_cache().expanduser() / "engines"
    kept = folder / f"{key}{target.suffix}"
    facts = _whole(kept)
    reused = facts is not None
    if facts is None:
        _record(kept).unlink(missing_ok=True)  # of an engine that is about to be replaced
        with replacing(kept) as temporary:
            facts = build(temporary)
        write_json(_record(kept), {"engine_sha256": sha256(kept), "build": facts})
    with replacing(target) as temporary:
        shutil.copyfile(kept, temporary)
    return facts, reused


def _record(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.json")


def _whole(kept: Path) -> dict[str, Any] | None:
    """The facts of a kept engine, None where it is absent or not as it was written."""
    if not (kept.is_file() and _record(kept).is_file()):
        return None
    try:
        record = read_json(_record(kept))
    except SrkdError:
        return None
    return record.get("build") if record.get("engine_sha256") == sha256(kept) else None
