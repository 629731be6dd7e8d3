"""Numbers of the table: computed as the papers do, told with what they mean, harmless as files."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from demo.jobs import Numbers, Pane, Result, Role
from demo.scores import (
    BEST,
    cost_of,
    protocol_of,
    scores,
    shown_name,
    table,
    to_csv,
    to_json,
    too_small,
)
from srkd.data.degradation import downscale_uint8
from srkd.metrics import RGB, psnr, ssim
from srkd.networks import build_family
from srkd.types import Facts


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 246, (h, w, 3), dtype=np.uint8)


def tensor(rgb: np.ndarray) -> torch.Tensor:
    return torch.tensor(rgb).permute(2, 0, 1)[None]


def pane(key: str, role: Role = "model", notes: tuple[str, ...] = (), **numbers: object) -> Pane:
    made = Numbers(**numbers)  # type: ignore[arg-type]
    return Pane(key, key.upper(), role, Path("hidden") / f"{key}.png", (40, 60), made, notes)


def result(*panes: Pane, **facts: object) -> Result:
    asked = {"name": "photo.png", "scale": 4, "lr_size": (10, 15), "protocol": protocol_of(4)}
    return Result(panes, **{**asked, **facts})  # type: ignore[arg-type]


# --- scores -------------------------------------------------------------------------------------


def test_psnr_of_a_constant_offset_by_hand() -> None:
    """+10 in R, G and B is 10 * (65.481 + 128.553 + 24.966) / 255 = 8.5882 in Y."""
    truth = noise(40, 48)
    found = scores(truth + 10, 4, truth=truth)
    assert found["psnr_rgb"] == pytest.approx(20 * math.log10(255 / 10))
    assert found["psnr_y"] == pytest.approx(20 * math.log10(255 / (2190 / 255)))
    assert found.keys() == {"psnr_y", "ssim_y", "psnr_rgb"}


def test_scores_are_those_of_the_papers_protocol() -> None:
    a, b = noise(40, 48), noise(40, 48, 1)
    found = scores(a, 2, truth=b, reference=b)
    assert found["psnr_y"] == float(psnr(tensor(a), tensor(b), 2))
    assert found["ssim_y"] == float(ssim(tensor(a), tensor(b), 2))
    assert found["psnr_rgb"] == float(psnr(tensor(a), tensor(b), 2, RGB))
    assert found["agreement_db"] == found["psnr_y"]


def test_equal_pictures_are_infinitely_alike() -> None:
    a = noise(40, 48)
    found = scores(a, 4, truth=a, reference=a, lr=downscale_uint8(a, 4))
    assert found["ssim_y"] == 1
    assert all(math.isinf(v) for key, v in found.items() if key != "ssim_y")


def test_consistency_counts_the_border_too() -> None:
    """A flat picture stays flat when it is reduced; one LR corner off by 10 levels is 1 of 8 * 12 pixels."""
    sr, lr = np.full((32, 48, 3), 100, np.uint8), np.full((8, 12, 3), 100, np.uint8)
    lr[0, 0] += 10
    error = (2190 / 255) ** 2 / (8 * 12)
    assert scores(sr, 4, lr=lr)["consistency_db"] == pytest.approx(10 * math.log10(255**2 / error))


@pytest.mark.parametrize(
    ("side", "kept", "word"),
    [
        (8, set(), "PSNR and SSIM"),
        (9, {"psnr_y", "psnr_rgb"}, "SSIM"),
        (18, {"psnr_y", "psnr_rgb"}, "SSIM"),
        (19, {"psnr_y", "ssim_y", "psnr_rgb"}, None),
    ],
)
def test_scores_that_a_picture_is_too_small_for_are_left_out(
    side: int, kept: set[str], word: str | None
) -> None:
    a = noise(side, 40)
    assert scores(a, 4, truth=a).keys() == kept
    told = too_small((side, 40), 4)
    assert len(told) == (word is not None)
    if word:
        assert told[0].startswith(f"40x{side} px are too small for {word}:")


# --- cost ---------------------------------------------------------------------------------------


def test_cost_of_a_whole_picture_by_hand() -> None:
    """A convolution of 3 to 12 channels, 3x3: 3 * 9 * 12 multiply-adds a pixel."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.PixelShuffle(2))
    facts = Facts(scale=2, receptive_field_px=1, exact_tiling=True)
    for h, w in [(3, 5), (31, 47), (1000, 1500)]:
        assert cost_of(network, (h, w), facts) == (12 * 28, h * w * 324 / 1e9)


def test_cost_that_only_a_run_could_tell_is_not_made_up() -> None:
    attending = build_family(
        "san", {"scale": 2, "channels": 8, "blocks": 1, "group_count": 1, "reduction": 2}
    )
    parameters, macs_g = cost_of(attending, (1000, 1500))
    assert parameters > 0 and macs_g is None


# --- table --------------------------------------------------------------------------------------


def column(shown: object, header: str) -> list[str]:
    at = shown.headers.index(header)  # type: ignore[attr-defined]
    return [row[at] for row in shown.rows]  # type: ignore[attr-defined]


def test_best_is_marked_with_a_sign_and_ties_within_rounding_share_it() -> None:
    shown = table(
        result(
            pane("truth", "truth"),
            pane("nearest", "nearest", psnr_y=24.1, ssim_y=0.7),
            pane("bicubic", "bicubic", psnr_y=26.0, ssim_y=0.80001),
            pane("a", psnr_y=28.1012, ssim_y=0.80004),
            pane("b", psnr_y=28.0951, ssim_y=0.8012),
        )
    )
    assert column(shown, "PSNR-Y (dB)") == ["–", "24.10", "26.00", f"28.10 {BEST}", f"28.10 {BEST}"]
    assert column(shown, "SSIM-Y") == ["–", "0.7000", "0.8000", "0.8000", f"0.8012 {BEST}"]
    assert shown.marks == {(3, 1), (4, 1), (4, 2)}
    assert [row[0] for row in shown.rows] == ["TRUTH", "NEAREST", "BICUBIC", "A", "B"]
    assert "BT.601, 16–235), PSNR-RGB; 8-bit, border 4 px" in shown.caption


