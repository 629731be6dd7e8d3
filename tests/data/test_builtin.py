"""The built-in images: there without a network, the same every time, licences as their source says."""

from __future__ import annotations

import numpy as np
import pytest

from srkd.data import builtin
from srkd.data.builtin import LICENCES, Photograph, held_out_images, training_images
from srkd.errors import MissingError


@pytest.fixture(scope="module")
def trained() -> list[tuple[str, np.ndarray]]:
    return training_images()


TERMS = {
    "CC0": "cc0",
    "public domain": "public domain",
    "no known copyright restrictions": "no known copyright restrictions",
}


@pytest.mark.parametrize("photo", LICENCES, ids=lambda photo: photo.name)
def test_licence_is_what_scikit_image_states(photo: Photograph) -> None:
    import skimage.data

    stated = " ".join((getattr(skimage.data, photo.name).__doc__ or "").lower().split())
    assert TERMS[photo.licence] in stated


def test_images_are_rgb_and_large_enough_to_train_on(trained: list[tuple[str, np.ndarray]]) -> None:
    names = [name for name, _ in trained]
    assert len(set(names)) == len(names)
    assert len(trained) >= 24 + 9
    for _, image in trained:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert min(image.shape[:2]) >= 4 * 64  # a 64 px patch at x4
        assert image.std() > 5


def test_held_out_photographs_are_never_trained_on(trained: list[tuple[str, np.ndarray]]) -> None:
    held_out = held_out_images()
    assert len(held_out) >= 3
    contents = {image.tobytes() for _, image in trained}
    for _, image in held_out:
        assert image.tobytes() not in contents
        assert np.ptp(image.astype(int), axis=2).mean() > 1  # in colour


def test_the_same_every_time(trained: list[tuple[str, np.ndarray]]) -> None:
    again = training_images()
    assert [name for name, _ in again] == [name for name, _ in trained]
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(again, trained, strict=True))
    drawn = [image.tobytes() for name, image in trained if name.startswith("dead_leaves")]
    assert len(set(drawn)) == 12


def test_absent_photograph_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"'astronaut' ships inside scikit-image.*--data FOLDER"):
        held_out_images()
