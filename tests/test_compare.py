"""Comparisons of run folders with known scores: hand-worked means, spreads, gains, costs; what is refused."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from scored_run import Scores, make_run

from scripts.compare import main
from srkd import plots
from srkd.compare import Comparison, compare
from srkd.compare_pages import gain_text, html, markdown
from srkd.console import run_command
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import read_json, write_json, write_text
from srkd.finished import find_runs
from srkd.papers import OUR_NAME, paper_gains, sets_for

if TYPE_CHECKING:
    from srkd.compare_rows import Row


def sets(set5: float, set14: float) -> Scores:
    return {"Set5": set5, "Set14": set14}


def compared(*folders: Path, **options: Any) -> Comparison:
    return compare(find_runs(folders), **options)


def row_of(comparison: Comparison, method: str, table: int = 0) -> Row:
    (row,) = [r for r in comparison.tables[table].rows if r.label == method]
    return row


# -- quality ------------------------------------------------------------------------------------


def test_means_spreads_and_paired_gain_by_hand(tmp_path: Path) -> None:
    make_run(tmp_path / "s0", "scratch", 0, sets(30.0, 27.0))
    make_run(tmp_path / "s1", "scratch", 1, sets(30.2, 27.4))
    make_run(tmp_path / "l0", "logits", 0, sets(30.3, 27.1))
    make_run(tmp_path / "l1", "logits", 1, sets(30.4, 27.8))
    make_run(tmp_path / "l2", "logits", 2, sets(39.0, 39.0))  # no scratch of this seed
    result = compared(tmp_path)
    scratch, logits = result.tables[0].rows

    set5 = scratch.score("Set5", "psnr_y")
    assert (set5.mean, set5.sd, set5.n) == (pytest.approx(30.1), pytest.approx(0.1 * 2**0.5), 2)
    assert scratch.score("Set14", "ssim_y").mean == pytest.approx(0.272)
    assert logits.score("Set5", "psnr_y").n == 3
    # Differences: seed 0 0.3 and 0.1, seed 1 0.2 and 0.4; means over the sets 0.2 and 0.3.
    assert logits.gain is not None and [*logits.gain.differences] == [0, 1]
    gain = logits.gain.over()
    assert (gain.mean, gain.sd) == (pytest.approx(0.25), pytest.approx(0.05 * 2**0.5))
    set14 = logits.gain.over(["Set14"])
    assert (set14.mean, set14.sd) == (pytest.approx(0.25), pytest.approx(0.15 * 2**0.5))
    assert logits.gain.within_spread is False
    assert gain_text(logits) == "+0.250 ± 0.071 (2 of 3 seeds)"
    assert gain_text(scratch) == "baseline"
    assert "leaves out seed 2" in result.tables[0].notes[0]


@pytest.mark.parametrize(
    ("scores", "within", "text"),
    [
        ([30.1, 29.95], True, "+0.025 ± 0.106 not significant"),
        ([29.9, 29.7], False, "-0.200 ± 0.141"),
        ([30.3], None, "+0.300 ± -"),
    ],
)
def test_gain_is_held_against_its_spread(
    tmp_path: Path, scores: list[float], within: bool | None, text: str
) -> None:
    for seed, score in enumerate(scores):
        make_run(tmp_path / f"s{seed}", "scratch", seed, {"Set5": 30.0})
        make_run(tmp_path / f"l{seed}", "logits", seed, {"Set5": score})
    row = row_of(compared(tmp_path), "logits")
    assert row.gain is not None and row.gain.within_spread is within
    assert gain_text(row) == text


def test_a_seed_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, "scratch", 0, {"Set5": 30.0 if name == "a" else 30.2})
    (row,) = compared(tmp_path).tables[0].rows
    assert len(row.runs) == 2
    score = row.score("Set5", "psnr_y")
    assert (score.mean, score.sd, score.n) == (pytest.approx(30.1), None, 1)


def test_without_scratch_or_common_seed_there_is_no_gain(tmp_path: Path) -> None:
    run = make_run(tmp_path / "l", "logits", 0, {"Set5": 30.0})
    result = compared(run)
    assert gain_text(row_of(result, "logits")) == "-"
    assert "there is no scratch run" in result.tables[0].notes[0]
    make_run(tmp_path / "s", "scratch", 5, {"Set5": 30.0})
    result = compared(tmp_path)
    assert gain_text(row_of(result, "logits")) == "-"
    assert "no seed is also that of a scratch run" in result.tables[0].notes[0]


def test_runs_without_validation_say_so(tmp_path: Path) -> None:
    make_run(tmp_path / "l", "logits", 0, {})
    make_run(tmp_path / "s", "scratch", 0, {})
    assert "validated on nothing" in compared(tmp_path).tables[0].notes[0]


# -- groups and budgets -------------------------------------------------------------------------


def test_paths_and_how_often_things_are_shown_make_no_group(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "logits", 0, {"Set5": 30.0})
    shown = ("train.log_every=7", "train.save_every=9", "validate.every=3", "data.cache=elsewhere")
    place = (f"data.train={tmp_path}", f"data.lr={tmp_path}", "teacher.models=['copy/rcan_c']")
    make_run(tmp_path / "b", "logits", 1, {"Set5": 30.0}, *shown, *place)
    (table,) = compared(tmp_path).tables
    (row,) = table.rows
    assert [*row.seeds] == [0, 1]


def test_students_options_and_teachers_make_rows_of_their_own(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "logits", 0, {"Set5": 30.0})
    make_run(tmp_path / "b", "logits", 0, {"Set5": 30.1}, "method.logits_weight=0.5")
    make_run(tmp_path / "c", "logits", 0, {"Set5": 30.2}, teacher=("rcan_c_x4", "u" * 64))
    make_run(tmp_path / "d", "logits", 0, {"Set5": 30.3}, student="rcan_a")
    (table,) = compared(tmp_path).tables
    told = {(r.student, r.label, r.teacher): r.quality().mean for r in table.rows}
    ours, other = "rcan_c_x4 (tttttttt)", "rcan_c_x4 (uuuuuuuu)"
    assert told == {
        ("edsr_tiny", "logits (logits_weight=1.0)", ours): 30.0,
        ("edsr_tiny", "logits (logits_weight=0.5)", ours): 30.1,
        ("edsr_tiny", "logits", other): 30.2,
        ("rcan_a", "logits", ours): 30.3,
    }
    series = [r.series for r in table.rows if r.student == "edsr_tiny"]
    assert len(set(series)) == 3 and f"logits of {other}" in series


def test_a_budget_counts_steps_on_hr(tmp_path: Path) -> None:
    """Stage-wise fitnet has its steps on HR after those on features; those of mkd's loop count."""
    longer = ("train.iterations=26", "train.distil_iterations=6")
    make_run(tmp_path / "s", "scratch", 0, {"Set5": 30.0}, "train.iterations=20")
    make_run(tmp_path / "f", "fitnet", 0, {"Set5": 30.1}, *longer)
    make_run(tmp_path / "j", "fitnet", 0, {"Set5": 30.3}, "train.iterations=20")
    make_run(
        tmp_path / "m", "mkd", 0, {"Set5": 30.2}, "train.iterations=20", "train.distil_iterations=6"
    )
    (table,) = compared(tmp_path).tables
    assert table.title.startswith("20 steps on HR, ")
    told = {r.label: gain_text(r) for r in table.rows}
    assert told == {
        "scratch": "baseline",
        "fitnet (train.distil_iterations=0)": "+0.300 ± -",
        "fitnet (train.distil_iterations=6)": "+0.100 ± -",
        "mkd": "+0.200 ± -",
    }
    notes = "\n".join(table.notes)
    assert "6): 6 iterations on features alone come on top" in notes
    assert "mkd: 6 of its steps on HR lie between steps on features" in notes


