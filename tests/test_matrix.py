"""The plan of a matrix: which runs, in which order, whose; what is there already; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scored_run import make_run, write_run

from scripts.distill import overrides, parse
from srkd.errors import SrkdError
from srkd.files import write_text
from srkd.matrix import PlannedRun, load_matrix, only, share_of, stages, standing, teacher_hashes
from srkd.matrix_results import plan_lines, plan_table
from srkd.matrix_run import matrix_seconds, paces, seconds_left
from srkd.recipe import load_recipe
from srkd.training import prepare

ROOT = Path(__file__).resolve().parent.parent
HEAD = 'base = "base.toml"\nstudents = ["edsr_tiny", "rcan_a"]\nscales = [2, 4]\nseeds = [0, 1]\n'
ROWS = """
[rows.scratch]
method = "scratch"
[rows.kd]
method = "logits"
teachers = ["$DATA/t_x{scale}.pt"]
students = ["rcan_a"]
scales = [4]
set.method.logits_weight = 0.5
[rows.mkd]
method = "mkd"
teachers = ["rcan_c"]
students = ["rcan_a"]
seeds = [1]
set.train.distil_iterations = 3
"""


def write_matrix(folder: Path, text: str = HEAD + ROWS, base: str = "") -> Path:
    write_text(folder / "base.toml", f"[train]\niterations = 10\n{base}")
    write_text(folder / "m.toml", text)
    return folder / "m.toml"


def test_runs_in_order_with_their_recipes(tmp_path: Path) -> None:
    runs = load_matrix(write_matrix(tmp_path), tmp_path / "out")
    names = [run.name for run in runs]
    first = ["x2/edsr_tiny/scratch-0", "x2/rcan_a/scratch-0", "x4/edsr_tiny/scratch-0"]
    last = ["x4/rcan_a/scratch-1", "x4/rcan_a/kd-1", "x4/rcan_a/mkd-1"]
    assert names[:3] == first and names[-3:] == last
    assert len(names) == 8 + 2 + 2 and "x2/rcan_a/mkd-1" in names
    kd = runs[names.index("x4/rcan_a/kd-1")]
    assert kd.folder == tmp_path / "out" / "runs" / "x4" / "rcan_a" / "kd-1"
    assert kd.recipe.teacher.models == ("$DATA/t_x4.pt",) and kd.recipe.seed == 1
    assert kd.recipe.method.configs["logits"].logits_weight == 0.5


def test_the_words_of_a_run_give_its_recipe(tmp_path: Path) -> None:
    """Whoever copies the command from the plan trains the very run."""
    for run in load_matrix(write_matrix(tmp_path), tmp_path / "out"):
        args = parse([*run.words, "--out", str(run.folder)])
        assert load_recipe(args.recipe, overrides(args)) == run.recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "has no rows"),
        (HEAD + "[rows.a]\nteachers = []", r"\[rows\.a\] .* has no method"),
        (
            HEAD + 'sets = 3\n[rows.a]\nmethod = "scratch"',
            "unknown key 'sets'; did you mean 'students'",
        ),
        (HEAD + '[rows.a]\nmethod = "scratch"\nteacher = []', "did you mean 'teachers'"),
        (HEAD + '[rows."a/b"]\nmethod = "scratch"', "a row's name becomes a folder's"),
        (
            HEAD + '[rows.a]\nmethod = "scrach"',
            r"row 'a' for edsr_tiny x2: .*did you mean 'scratch'",
        ),
        (
            HEAD + '[rows.a]\nmethod = "scratch"\nset.seed = 3',
            "sets seed, which the matrix decides",
        ),
        (HEAD + '[rows.a]\nmethod = "scratch"\nset.train.batsh = 3', "did you mean 'batch'"),
        (HEAD.replace("[0, 1]", "0") + '[rows.a]\nmethod = "scratch"', "a list is needed"),
        (HEAD.replace("[0, 1]", "[]") + '[rows.a]\nmethod = "scratch"', "names no seeds"),
        ("a = [", "is not valid TOML"),
    ],
)
def test_wrong_matrices_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SrkdError, match=message):
        load_matrix(write_matrix(tmp_path, text), tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("scratch", "train.iterations = 11", "steps on HR = 11, not 10"),
        ("scratch", "train.batch = 8", r"train\.batch = 8, not 16"),
        ("scratch", "data.patch = 24", r"data\.patch = 24, not 48"),
        ("fitnet", "train.distil_iterations = 3", "steps on HR = 7, not 10"),
    ],
)
def test_rows_of_another_budget_are_refused(
    method: str, change: str, message: str, tmp_path: Path
) -> None:
    row = f'[rows.odd]\nmethod = "{method}"\nset.{change}\n'
    with pytest.raises(SrkdError, match=f"row 'odd' has another budget than 'scratch': {message}"):
        load_matrix(write_matrix(tmp_path, HEAD + ROWS + row), tmp_path / "out")


def test_stage_wise_row_with_equal_steps_on_hr_is_taken(tmp_path: Path) -> None:
    row = '[rows.two]\nmethod = "fitnet"\nset.train = { distil_iterations = 3, iterations = 13 }\n'
    runs = load_matrix(write_matrix(tmp_path, HEAD + ROWS + row), tmp_path / "out")
    assert "x4/rcan_a/two-1" in [run.name for run in runs]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").rglob("*.matrix.toml")), ids=lambda p: p.stem
)
def test_shipped_matrices_load_and_have_a_baseline(path: Path, tmp_path: Path) -> None:
    runs = load_matrix(path, tmp_path)
    folders = [run.folder for run in runs]
    assert len({*folders}) == len(folders) > 1
    known = {(r.kind[1:], r.recipe.seed) for r in runs if r.recipe.method.name == "scratch"}
    assert {(r.kind[1:], r.recipe.seed) for r in runs} == known


def test_shares_are_a_partition_that_nothing_changes(tmp_path: Path) -> None:
    matrix, out = write_matrix(tmp_path), tmp_path / "out"
    runs = load_matrix(matrix, out)
    shares = [share_of(runs, f"{i}/5") for i in range(1, 6)]
    assert sorted(r.name for s in shares for r in s) == sorted(r.name for r in runs)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    write_run(runs[0].folder, runs[0].recipe, {"Set5": 30.0})  # finished meanwhile
    again = share_of(load_matrix(matrix, out), "2/5")
    assert [r.name for r in again] == [r.name for r in shares[1]]
    for wrong in ("0/5", "6/5", "5", "a/b"):
        with pytest.raises(SrkdError, match=f"--share {wrong} is no share"):
            share_of(runs, wrong)


def test_only_takes_rows_and_single_runs(tmp_path: Path) -> None:
    runs = load_matrix(write_matrix(tmp_path), tmp_path / "out")
    chosen = only(runs, ["kd", "x2/rcan_a/scratch-1"])
    assert [r.name for r in chosen] == ["x4/rcan_a/kd-0", "x2/rcan_a/scratch-1", "x4/rcan_a/kd-1"]
    with pytest.raises(SrkdError, match="--only scrach is no row of this matrix; did you mean"):
        only(runs, ["scrach"])


# -- what is there already ----------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> PlannedRun:
    """The first run of a matrix: edsr_tiny x2 from scratch."""
    return load_matrix(write_matrix(tmp_path), tmp_path / "out")[0]


def test_new_unfinished_and_done(run: PlannedRun) -> None:
    assert standing(run).state == "new"
    write_text(run.folder / "recipe.toml", run.recipe.to_toml())
    log = "".join(json.dumps({"step": i, "steps_per_s": 2.0}) + "\n" for i in (1, 4))
    write_text(run.folder / "log.jsonl", log + '{"step": 9')  # killed while it wrote
    now = standing(run)
    assert (now.state, now.steps, now.of) == ("unfinished", 4, 10)
    write_run(run.folder, run.recipe, {"Set5": 30.0})
    assert standing(run).state == "unfinished"  # its report is not there yet
    write_text(run.folder / "report.md", "")
    assert (standing(run).state, standing(run).steps) == ("done", 10)


def test_another_run_in_the_folder_is_refused_with_the_difference(run: PlannedRun) -> None:
    other = replace(run.recipe, train=replace(run.recipe.train, batch=8, log_every=7))
    write_text(run.folder / "recipe.toml", other.to_toml())
    with pytest.raises(SrkdError, match=r"holds another run .*: train\.batch: 8 -> 16\. Move"):
        standing(run)


def test_other_teachers_than_the_matrix_names_are_refused(tmp_path: Path) -> None:
    teacher = make_run(tmp_path / "teacher", "scratch", 0, {"Set5": 30.0})
    rows = f'[rows.kd]\nmethod = "logits"\nteachers = ["{teacher}"]\n'
    head = HEAD.replace("[2, 4]", "[4]")
    run = load_matrix(write_matrix(tmp_path, head + rows), tmp_path / "out")[0]
    (own,) = teacher_hashes((str(teacher),), 4)
    taught = {"name": "elsewhere", "weights_sha256": own}
    write_run(run.folder, run.recipe, {"Set5": 30.0}, teachers=[taught])
    write_text(run.folder / "report.md", "")
    # A copy of a run of another machine has other paths, and the same weights.
    moved = replace(run.recipe, teacher=replace(run.recipe.teacher, models=("/away/t",)))
    write_text(run.folder / "recipe.toml", moved.to_toml())
    assert standing(run).state == "done"
    write_run(run.folder, run.recipe, {"Set5": 30.0}, teachers=[{**taught, "weights_sha256": "0"}])
    with pytest.raises(SrkdError, match="was taught by other weights than"):
        standing(run)


def test_a_run_that_was_begun_by_hand_is_adopted(tmp_path: Path) -> None:
    """What training resolves and keeps (`auto`, relative paths made absolute) is still the plan's run."""
    text = HEAD.replace("[2, 4]", "[4]") + '[rows.s]\nmethod = "scratch"\n'
    plan = load_matrix(write_matrix(tmp_path, text), tmp_path / "out")[0]
    by_hand = load_recipe(tmp_path / "base.toml", ["student.network=edsr_tiny"])
    resolved = prepare(by_hand, "cpu").recipe
    assert by_hand.train.precision == "auto" != resolved.train.precision
    write_run(plan.folder, resolved, {"Set5": 30.0})
    write_text(plan.folder / "report.md", "")
    assert standing(plan).state == "done"