def test_infinite_score_is_the_best_and_told_in_words() -> None:
    shown = table(result(pane("a", psnr_y=math.inf), pane("b", psnr_y=50.0)))
    assert column(shown, "PSNR-Y (dB)") == [f"equal (inf) {BEST}", "50.00"]


def test_single_value_is_no_winner() -> None:
    shown = table(result(pane("bicubic", "bicubic"), pane("a", psnr_y=28.0, p50_ms=3.0)))
    assert not shown.marks and BEST not in shown.caption


def test_without_truth_the_reference_is_named_and_does_not_compete() -> None:
    shown = table(
        result(
            pane("bicubic", "bicubic", agreement_db=30.0, consistency_db=40.0),
            pane("t", agreement_db=math.inf, consistency_db=50.0),
            pane("s", agreement_db=35.0, consistency_db=51.0),
            reference="t",
        )
    )
    header = "agreement with T (PSNR-Y, dB)"
    assert column(shown, header) == ["30.00", "reference", f"35.00 {BEST}"]
    assert "PSNR-Y (dB)" not in shown.headers
    assert "not how good" in shown.caption and "no border cropped" in shown.caption


def test_times_say_what_they_are() -> None:
    timed = {"runs": 30, "timed_px": (200, 256)}
    shown = table(
        result(
            pane("a", model_s=0.123, total_s=1.0, warm=True, p50_ms=100.0, p95_ms=110.0, **timed),
            pane("b", model_s=4.0, total_s=5.5, warm=False, p50_ms=101.9, p95_ms=102.0, **timed),
            pane("c", p50_ms=102.1, p95_ms=103.0, **timed),
        )
    )
    assert column(shown, "one run: network (s)") == ["0.123, warm", "4, cold", "–"]
    assert column(shown, "p50 (ms)") == [f"100 {BEST}", f"102 {BEST}", "102"]  # 2 % apart is a tie
    assert column(shown, "timed") == ["n = 30, LR 256x200 px"] * 3


def test_nothing_is_fastest_on_a_busy_machine() -> None:
    timed = {"runs": 30, "timed_px": (9, 9), "busy": True}
    shown = table(result(pane("a", p50_ms=1.0, **timed), pane("b", p50_ms=9.0, **timed)))
    assert not shown.marks
    assert column(shown, "timed") == ["n = 30, LR 9x9 px, on a busy machine"] * 2


def test_notes_follow_the_table_and_missing_pictures_are_told() -> None:
    shown = table(result(pane("a", notes=("16-bit",)), notes=("cropped",), complete=False))
    assert shown.notes == ("cropped", "A: 16-bit")
    assert "not finished" in shown.caption
    assert "stopped" not in shown.caption  # it may still be running


# --- files --------------------------------------------------------------------------------------


def read_csv(text: str) -> list[dict[str, str]]:
    assert text.endswith("\r\n")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_reads_back_in_full_precision() -> None:
    made = result(
        pane("a", psnr_y=28.123456789, warm=False, timed_px=(3, 4)), pane("b", psnr_y=math.inf)
    )
    first, second = read_csv(to_csv(made))
    assert float(first["psnr_y_db"]) == 28.123456789
    assert (first["timed_lr_h"], first["timed_lr_w"], first["warm"]) == ("3", "4", "False")
    assert second["psnr_y_db"] == "inf" and second["ssim_y"] == ""
    assert first["protocol"] == protocol_of(4)


@pytest.mark.parametrize(
    "name", ["=cmd|'calc'!A0", "+1+1", "-2+3", "@SUM(A1)", '=HYPERLINK("x","y")']
)
def test_csv_cells_never_start_a_formula(name: str) -> None:
    made = result(pane("a", notes=(name,)), name=name)
    (row,) = read_csv(to_csv(made))
    assert row["picture"][0] == "'" and row["notes"] == f"'{name}"
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row.values())


def test_csv_keeps_quotes_commas_and_line_ends_in_their_cell() -> None:
    note = 'a "quoted", note\r\nof two lines'
    (row,) = read_csv(to_csv(result(pane("a", notes=(note,)))))
    assert row["notes"] == note


def test_json_is_strict_and_names_no_folder_of_the_server() -> None:
    made = result(pane("a", psnr_y=math.inf, engine="torch", device="cpu"), name="/srv/x/photo.png")
    text = to_json(made)
    found = json.loads(text, parse_constant=pytest.fail)
    assert "hidden" not in text and "/srv" not in text
    assert found["name"] == "photo.png" and found["protocol"] == protocol_of(4)
    assert found["srkd"] and found["time"] and found["environment"]["cpu"]
    (one,) = found["panes"]
    assert one["file"] == "a.png" and one["numbers"]["psnr_y"] == "inf"
    assert one["numbers"]["device"] == "cpu" and one["numbers"]["ssim_y"] is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("..\\secret\\a b.png", "a b.png"),
        ("a\ud800.png", "a?.png"),
        ("a\u202eb\n.png", "ab.png"),
        ("dir/", "picture"),
        ("x" * 500, "x" * 120),
    ],
)
def test_names_are_shown_as_one_line_of_valid_text(name: str, shown: str) -> None:
    assert shown_name(name) == shown
    assert to_csv(result(pane("a"), name=name)).encode()
    assert to_json(result(pane("a"), name=name)).encode()
