"""A folder shared out over processes: every picture once, exact sums, one report, one message at the end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from several import in_group, rank_process

from scripts.upscale import main
from srkd.console import run_command
from srkd.images import write_png
from srkd.jobs import Job, shares, totals
from srkd.models import save_model
from srkd.networks import build

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, build("edsr_tiny", 2), {})
    return path


def write_photos(photos: Path, names: tuple[str, ...] = NAMES, px: int = 9) -> Path:
    """Pictures of different heights, the last the largest."""
    numbers = np.random.default_rng(0)
    for n, name in enumerate(names):
        write_png(
            photos / f"{name}.png", numbers.integers(0, 256, (px + n, px, 3)).astype(np.uint8)
        )
    return photos


def jobs_of(*pixels: int) -> list[Job]:
    return [Job(Path(f"{n}.png"), Path(f"out/{n}.png"), p) for n, p in enumerate(pixels)]


def test_shares_by_hand() -> None:
    # 9 | 8, then 5 to the 8, 4 to the 9, and 1 to the first of two equal ones.
    assert shares(jobs_of(1, 9, 5, 8, 4), 2) == [[0, 1, 4], [2, 3]]
    assert shares(jobs_of(3, 1), 1) == [[0, 1]]
    assert shares(jobs_of(7), 3) == [[0], [], []]
    assert shares(jobs_of(0, 0, 0, 0), 2) == [[0, 2], [1, 3]]  # none of them can be read


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_picture_is_in_one_share(world: int) -> None:
    parts = shares(jobs_of(*range(20)), world)
    assert sorted(n for part in parts for n in part) == list(range(20))


def _upscale(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(main, words)
    return code, out.getvalue(), err.getvalue()


def test_two_processes_do_what_one_does(folder: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    (photos / "broken.png").write_bytes(b"these are words")
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["--model", str(folder), "--device", "cpu"]
    code, said, _ = _upscale([str(photos), str(one), *words])
    assert code == 1 and "5 pictures, 1 failed, 0.00 -> 0.00 megapixels" in said

    shared = in_group(2, _upscale, [str(photos), str(two), *words])
    assert [done[0] for done in shared] == [1, 1]
    assert shared[1][1:] == ("", "")  # the first one speaks
    lines = shared[0][1].splitlines()
    assert [line.split()[0] for line in lines[:5]] == [str(photos / f"{n}.png") for n in NAMES]
    assert lines[5].startswith("5 pictures, 1 failed") and lines[5].endswith(" by 2 processes")
    assert shared[0][2].count("failed: ") == 1 and "1 of 6 pictures failed" in shared[0][2]
    for name in NAMES:
        assert (one / f"{name}.png").read_bytes() == (two / f"{name}.png").read_bytes()

    code, said, _ = in_group(2, _upscale, [str(photos), str(two), *words, "--json", "--overwrite"])[
        0
    ]
    document = json.loads(said)
    pixels = sum((9 + n) * 9 for n in range(5))
    assert (document["totals"]["lr_pixels"], document["totals"]["sr_pixels"]) == (
        pixels,
        4 * pixels,
    )
    assert (document["totals"]["failed"], document["totals"]["processes"]) == (1, 2)
    assert [Path(p["source"]).stem for p in document["pictures"]] == list(NAMES)


def test_what_is_refused_is_said_once(folder: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    for words in (
        [str(photos), str(tmp_path / "x"), "--model", str(tmp_path / "none")],
        [str(tmp_path / "none"), str(tmp_path / "x"), "--model", str(folder)],
        [str(photos / "a.png"), str(tmp_path / "x.png"), "--model", str(folder)],
    ):
        first, second = in_group(2, _upscale, words)
        assert (first[0], second[0]) == (2, 2)
        assert first[2].count("error: ") == 1 and second[1:] == ("", "")
    assert "torchrun shares out a folder" in first[2]
    assert not (tmp_path / "x").exists()


def test_sums_of_nothing() -> None:
    assert totals([], 1.0, 1)["pictures"] == 0


@pytest.mark.slow
def test_a_lost_process_ends_all_with_one_message(folder: Path, tmp_path: Path) -> None:
    """torchrun as users type it; one process is killed in the middle of the folder."""
    names = tuple(f"p{n:03d}" for n in range(400))
    photos, out = write_photos(tmp_path / "photos", names, 32), tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["scripts/upscale.py", str(photos), str(out), "--model", str(folder)]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*.png"))) < 4 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    # Which of both: torchrun was quicker to end the other one, or that one was waiting for what never came.
    sentences = ("another one was lost", "a process was lost")
    assert said.count("error: ") == sum(map(said.count, sentences)) == 1, said
    assert "--overwrite does all of them again" in said
    files = [p.name for p in out.iterdir()]
    halves = [name for name in files if ".part" in name]
    assert len(halves) <= 1  # of the process that was killed
    assert 4 <= len(files) - len(halves) < 400
