"""Which LR file belongs to which HR file, and what is said when one does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from srkd.data.folders import list_images, list_pairs, read_pair
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from pathlib import Path


def save(path: Path, height: int, width: int, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)


def test_extensions_in_any_case_hidden_files_and_others_left_out(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "c.tif", "d.WebP", "e.bmp", ".f.png"):
        save(tmp_path / name, 4, 4)
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == [
        "a.jpeg",
        "b.PNG",
        "c.tif",
        "d.WebP",
        "e.bmp",
    ]


@pytest.mark.parametrize("lr_name", ["0001.png", "0001x4.png", "X4/0001x4.png", "X4/0001.bmp"])
def test_lr_names(tmp_path: Path, lr_name: str) -> None:
    save(tmp_path / "hr" / "0001.png", 8, 12)
    save(tmp_path / "lr" / lr_name, 2, 3)
    (pair,) = list_pairs(tmp_path / "hr", tmp_path / "lr", 4)
    assert (pair.name, pair.hr, pair.lr) == (
        "0001",
        tmp_path / "hr/0001.png",
        tmp_path / "lr" / lr_name,
    )


def test_without_lr_folder(tmp_path: Path) -> None:
    save(tmp_path / "b.png", 8, 12)
    save(tmp_path / "a.png", 8, 12)
    pairs = list_pairs(tmp_path, None, 4)
    assert [(p.name, p.lr) for p in pairs] == [("a", None), ("b", None)]


def test_hr_need_not_be_a_multiple(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "a.png", 11, 14)
    save(tmp_path / "lr" / "a.png", 2, 3, value=9)
    (pair,) = list_pairs(tmp_path / "hr", tmp_path / "lr", 4)
    hr, lr = read_pair(pair, 4)
    assert hr.shape == (8, 12, 3)
    assert np.all(lr == 9)


def test_missing_lr_is_named(tmp_path: Path) -> None:
    for name in "abcdefgh":
        save(tmp_path / "hr" / f"{name}.png", 8, 8)
    save(tmp_path / "lr" / "ax2.png", 4, 4)
    with pytest.raises(
        SrkdError, match=r"lacks .* 7 of 8 .*\(b.png, c.png, d.png, e.png, f.png, 2 more\)"
    ):
        list_pairs(tmp_path / "hr", tmp_path / "lr", 2)


def test_extra_lr_is_named(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "a.png", 8, 8)
    save(tmp_path / "lr" / "a.png", 4, 4)
    save(tmp_path / "lr" / "stray.png", 4, 4)
    with pytest.raises(SrkdError, match=r"1 images that belong to no HR image .*\(stray.png\)"):
        list_pairs(tmp_path / "hr", tmp_path / "lr", 2)


def test_wrong_sizes_are_named(tmp_path: Path) -> None:
    save(tmp_path / "hr" / "a.png", 8, 12)
    save(tmp_path / "lr" / "a.png", 4, 6)
    with pytest.raises(SrkdError, match=r"1 of 1 pairs are not x4 pairs \(a: HR 12x8, LR 6x4\)"):
        list_pairs(tmp_path / "hr", tmp_path / "lr", 4)


def test_duplicates_are_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 8, 8)
    save(tmp_path / "a.bmp", 8, 8)
    with pytest.raises(SrkdError, match=r"two images named 'a' \(a.bmp, a.png\)"):
        list_pairs(tmp_path, None, 2)


def test_empty_and_absent_folders(tmp_path: Path) -> None:
    with pytest.raises(SrkdError, match="there is no folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "HR").mkdir()
    with pytest.raises(SrkdError, match=r"holds no images .* subfolders are HR: give one"):
        list_images(tmp_path)


def test_too_small_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "tiny.png", 3, 8)
    (pair,) = list_pairs(tmp_path, None, 4)
    with pytest.raises(SrkdError, match=r"tiny.png: an image of 8x3 px"):
        read_pair(pair, 4)


def test_exif_rotation_of_one_of_two_files_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "lr" / "a.png", 4, 6)
    (tmp_path / "hr").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "hr" / "a.jpg", exif=turned)
    (pair,) = list_pairs(tmp_path / "hr", tmp_path / "lr", 2)
    with pytest.raises(SrkdError, match="8x12 px upright and its LR image 6x4"):
        read_pair(pair, 2)
