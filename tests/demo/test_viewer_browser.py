"""The viewer in a browser: what is on the screen, counted in pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import viewer_page as vp
from PIL import Image
from viewer_page import KEYS, H, W, data_of, marker, picture, pixels_of, press, ready, state, view

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Open = Callable[..., "Page"]


def test_one_zoom_and_pan_in_all_panes_kept_on_update(show: Open, folder: Path) -> None:
    page = show()
    press(page, "z", "+", "+", "Shift+ArrowRight", "Shift+ArrowDown")
    before = state(page)
    assert (before["mode"], before["zoom"], before["keys"]) == ("grid", 3, list(KEYS))
    places = {marker(pixels_of(view(page, key))) for key in KEYS}
    assert len(places) == 1
    left, top, right, bottom = places.pop()
    assert (right - left, bottom - top) == (24, 24)

    keys = ("truth", "bicubic", "teacher", "student", "another")
    vp.write(folder, keys)
    page.evaluate("(data) => viewer.update(data)", data_of(folder, keys))
    ready(page)
    after = state(page)
    assert after["keys"] == list(keys)
    assert [after[one] for one in ("zoom", "pan", "mode")] == [
        before[one] for one in ("zoom", "pan", "mode")
    ]
    assert {marker(pixels_of(view(page, key))) for key in keys} == {(left, top, right, bottom)}


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 1.25, 1.5])
def test_one_to_one_is_the_file_on_device_pixels(
    show: Open, launch: Callable[..., Browser], ratio: float
) -> None:
    """With a ratio of the browser's own: an emulated one is rounded otherwise."""
    own = launch(f"--force-device-scale-factor={ratio}", "--window-size=1300,1000")
    page = show(browser=own, viewport=None, no_viewport=True)
    assert page.evaluate("devicePixelRatio") == ratio
    page.evaluate("document.querySelector('.place').style.margin = '1px 0 0 7.7px'")
    press(page, "k", "z")
    assert page.locator(".srkd-zoom").text_content() == "100 %"
    for number, key in enumerate(KEYS, start=1):
        press(page, str(number))
        shot = pixels_of(view(page, key))
        left, top, *_ = marker(shot)
        top, left = top - 100, left - 150
        np.testing.assert_array_equal(shot[top : top + H, left : left + W], picture(number - 1))
        around = shot.copy()
        around[top : top + H, left : left + W] = vp.GREY
        assert (around == vp.GREY).all()


