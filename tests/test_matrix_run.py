"""Runs of a matrix side by side with a stand-in for training; the report; what fails, stops and goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from scored_run import write_run
from tiny_run import write_photos

from deploy.benchmark import benchmark
from deploy.speed import Limits
from scripts.matrix import main, measured
from srkd.compare import Speed, compare
from srkd.compare_pages import html
from srkd.console import run_command
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import read_json, write_text
from srkd.finished import find_runs
from srkd.matrix import PlannedRun, load_matrix
from srkd.matrix_results import known_speed, write_results
from srkd.matrix_run import train_all

MATRIX = """\
base = "base.toml"
students = ["edsr_tiny"]
scales = [4]
seeds = [0, 1]
[rows.scratch]
method = "scratch"
[rows.kd]
method = "logits"
teachers = ["t"]
"""
# Writes what it was called with; the seed says how it goes on.
STAND_IN = """\
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
folder.mkdir(parents=True, exist_ok=True)
threads = os.environ["OMP_NUM_THREADS"]
(folder / "called.json").write_text(json.dumps({"words": words, "threads": threads}))
if folder.name == "kd-0":
    print("some lines")
    print("error: the teacher is ill.", file=sys.stderr)
    sys.exit(2)
if folder.name == "kd-1":
    def stop(*_):
        (folder / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    time.sleep(60)
"""


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    write_text(tmp_path / "base.toml", "[train]\niterations = 10\n")
    write_text(tmp_path / "m.toml", MATRIX)
    return tmp_path / "m.toml"


@pytest.fixture
def runs(matrix: Path) -> dict[str, PlannedRun]:
    return {run.folder.name: run for run in load_matrix(matrix, matrix.parent / "out")}


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    write_text(tmp_path / "stand_in.py", STAND_IN)
    return [sys.executable, str(tmp_path / "stand_in.py")]


def test_a_failure_is_told_and_the_others_go_on(
    runs: dict[str, PlannedRun], launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    continued = runs["scratch-1"]
    write_text(continued.folder / "recipe.toml", continued.recipe.to_toml())
    todo = [runs[name] for name in ("kd-0", "scratch-0", "scratch-1")]
    options = ["--device", "cpu"]
    outcome = train_all(todo, launcher, jobs=2, options=options, quiet=True)
    assert not outcome.interrupted
    assert outcome.failed == {"x4/edsr_tiny/kd-0": "the teacher is ill."}
    called = {n: read_json(runs[n].folder / "called.json") for n in ("scratch-0", "scratch-1")}
    new = runs["scratch-0"]
    begun = [*new.words, "--out", str(new.folder), *options, "--quiet"]
    assert called["scratch-0"]["words"] == begun
    again = ["--resume", str(continued.folder), *options, "--quiet"]
    assert called["scratch-1"]["words"] == again
    cores = len(os.sched_getaffinity(0))
    assert called["scratch-0"]["threads"] == str(max(1, cores // 2))


def test_interrupt_lets_the_runs_save_and_starts_no_other(
    runs: dict[str, PlannedRun], launcher: list[str]
) -> None:
    stopped = runs["kd-1"]

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (stopped.folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = train_all([stopped, runs["scratch-0"]], launcher, jobs=1, quiet=True)
    thread.join()
    assert outcome.interrupted and not outcome.failed
    assert (stopped.folder / "saved").exists()
    assert not runs["scratch-0"].folder.exists()


# -- the report ---------------------------------------------------------------------------------

SCORES = {"scratch-0": 30.0, "scratch-1": 30.2, "kd-0": 30.1, "kd-1": 30.35}


def finish(runs: dict[str, PlannedRun], **facts: dict[str, Any]) -> None:
    """Every run finished, with known scores; `facts` by run."""
    for name, run in runs.items():
        named = [{"name": "t", "weights_sha256": "t" * 64}] if run.row == "kd" else []
        own = {"teachers": named, **facts.get(name, {})}
        write_run(run.folder, run.recipe, {"Set5": SCORES[name]}, **own)
        write_text(run.folder / "report.md", "")


def test_report_of_a_finished_matrix(
    matrix: Path, runs: dict[str, PlannedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    finish(runs)
    out = matrix.parent / "out"
    # The teacher's file is not here, so what is finished is left alone by the plan without scratch alone.
    words = [str(matrix), "--out", str(out), "--only", "scratch", "--no-speed"]
    assert main([*words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == read_json(out / "results.json")
    assert results["equal_budget"] and results["speed"] is None
    rows = {row["method"]: row for row in results["tables"][0]["rows"]}
    assert rows["logits"]["gain"]["mean"] == pytest.approx(0.125)
    own = rows["logits"]["runs"][0]
    assert own["folder"] == str(runs["kd-0"].folder) and len(own["weights_sha256"]) == 64
    assert own["command"].startswith(f"python scripts/distill.py {own['folder']}/recipe.toml")
    text = (out / "report.md").read_text()
    assert "4 of 4 runs are finished" in text and "report.svg" in text
    assert "had the same budget" in text and own["weights_sha256"][:16] in text
    ElementTree.parse(out / "report.svg")
    assert "Results of m.toml" in (out / "report.html").read_text()


def test_unequal_budgets_are_marked_and_fail(
    matrix: Path, runs: dict[str, PlannedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    finish(runs, **{"kd-1": {"digest": "e" * 64}})
    out = matrix.parent / "out"
    assert main([str(matrix), "--out", str(out), "--only", "scratch", "--no-speed"]) == 1
    line = rf"UNEQUAL BUDGET at x4: data\.digest: d+ -> e+ in {runs['kd-1'].folder}"
    assert re.search(line, capsys.readouterr().err)
    assert re.search("UNEQUAL BUDGET", (out / "report.html").read_text())
    assert not read_json(out / "results.json")["equal_budget"]


def test_failed_runs_stand_in_the_report(matrix: Path, runs: dict[str, PlannedRun]) -> None:
    finish({name: run for name, run in runs.items() if run.row == "scratch"})
    out = matrix.parent / "out"
    write_results(out, matrix, [*runs.values()], {"x4/edsr_tiny/kd-0": "the teacher is ill."}, None)
    text = (out / "report.md").read_text()
    assert "2 of 4 runs are finished" in text and "the teacher is ill." in text


def test_times_are_drawn_and_known_the_next_time(matrix: Path, runs: dict[str, PlannedRun]) -> None:
    write_text(matrix, MATRIX.replace('["edsr_tiny"]', '["edsr_tiny", "rcan_a"]'))
    out = matrix.parent / "out"
    plan = load_matrix(matrix, out)
    for i, run in enumerate(plan):
        write_run(run.folder, run.recipe, {"Set5": 30 + 0.1 * i}, teachers=[])
    pairs = [("edsr_tiny", 4), ("rcan_a", 4)]
    assert known_speed(out, pairs) is None
    speed = Speed({pairs[0]: 12.5, pairs[1]: 40.0}, "Times: by hand.")
    written = write_results(out, matrix, plan, {}, speed)
    assert known_speed(out, pairs) == speed and known_speed(out, [("edsr_tiny", 2)]) is None
    page = (out / "report.html").read_text()
    for axis in ("thousand parameters", "G multiply-adds at 256x256", "ms for 256x256 LR pixels"):
        assert axis in page
    assert "12.5" in page and "Times: by hand." in page
    without = html(compare(find_runs([run.folder for run in plan])))
    assert "ms for 256x256 LR pixels" not in without and "thousand parameters" in without
    assert written.comparison.tables[0].rows[0].latency_ms == 12.5


def test_networks_are_timed_side_by_side_once(
    matrix: Path, runs: dict[str, PlannedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a watch that needs no quiet machine, and one run a turn."""
    once = Limits(0.0, 2, 0.0, rounds=1, warm_up_s=0.0, warm_up_runs=2, give_up_s=0.0, drift=1e9)
    quick = partial(benchmark, limits=once, others=lambda: 0.0)
    monkeypatch.setattr("deploy.benchmark.benchmark", quick)
    monkeypatch.setattr("deploy.speed_card.check_watch", lambda watch: {"off": 0.0})
    monkeypatch.setattr("scripts.matrix.SPEED_SIZE", (12, 10))
    out, plan = matrix.parent / "out", [*runs.values()]
    begun = {name: run for name, run in runs.items() if name != "kd-1"}
    finish(begun)
    speed, timed = measured(out, plan, quiet=True)
    assert timed and not speed.ms and "when all runs are finished" in speed.note
    finish(runs)
    speed, timed = measured(out, plan, quiet=True)
    assert timed and [*speed.ms] == [("edsr_tiny", 4)] and speed.ms["edsr_tiny", 4] > 0
    assert "torch fp32" in speed.note and "a 12x10 LR picture" in speed.note
    assert read_json(out / "speed.json")["rows"][0]["p50_ms"] == speed.ms["edsr_tiny", 4]
    write_results(out, matrix, plan, {}, speed)
    assert measured(out, plan, quiet=True) == (speed, True)

    def busy(*_: object, **__: object) -> None:
        raise CheckFailedError("the machine is busy.")

    (out / "results.json").unlink()
    monkeypatch.setattr("deploy.benchmark.benchmark", busy)
    assert measured(out, plan, quiet=True) == (
        Speed({}, "Times were not measured: the machine is busy."),
        False,
    )


def test_plan_is_printed_without_training(
    matrix: Path, runs: dict[str, PlannedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    begun = runs["scratch-0"]
    write_text(begun.folder / "recipe.toml", begun.recipe.to_toml())
    write_text(begun.folder / "log.jsonl", '{"step": 4, "steps_per_s": 2.0}\n')
    words = [str(matrix), "--out", str(matrix.parent / "out"), "--dry-run", "--only", "scratch"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["runs"]
    left = [(p["row"], p["state"], p["steps"], p["seconds_left"]) for p in plan]
    assert left == [("scratch", "unfinished", 4, 3.0), ("scratch", "new", 0, 5.0)]
    # A row that cannot be trained says so before days have gone by.
    assert main([*words[:-1], "kd", "--quiet"]) == 1
    assert "REFUSED x4/edsr_tiny/kd-1: there is no file, run folder" in capsys.readouterr().err


def test_requests_that_make_no_sense(
    matrix: Path, runs: dict[str, PlannedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, [str(matrix), "--jobs", "0"]) == 2
    assert "--jobs 0 trains nothing" in capsys.readouterr().err
    with pytest.raises(SrkdError, match="cannot read matrix"):
        load_matrix(matrix / "none", matrix.parent)


@pytest.mark.slow
def test_whole_matrix_is_trained_measured_once_and_left_alone_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos")
    write_text(
        tmp_path / "base.toml",
        f"[data]\npatch = 12\ntrain = '{photos}'\n[train]\niterations = 4\nbatch = 2\nlog_every = 1\n"
        f"[validate]\nsets = ['{photos}']\nevery = 2\n",
    )
    text = MATRIX.replace("[4]", "[2]").replace("[0, 1]", "[0]").replace('"logits"', '"fitnet"')
    teacher = tmp_path / "out" / "runs" / "x2" / "edsr_tiny" / "scratch-0"
    write_text(tmp_path / "m.toml", text.replace('"t"', f'"{teacher}"'))
    words = [str(tmp_path / "m.toml"), "--out", str(tmp_path / "out"), "--no-speed", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    (row,) = [r for r in first["tables"][0]["rows"] if r["method"] == "fitnet"]
    assert row["gain"]["n"] == 1 and len(row["curve"]) == 2
    assert "FAILED" not in capsys.readouterr().err
    before = (teacher / "weights.safetensors").stat().st_mtime_ns
    assert main(words) == 0
    assert (teacher / "weights.safetensors").stat().st_mtime_ns == before
    assert json.loads(capsys.readouterr().out) == first
