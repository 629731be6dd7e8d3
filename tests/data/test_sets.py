"""Evaluation sets: what a name or a folder means, and where its LR images come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from srkd.data.degradation import downscale_uint8
from srkd.data.sets import MADE, OFFICIAL, open_set
from srkd.errors import SrkdError

if TYPE_CHECKING:
    from pathlib import Path


def photo(path: Path, height: int, width: int) -> np.ndarray:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


@pytest.mark.parametrize(
    ("spec", "name", "count"),
    [("Set5", "Set5", 5), ("set14", "Set14", 14), ("B100", "BSD100", 100)],
)
def test_benchmarks(shared_data: Path, spec: str, name: str, count: int) -> None:
    images = open_set(spec, 3)
    assert (images.name, images.scale, len(images)) == (name, 3, count)
    assert images.lr_origin == OFFICIAL == "official files"
    first = next(iter(images))
    (h, w), (height, width) = first.lr.shape[:2], first.hr.shape[:2]
    assert (height, width) == (3 * h, 3 * w)


def test_grey_files_become_rgb(shared_data: Path) -> None:
    bridge = next(image for image in open_set("Set14", 4) if image.name == "bridge")
    for array in (bridge.lr, bridge.hr):
        assert array.shape[2] == 3
        assert np.all(array == array[..., :1])


def test_folder_with_lr_files(tmp_path: Path) -> None:
    hr = photo(tmp_path / "HR" / "a.png", 13, 9)
    lr = photo(tmp_path / "LR_bicubic" / "X4" / "ax4.png", 3, 2)
    images = open_set(tmp_path, 4)
    assert images.lr_origin == "files in LR_bicubic/X4"
    (image,) = images
    assert image.name == "a"
    assert np.array_equal(image.lr, lr)
    assert np.array_equal(image.hr, hr[:12, :8])
    # There are no files of scale 2, so they are made, and that is said.
    assert open_set(tmp_path, 2).lr_origin == MADE


def test_plain_folder(tmp_path: Path) -> None:
    b, a = photo(tmp_path / "b.png", 13, 9), photo(tmp_path / "a.png", 8, 8)
    images = open_set(str(tmp_path), 4)
    assert images.lr_origin == "made by MATLAB-compatible bicubic (uint8, symmetric border)"
    for image, (name, hr) in zip(images, [("a", a), ("b", b[:12, :8])], strict=True):
        assert image.name == name
        assert np.array_equal(image.hr, hr)
        assert np.array_equal(image.lr, downscale_uint8(hr, 4))


def test_images_are_decoded_one_by_one(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", 8, 8)
    photo(tmp_path / "b.png", 80, 80)
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[: len(content) // 2])
    images = iter(open_set(tmp_path, 2))
    assert next(images).name == "a"
    with pytest.raises(SrkdError, match=r"b\.png"):
        next(images)


def test_builtin() -> None:
    images = open_set("builtin", 4)
    names = [image.name for image in images]
    assert len(names) == len(images) >= 3
    first = next(iter(images))
    assert np.array_equal(first.lr, downscale_uint8(first.hr, 4))
    assert images.lr_origin == MADE


def test_missing_data_names_the_variable_and_the_alternatives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SRKD_DATA", raising=False)
    with pytest.raises(SrkdError, match=r"SRKD_DATA is not set.*--data builtin or a folder"):
        open_set("Set5", 4)
    monkeypatch.setenv("SRKD_DATA", str(tmp_path))
    with pytest.raises(SrkdError, match=r"Urban100 is looked for in .* but there is no .*Urban100"):
        open_set("urban100", 4)


def test_unknown_spec_lists_what_there_is() -> None:
    with pytest.raises(
        SrkdError, match=r"neither a folder nor a set .* Set5, Set14, BSD100, Urban100"
    ):
        open_set("Set6", 4)
    with pytest.raises(SrkdError, match="scale 1"):
        open_set("builtin", 1)