@pytest.mark.slow
def test_enlarged_pixels_are_squares_until_smoothed(show: Open) -> None:
    page = show()
    press(page, "k", "4", "z", "+", "+", "+")
    shot = pixels_of(view(page, "teacher")).astype(int)
    left, top, right, bottom = marker(shot)
    assert (right - left, bottom - top) == (32, 32)
    blocks = shot[top - 40 : top + 72, left - 40 : left + 72].reshape(28, 4, 28, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    press(page, "p")
    blocks = pixels_of(view(page, "teacher"))[top - 40 : top + 72, left - 40 : left + 72]
    blocks = blocks.reshape(28, 4, 28, 4, 3)
    assert not (blocks == blocks[:, :1, :, :1]).all()
    assert page.get_by_role("button", name="Pixels").get_attribute("aria-pressed") == "false"


@pytest.mark.slow
def test_flicker_shows_a_picture_in_every_frame(show: Open) -> None:
    """In each frame one pane is seen, its middle in colours of its own picture, at the zoom of that moment."""
    page = show()
    press(page, "k", "1")
    page.evaluate("""() => {
        window.frames_seen = [];
        const look = () => {
            const views = [...document.querySelectorAll(".srkd-view")];
            const seen = views.filter((v) => getComputedStyle(v).visibility === "visible" && v.offsetWidth);
            frames_seen.push(seen.map((v) => {
                const canvas = v.querySelector("canvas");
                const at = [canvas.width / 2, canvas.height / 2].map(Math.floor);
                const pixel = (x, y) => canvas.getContext("2d").getImageData(x, y, 1, 1).data;
                // 200 pixels beside the middle there is picture at x3, which fits, and none at 1:1.
                const wide = pixel(at[0] - 200, at[1])[3] === 255;
                return [v.dataset.image, wide === viewer.state().fit, ...pixel(...at)];
            }));
            window.looking = requestAnimationFrame(look);
        };
        look();
    }""")
    for index in range(12):
        page.keyboard.press("zf"[index % 2])
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(20)
    page.keyboard.press("ArrowLeft")
    frames = page.evaluate("() => { cancelAnimationFrame(looking); return frames_seen; }")
    assert {len(frame) for frame in frames} == {1}
    assert {frame[0][0] for frame in frames} == set(KEYS)
    for [(key, zoomed, *rgba)] in frames:
        own = picture(KEYS.index(key)).reshape(-1, 3)
        assert zoomed and rgba[3] == 255 and (own == rgba[:3]).all(axis=1).any(), (key, rgba)
    assert state(page)["active"] == KEYS[(12 - 1) % len(KEYS)]


def colours(pixels: np.ndarray) -> np.ndarray:
    """The distinct colours of (..., 3), as one number each."""
    return np.unique(pixels.reshape(-1, 3).astype(int) @ [1, 256, 65536])


@pytest.mark.slow
def test_slider_by_keys_and_by_mouse(show: Open) -> None:
    page = show()
    press(page, "s")
    handle = page.get_by_role("slider")
    assert handle.get_attribute("aria-valuenow") == "50"
    assert handle.get_attribute("aria-label") == "Divide between Bicubic and Student"
    page.get_by_label("Left picture").select_option("nearest")
    handle.focus()
    for key in ("End", "Home", "PageUp", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert handle.get_attribute("aria-valuenow") == "13"
    press(page, "ArrowRight")
    assert handle.get_attribute("aria-valuenow") == "15"
    assert page.evaluate("document.activeElement.className") == "srkd-stage"

    box = view(page, "student").bounding_box()
    grip = handle.bounding_box()
    assert box and grip
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30, steps=3)
    page.mouse.up()
    assert state(page)["slider"]["at"] == pytest.approx(0.5, abs=2 / box["width"])
    shot = pixels_of(page.locator(".srkd-divide"))
    middle = shot.shape[1] // 2
    for key, columns in {
        "nearest": slice(0, middle - 3),
        "student": slice(middle + 3, None),
    }.items():
        part = shot[40:60, columns].reshape(-1, 3)
        seen = colours(part[(part != vp.GREY).any(axis=1)])
        assert len(seen) > 100
        assert np.isin(seen, colours(picture(KEYS.index(key)))).all(), key
    before = state(page)["pan"]
    assert before == [W / 2, H / 2]


@pytest.mark.slow
def test_lens_shows_one_region_of_every_picture(show: Open) -> None:
    page = show()
    press(page, "l", "Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowDown")
    region = page.evaluate("viewer.region()")
    assert 0 < region["x"] < vp.LR[1] and region["px"] == region["side"] * vp.SCALE * 4
    assert page.locator(".srkd-where").inner_text().startswith(f"LR x {region['x']}–")
    crops = page.locator(".srkd-crop canvas")
    assert crops.count() == len(KEYS)
    rows, columns = (
        slice(vp.SCALE * region[one], vp.SCALE * (region[one] + region["side"]))
        for one in ("y", "x")
    )
    for index in range(len(KEYS)):
        want = picture(index)[rows, columns].repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(pixels_of(crops.nth(index)), want)
    # The frame in the panes is around the same region.
    at = page.evaluate("""() => {
        const box = document.querySelector(".srkd-region").getBoundingClientRect();
        const view = document.querySelector(".srkd-view").getBoundingClientRect();
        const picture = SrkdViewer.geometry.place(viewer.centre, viewer.zoom, viewer.size, viewer.pane);
        return [(box.left - view.left - picture.x) / viewer.zoom, (box.top - view.top - picture.y) / viewer.zoom];
    }""")
    assert at == pytest.approx([vp.SCALE * region["x"], vp.SCALE * region["y"]], abs=0.02)


def shift(folder: Path, key: str, seed: int) -> np.ndarray:
    """Rewrite a picture as another one plus a little noise; the largest difference stands alone."""
    pixels = picture(seed).astype(int) + np.random.default_rng(9).integers(-6, 7, (H, W, 3))
    pixels[77, 33] = (0, 40, 250)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{key}.png")
    return pixels


def remark(page: Page, key: str) -> str:
    pane = page.locator(".srkd-pane", has=view(page, key))
    line = pane.locator(".srkd-line", has_text="max").or_(
        pane.locator(".srkd-line", has_text="same")
    )
    line.wait_for()
    return line.text_content() or ""


@pytest.mark.slow
def test_largest_difference_is_numpys(show: Open, folder: Path) -> None:
    student = shift(folder, "student", 0)
    page = show()
    press(page, "d")
    pictures = {key: picture(index) for index, key in enumerate(KEYS)} | {"student": student}
    for against in ("truth", "teacher"):
        page.get_by_label("Against this picture").select_option(against)
        for key in set(KEYS) - {against}:
            gap = np.abs(pictures[key].astype(int) - pictures[against]).max(axis=2)
            y, x = np.unravel_index(gap.argmax(), gap.shape)
            want = f"max |difference| {gap.max()} of 255 at x {x}, y {y}"
            page.wait_for_function(
                "([key, text]) => document.querySelector(`.srkd-view[data-image=${key}]`)"
                ".parentElement.textContent.includes(text)",
                arg=[key, want],
            )
    assert (
        "the others are compared"
        in page.locator(".srkd-pane", has=view(page, "teacher")).inner_text()
    )


@pytest.mark.slow
def test_difference_is_of_the_files_levels_not_of_colours(show: Open, folder: Path) -> None:
    """A gamma in the file changes how it looks, not what is compared; an equal picture has no maximum."""
    plain = Image.fromarray(picture(0))
    plain.save(folder / "teacher.png")
    body = (folder / "teacher.png").read_bytes()
    chunk = b"gAMA" + struct.pack(">I", 100_000)
    piece = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "student.png").write_bytes(body[:33] + piece + body[33:])
    page = show()
    shots = [pixels_of(view(page, key)) for key in ("teacher", "student")]
    assert (shots[0] != shots[1]).any(), "the browser ignores the gamma: this test shows nothing"
    press(page, "d")
    assert remark(page, "student") == "every pixel is the same"


