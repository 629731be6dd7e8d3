"""The viewer under keys, mouse, wheel and fingers; its layout, names and contrast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from viewer_page import KEYS, data_of, marker, pixels_of, press, ready, state, view

if TYPE_CHECKING:
    from playwright.sync_api import CDPSession, Page

Open = Callable[..., "Page"]
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}
# As promised to users; the list in the viewer is made from its buttons.
PROMISED = [
    "1", "2", "3", "4", "5", "ArrowLeft", "ArrowRight", "Space", "g", "s", "k", "l", "d", "[", "]", "f",
    "z", "+", "-", "p", "?", "Shift+ArrowLeft", "Shift+ArrowRight", "Shift+ArrowUp", "Shift+ArrowDown",
]  # fmt: skip


@pytest.mark.slow
def test_every_key_is_a_named_button_and_in_the_list(show: Open) -> None:
    page = show()
    press(page, "d", "?")
    found = page.evaluate("""() => [...document.querySelectorAll("[data-key]")].map((b) => [
        b.dataset.key, b.tagName, b.getAttribute("aria-keyshortcuts"), b.title,
        b.ariaLabel || [...b.childNodes].filter((n) => n.ariaHidden !== "true").map((n) => n.textContent).join("")
    ])""")
    assert sorted(key for key, *_ in found) == sorted(PROMISED)
    for key, tag, shortcut, title, name in found:
        assert tag == "BUTTON" and title and name, key
        assert shortcut == ("Plus" if key == "+" else key)
    listed = page.locator(".srkd-entry").count()
    assert listed == 1 + len([key for key in PROMISED if not key.isdigit()])


@pytest.mark.slow
def test_keys_and_buttons_do_the_same(show: Open) -> None:
    """Each key, and then its button on a fresh page, ends in the same state."""
    page = show()
    start = state(page)
    press(page, "z", "d")  # so that every button has something to do
    changed = 0
    for key in PROMISED:
        if key == "Space":
            continue
        page.evaluate(
            "(start) => viewer.restore({...start, fit: false, zoom: 4, difference: {on: true, gain: 4}})",
            start,
        )
        ready(page)
        before = state(page)
        press(page, key)
        by_key = state(page)
        page.evaluate("(before) => viewer.restore(before)", before)
        ready(page)
        page.evaluate(
            "(key) => [...document.querySelectorAll('[data-key]')].find((b) => b.dataset.key === key).click()",
            key,
        )
        ready(page)
        by_button = state(page)
        assert by_button == by_key, key
        changed += by_key != before
    # 5 is in front already, grid is on, smoothing aside every other key changes something; ? opens the list.
    assert changed == len(PROMISED) - 1 - len({"5", "g", "?"})


@pytest.mark.slow
def test_keys_need_the_focus(show: Open) -> None:
    page = show()
    before = state(page)
    page.locator("input").focus()
    page.keyboard.type("skgld12 ")
    assert page.locator("input").input_value() == "skgld12 " and state(page) == before
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    page.wait_for_function("scrollY > 100")
    assert state(page) == before
    press(page, "Control+s", "Alt+k")
    assert state(page) == before


@pytest.mark.slow
def test_brackets_typed_with_altgr_are_keys_and_shortcuts_are_not(show: Open) -> None:
    """Windows and Linux say AltGraph beside Ctrl and Alt, a Mac says Alt alone (Option)."""
    page = show()
    press(page, "d")
    for gain, held in (
        (8, {"ctrlKey": True, "altKey": True, "modifierAltGraph": True}),
        (8, {"altKey": True}),
        (4, {"ctrlKey": True, "altKey": True}),
        (4, {"ctrlKey": True}),
        (4, {"metaKey": True, "modifierAltGraph": True}),
    ):
        page.evaluate("viewer.restore({ difference: { gain: 4 } })")
        page.evaluate(
            """(held) => document.querySelector(".srkd-stage").dispatchEvent(
                new KeyboardEvent("keydown", { key: "]", bubbles: true, cancelable: true, ...held }))""",
            held,
        )
        assert state(page)["difference"]["gain"] == gain, held


@pytest.mark.slow
def test_the_keyboard_alone_reaches_everything_and_leaves_again(show: Open) -> None:
    page = show()
    page.locator("input").focus()
    names = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("""() => {
            const e = document.activeElement;
            if (!e.closest(".srkd-viewer")) return null;
            const ring = getComputedStyle(e);
            if (ring.outlineStyle === "none" || parseFloat(ring.outlineWidth) < 2) throw Error("no ring: " + e.title);
            return e.dataset.do ?? e.className;
        }""")
        if name is None:
            break
        names.append(name)
    else:
        pytest.fail("Tab does not leave the viewer")
    assert {
        "grid",
        "one",
        "lens",
        "difference",
        "hold",
        "west",
        "fullscreen",
        "keys",
        "srkd-stage",
    } <= {*names}
    assert names.count("show") == names.count("pick") == len(KEYS)
    # From the button of the slider to its handle, without a mouse.
    page.get_by_role("button", name="Slider").focus()
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role') === 'slider'"):
            break
    page.keyboard.press("Home")
    assert state(page)["slider"]["at"] == 0 and state(page)["mode"] == "slider"
    hold = page.get_by_role("button", name="Reference")
    hold.focus()
    page.keyboard.press("Space")
    assert hold.get_attribute("aria-pressed") == "true"


@pytest.mark.slow
def test_what_is_shown_is_announced(show: Open) -> None:
    page = show()
    press(page, "k", "4", "z")
    page.get_by_role("status").filter(has_text="Shown: Teacher · zoom 100 %.").wait_for()
    front = page.locator(".srkd-pane:not([aria-hidden=true]) canvas")
    assert (
        front.get_attribute("aria-label")
        == "Teacher, 256×192 pixels, PSNR-Y 37.00 dB, SSIM-Y 0.9000"
    )
    assert front.get_attribute("role") == "img"


@pytest.mark.slow
def test_wheel_scrolls_the_page_until_the_viewer_has_the_focus(show: Open) -> None:
    page = show()
    box = view(page, "teacher").bounding_box()
    assert box
    at = (box["x"] + 100, box["y"] + 60)
    page.mouse.move(*at)
    before = state(page)["zoom"]
    for distance, there in ((100, "scrollY > 50"), (-100, "scrollY < 50")):
        page.mouse.wheel(0, distance)
        page.wait_for_function(there)
        assert state(page)["zoom"] == before
    page.evaluate("scrollTo(0, 0)")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_function("(before) => viewer.state().zoom > before", arg=before)
    press(page, "f")
    press(page, "z", "+", "+")
    spot = marker(pixels_of(view(page, "teacher")))
    page.mouse.move(box["x"] + spot[0], box["y"] + spot[1])
    page.mouse.wheel(0, -60)
    page.wait_for_function("viewer.state().zoom > 3.1")
    ready(page)
    moved = marker(pixels_of(view(page, "teacher")))
    assert moved[0] == pytest.approx(spot[0], abs=3) and moved[1] == pytest.approx(spot[1], abs=3)
    assert page.evaluate("scrollY") == 0


@pytest.mark.slow
def test_drag_and_double_click(show: Open) -> None:
    page = show()
    press(page, "z", "+", "+", "+")
    box = view(page, "bicubic").bounding_box()
    assert box
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    before = marker(pixels_of(view(page, "truth")))
    page.mouse.move(box["x"] + 170, box["y"] + 80, steps=4)
    page.mouse.up()
    ready(page)
    for key in KEYS:
        after = marker(pixels_of(view(page, key)))
        assert (after[0] - before[0], after[1] - before[1]) == (-30, -20)
    # Not the pane under a drag comes to the front, only the one that is clicked.
    assert state(page)["active"] == "student"
    page.mouse.click(box["x"] + 20, box["y"] + 20)
    assert state(page)["active"] == "bicubic"
    page.mouse.dblclick(box["x"] + 20, box["y"] + 20)
    assert state(page)["fit"]


def fingers(session: CDPSession, kind: str, *points: tuple[float, float]) -> None:
    session.send(
        "Input.dispatchTouchEvent",
        {
            "type": kind,
            "touchPoints": [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)],
        },
    )


@pytest.mark.slow
def test_pinch_zooms_one_finger_scrolls_then_pans(show: Open) -> None:
    page = show(**PHONE)
    assert state(page)["mode"] == "stack"
    session = page.context.new_cdp_session(page)
    box = view(page, "student").bounding_box()
    assert box
    x, y = box["x"] + 180, box["y"] + 90
    before = state(page)
    fingers(session, "touchStart", (x, y + 60))
    for step in range(1, 9):
        fingers(session, "touchMove", (x, y + 60 - 15 * step))
    fingers(session, "touchEnd")
    page.wait_for_function("scrollY > 40")
    assert state(page) == before

    page.wait_for_timeout(500)  # the scroll runs out
    page.evaluate("scrollTo(0, 0)")
    fingers(session, "touchStart", (x - 20, y), (x + 20, y))
    for step in range(1, 11):
        fingers(session, "touchMove", (x - 20 - 5 * step, y), (x + 20 + 5 * step, y))
    fingers(session, "touchEnd")
    ready(page)
    zoomed = state(page)
    assert zoomed["zoom"] == pytest.approx(before["zoom"] * 140 / 40, rel=0.1)
    assert page.evaluate("visualViewport.scale") == 1

    fingers(session, "touchStart", (x, y))
    for step in range(1, 9):
        fingers(session, "touchMove", (x - 8 * step, y))
    fingers(session, "touchEnd")
    ready(page)
    panned = state(page)
    assert panned["zoom"] == zoomed["zoom"] and page.evaluate("scrollY") == 0
    assert panned["pan"][0] - zoomed["pan"][0] == pytest.approx(2 * 64 / zoomed["zoom"], rel=0.15)


@pytest.mark.slow
def test_on_a_phone_nothing_overflows_and_targets_are_large(show: Open, folder: Path) -> None:
    names = {"student": "A distilled student with a long name, ONNX Runtime fp16"}
    page = show(data_of(folder, KEYS, **names), **PHONE)
    for keys in ("", "g", "s", "k", "d", "l", "?"):
        press(page, *keys)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, keys
        small = page.evaluate("""() => [...document.querySelectorAll(
            ".srkd-viewer button, .srkd-viewer select, .srkd-handle")].filter((e) => {
                const { width, height } = e.getBoundingClientRect();
                return width && (width < 32 || height < 32);
            }).map((e) => e.title)""")
        assert small == []


CONTRAST = """() => {
    const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const back = (e) => {
        for (; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const poor = [];
    for (const e of document.querySelectorAll(".srkd-viewer *")) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || !e.getClientRects().length || e.closest("[aria-disabled=true]")) continue;
        const style = getComputedStyle(e);
        const under = back(e);
        const front = parse(style.color).slice(0, 3).map((c, i) => c * style.opacity + under[i] * (1 - style.opacity));
        const [a, b] = [light(front), light(under)].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) poor.push([e.className, e.textContent, ratio]);
    }
    return poor;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_texts(show: Open, scheme: str, folder: Path) -> None:
    data = data_of(folder)
    data["images"][3]["url"] = "nowhere.png"
    page = show(data, color_scheme=scheme)
    for keys in ("d", "l", "s", "?"):
        press(page, keys)
        assert page.evaluate(CONTRAST) == []


