"""Several processes train what one trains; the first one writes, and one sentence says what went wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from several import in_group, rank_process
from tiny_pair import student_of
from tiny_run import recipe_for, tensors_of, write_photos

import srkd.ranks as ranks
from srkd.errors import MissingError, SrkdError
from srkd.models import save_model
from srkd.runs import Run
from srkd.train import distill, resume

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "train.batch=6",
    "train.iterations=4",
    "train.ema=0.5",
    "validate.every=4",
    # Adam turns rounding into steps of the whole rate where a gradient is nearly 0.
    "train.learning_rate=1e-5",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


# -- the calls ------------------------------------------------------------------------------------


def _calls() -> dict[str, Any]:
    rank, world = ranks.rank(), ranks.world()
    tensors = [torch.full((2, 3), float(rank)), torch.tensor([10.0 * rank])]
    ranks.average_(tensors)
    return {
        "rank": (rank, world, ranks.is_first()),
        "average": [t.flatten()[0].item() for t in tensors],
        "first": ranks.first_says(f"from {rank}"),
        "any": (ranks.any_says(rank == 1), ranks.any_says(False)),
        "gathered": ranks.gathered(list("abcde")[rank::world]),
        "turn": ranks.in_turn(lambda: rank),
    }


def test_calls_between_three_processes() -> None:
    for rank, found in enumerate(in_group(3, _calls)):
        assert found == {
            "rank": (rank, 3, rank == 0),
            "average": [1.0, 10.0],
            "first": "from 0",
            "any": (True, False),
            "gathered": list("abcde"),
            "turn": rank,
        }


def test_a_process_alone_needs_no_group() -> None:
    tensor = torch.ones(2)
    ranks.average_([tensor])
    with ranks.group("cpu"):
        assert (ranks.world(), ranks.rank(), ranks.is_first()) == (1, 0, True)
    assert torch.equal(tensor, torch.ones(2))
    assert ranks.gathered([1, 2]) == [1, 2] and ranks.together(lambda: 3) == 3


def _one_fails() -> tuple[str, str, int]:
    def work() -> None:
        if ranks.rank() == 1:
            raise MissingError("no GPU on this machine.")

    try:
        ranks.together(work)
    except SrkdError as error:
        return type(error).__name__, str(error), error.exit_code
    return "", "", 0


def test_where_one_fails_all_fail_and_it_alone_says_why() -> None:
    first, second = in_group(2, _one_fails)
    assert first == ("SaidElsewhereError", "", 3)
    assert second == ("MissingError", "no GPU on this machine.", 3)


# -- training -------------------------------------------------------------------------------------


def _distill(recipe: Any, out: Path) -> dict[str, Any]:
    return distill(recipe, out, device="cpu", quiet=True).to_dict()


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_processes_equal_micro_batches(photos: Path, tmp_path: Path) -> None:
    """Two processes give what one gives with two micro-batches, random draws of the method included."""
    save_model(tmp_path / "teacher", student_of("edsr", 1), {})
    recipe = recipe_for(
        photos, *SMALL, "method.name=dukd", f"teacher.models=['{tmp_path / 'teacher'}']"
    )
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    results = in_group(2, _distill, recipe, shared)
    split = replace(recipe, train=replace(recipe.train, accumulate=2))
    single = _distill(split, alone)
    for name, weight in tensors_of(alone).items():
        torch.testing.assert_close(tensors_of(shared)[name], weight, rtol=1e-4, atol=2e-6)
    assert results[0]["scores"] == results[1]["scores"]
    (ours,), (theirs,) = results[0]["scores"].values(), single["scores"].values()
    assert ours["psnr_y"] == pytest.approx(theirs["psnr_y"], abs=1e-3)
    assert [r["table"] for r in results[1:]] == [[]] and results[0]["table"]
    lines = [r for r in _log(shared) if "terms" in r]
    assert [r["step"] for r in lines] == [1, 2, 3, 4]  # one process writes
    for ours, theirs in zip(lines, [r for r in _log(alone) if "terms" in r], strict=True):
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-3)


def _meta(shares: list[tuple[int, int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(the meta-gradient of this rank's share, KRNet after a bilevel iteration with all ranks)."""
    from test_bilevel import RATE
    from test_bilevel import Run as Bilevel

    from srkd.bilevel import meta_gradient, split

    run = Bilevel()
    start, stop = shares[ranks.rank()]
    run.lr, run.hr = run.lr[start:stop], run.hr[start:stop]
    run.taught = {name: feature[start:stop] for name, feature in run.taught.items()}
    own, _ = meta_gradient(run.student, run.method, run.plan, run.lr, run.hr, run.taught, RATE)
    run.bilevel()
    return own, [p.detach().clone() for p in split(run.method, run.plan)[1].values()]


