"""The page around the viewer: its texts, and in a browser what is pressed, announced, linked and scrolled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from live_server import live
from tiny_service import picture

from demo import markup
from demo.batch import MOST_SR_PX
from demo.jobs import Progress
from demo.limits import Limits
from demo.widgets import EXAMPLES, batch_limits_text, read_examples

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PRESSED = "document.querySelector('{}').getAttribute('aria-disabled')"


# --- texts --------------------------------------------------------------------------------------


def announced(html: str) -> list[str]:
    return re.findall(r'role="status">(.*?)</p>', html)


def test_only_a_new_stage_is_announced() -> None:
    told = [
        "model 1/2 · loading A",
        "model 1/2 · tile 1/7",
        "model 1/2 · tile 2/7 · ~9 s",
        "model 1/2 · tile 8 · ~1 min",
        "model 2/2 · tile 1/7 · ~3 s",
        "measuring · round 3",
    ]
    lines = [markup.progress(Progress(0.1 * i, text)) for i, text in enumerate(told)]
    assert [announced(line) for line in lines] == [
        ["model 1/2 · loading A"],
        *[["model 1/2"]] * 3,
        ["model 2/2"],
        ["measuring"],
    ]
    for line, text in zip(lines, told, strict=True):
        assert f"<span>{text}</span>" in line, "all of it is shown"
    assert announced(markup.refusal("No <b>.")) == ["Not done. No &lt;b&gt;."]


def test_the_most_that_a_batch_makes_is_said_before_the_upload() -> None:
    service: Any = SimpleNamespace(limits=Limits())
    assert f"together: at most {MOST_SR_PX // 1_000_000} megapixels" in batch_limits_text(
        service, 4
    )


def test_sources_and_licences_of_the_examples_are_told() -> None:
    records = json.loads((EXAMPLES / "index.json").read_text(encoding="utf-8"))
    for record, example in zip(records, read_examples(), strict=True):
        html = markup.origins([(example.title, example.about, example.source, example.licence)])
        assert f"Licence: {record['licence']}." in html
        assert markup.escape(record["source"]) in html
    assert "<script>" not in markup.origins([("<script>", "<script>", "<script>", "<script>")])


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """The page with the tiny networks at x2, one of them ticked."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    one = context.new_page()
    faults: list[str] = []
    one.on("pageerror", lambda error: faults.append(str(error)))
    one.goto(f"{live().address}/?scale=2&models=tiny_scratch")
    one.wait_for_selector("#srkd-examples button img")
    yield one
    context.close()
    assert faults == []


def upload(page: Page, folder: Path) -> None:
    file = picture(folder / "mine.png")
    page.locator("#srkd-picture input[type=file]").set_input_files(str(file))
    page.locator("#srkd-picture img[src*='file=']").wait_for()


def finished(page: Page, said: str = "Done.") -> None:
    page.wait_for_function(
        "said => document.querySelector('#srkd-status [role=status]').textContent.startsWith(said)",
        arg=said,
    )


def compared(page: Page, folder: Path) -> None:
    upload(page, folder)
    page.locator("#srkd-go").click()
    finished(page)


def jobs_of(page: Page) -> list[str]:
    """What comparisons send from now on: they alone name engine and precision."""
    sent: list[str] = []

    def note(body: str | None) -> None:
        if body and '"torch","fp32"' in body and "tiny_scratch" in body:
            sent.append(body)

    page.on(
        "request",
        lambda request: note(request.post_data) if "/queue/join" in request.url else None,
    )
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["#srkd-go", "#srkd-examples button"])
def test_a_double_press_starts_one_job(page: Page, tmp_path: Path, starter: str) -> None:
    upload(page, tmp_path)
    sent = jobs_of(page)
    at_once = page.evaluate(
        f"() => {{ const b = document.querySelector('{starter}'); b.click(); b.click(); "
        f"return {PRESSED.format(starter)}; }}"
    )
    assert at_once == "true"
    finished(page)
    page.wait_for_function(f"{PRESSED.format(starter)} === 'false'")
    assert len(sent) == 1
    page.locator(starter).first.click()
    page.wait_for_function(f"{PRESSED.format(starter)} === 'false'")
    assert len(sent) == 2, "after the end it works again"


@pytest.mark.slow
def test_a_refused_and_a_stopped_job_free_the_button(page: Page, tmp_path: Path) -> None:
    page.locator("#srkd-go").click()
    finished(page, "Not done.")
    page.wait_for_function(f"{PRESSED.format('#srkd-go')} === 'false'")
    upload(page, tmp_path)
    page.evaluate(
        "() => { document.querySelector('#srkd-go').click(); document.querySelector('#srkd-stop').click(); }"
    )
    page.wait_for_function(f"{PRESSED.format('#srkd-go')} === 'false'")
    compared(page, tmp_path)


@pytest.mark.slow
def test_the_layout_of_a_link_is_not_gradios_view(page: Page, tmp_path: Path) -> None:
    compared(page, tmp_path)
    page.locator(".srkd-stage").press("k")
    page.wait_for_function("location.search.includes('layout=stack')")
    assert "view=" not in page.url
    page.goto(page.url.replace("layout=stack", "layout=slider"))
    page.wait_for_selector("#srkd-examples button img")
    compared(page, tmp_path)
    slider = page.locator("#srkd-viewer button[data-do=slider]")
    assert slider.get_attribute("aria-pressed") == "true"


@pytest.mark.slow
def test_a_screen_reader_hears_stages_not_percentages(page: Page, tmp_path: Path) -> None:
    upload(page, tmp_path)
    page.evaluate("""() => {
        window.heard = [];
        window.region = document.querySelector("#srkd-status [role=status]");
        new MutationObserver(() => heard.push(region.textContent))
            .observe(region, { characterData: true, childList: true, subtree: true });
    }""")
    page.locator("#srkd-go").click()
    finished(page)
    heard = page.evaluate("heard")
    assert page.evaluate("region.isConnected"), "a region that is put there anew is not heard"
    assert heard[-1] == "Done."
    assert len(heard) == len(set(heard)), heard
    assert not [text for text in heard if re.search(r"tile|%|~", text)]
    assert page.locator("#srkd-status [role=status] progress").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_table_of_results_keeps_to_its_box(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.locator("#srkd-examples button").first.click()  # with a ground truth: the most columns
    finished(page)
    box = page.locator(".srkd-page-table")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inside, whole = box.evaluate("box => [box.clientWidth, box.scrollWidth]")
    if width == 1280:
        assert whole == inside, "the usual columns fit"
        return
    assert whole > inside
    left = "box => box.querySelector('tbody th').getBoundingClientRect().left"
    before = box.evaluate(left)
    box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    assert box.evaluate(left) == before, "the names stay while the numbers scroll"


NAMED = ("button", "checkbox", "combobox", "link", "listbox", "radio", "slider", "tab", "textbox")


@pytest.mark.slow
def test_every_control_has_a_name_and_the_keyboard_reaches_it(page: Page, tmp_path: Path) -> None:
    compared(page, tmp_path)
    page.locator("#srkd-truth-box button").click()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip(), node.get("value"))
        for node in tree["nodes"]
        if not node["ignored"] and node["role"]["value"] in NAMED
    ]
    assert len(controls) > 40
    assert [control for control in controls if not control[1]] == []
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.closest('[id^=srkd-]')?.id ?? document.activeElement.tagName"
            )
        )
    wanted = (
        "picture examples origins truth shrink models go stop how viewer results speed wanted files"
    )
    assert {f"srkd-{part}" for part in wanted.split()} <= reached