@pytest.mark.slow
def test_gain_and_colours_of_the_difference(show: Open, folder: Path) -> None:
    student = shift(folder, "student", 0)
    page = show()
    press(page, "k", "5", "z", "d")
    remark(page, "student")
    assert page.locator(".srkd-gain").text_content() == "gain × 4"
    press(page, "]", "]", "]", "[")
    assert page.locator(".srkd-gain").text_content() == "gain × 8"
    assert page.locator(".srkd-ticks").inner_text().split("\n") == ["0", "16", "≥ 31 levels"]
    page.wait_for_function("[...viewer.differences.maps.values()].some((map) => map.gain === 8)")
    ready(page)
    shot = pixels_of(view(page, "student"))
    top, left = (shot.shape[0] - H) // 2, (shot.shape[1] - W) // 2
    level = np.abs(student.astype(int) - picture(0)).max(axis=2)
    for y, x in ((10, 10), (150, 200), (120, 31)):
        at = min(255, 8 * level[y, x]) / 255 * 8
        low = min(int(at), 7)
        scale = page.evaluate("SrkdViewer.heatScale")
        want = np.array(scale[low]) + (at - low) * (np.array(scale[low + 1]) - scale[low])
        np.testing.assert_allclose(shot[top + y, left + x], want, atol=1)


@pytest.mark.slow
def test_difference_of_other_sizes_is_refused(show: Open, folder: Path) -> None:
    Image.fromarray(picture(3, (H, W - 4))).save(folder / "student.png")
    page = show()
    press(page, "d")
    said = page.get_by_role("alert")
    said.filter(has_text="No difference").wait_for()
    assert (
        said.inner_text()
        == "No difference: 252×192 and 256×192 pixels. Compare pictures of one size."
    )


