"""Records of a folder: none is lost, whoever writes at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import deploy.sidecar
from deploy.sidecar import drop_parity, read_parity, write_parity
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from pathlib import Path


def test_two_exports_to_one_folder_keep_both_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(folder: Path) -> dict[str, Any]:
        found = read_parity(folder)
        time.sleep(0.02)  # long enough for the others to read the same
        return found

    write_parity(tmp_path, "old.onnx", {"verdict": "PASS"})
    monkeypatch.setattr(deploy.sidecar, "read_parity", slow)
    with ThreadPoolExecutor(4) as pool:
        done = [
            pool.submit(write_parity, tmp_path, f"{n}.onnx", {"verdict": "PASS", "number": n})
            for n in range(3)
        ]
        done.append(pool.submit(drop_parity, tmp_path, "old.onnx"))
    assert all(future.exception() is None for future in done)
    assert {name: r["number"] for name, r in read_parity(tmp_path).items()} == {
        "0.onnx": 0,
        "1.onnx": 1,
        "2.onnx": 2,
    }


def test_dropping_from_a_folder_without_records_makes_nothing(tmp_path: Path) -> None:
    assert drop_parity(tmp_path / "new", "a.onnx") == {}
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SrkdError, match=r"cannot write to .*file.*another --out"):
        write_parity(tmp_path / "file", "a.onnx", {})
