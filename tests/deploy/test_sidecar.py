"""Records of a folder: none is lost, whoever writes at the same time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from parity_record import RECORD

import deploy.sidecar
from deploy.sidecar import REPORT_FILE, drop_parity, portable, read_parity, write_parity
from srkd.errors import SrkdError
from srkd.models import WEIGHTS_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable


def test_two_exports_to_one_folder_keep_both_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*given: Any) -> Any:
            found = function(*given)
            time.sleep(0.02)  # long enough for the others to read or write the same
            return found

        return slow

    write_parity(tmp_path, "old.onnx", RECORD)
    monkeypatch.setattr(deploy.sidecar, "read_parity", slowly(read_parity))
    monkeypatch.setattr(deploy.sidecar, "write_json", slowly(deploy.sidecar.write_json))
    with ThreadPoolExecutor(4) as pool:
        done = [
            pool.submit(write_parity, tmp_path, f"{n}.onnx", {**RECORD, "photographs": n})
            for n in range(3)
        ]
        done.append(pool.submit(drop_parity, tmp_path, "old.onnx"))
    assert all(future.exception() is None for future in done)
    assert {name: r["photographs"] for name, r in read_parity(tmp_path).items()} == {
        "0.onnx": 0,
        "1.onnx": 1,
        "2.onnx": 2,
    }
    page = (tmp_path / REPORT_FILE).read_text()
    assert [f"## {n}.onnx: **PASS**" in page for n in (0, 1, 2, "old")] == [True, True, True, False]


def test_dropping_from_a_folder_without_records_makes_nothing(tmp_path: Path) -> None:
    drop_parity(tmp_path / "new", "a.onnx")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SrkdError, match=r"cannot write to .*file.*another --out"):
        write_parity(tmp_path / "file", "a.onnx", RECORD)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/a/deploy/../x", "../x"),
        ("runs/a/deploy", "."),
        ("runs/a/deploy/w.safetensors", "./w.safetensors"),
        (WEIGHTS_FOLDER / "rcan_c_x4", "rcan_c_x4"),
        (WEIGHTS_FOLDER / "nonesuch", None),
    ],
)
def test_paths_in_records(path: str | Path, name: str | None) -> None:
    folder = Path("runs/a/deploy")
    found = portable(path, folder)
    assert found == name or (name is None and found.startswith("../../.."))
    if found.startswith("."):
        assert (folder / found).resolve() == Path(path).resolve()