@pytest.mark.slow
def test_dark_follows_gradio_before_the_system(show: Open) -> None:
    page = show(color_scheme="dark")
    theme: Any = lambda: page.locator(".srkd-viewer").get_attribute("data-theme")  # noqa: E731
    assert theme() == "dark"
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('div'), {className: 'gradio-container'}))"
    )
    page.evaluate("document.body.classList.add('dark')")
    page.evaluate("document.body.classList.remove('dark')")
    page.wait_for_function("document.querySelector('.srkd-viewer').dataset.theme === 'light'")
    page.evaluate("document.body.classList.add('dark')")
    page.wait_for_function("document.querySelector('.srkd-viewer').dataset.theme === 'dark'")
    stage = "getComputedStyle(document.querySelector('.srkd-stage')).backgroundColor"
    assert page.evaluate(stage) == "rgb(128, 128, 128)"


@pytest.mark.slow
def test_full_screen(show: Open) -> None:
    page = show()
    page.get_by_role("button", name="Full screen").click()
    page.wait_for_function("document.fullscreenElement?.className === 'srkd-viewer'")
    ready(page)
    assert page.get_by_role("button", name="Full screen").get_attribute("aria-pressed") == "true"
    beyond = page.evaluate("""() => {
        const root = document.querySelector(".srkd-viewer");
        return [root.scrollHeight - root.clientHeight, root.scrollWidth - root.clientWidth];
    }""")
    assert beyond == [0, 0]
    press(page, "k", "l")
    page.wait_for_timeout(300)
    inside = page.evaluate("""() => {
        const stage = document.querySelector(".srkd-stage").getBoundingClientRect();
        const caption = document.querySelector(".srkd-pane[data-place=seen] figcaption").getBoundingClientRect();
        const view = document.querySelector(".srkd-pane[data-place=seen] .srkd-view").getBoundingClientRect();
        return view.top >= stage.top && caption.bottom <= stage.bottom;
    }""")
    assert inside
    press(page, "g", "l")
    assert len({marker(pixels_of(view(page, key))) for key in KEYS}) == 1