# -- estimates ----------------------------------------------------------------------------------


def test_time_left_by_hand(tmp_path: Path) -> None:
    runs = {r.name: r for r in load_matrix(write_matrix(tmp_path), tmp_path / "out")}
    first, again = runs["x4/rcan_a/kd-0"], runs["x4/rcan_a/kd-1"]
    write_run(first.folder, first.recipe, {"Set5": 30.0}, speeds=(1.0, 4.0, 4.0, 5.0))
    pace = paces(runs.values())
    assert pace == {(first.kind, ""): 0.25}
    assert seconds_left(first, pace) == 6 * 0.25  # 4 of 10 steps are done
    assert seconds_left(again, pace) == 10 * 0.25
    assert seconds_left(runs["x4/rcan_a/mkd-1"], pace) == 10 * 0.25  # the student's other row
    assert seconds_left(runs["x2/rcan_a/mkd-1"], pace) is None
    assert matrix_seconds([6.0, 2.0, None], 2) == 6.0  # (6 + 2 + 4) / 2
    assert matrix_seconds([9.0, 2.0], 4) == 9.0  # no sooner than the longest
    assert matrix_seconds([None], 1) is None and matrix_seconds([], 3) == 0


def test_first_stages_count(tmp_path: Path) -> None:
    row = '[rows.m]\nmethod = "mtkd"\nteachers = ["a", "b"]\nset.stage1.iterations = 30\n'
    run = load_matrix(write_matrix(tmp_path, HEAD + row), tmp_path / "out")[0]
    assert stages(run.recipe) == {"stage1": 30, "": 10}
    write_text(run.folder / "stage1" / "log.jsonl", '{"step": 20, "steps_per_s": 2.0}\n')
    pace = paces([run]) | {(run.kind, ""): 3.0}
    assert seconds_left(run, pace) == 10 * 0.5 + 10 * 3.0
    # Old records of the first stage may be short of its end; the second one began, so it is over.
    write_text(run.folder / "log.jsonl", '{"step": 4}\n')
    assert seconds_left(run, pace) == 6 * 3.0


def test_the_plan_is_a_table(run: PlannedRun) -> None:
    lines = plan_lines([run], [standing(run)], {(run.kind, ""): 90.0})
    text = plan_table(lines, jobs=2)
    assert text.splitlines()[1].split() == [str(run.folder), "new", "0/10", "15m00"]
    assert text.endswith("0 of 1 done; the rest takes 15m00, 2 at a time")
    command = lines[0].to_dict()["command"]
    assert command.startswith("python scripts/distill.py") and f"--out {run.folder}" in command
