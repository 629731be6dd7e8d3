"""Forward passes of the networks of a training step, as few as the image sizes allow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srkd.networks.base import Network
from srkd.networks.privileged import PrivilegedTeacher
from srkd.types import Pass


def forward(network: nn.Module, lr: Tensor, taps: tuple[str, ...] = ()) -> Pass:
    """One pass of a network of ours or a foreign one (which has outputs only)."""
    if isinstance(network, Network | PrivilegedTeacher):
        return network.run(lr, taps)
    return Pass(network=network, sr=network(lr))


def passes(network: nn.Module, images: list[Tensor], taps: tuple[str, ...]) -> list[Pass]:
    """Passes of one network over several batches; those of one image size share one pass.

    The first batch alone keeps the features at `taps`.
    """
    found: dict[int, Pass] = {}
    for size in dict.fromkeys(image.shape[-2:] for image in images):
        members = [i for i, image in enumerate(images) if image.shape[-2:] == size]
        joined = torch.cat([images[i] for i in members]) if len(members) > 1 else images[members[0]]
        whole = forward(network, joined, taps if 0 in members else ())
        start = 0
        for i in members:
            stop = start + len(images[i])
            found[i] = slice_pass(whole, start, stop, taps=i == 0) if len(members) > 1 else whole
            start = stop
    return [found[i] for i in range(len(images))]


def slice_pass(whole: Pass, start: int, stop: int, *, taps: bool) -> Pass:
    """The part of a pass that belongs to the samples start..stop."""
    head = whole.head[start:stop] if taps and whole.head is not None else None
    kept = {name: feature[start:stop] for name, feature in whole.taps.items()} if taps else {}
    return Pass(network=whole.network, sr=whole.sr[start:stop], head=head, taps=kept)
