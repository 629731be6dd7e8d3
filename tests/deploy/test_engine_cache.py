"""A kept engine is used again when it is the one, and whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from deploy.engine_cache import cached_engine
from srkd.errors import CheckFailedError

if TYPE_CHECKING:
    from pathlib import Path


class Builder:
    """Writes how often it was asked."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, target: Path) -> dict[str, Any]:
        self.built += 1
        target.write_text(f"engine {self.built}")
        return {"library": "tensorrt", "number": self.built}


def test_the_same_key_builds_once(tmp_path: Path) -> None:
    build, folder = Builder(), tmp_path / "engines"
    first, second = tmp_path / "a.plan", tmp_path / "out" / "b.plan"
    assert cached_engine("k1", first, build, folder) == (
        {"library": "tensorrt", "number": 1},
        False,
    )
    assert cached_engine("k1", second, build, folder) == (
        {"library": "tensorrt", "number": 1},
        True,
    )
    assert first.read_text() == second.read_text() == "engine 1"
    assert cached_engine("k2", second, build, folder)[0]["number"] == 2
    assert second.read_text() == "engine 2" and first.read_text() == "engine 1"


@pytest.mark.parametrize("damage", ["changed", "cut record", "no record", "no engine"])
def test_a_damaged_one_is_built_again(damage: str, tmp_path: Path) -> None:
    build, folder, target = Builder(), tmp_path / "engines", tmp_path / "a.plan"
    cached_engine("k", target, build, folder)
    kept, record = folder / "k.plan", folder / "k.plan.json"
    if damage == "changed":
        kept.write_text("engine X")
    elif damage == "cut record":
        record.write_text(record.read_text()[:20])
    else:
        (record if damage == "no record" else kept).unlink()
    assert cached_engine("k", target, build, folder) == (
        {"library": "tensorrt", "number": 2},
        False,
    )
    assert target.read_text() == "engine 2"
    assert cached_engine("k", target, build, folder)[1]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fails(target: Path) -> dict[str, Any]:
        target.write_text("half")
        raise CheckFailedError("built nothing")

    folder = tmp_path / "engines"
    with pytest.raises(CheckFailedError, match="built nothing"):
        cached_engine("k", tmp_path / "a.plan", fails, folder)
    assert list(folder.iterdir()) == [] and not (tmp_path / "a.plan").exists()


def test_default_place_is_srkd_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRKD_CACHE", str(tmp_path / "cache"))
    cached_engine("k", tmp_path / "a.plan", Builder())
    record = json.loads((tmp_path / "cache" / "engines" / "k.plan.json").read_text())
    assert record["build"]["number"] == 1
