"""The folders of the demo: names that nobody guesses, together within a bound."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from demo.workspace import Workspace, make_upload_room
from srkd.errors import MissingError

if TYPE_CHECKING:
    from pathlib import Path


def fill(folder: Path, count: int) -> None:
    (folder / "a.png").write_bytes(bytes(count))


def done(workspace: Workspace, count: int = 1, room: int = 0) -> Path:
    """The folder of a job that left a file of `count` bytes."""
    with workspace.job(room) as folder:
        fill(folder, count)
    return folder


def test_folders_are_private_and_their_names_long(tmp_path):
    one, other = done(Workspace(tmp_path)), done(Workspace(tmp_path))
    assert one != other
    assert len(one.name) >= 20
    assert one.stat().st_mode & 0o077 == 0


def test_the_oldest_folders_give_way(tmp_path):
    workspace = Workspace(tmp_path, max_bytes=1000)
    folders = [done(workspace, 300) for _ in range(3)]
    fresh = done(workspace, room=500)
    assert [folder.exists() for folder in folders] == [False, False, True]
    assert fresh.is_dir()


def test_the_folder_of_a_running_job_stays(tmp_path):
    workspace = Workspace(tmp_path, max_bytes=1000)
    with workspace.job() as running:
        fill(running, 600)
        younger = done(workspace, 300)
        with pytest.raises(MissingError, match="try again when they are done"):
            done(workspace, room=500)
        assert running.is_dir()
        assert not younger.exists()
    done(workspace, room=500)
    assert not running.exists()


def test_more_than_the_bound_is_refused_before_anything_is_removed(tmp_path):
    workspace = Workspace(tmp_path, max_bytes=3 * 2**20)
    kept = done(workspace)
    with pytest.raises(MissingError, match="4 MiB of disk, but the demo keeps at most 3 MiB"):
        done(workspace, room=4 * 2**20)
    assert kept.is_dir()


def test_a_job_that_leaves_nothing_leaves_no_folder(tmp_path):
    workspace = Workspace(tmp_path)
    with workspace.job() as folder:
        pass
    assert not folder.exists()


def test_clear_spares_what_runs(tmp_path):
    workspace = Workspace(tmp_path)
    finished = done(workspace)
    with workspace.job() as running:
        workspace.clear()
        assert running.is_dir()
        assert not finished.exists()


def test_the_default_root_goes_with_its_workspace():
    workspace = Workspace()
    root = workspace.root
    done(workspace)
    del workspace
    assert not root.exists()


# --- uploads ------------------------------------------------------------------------------------


def test_the_oldest_uploads_give_way_to_new_ones_and_results_stay(tmp_path):
    uploads = [tmp_path / (letter * 64) for letter in "cab"]
    for upload in uploads:
        upload.mkdir()
        fill(upload, 300)
        time.sleep(0.02)  # file systems tell times in steps of some milliseconds
    loose = tmp_path / "tmp1234"  # of a request that broke off
    loose.write_bytes(bytes(300))
    result = done(Workspace(tmp_path / "results"), 5000)
    assert make_upload_room(tmp_path, 400, 1000, spared_s=0)
    assert [upload.exists() for upload in uploads] == [False, False, True]
    assert loose.exists() and result.exists()
    assert not make_upload_room(tmp_path, 1001, 1000, spared_s=0)
    assert not loose.exists()


def test_uploads_whose_job_may_still_come_stay(tmp_path):
    upload = tmp_path / ("a" * 64)
    upload.mkdir()
    fill(upload, 300)
    assert not make_upload_room(tmp_path, 800, 1000)
    assert upload.is_dir()
    assert make_upload_room(tmp_path, 700, 1000)
