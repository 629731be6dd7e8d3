"""No step waits for its device: nothing that networks or images have brought about is read by Python.

On a CPU reading costs nothing, so it is followed here: every tensor that comes of weights or images is marked, and
operators whose result or whose size Python would have to wait for may not see a marked one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_methods_in_training import NAMES, STEPS, crops, recipe_for, teacher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srkd.step import train_step
from srkd.training import prepare

if TYPE_CHECKING:
    from pathlib import Path

    from srkd.training import Training

READ = ["aten._local_scalar_dense.default", "aten.index.Tensor"]
__all__ = ["teacher"]  # the fixture
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2)


class Reads(TorchDispatchMode):
    """Collects the operators that read a tensor which comes of `sources`."""

    def __init__(self, sources: list[torch.Tensor]) -> None:
        super().__init__()
        self.found: list[str] = []
        for tensor in sources:
            tensor.comes_of_the_device = True  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        marked = any(getattr(x, "comes_of_the_device", False) for x in given)
        operator = func.overloadpacket
        mask = operator is aten.index and any(x.dtype == torch.bool for x in given[1:])
        if marked and (operator in READS or mask):
            self.found.append(str(func))
        result = func(*args, **(kwargs or {}))
        if marked:
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor):
                    x.comes_of_the_device = True  # type: ignore[attr-defined]
        return result


def sources(training: Training) -> list[torch.Tensor]:
    networks = [training.student, training.method, *(t.network for t in training.teachers)]
    return [v for n in networks for v in (*n.parameters(), *n.buffers())]


@pytest.mark.parametrize("name", NAMES)
def test_no_step_reads_what_is_on_the_device(name: str, teacher: Path) -> None:
    training = prepare(recipe_for(name, teacher), "cpu")
    for step in range(STEPS):
        images = crops(step)
        with Reads([*sources(training), *images]) as reads:
            train_step(training, *images)
        assert reads.found == []


def test_a_read_is_seen(teacher: Path) -> None:
    training = prepare(recipe_for("scratch", teacher), "cpu")
    images = crops(0)
    with Reads([*sources(training), *images]) as reads:
        terms = train_step(training, *images)
        assert terms["pixel"].item() > 0
        images[0][images[0] > 9]
        torch.rand(1).item()  # a draw on the CPU is nobody's wait
    assert reads.found == READ