@pytest.mark.parametrize(
    ("change", "facts", "difference"),
    [
        ("train.iterations=10", {}, "steps on HR: 250000 -> 10"),
        ("train.batch=8", {}, "train.batch: 16 -> 8"),
        ("data.patch=24", {}, "data.patch: 48 -> 24"),
        ("train.learning_rate=1e-3", {}, "train.learning_rate: 0.0001 -> 0.001"),
        ("train.schedule=cosine", {}, "train.schedule: step -> cosine"),
        ("student.weights=mine", {}, "student.weights: none -> mine"),
        ("seed=1", {"precision": "bf16"}, "train.precision: fp32 -> bf16"),
        ("seed=1", {"digest": "e" * 64}, "data.digest: dddddddddddd... -> eeeeeeeeeeee..."),
        ("seed=1", {"other_set": "Set14"}, "validate.sets: Set5 -> Set14"),
    ],
)
def test_another_budget_stands_apart(
    tmp_path: Path, change: str, facts: dict[str, Any], difference: str
) -> None:
    measured = facts.pop("other_set", "Set5")
    make_run(tmp_path / "a", "scratch", 1, {"Set5": 30.0})
    make_run(tmp_path / "b", "logits", 1, {measured: 31.0}, change, **facts)
    result = compared(tmp_path)
    assert [t.differences for t in result.tables] == [[], [difference]]
    assert gain_text(row_of(result, "logits", table=1)) == "-"
    page = markdown(result, picture="")
    assert "## Budget 2" in page and "Not to be compared with budget 1" in page


