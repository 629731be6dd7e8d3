"""A network that is watched while it runs: how long it took, whether it was warm, whether it should stop."""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deploy.engine_model import EngineNetwork
from deploy.openvino_engine import KEPT_SIZES
from srkd.devices import wait_for
from srkd.infer import feature_channels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Timed(nn.Module):
    """A network in the place of itself, watched: (N, 3, h, w) -> (N, 3, s*h, s*w).

    seconds   spent inside since the last `watched` began, the device waited for
    warm      whether no run since then was the first one (for engines that compile by size: of its size)
    """

    def __init__(self, network: nn.Module, by_size: bool) -> None:
        super().__init__()
        self.network = network
        self.channels = feature_channels(network)
        self.by_size = by_size
        self.seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.seconds = 0.0
        self.warm = True
        self.check: Callable[[], None] | None = None

    @contextmanager
    def watched(self, check: Callable[[], None]) -> Iterator[None]:
        """Time anew. `check` may raise to stop a network in torch between two of its layers."""
        self.seconds, self.warm = 0.0, True
        # Engines look like one layer from outside, and torch.compile wants no mode around it.
        self.check = None if isinstance(self.network, EngineNetwork) else check
        try:
            yield
        finally:
            self.check = None

    def forward(self, lr: Tensor) -> Tensor:
        size = tuple(lr.shape) if self.by_size else ()
        self.warm = self.warm and size in self.seen
        begin = time.perf_counter()
        with nullcontext() if self.check is None else Stoppable(self.check):
            sr = self.network(lr)
        wait_for(lr.device)
        self.seconds += time.perf_counter() - begin
        self.seen[size] = None
        self.seen.move_to_end(size)
        if len(self.seen) > KEPT_SIZES:
            self.seen.popitem(last=False)
        return sr


class Stoppable(TorchFunctionMode):
    """Asks before every function of torch, about a microsecond each, whether to go on; `check` raises if not.

    A large picture takes a network many seconds in one tile, and the scores after it as long.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self.check = check

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.check()
        return func(*args, **(kwargs or {}))
