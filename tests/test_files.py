"""Files are complete or absent, and the reason is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from srkd.errors import SrkdError
from srkd.files import read_json, replacing, sha256, write_json, write_text


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ValueError, match="half way"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise ValueError("half way")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text("x")
    assert path.stat().st_mode & 0o444 == 0o444


def test_unwritable_places_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SrkdError, match=r"cannot write .*sub/a\.json"):
        write_json(tmp_path / "file" / "sub" / "a.json", {})


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5], "ü": None})
    assert read_json(path) == {"a": [1, 2.5], "ü": None}
    path.write_text("{")
    with pytest.raises(SrkdError, match="cannot read"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(SrkdError, match="list, not a JSON object"):
        read_json(path)


def test_sha256_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_text("abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
