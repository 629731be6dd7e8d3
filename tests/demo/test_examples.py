"""The shipped examples: what they promise, and that their maker still makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.make_examples import FOLDER, JPEG_QUALITY, main
from srkd.data.builtin import LICENCES
from srkd.data.degradation import downscale_uint8
from srkd.images import Picture, read_picture

RECORDS: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
NAMES = [record["file"] for record in RECORDS]
MOST_BYTES = 1_500_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert main(["--out", str(folder)]) == 0
    return folder


def test_the_maker_reproduces_the_files(made: Path) -> None:
    assert (made / "index.json").read_text() == (FOLDER / "index.json").read_text()
    assert {p.name for p in made.iterdir()} == {p.name for p in FOLDER.iterdir()}
    for path in sorted(FOLDER.glob("*.[pj]*g")):
        ours, again = read_picture(path), read_picture(made / path.name)
        assert np.array_equal(ours.rgb, again.rgb), path.name
        assert (ours.alpha is None) == (again.alpha is None), path.name
        if ours.alpha is not None and again.alpha is not None:
            assert np.array_equal(ours.alpha, again.alpha), path.name


def test_six_small_cases_and_no_file_without_its_terms() -> None:
    assert len(RECORDS) == 6
    listed = {"index.json", *(r[key] for r in RECORDS for key in ("file", "truth"))}
    assert {p.name for p in FOLDER.iterdir()} == listed
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < MOST_BYTES
    for record in RECORDS:
        assert all(record[key].strip() for key in ("title", "about", "licence", "source"))


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
def test_a_pair_fits_every_scale(record: dict[str, Any]) -> None:
    lr, hr = (read_picture(FOLDER / record[key]) for key in ("file", "truth"))
    assert hr.size == tuple(record["scale"] * side for side in lr.size)
    assert all(side % 12 == 0 for side in hr.size)
    assert (lr.alpha is None) == (hr.alpha is None)


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
def test_the_lr_picture_is_the_reduced_truth(record: dict[str, Any]) -> None:
    lr, hr = (read_picture(FOLDER / record[key]) for key in ("file", "truth"))
    if lr.alpha is not None:
        for ground in (0, 255):
            reduced = downscale_uint8(on(ground, hr), record["scale"])
            # Clipping between the passes costs up to 18 levels at sharp edges; hidden black mixed in, 45.
            assert np.abs(on(ground, lr).astype(int) - reduced).max() <= 20
        return
    distance = np.abs(lr.rgb.astype(int) - downscale_uint8(hr.rgb, record["scale"]))
    if lr.format == "jpg":
        assert str(JPEG_QUALITY) in record["about"]
        assert 1 < distance.mean() < 10, "compressed, but the same picture"
    else:
        assert not distance.any()


def on(ground: int, picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8: the picture over a plain ground."""
    assert picture.alpha is not None
    alpha = picture.alpha[..., None] / 255
    return np.rint(alpha * picture.rgb + (1 - alpha) * ground).astype(np.uint8)


def test_the_logo_has_holes_glass_and_solid_parts() -> None:
    alpha = read_picture(FOLDER / "logo.png").alpha
    assert alpha is not None
    shares = [(alpha == 0).mean(), ((alpha > 0) & (alpha < 255)).mean(), (alpha == 255).mean()]
    assert min(shares) > 0.05


def test_photographs_are_held_out_and_keep_their_terms() -> None:
    by_name = {photo.name: photo for photo in LICENCES}
    photographs = [r for r in RECORDS if "scikit-image" in r["source"]]
    assert len(photographs) == 2
    for record in photographs:
        photo = by_name[record["source"].split("'")[1]]
        assert photo.held_out
        assert record["licence"] == photo.licence


@pytest.mark.slow
def test_the_maker_runs_as_a_file(tmp_path: Path) -> None:
    """Its folder holds a module that is named as one of the standard library."""
    subprocess.run(
        [sys.executable, FOLDER.parent / "make_examples.py", "--out", tmp_path], check=True
    )
    assert (tmp_path / "index.json").is_file()
