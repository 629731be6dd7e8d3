"""The folders of the demo: names that nobody guesses, together within a bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from demo.workspace import Workspace
from srkd.errors import MissingError

if TYPE_CHECKING:
    from pathlib import Path


def fill(folder: Path, count: int) -> None:
    (folder / "a.png").write_bytes(bytes(count))


def test_folders_are_private_and_their_names_long(tmp_path):
    one, other = Workspace(tmp_path).folder(), Workspace(tmp_path).folder()
    assert one != other
    assert len(one.name) >= 20
    assert one.stat().st_mode & 0o077 == 0


def test_the_oldest_folders_give_way(tmp_path):
    workspace = Workspace(tmp_path, max_bytes=1000)
    folders = [workspace.folder() for _ in range(3)]
    for folder in folders:
        fill(folder, 300)
    fresh = workspace.folder(room=500)
    assert [folder.exists() for folder in folders] == [False, False, True]
    assert fresh.is_dir()


def test_the_folder_of_a_running_job_stays(tmp_path):
    workspace = Workspace(tmp_path, max_bytes=1000)
    with workspace.job() as running:
        fill(running, 600)
        younger = workspace.folder()
        fill(younger, 300)
        with pytest.raises(MissingError, match="try again when they are done"):
            workspace.folder(room=500)
        assert running.is_dir()
        assert not younger.exists()
    workspace.folder(room=500)
    assert not running.exists()


def test_more_than_the_bound_is_refused_before_anything_is_removed(tmp_path):
    workspace = Workspace(tmp_path, max_bytes=3 * 2**20)
    kept = workspace.folder()
    with pytest.raises(MissingError, match="4 MiB of disk, but the demo keeps at most 3 MiB"):
        workspace.folder(room=4 * 2**20)
    assert kept.is_dir()


def test_a_job_that_leaves_nothing_leaves_no_folder(tmp_path):
    workspace = Workspace(tmp_path)
    with workspace.job() as folder:
        pass
    assert not folder.exists()


def test_clear_spares_what_runs(tmp_path):
    workspace = Workspace(tmp_path)
    done = workspace.folder()
    with workspace.job() as running:
        workspace.clear()
        assert running.is_dir()
        assert not done.exists()


def test_the_default_root_goes_with_its_workspace():
    workspace = Workspace()
    root = workspace.root
    workspace.folder()
    del workspace
    assert not root.exists()