@pytest.mark.slow
def test_difference_of_a_picture_wider_than_any_canvas(show: Open, folder: Path) -> None:
    """80000 px, beyond the 65535 of a canvas and the 16 bits of a coordinate: 20000x2 px at x4."""
    h, w = 8, 80_000
    data = data_of(folder, KEYS[:2])
    data |= {"lr": [h // 4, w // 4]}
    for image, level in zip(data["images"], (40, 90), strict=True):
        image |= {"h": h, "w": w}
        pixels = np.full((h, w, 3), level, np.uint8)
        pixels[5, 79_990] = 255 if level == 90 else 0
        Image.fromarray(pixels).save(folder / f"{image['key']}.png")
    page = show(data)
    press(page, "d")
    assert remark(page, "nearest") == "max |difference| 255 of 255 at x 79990, y 5"
    press(page, "z", *["+"] * 5, "l")
    page.evaluate("viewer.restore({ pan: [79990, 4], difference: { gain: 1 } })")
    page.wait_for_function("[...viewer.differences.maps.values()].every((map) => map.gain === 1)")
    ready(page)
    shot = pixels_of(view(page, "nearest")).reshape(-1, 3)
    brightest = page.evaluate("SrkdViewer.heatScale.at(-1)")
    assert (shot == brightest).all(axis=1).sum() == 8**2, (
        "the one pixel that differs most, at 800 %"
    )
    sizes = page.evaluate(
        "[...document.querySelectorAll('canvas')].map((c) => [c.width, c.height])"
    )
    assert max(max(size) for size in sizes) <= 1280
    assert page.get_by_role("alert").inner_text() == ""


@pytest.mark.slow
def test_a_difference_that_fails_is_said(show: Open) -> None:
    page = show()
    page.evaluate("""() => {
        const Real = Worker;
        window.Worker = class extends Real { constructor() { super("nowhere.js"); } };
    }""")
    press(page, "d")
    said = page.get_by_role("alert").filter(has_text="No difference")
    said.wait_for()
    assert said.inner_text().startswith("No difference: the browser stopped the computation.")


@pytest.mark.slow
def test_transparent_pictures_lie_on_a_checkerboard(show: Open, folder: Path) -> None:
    clear = np.dstack([picture(0), np.full((H, W), 255, np.uint8)])
    clear[:60, :, 3] = 0
    Image.fromarray(clear).save(folder / "student.png")
    page = show()
    press(page, "k", "5", "z")
    shot = pixels_of(view(page, "student"))
    top, left = (shot.shape[0] - H) // 2, (shot.shape[1] - W) // 2
    upper = shot[top : top + 60, left : left + W].reshape(-1, 3)
    assert {tuple(map(int, one)) for one in np.unique(upper, axis=0)} == {(154,) * 3, (102,) * 3}
    np.testing.assert_array_equal(shot[top + 60 : top + H, left : left + W], clear[60:, :, :3])


@pytest.mark.slow
def test_difference_of_transparent_pictures_is_as_on_black(show: Open, folder: Path) -> None:
    """Colours under full transparency are hidden, so they differ from nothing."""
    pixels = picture(0)
    pixels[:20] = 0
    for key, hidden, alpha in (("truth", 10, 200), ("student", 250, 120)):
        clear = np.dstack([pixels, np.full((H, W), 255, np.uint8)])
        clear[:20] = (hidden, hidden, hidden, 0)
        clear[50, 60] = (240, 0, 0, alpha)
        Image.fromarray(clear).save(folder / f"{key}.png")
    page = show()
    press(page, "d")
    want = round(240 * 200 / 255) - round(240 * 120 / 255)
    assert remark(page, "student") == f"max |difference| {want} of 255 at x 60, y 50"


@pytest.mark.slow
def test_reference_while_held(show: Open) -> None:
    page = show()
    press(page, "k", "5", "z")
    own = pixels_of(view(page, "student"))
    page.keyboard.down("Space")
    truth = pixels_of(view(page, "student"))
    assert page.evaluate("scrollY") == 0
    caption = page.locator(".srkd-pane", has=view(page, "student")).locator(".srkd-caption")
    assert "Truth" in caption.inner_text() and "Student" not in caption.inner_text()
    page.keyboard.up("Space")
    assert (pixels_of(view(page, "student")) == own).all() and (truth != own).any()
    left, top, *_ = marker(truth)
    np.testing.assert_array_equal(
        truth[top - 100 : top - 100 + H, left - 150 : left - 150 + W], picture(0)
    )
    page.keyboard.down("Space")
    page.evaluate("document.querySelector('input').focus()")
    assert not page.evaluate("viewer.holding")


@pytest.mark.slow
def test_hostile_texts_stay_texts(show: Open, folder: Path) -> None:
    hostile = '<img src=x onerror="window.broken=1"><b>&amp;'
    data = data_of(folder, student=hostile)
    data["name"] = data["protocol"] = hostile
    data["images"][4]["lines"] = [hostile]
    page = show(data)
    press(page, "l", "d", "s", "?")
    page.wait_for_timeout(400)
    assert page.locator(".srkd-viewer img, .srkd-viewer b").count() == 0
    assert page.evaluate("window.broken") is None
    assert hostile in page.locator(".srkd-about").inner_text()
    assert page.locator(".srkd-name", has_text=hostile).count() >= 1


@pytest.mark.slow
def test_a_picture_that_does_not_load_is_said(show: Open, folder: Path) -> None:
    data = data_of(folder)
    data["images"][3]["url"] = "nowhere.png"
    (folder / "bicubic.png").write_bytes(b"no picture")
    page = show(data)
    said = page.get_by_role("alert").inner_text()
    assert "Teacher did not load: the server answered 404. Run the comparison again." in said
    assert "Bicubic did not load: this browser cannot decode it." in said
    assert page.locator(".srkd-message", has_text="did not load").count() == 2
    marker(pixels_of(view(page, "student")))  # the others are shown


@pytest.mark.slow
def test_pictures_are_loading_until_they_are_there(show: Open, folder: Path) -> None:
    page = show()
    data = data_of(folder)
    data["images"][4]["url"] = "late.png"
    page.route("**/late.png", lambda route: None)  # never answered
    page.evaluate("(data) => { viewer.update(data); }", data)
    page.get_by_role("status").filter(has_text="Loading: 4 of 5 pictures.").wait_for()
    assert page.locator(".srkd-message", has_text="loading…").count() == 1
    assert page.locator(".srkd-stage").get_attribute("aria-busy") == "true"


@pytest.mark.slow
def test_mounting_again_is_an_update_also_of_new_markup(show: Open, folder: Path) -> None:
    page = show()
    press(page, "k", "2", "z")
    before = state(page)
    again = page.evaluate("""() => {
        const place = document.querySelector(".place");
        const same = SrkdViewer.mount(place, data) === viewer;
        place.innerHTML = template;
        return [same, SrkdViewer.mount(place, data) === viewer];
    }""")
    ready(page)
    assert again == [True, True] and state(page) == before
    press(page, "3")
    assert state(page)["active"] == "bicubic"
    marker(pixels_of(view(page, "bicubic")))


@pytest.mark.slow
def test_a_saved_state_is_taken_up_and_nonsense_is_not(show: Open) -> None:
    page = show()
    press(page, "k", "4", "z", "+", "Shift+ArrowRight", "d", "]", "l")
    saved = state(page)
    page.reload()
    ready(page)
    page.evaluate("(saved) => viewer.restore(saved)", saved)
    ready(page)
    assert state(page) == saved
    page.evaluate("""viewer.restore({mode: "<b>", zoom: -3, pan: ["a"], lens: {k: 1e9}, difference: {gain: 0},
        slider: {at: "x", left: "nobody"}})""")
    page.evaluate("viewer.restore({pan: [100]})")
    assert {k: v for k, v in state(page).items() if k != "slider"} == {
        k: v for k, v in saved.items() if k != "slider"
    }
    assert state(page)["slider"]["at"] == 0 and state(page)["slider"]["left"] == "bicubic"


@pytest.mark.slow
def test_one_picture_nine_pictures_and_none_left(show: Open, folder: Path) -> None:
    many = ("truth", "nearest", "bicubic", *(f"m{index}" for index in range(6)))
    vp.write(folder, many)
    page = show(data_of(folder, many))
    # The models before what is only interpolated.
    assert state(page)["keys"] == ["truth", "m0", "m1", "m2", "m3", "m4"]
    page.get_by_role("checkbox", name="Show Nearest").click()
    status = page.get_by_role("status")
    status.filter(has_text="6 pictures are shown at most: hide one first.").wait_for()
    page.get_by_role("checkbox", name="Show M2").click()
    page.get_by_role("checkbox", name="Show Nearest").click()
    assert state(page)["keys"] == ["truth", "nearest", "m0", "m1", "m3", "m4"]

    page.evaluate("(data) => viewer.update(data)", data_of(folder, ("m4",)))
    press(page, "s", "d", "ArrowRight")
    assert state(page)["keys"] == ["m4"] and state(page)["mode"] == "grid"
    assert not state(page)["difference"]["on"]
    page.get_by_role("checkbox", name="Show M4").click()
    status.filter(has_text="One picture has to stay.").wait_for()
    page.evaluate("viewer.destroy()")
    assert page.locator(".srkd-pane").count() == 0
