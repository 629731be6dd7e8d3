"""Where student and teacher features are compared: the pairs of taps that feature methods share.

Sources: the settings of FAKD's public code (Vincent-Hoo/Knowledge-Distillation-for-Super-resolution) and,
for pairs that no paper prints, one and two thirds of the body, rounded, and the body convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srkd.errors import SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from srkd.networks.base import Network

Pairs = tuple[tuple[str, str], ...]

# (family, units) -> units after which the first two features are read.
THIRDS: dict[tuple[str, int], tuple[int, int]] = {
    ("edsr", 32): (10, 21),
    ("edsr", 16): (5, 10),
    ("rcan", 10): (3, 7),
}
# Pairs whose positions depend on both: (family, student units, teacher units).
PAIRED: dict[tuple[str, int, int], tuple[tuple[int, int], tuple[int, int]]] = {
    ("rcan", 5, 10): ((2, 4), (4, 8)),
    ("swinir", 4, 6): ((1, 3), (2, 4)),
}


def units(network: Network) -> int:
    """Residual blocks, groups or RSTBs: the groups without the body convolution."""
    return len(network.groups) - 1


def thirds(network: Network) -> tuple[int, int]:
    """Units after which one and two thirds of the body are done."""
    n = units(network)
    by_rule = (max(1, round(n / 3)), max(1, round(2 * n / 3)))
    return THIRDS.get((network.family, n), by_rule)


def middle(network: Network) -> str:
    """The tap that cuts the body in two."""
    return network.tap_names[max(1, units(network) // 2) - 1]


def default_pairs(student: Network, teacher: Network) -> Pairs:
    """(student tap, teacher tap) of one third, two thirds and the body convolution."""
    key = (student.family, units(student), units(teacher))
    same = student.family == teacher.family
    ours, theirs = PAIRED[key] if same and key in PAIRED else (thirds(student), thirds(teacher))
    pairs = [
        (student.tap_names[s - 1], teacher.tap_names[t - 1])
        for s, t in zip(ours, theirs, strict=True)
    ]
    return tuple(dict.fromkeys([*pairs, ("body", "body")]))


def choose_pairs(student: nn.Module, teacher: nn.Module, given: Iterable[str]) -> Pairs:
    """The pairs of a recipe's `positions` ("block5:block10", ...), or the default ones if empty."""
    ours, theirs = network_of(student), network_of(teacher)
    pairs = []
    for text in given:
        s, colon, t = text.partition(":")
        if not colon:
            raise SrkdError(
                f"position '{text}' names one tap; write student:teacher, for example "
                f"'{ours.tap_names[0]}:{theirs.tap_names[0]}' (see --list-taps NETWORK)."
            )
        for network, tap in ((ours, s), (theirs, t)):
            network.position(tap)  # refuses unknown names
        pairs.append((s, t))
    return tuple(pairs) if pairs else default_pairs(ours, theirs)


def network_of(module: Any) -> Network:
    """The module as one of our networks, whose groups can be read."""
    from srkd.networks.base import Network

    if not isinstance(module, Network):
        raise SrkdError(
            f"{type(module).__name__} has outputs only, but features inside the network are needed; "
            "use a teacher of our networks (--list-networks)."
        )
    return module