def test_the_meta_gradient_is_averaged() -> None:
    """KRNet takes the same step everywhere, the Adam step along the mean of the meta-gradients."""
    from test_bilevel import Run as Bilevel

    from srkd.bilevel import split

    (one, first), (two, second) = in_group(2, _meta, [(0, 1), (1, 2)])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.allclose(a, b) for a, b in zip(one, two, strict=True))
    run = Bilevel()
    phi = list(split(run.method, run.plan)[1].values())
    for p, a, b in zip(phi, one, two, strict=True):
        p.grad = (a + b) / 2
    assert run.state.meta is not None
    run.state.meta.step()
    for p, after in zip(phi, first, strict=True):
        torch.testing.assert_close(after, p.detach(), rtol=1e-4, atol=1e-7)


def test_more_processes_than_images(photos: Path, tmp_path: Path) -> None:
    """One picture to validate on, two processes: the second one has nothing to score."""
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(next(photos.iterdir()), one / "p.png")
    recipe = recipe_for(photos, *SMALL, "method.name=scratch", f"validate.sets=['{one}']")
    first, second = in_group(2, _distill, recipe, tmp_path / "run")
    assert first["scores"] == second["scores"] and first["scores"]["one"]["psnr_y"] > 0


def test_a_number_of_processes_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(SrkdError, match=r"WORLD_SIZE = 2 .* RANK.*unset WORLD_SIZE"),
        ranks.group("cpu"),
    ):
        pass


def _breaks(recipe: Any, out: Path) -> str:
    try:
        distill(recipe, out, device="cpu", quiet=True)
    except SrkdError as error:
        return f"{error.exit_code} {error}"
    return ""


def test_a_loss_that_is_no_number_is_said_once(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_for(photos, *SMALL, "method.name=scratch", "train.learning_rate=1e30")
    first, second = in_group(2, _breaks, recipe, tmp_path / "run")
    assert first.startswith("1 training stopped: ") and second == "1 "


def test_an_uneven_batch_is_refused(photos: Path, tmp_path: Path) -> None:
    recipe = recipe_for(photos, "train.batch=4")
    with pytest.raises(
        SrkdError, match=r"batch = 4 cannot be shared by 3 processes.*multiple of 3"
    ):
        in_group(3, _distill, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lost_process_ends_the_run_which_resumes_alone(photos: Path, tmp_path: Path) -> None:
    """torchrun as users type it; one process is killed in the middle."""
    out = tmp_path / "run"
    recipe = recipe_for(
        photos, "method.name=scratch", "train.iterations=100000", "train.save_every=2"
    )
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        "scripts/distill.py",
        str(tmp_path / "r.toml"),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(list((out / "state").glob("step_*.pt"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert said.count("error: ") == said.count("error: a process was lost") == 1
    state = Run(out, recipe).load_state()
    assert state is not None
    # A shorter run is another recipe, so the folder is told that this is its end.
    changed = replace(recipe, train=replace(recipe.train, iterations=state["step"] + 2))
    for path, key in (
        (out / "recipe.toml", None),
        *((p, "recipe") for p in Run(out, recipe).states()),
    ):
        if key is None:
            path.write_text(changed.to_toml())
        else:
            kept = torch.load(path, weights_only=True)
            torch.save({**kept, key: changed.to_toml()}, path)
    assert not resume(out, device="cpu", quiet=True).interrupted
    assert [r["step"] for r in _log(out) if "terms" in r][-1] == state["step"] + 2