# -- finding and checking -----------------------------------------------------------------------


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    taught = make_run(tmp_path / "x" / "y" / "a", "logits", 0, {"Set5": 30.2}, "with_baseline=true")
    make_run(taught / "baseline", "scratch", 0, {"Set5": 30.0})
    alone = make_run(tmp_path / "x" / "b", "logits", 1, {"Set5": 30.3})
    make_run(alone / "baseline", "scratch", 1, {"Set5": 30.0})  # nobody asked for this one
    found = find_runs([tmp_path, taught])
    assert [r.folder for r in found.runs] == [alone, taught, taught / "baseline"]
    row = row_of(compare(found), "logits")
    assert row.gain is not None and row.gain.differences == {0: {"Set5": pytest.approx(0.2)}}


def test_unfinished_runs_are_named_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", "scratch", 0, {"Set5": 30.0})
    write_text(tmp_path / "b" / "recipe.toml", "")
    make_run(tmp_path / "c", "logits", 0, {"Set5": 30.0}, "with_baseline=true")
    assert main([str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"skipped {tmp_path / 'b'}: not finished" in err
    assert f"skipped {tmp_path / 'c' / 'baseline'}: not there" in err
    assert len(json.loads(out)["skipped"]) == 2


def other_weights(run: Path) -> None:
    weights = run / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")


def no_weights(run: Path) -> None:
    (run / "weights.safetensors").unlink()


def no_recipe(run: Path) -> None:
    (run / "recipe.toml").unlink()


def half_a_description(run: Path) -> None:
    (run / "model.json").write_text("{")


def without(*keys: str) -> Any:
    def change(run: Path) -> None:
        info = node = read_json(run / "model.json")
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
        write_json(run / "model.json", info)

    return change


def other_seed(run: Path) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 1", "seed = 4"))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (other_weights, "is not the file that was scored"),
        (no_weights, "is not the file that was scored"),
        (no_recipe, "has no recipe.toml"),
        (half_a_description, "cannot read"),
        (without("weights_sha256"), "damaged or incomplete"),
        (without("scores", "Set5", "psnr_y"), "damaged or incomplete"),
        (without("training", "data"), "damaged or incomplete"),
        (other_seed, "seed is 1, but 4 in recipe.toml"),
    ],
)
def test_a_run_that_fails_its_check_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Any, reason: str
) -> None:
    make_run(tmp_path / "good", "scratch", 1, {"Set5": 30.0})
    bad = make_run(tmp_path / "bad", "logits", 1, {"Set5": 31.0})
    harm(bad)
    assert run_command(main, [str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert f"FAILED {bad}: " in err and reason in err
    document = json.loads(out)
    assert [*document["failed"]] == [str(bad)]
    assert [r["method"] for t in document["tables"] for r in t["rows"]] == ["scratch"]
    with pytest.raises(CheckFailedError, match="no run that can be compared"):
        compared(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no run folder"),
        (lambda p: write_text(p / "recipe.toml", ""), "not finished"),
    ],
)
def test_nothing_to_compare_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(SrkdError, match=message) as refusal:
        compared(tmp_path)
    assert refusal.value.exit_code == 2
    with pytest.raises(SrkdError, match="is no folder"):
        find_runs([tmp_path / "nowhere"])


# -- cost ---------------------------------------------------------------------------------------


def costed(folder: Path) -> Path:
    make_run(folder / "s", "scratch", 0, {"Set5": 30.0}, speeds=(12.0,))
    make_run(folder / "l0", "logits", 0, {"Set5": 30.0}, speeds=(1.0, 8.0, 9.0))  # first lap slow
    make_run(folder / "l1", "logits", 1, {"Set5": 30.0}, speeds=(10.0,))
    make_run(folder / "f", "fitnet", 0, {"Set5": 30.0}, speeds=(6.0,))
    return folder


def test_cost_from_the_logs(tmp_path: Path) -> None:
    result = compared(costed(tmp_path))
    costs = {r.method: r.cost for r in result.tables[0].rows}
    # logits: medians 8 and 10 steps/s, together 9.
    assert row_of(result, "logits").steps_per_s == 9.0
    assert costs == {"scratch": 0.75, "logits": 1.0, "fitnet": 1.5}
    assert "only a hint" in result.cost_note
    other = compared(tmp_path, baseline="fitnet")
    assert row_of(other, "scratch").cost == 0.5
    with pytest.raises(
        SrkdError, match=r"no method 'fitnett' in these runs.*did you mean 'fitnet'"
    ):
        compared(tmp_path, baseline="fitnett")


def test_speeds_of_two_devices_or_teachers_are_no_cost(tmp_path: Path) -> None:
    make_run(tmp_path / "l", "logits", 0, {"Set5": 30.0}, speeds=(8.0,))
    make_run(tmp_path / "f", "fitnet", 0, {"Set5": 30.0}, speeds=(40.0,), device="cuda")
    make_run(tmp_path / "a", "at", 0, {"Set5": 30.0}, speeds=(4.0,), teacher=("other", "o" * 64))
    rows = compared(tmp_path).tables[0].rows
    assert {r.method: r.cost for r in rows} == {"logits": 1.0, "fitnet": None, "at": None}


def test_cost_from_a_measurement(tmp_path: Path) -> None:
    record = tmp_path / "cost.json"
    rows = {"logits": {"ratio": 1.0}, "fitnet": {"ratio": 1.3}}
    write_json(record, {"pair": "rcan_c -> edsr_tiny x4", "rows": rows})
    result = compared(costed(tmp_path / "runs"), cost=record)
    costs = {r.method: r.cost for r in result.tables[0].rows}
    assert costs == {"scratch": None, "logits": 1.0, "fitnet": 1.3}
    assert "interleaved measurement of rcan_c -> edsr_tiny x4" in result.cost_note
    assert row_of(compared(tmp_path / "runs", cost=record, baseline="fitnet"), "logits").cost == (
        pytest.approx(1 / 1.3)
    )
    # Another switch was not measured; another weight costs the same.
    make_run(tmp_path / "none", "fitnet", 0, {"Set5": 30.0}, "method.feature_norm=none")
    make_run(tmp_path / "half", "fitnet", 0, {"Set5": 30.0}, "method.weight=0.5")
    assert compared(tmp_path / "none", cost=record).tables[0].rows[0].cost is None
    assert compared(tmp_path / "half", cost=record).tables[0].rows[0].cost == 1.3
    write_json(record, {"pair": "rcan -> edsr_tiny x4", "rows": rows})
    assert row_of(compared(tmp_path / "runs", cost=record), "fitnet").cost is None
    write_json(record, {"pair": "rcan_c -> rcan_a x4", "rows": rows})
    assert row_of(compared(tmp_path / "runs", cost=record), "fitnet").cost is None
    assert "hint" not in result.cost_note
    with pytest.raises(SrkdError, match=r"no method 'at' in .*cost\.json"):
        compared(tmp_path / "runs", cost=record, baseline="at")


@pytest.mark.parametrize(
    "content", [{}, {"rows": {}}, {"rows": {"logits": 3}}, {"rows": {"logits": {"ratio": 0}}}]
)
def test_a_file_without_costs_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    write_json(tmp_path / "cost.json", content)
    run = make_run(tmp_path / "l", "logits", 0, {"Set5": 30.0})
    with pytest.raises(SrkdError, match="no record of method costs"):
        compared(run, cost=tmp_path / "cost.json")


def test_multiply_adds_are_counted_once_per_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import srkd.cost

    calls = []
    count = srkd.cost.cost
    monkeypatch.setattr(srkd.cost, "cost", lambda *a: calls.append(a) or count(*a))
    for seed in range(3):
        make_run(tmp_path / str(seed), "logits", seed, {"Set5": 30.0})
    (row,) = compared(tmp_path).tables[0].rows
    assert len(calls) == 1
    # Head, nine body convolutions, two x2 stages at 1 and 4 times the pixels, last at 16 times.
    products = 3 * 16 + 9 * 16 * 16 + 16 * 64 + 4 * 16 * 64 + 16 * 16 * 3
    assert row.macs_g == pytest.approx(256 * 256 * 9 * products / 1e9, rel=1e-12)


# -- papers -------------------------------------------------------------------------------------


def test_paper_gain_by_hand() -> None:
    # MiPKD Table 3, x4, Set5 and Set14: 32.58 and 28.84, from scratch 32.38 and 28.69.
    (gain,) = [g for g in paper_gains("mipkd", 4, ["Set5", "Set14"]) if g.table == "3"]
    assert (gain.paper, gain.student, gain.sets) == ("MiPKD", "RCAN_c64b6g10", ("Set5", "Set14"))
    assert gain.gain_db == pytest.approx((0.20 + 0.15) / 2)


def test_doubtful_cells_give_no_gain() -> None:
    usual = ("Set5", "Set14", "BSD100")
    rows = {(g.paper, g.student): g for g in paper_gains("fitnet", 4, usual)}
    b = rows["MKD", "RCAN-B"]  # Vanilla and FitNet on BSD100 are printed as 24.17 and 24.22
    assert b.sets == ("Set5", "Set14") and any("without BSD100" in n for n in b.notes)
    assert rows["MKD", "RCAN-A"].sets == usual
    # DUKD Table 2 x2: RCAN Scratch equals SwinIR DUKD in every cell, and others quote these rows.
    assert {(g.paper, g.student) for g in paper_gains("dukd", 2, usual)} == {
        ("DUKD", "EDSR_c64b32"),
        ("MTKD", "RCAN_lightweight"),
    }
    assert {g.student for g in paper_gains("mipkd", 2, usual)} == {
        "EDSR_c64b32",
        "SwinIR_c60b4_pixelshuffle",
    }


def test_every_method_of_the_papers_has_gains_at_x4() -> None:
    for method in {*OUR_NAME.values()} - {"scratch"}:
        gains = paper_gains(method, 4, ("Set5", "Set14", "BSD100"))
        assert gains, method
        # What remains after the doubtful cells is plausible; a wrong digit would be dBs away.
        assert all(abs(g.gain_db) < 0.5 for g in gains), method
    assert paper_gains("scratch", 4, ["Set5"]) == [] == paper_gains("dukd+mipkd", 4, ["Set5"])


def test_gains_stand_beside_the_papers(tmp_path: Path) -> None:
    assert sets_for(["builtin"]) == ("Set5", "Set14", "BSD100")
    for student, more in (("edsr_tiny", 0.0), ("rcan_a", 0.1)):
        make_run(tmp_path / student / "s", "scratch", 0, sets(30.0, 27.0), student=student)
        better = sets(30.1 + more, 27.3 + more)
        make_run(tmp_path / student / "f", "fitnet", 0, better, student=student)
    (row,) = compared(tmp_path).papers
    assert (row.method, row.scale, row.sets) == ("fitnet", 4, ("Set5", "Set14"))
    ours = {name: gain.mean for name, gain in row.ours.items()}
    assert ours == {"edsr_tiny": pytest.approx(0.2), "rcan_a": pytest.approx(0.3)}
    assert {g.paper for g in row.papers} == {"MiPKD", "MKD"}
    page = markdown(compared(tmp_path), picture="")
    assert "MKD RCAN-A" in page and "training budget, data, teachers and students differ" in page


# -- output -------------------------------------------------------------------------------------


class Strict(HTMLParser):
    """Every tag that is opened is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """Two seeds, two students, learning curves and a teacher whose name is markup."""
    root = tmp_path / "runs"
    teacher = ("<b>&|_x", "n" * 64)
    for seed in (0, 1):
        for student, base in (("edsr_tiny", 30.0), ("rcan_a", 31.0)):
            for method, gain in (("scratch", 0.0), ("logits", 0.1), ("at", -0.001 + seed / 100)):
                end = {"Set5": base + gain + 0.02 * seed}
                make_run(
                    root / f"{student}_{method}_{seed}",
                    method,
                    seed,
                    end,
                    student=student,
                    teacher=teacher,
                    speeds=(5.0 - gain,),
                    curve={1: {"Set5": 20.0 + 2 * seed}, 2: end},
                )
    write_text(root / "<script>" / "recipe.toml", "")  # unfinished: named in the pages
    return root


def test_files_are_well_formed(nasty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = nasty.parent / "out"
    page = out / "page.html"
    assert main([str(nasty), "--out", str(out), "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_json(out / "compare.json")

    svg = ElementTree.parse(out / "compare.svg").getroot()
    words = "".join(svg.itertext())
    for label in ("dB", "time of a training step (logits = 1)", "G multiply-adds", "Gain over"):
        assert label in words

    tables = re.findall(r"(?:^\|.*\n)+", (out / "compare.md").read_text(), re.M)
    assert len(tables) == 3  # rows, the papers, the runs
    for table in tables:
        lines = [re.sub(r"\\\|", "", line) for line in table.strip().split("\n")]
        assert len({line.count("|") for line in lines}) == 1

    text = page.read_text()
    parser = Strict()
    parser.feed(text)
    assert parser.open == [] and "<b>&|_x" in parser.text
    assert "<script" not in text and "<b>" not in text
    assert any("<script>: not finished" in t for t in parser.text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)
    assert text.count("<polyline") == 6  # three methods of two students
    assert "prefers-color-scheme:dark" in text


def test_learning_curve_is_the_mean_over_seeds(nasty: Path) -> None:
    row = next(r for r in compared(nasty).tables[0].rows if r.method == "scratch")
    assert row.curve() == [(1, 21.0), (2, pytest.approx(30.01))]


def test_without_validations_there_are_no_curves(tmp_path: Path) -> None:
    make_run(tmp_path / "s", "scratch", 0, {"Set5": 30.0}, curve={5: {"Set5": 30.0}})
    assert "Learning curves" not in html(compared(tmp_path))


def test_table_on_stdout_is_not_cut(nasty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(nasty)]) == 0
    out = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    columns = ["+0.100 ± 0.000", "30.110 ± 0.014 / 0.3011", "2", "40,323", "4.86", "4.90", "1.00"]
    (row,) = [r for r in rows if r[:2] == ["logits", "edsr_tiny x4"]]
    assert row[2:] == ["<b>&|_x", *columns]
    assert "…" not in out and "not significant" in out


# -- charts -------------------------------------------------------------------------------------


def test_ticks_are_round_and_enclose() -> None:
    assert plots.ticks(-0.03, 0.13) == pytest.approx([-0.05, 0, 0.05, 0.1, 0.15])
    assert plots.ticks(0, 2000) == [0, 500, 1000, 1500, 2000]
    assert plots.log_ticks(3, 40) == [2, 5, 10, 20, 50]
    assert plots.log_ticks(10, 100) == [10, 20, 50, 100]


def test_dots_stand_at_their_values() -> None:
    dot = plots.Dot("fakd", 0.1, 0.05, [0.05, 0.15], solid=True)
    figure = plots.dot_rows("t", {"edsr x4": [dot]}, "dB", ["fakd"])
    drawing = ElementTree.fromstring(plots.svg([figure], "t"))
    space = "{http://www.w3.org/2000/svg}"
    marks = {
        float(t.text): float(t.get("x", "nan"))
        for t in drawing.iter(f"{space}text")
        if re.fullmatch(r"[+-]?0\.\d+", t.text or "") and t.text
    }
    circles = [float(c.get("cx", "nan")) for c in drawing.iter(f"{space}circle")]
    assert circles == pytest.approx([marks[0.05], marks[0.15], marks[0.1]], abs=0.06)


def test_points_of_one_cost_stand_side_by_side() -> None:
    assert plots.side_by_side([50.0, 50.0, 200.0]) == [44.5, 55.5, 200.0]
    # Two places 10 px apart: what is spread around one stays on its own side of the middle.
    moved = plots.side_by_side([50.0, 50.0, 60.0, 60.0])
    assert moved == [48.0, 52.0, 58.0, 62.0]


def test_crowded_points_stay_inside_the_frame() -> None:
    names = [f"method{i}" for i in range(16)]
    points = [plots.Point(name, x, 30.0) for name in names for x in (1.0, 2.0)]
    drawing = ElementTree.fromstring(plots.svg([plots.plane("t", points, "x", "y", names)], "t"))
    space = "{http://www.w3.org/2000/svg}"
    rules = [line for line in drawing.iter(f"{space}line") if line.get("y1") == line.get("y2")]
    left, right = (float(rules[0].get(end, "nan")) for end in ("x1", "x2"))
    circles = [float(c.get("cx", "nan")) for c in drawing.iter(f"{space}circle")]
    drawn = [x for x in circles if x != right + 22]  # all but the legend
    assert drawn and all(left <= x <= right for x in drawn)


def test_equal_values_and_many_series_can_be_drawn() -> None:
    names = [f"method{i}" for i in range(20)]
    same = [plots.Point(name, 1.0, 30.0, 0.0) for name in names]
    figure = plots.plane("t", same, "x", "y", names)
    drawing = plots.svg([figure], "t")
    ElementTree.fromstring(drawing)
    assert not any(word in drawing for word in ("nan", "inf"))
    assert math.isfinite(figure.height) and figure.height > 20 * len(names)


@pytest.mark.parametrize(
    ("key", "value"), [("family", "zzz"), ("arguments", {"channels": "a"}), ("arguments", {"z": 1})]
)
def test_run_that_this_version_cannot_build_is_named_and_the_rest_compared(
    tmp_path: Path, key: str, value: Any
) -> None:
    make_run(tmp_path / "good", "logits", 0, {"Set5": 30.0})
    make_run(tmp_path / "odd", "fitnet", 0, {"Set5": 30.0})
    info = json.loads((tmp_path / "odd/model.json").read_text())
    write_json(tmp_path / "odd/model.json", {**info, key: value})
    finding = find_runs([tmp_path])
    assert list(finding.failed) == [str(tmp_path / "odd")]
    assert [run.recipe.method.name for run in finding.runs] == ["logits"]


def test_odd_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "l", "logits", 0, {"Set5": 30.0}, speeds=(2.0,))
    with (tmp_path / "l/log.jsonl").open("a") as log:
        log.write('{"step": 5, "scores": {"Set5": 5}}\n{"step": 6, "steps_per_s": NaN}\n')
    (found,) = find_runs([tmp_path]).runs
    assert found.steps_per_s == 2.0
    assert 5 not in found.curve
