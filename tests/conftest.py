"""Shared by all tests. Threads are set before torch is imported: two spinning threads beside another
busy process are ten times slower than one. Test processes side by side (-n 2) take one thread each."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A plain run leaves out what takes long; CI runs it."""
    if os.environ.get("SRKD_SLOW") == "1":
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes long: set SRKD_SLOW=1, as .ci/run does"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's decoded cache."""
    os.environ["SRKD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with benchmarks/, train/ and weights/ of others."""
    folder = os.environ.get("SRKD_DATA")
    if not folder:
        pytest.skip("set SRKD_DATA to the folder with benchmarks/, train/, weights/")
    return Path(folder)
