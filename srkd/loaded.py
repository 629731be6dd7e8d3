"""A network with what is known about it, and tensors from a file into a network.

What `srkd.models` (run folders, names) and `srkd.checkpoint` (single files) share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from srkd.errors import SrkdError
from srkd.types import ANY_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from srkd.types import Facts, Limits


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode with what is known about it.

    `network` maps (N, 3, h, w) in [0, 1] to (N, 3, scale*h, scale*w). It is a `Network` of ours, or a
    foreign module, which has outputs but no groups (`is_ours`). `limits` are sizes beyond which it does
    not run: pictures are cut or extended to them.
    """

    network: nn.Module
    name: str
    source: Path
    facts: Facts
    info: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    limits: Limits = ANY_SIZE

    @property
    def scale(self) -> int:
        return self.facts.scale

    @property
    def is_ours(self) -> bool:
        from srkd.networks.base import Network

        return isinstance(self.network, Network)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; damage is named."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SrkdError(
            f"{path} is not a readable safetensors file ({error}); it is damaged, cut short or "
            "another format. Copy it again."
        ) from error


def load_state(network: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Load strictly; leftovers and misfits are named. float16 files are widened to float32."""
    own = network.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (
                ("missing", missing),
                ("unknown", extra),
                ("of another shape", sorted(shapes)),
            )
            if keys
        ]
        raise SrkdError(
            f"{source} does not fit the network it names: tensors {'; '.join(parts)}. "
            "The file belongs to another architecture or configuration."
        )
    network.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, strict=True)
