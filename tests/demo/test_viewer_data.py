"""What the viewer is given for a result, and its own files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from demo.jobs import Numbers, Pane, Result, Role
from demo.viewer_data import FOLDER, SCRIPTS, assets, viewer_data


def pane(key: str, role: Role = "model", numbers: Numbers | None = None, label: str = "") -> Pane:
    file = Path(f"/secret/{key}.png")
    return Pane(key, label or key.title(), role, file, (192, 256), numbers or Numbers())


def result(*panes: Pane, reference: str | None = None) -> Result:
    return Result(panes, "photo.png", 4, (48, 64), "PSNR-Y, border 4 px", reference)


def as_data(*panes: Pane, reference: str | None = None) -> dict:
    return viewer_data(result(*panes, reference=reference), lambda path: f"/file={path.name}")


def lines_of(numbers: Numbers, reference: str | None = None) -> list[str]:
    panes = (pane("teacher"), pane("student", numbers=numbers))
    return as_data(*panes, reference=reference)["images"][1]["lines"]


def test_keys_of_the_contract() -> None:
    data = as_data(pane("truth", "truth"), pane("nearest", "nearest"), pane("student"))
    assert {key: data[key] for key in data if key != "images"} == {
        "scale": 4,
        "lr": [48, 64],
        "name": "photo.png",
        "protocol": "PSNR-Y, border 4 px",
        "truth": "truth",
        "reference": None,
    }
    assert data["images"][2] == {
        "key": "student",
        "label": "Student",
        "role": "model",
        "url": "/file=student.png",
        "w": 256,
        "h": 192,
        "alt": "Student, 256×192 pixels",
        "lines": [],
    }
    assert "/secret" not in json.dumps(data, allow_nan=False)


def test_quality_against_the_truth_then_time() -> None:
    numbers = Numbers(psnr_y=31.614, ssim_y=0.89123, model_s=0.35, warm=True)
    assert lines_of(numbers) == ["PSNR-Y 31.61 dB", "SSIM-Y 0.8912", "model 350 ms (one warm run)"]


def test_a_first_run_is_never_shown_as_the_speed() -> None:
    assert lines_of(Numbers(model_s=2.0, warm=False)) == ["model 2000 ms (first run, with loading)"]
    measured = Numbers(model_s=2.0, warm=False, p50_ms=11.25, runs=30)
    assert lines_of(measured) == ["model 11.2 ms (p50, warm)"]


def test_a_time_of_a_busy_machine_says_so() -> None:
    assert lines_of(Numbers(p50_ms=11.25, busy=True)) == [
        "model 11.2 ms (p50, warm, on a busy machine)"
    ]


def test_without_a_truth_agreement_names_the_model() -> None:
    assert lines_of(Numbers(agreement_db=43.2), "teacher") == ["agrees with Teacher: 43.20 dB"]
    assert lines_of(Numbers(agreement_db=43.2)) == []


def test_identical_pictures_have_no_number_that_json_cannot_hold() -> None:
    assert lines_of(Numbers(psnr_y=math.inf)) == ["PSNR-Y ∞ dB (identical)"]


def test_text_of_an_unfinished_result_is_complete() -> None:
    """The reference may not be finished yet; then nothing refers to it."""
    data = as_data(pane("bicubic", "bicubic"), reference="teacher")
    assert data["reference"] is None and data["truth"] is None


def test_markup_stays_text() -> None:
    label = '<img src=x onerror="alert(1)">'
    image = as_data(pane("student", label=label))["images"][0]
    assert image["label"] == label and image["alt"].startswith(label)


def test_assets_are_whole_and_ask_nobody_else() -> None:
    html, css, js = assets()
    assert set(SCRIPTS) == {path.name for path in FOLDER.glob("*.js")}
    assert 'class="srkd-viewer"' in html and "<script" not in html
    # Gradio treats markup as a template of JavaScript and of Handlebars.
    assert not re.search(r"\$\{|\{\{|`", html)
    assert not re.search(r"\bid=", html)
    for text in (html, css, js):
        assert not re.search(r"https?://|@import|@font-face", text)
    assert not re.search(r"\binnerHTML|insertAdjacentHTML|outerHTML|\beval\(", js)


def test_no_rule_reaches_beyond_the_viewer() -> None:
    css = re.sub(r"/\*.*?\*/", "", assets()[1], flags=re.S)
    selectors = [one.strip() for rule in re.findall(r"([^{}]+)\{", css) for one in rule.split(",")]
    assert len(selectors) > 50
    assert [one for one in selectors if not one.startswith(".srkd-viewer")] == []
