"""The page as a user meets it: `python demo/app.py` in a process of its own, driven in a real browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch

from demo.make_examples import FOLDER as EXAMPLES
from srkd.data.degradation import downscale_uint8
from srkd.images import read_rgb8, write_png
from srkd.infer import upscale_file
from srkd.metrics import RGB, psnr, psnr_ssim
from srkd.models import save_model
from srkd.networks import build

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# A server and a browser start, and networks run.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
SCALE = 4
SHIPPED = "rcan_c_x4"
WAIT_MS = 120_000  # for a busy machine


@dataclass
class Server:
    url: str
    model: Path
    process: subprocess.Popen[str]


@dataclass
class Visit:
    """A page with what it asked for and complained about."""

    page: Page
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # name -> address, the last of each name

    def watch(self) -> None:
        def asked(url: str) -> None:
            if urlsplit(url).scheme not in ("data", "blob"):
                self.hosts.add(urlsplit(url).netloc)
            if "/gradio_api/file=" in url:
                self.files[unquote(url).rsplit("/", 1)[1]] = url

        self.page.on("request", lambda request: asked(request.url))
        self.page.on("websocket", lambda socket: asked(socket.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console",
            lambda line: self.complaints.append(line.text) if line.type == "error" else None,
        )

    def shown(self, name: str) -> bytes:
        """The bytes behind the address that the page drew a picture from."""
        return self.page.request.get(self.files[name]).body()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped network and a tiny untrained one, which a user adds by --model."""
    folder = tmp_path_factory.mktemp("server")
    torch.manual_seed(0)
    save_model(folder / "tiny", build("edsr_tiny", SCALE), {})
    log = folder / "log.txt"
    command = [sys.executable, "demo/app.py", "--port", "0", "--model", str(folder / "tiny")]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        ) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.readline()
        found = re.search(r"http://\S+", first)
        assert found, f"no address in {first!r}; {log.read_text()[-2000:]}"
        yield Server(found.group().rstrip("/"), folder / "tiny", process)
        process.terminate()
        assert process.wait(30) == 130
    assert "Traceback" not in log.read_text()


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    """A fresh user; afterwards, nobody else was asked for anything and nothing was complained about."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    seen = Visit(context.new_page())
    seen.watch()
    seen.page.goto(f"{server.url}?models={SHIPPED}")
    seen.page.wait_for_selector("#srkd-models input")
    yield seen
    context.close()
    assert seen.hosts == {urlsplit(server.url).netloc}
    assert seen.complaints == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """LR and HR of a piece of a photograph, (24, 32) and (96, 128)."""
    folder = tmp_path_factory.mktemp("pair")
    hr = read_rgb8(EXAMPLES / "texture_hr.png")[60:156, 96:224]
    write_png(folder / "patch.png", downscale_uint8(hr, SCALE))
    write_png(folder / "patch_hr.png", hr)
    return folder / "patch.png", folder / "patch_hr.png"


def upload(page: Page, where: str, file: Path) -> None:
    box = page.locator(where)
    box.locator("input[type=file]").set_input_files(str(file))
    box.locator("img[src*='file=']").wait_for()


def tick_all(page: Page) -> None:
    for one in page.locator("#srkd-models input").all():
        one.check()


def compare(page: Page) -> None:
    page.get_by_role("button", name="Compare", exact=True).click()
    wait_for_status(page, "Done.")


def wait_for_status(page: Page, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('#srkd-status [role=status]')?.textContent === text",
        arg=text,
    )


def downloads(page: Page) -> dict[str, bytes]:
    """The files of the list, by their names, as the browser saves them."""
    found = {}
    for link in page.locator("#srkd-files a[href]").all():
        with page.expect_download() as saving:
            link.click()
        file = saving.value
        found[file.suggested_filename] = Path(file.path()).read_bytes()
    return found


def table_of(page: Page) -> dict[str, dict[str, str]]:
    """Rows of the results by their first cell; stars of the best left out."""
    heads = page.locator("#srkd-results thead th").all_inner_texts()
    rows = {}
    for row in page.locator("#srkd-results tbody tr").all():
        cells = [text.removesuffix("★").strip() for text in row.locator("th, td").all_inner_texts()]
        rows[cells[0]] = dict(zip(heads, cells, strict=True))
    return rows


def pixels(png: bytes, folder: Path) -> np.ndarray:
    (folder / "read.png").write_bytes(png)
    return read_rgb8(folder / "read.png")


def test_what_is_shown_and_saved_is_what_the_networks_give(
    visit: Visit, server: Server, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    page = visit.page
    upload(page, "#srkd-picture", pair[0])
    tick_all(page)
    compare(page)
    saved = downloads(page)
    for spec, key in ((SHIPPED, SHIPPED), (server.model, "tiny")):
        ours = tmp_path / f"{key}.png"
        upscale_file(pair[0], ours, spec)
        assert saved[f"patch_x4_{key}_torch-fp32.png"] == ours.read_bytes()
        assert visit.shown(f"{key}.png") == ours.read_bytes()
    lr = read_rgb8(pair[0])
    nearest = pixels(saved["patch_x4_nearest.png"], tmp_path)
    assert np.array_equal(nearest, lr.repeat(SCALE, 0).repeat(SCALE, 1))
    assert visit.shown("nearest.png") == saved["patch_x4_nearest.png"]
    assert {"patch_x4_table.json", "patch_x4_table.csv", "patch_x4_bicubic.png"} < set(saved)
    assert "agreement" in page.inner_text("#srkd-results"), "there is no truth to score against"


def test_scores_against_the_truth_are_those_of_the_metrics(
    visit: Visit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    page = visit.page
    upload(page, "#srkd-picture", pair[0])
    page.get_by_text("Ground truth (optional)").click()
    upload(page, "#srkd-truth", pair[1])
    compare(page)
    upscale_file(pair[0], tmp_path / "sr.png", SHIPPED)
    sr, hr = (
        torch.tensor(read_rgb8(path)).permute(2, 0, 1)[None]
        for path in (tmp_path / "sr.png", pair[1])
    )
    y, ssim = (float(value) for value in psnr_ssim(sr, hr, SCALE))
    rows = table_of(page)
    ours = next(row for name, row in rows.items() if name.startswith("RCAN-C"))
    assert ours["PSNR-Y (dB)"] == f"{y:.2f}"
    assert ours["SSIM-Y"] == f"{ssim:.4f}"
    assert ours["PSNR-RGB (dB)"] == f"{float(psnr(sr, hr, SCALE, RGB)):.2f}"
    assert {"ground truth", "nearest", "bicubic"} < set(rows)
    assert "BT.601, 16–235), PSNR-RGB; 8-bit, border 4 px" in page.inner_text("#srkd-results")


def test_keys_work_on_the_viewer_and_nowhere_else(visit: Visit, pair: tuple[Path, Path]) -> None:
    page = visit.page
    upload(page, "#srkd-picture", pair[0])
    compare(page)
    stage = page.locator(".srkd-stage")
    page.locator("body").press("k")
    assert pressed(page, "grid"), "the page itself takes no keys"
    stage.focus()
    for key, name in (
        ("k", "stack"),
        ("s", "slider"),
        ("g", "grid"),
        ("l", "lens"),
        ("d", "difference"),
    ):
        stage.press(key)
        assert pressed(page, name), key
    stage.press("z")
    assert page.inner_text(".srkd-zoom") == "100 %"
    stage.press("f")
    assert pressed(page, "fit")
    before = pressed(page, "pixels")
    stage.press("p")
    assert pressed(page, "pixels") is not before
    stage.press("k")
    fronts = []
    for number in "123":
        stage.press(number)
        fronts.append(
            page.locator(".srkd-pane[data-place=seen] .srkd-view").get_attribute("data-image")
        )
    assert fronts == ["nearest", "bicubic", SHIPPED]
    stage.press("ArrowRight")
    assert (
        page.locator(".srkd-pane[data-place=seen] .srkd-view").get_attribute("data-image")
        == "nearest"
    )
    stage.press("?")
    assert page.locator(".srkd-keys").is_visible()


def pressed(page: Page, name: str) -> bool:
    return (
        page.locator(f"#srkd-viewer button[data-do={name}]").get_attribute("aria-pressed") == "true"
    )


# Left and top edge of the black square in every pane's canvas, in device pixels.
EDGES = """() => Object.fromEntries([...document.querySelectorAll('.srkd-pane[data-place=seen] .srkd-view')].map(view => {
  const canvas = view.querySelector('canvas');
  const { width, height, data } = { width: canvas.width, height: canvas.height,
    data: canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data };
  let left = width, top = height;
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const at = 4 * (y * width + x);
    if (data[at + 3] === 255 && data[at] < 60 && data[at + 1] < 60 && data[at + 2] < 60) {
      left = Math.min(left, x); top = Math.min(top, y);
    }
  }
  return [view.dataset.image, [left, top]];
}))"""


def test_zoom_and_pan_are_one_for_all_panes_to_the_pixel(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    hr = np.full((24 * SCALE, 32 * SCALE, 3), 230, np.uint8)
    hr[10 * SCALE : 14 * SCALE, 12 * SCALE : 20 * SCALE] = 20
    write_png(tmp_path / "square_hr.png", hr)
    write_png(tmp_path / "square.png", downscale_uint8(hr, SCALE))
    upload(page, "#srkd-picture", tmp_path / "square.png")
    page.get_by_text("Ground truth (optional)").click()
    upload(page, "#srkd-truth", tmp_path / "square_hr.png")
    compare(page)
    stage = page.locator(".srkd-stage")
    stage.focus()
    for keys in (["z"], ["+", "+", "+"], ["Shift+ArrowRight", "Shift+ArrowDown"]):
        for key in keys:
            stage.press(key)
        page.wait_for_timeout(300)
        zoom = int(re.sub(r"\D", "", page.inner_text(".srkd-zoom"))) / 100
        edges = page.evaluate(EDGES)
        assert set(edges) == {"truth", "nearest", "bicubic", SHIPPED}
        exact = edges["truth"]
        assert exact == edges["nearest"]
        for left, top in edges.values():
            # Interpolation moves an edge by a part of an LR pixel, never the panes against each other.
            assert abs(left - exact[0]) <= SCALE * zoom / 2, edges
            assert abs(top - exact[1]) <= SCALE * zoom / 2, edges
    kept = page.inner_text(".srkd-zoom")
    compare(page)
    assert page.inner_text(".srkd-zoom") == kept, "a new result keeps the view"


def test_stop_ends_a_job_and_the_next_one_runs(
    visit: Visit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    page = visit.page
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    write_png(tmp_path / "large.png", noise)
    upload(page, "#srkd-picture", tmp_path / "large.png")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_function(
        "document.querySelector('#srkd-status').textContent.includes('model 1/1')"
    )
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.wait_for_function("document.querySelector('#srkd-status').textContent.includes('Stopped')")
    page.locator("#srkd-files a[href]").first.wait_for()
    kept = page.inner_text("#srkd-files")
    assert "large_x4_nearest.png" in kept, "what was finished stays"
    assert SHIPPED not in kept
    assert "not finished: pictures that were asked for are missing" in page.inner_text(
        "#srkd-results"
    )
    page.locator("#srkd-picture button[aria-label^=Remove]").click()
    upload(page, "#srkd-picture", pair[0])
    compare(page)
    assert "patch_x4_nearest.png" in page.inner_text("#srkd-files")
    assert SHIPPED in page.inner_text("#srkd-files")


def test_an_example_is_compared_by_one_click(visit: Visit) -> None:
    page = visit.page
    thumbnails = page.locator("#srkd-examples button img")
    assert thumbnails.count() == 6
    thumbnails.last.click()
    wait_for_status(page, "Done.")
    assert "transparent pixels, so nothing is scored" in page.inner_text("#srkd-right")
    assert page.locator(".srkd-pane[data-place=seen]").count() == 4


def test_a_telephone_scrolls_one_way_only(visit: Visit, pair: tuple[Path, Path]) -> None:
    page = visit.page
    page.set_viewport_size({"width": 390, "height": 844})
    upload(page, "#srkd-picture", pair[0])
    compare(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert pressed(page, "stack")


def test_a_refusal_is_one_sentence_with_both_sizes(
    visit: Visit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    page = visit.page
    upload(page, "#srkd-picture", pair[0])
    page.get_by_text("Ground truth (optional)").click()
    write_png(tmp_path / "other.png", np.zeros((50, 60, 3), np.uint8))
    upload(page, "#srkd-truth", tmp_path / "other.png")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.wait_for_function(
        "document.querySelector('#srkd-status .srkd-page-refusal, #srkd-status .srkd-refusal')"
    )
    told = page.inner_text("#srkd-status")
    assert "60x50" in told
    assert "128x96" in told
    assert str(tmp_path) not in told
