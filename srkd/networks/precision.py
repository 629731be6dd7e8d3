"""Steps of a network that half precision would ruin."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@contextmanager
def full_precision(x: Tensor) -> Iterator[Tensor]:
    """x in float32 (float64 stays) for a block that no autocast lowers."""
    device = x.device.type
    # Shapes alone (the meta device) know no autocast.
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not lowered:
        yield wide
        return
    with torch.autocast(device, enabled=False):
        yield wide
