"""What --list-methods, --list-networks and --list-taps print. The first two load no torch."""

from __future__ import annotations

import json
from typing import Any

from srkd.methods import METHODS
from srkd.networks import ZOO, build, zoo_entry


def methods() -> dict[str, dict[str, str]]:
    """Method -> paper and needs."""
    rows = {}
    for name, entry in METHODS.items():
        fewest, most = entry.teachers
        needs = (
            "no teacher: it trains its own"
            if entry.own_teacher
            else "no teacher"
            if most == 0
            else "one teacher"
            if (fewest, most) == (1, 1)
            else "one teacher or none"
            if (fewest, most) == (0, 1)
            else f"{fewest} or more teachers"
        )
        if entry.needs_groups and not entry.own_teacher:
            needs += " with groups"
        rows[name] = {"paper": entry.paper, "needs": needs}
    return rows


def networks() -> dict[str, dict[str, str]]:
    """Network -> what it is and its scales."""
    return {
        name: {"about": entry.about, "scales": ", ".join(f"x{s}" for s in entry.scales)}
        for name, entry in ZOO.items()
    }


def taps(network: str, scale: int | None) -> dict[str, dict[str, str]]:
    """Tap -> size of the feature there."""
    import torch

    with torch.device("meta"):
        built = build(network, scale or zoo_entry(network).scales[-1])
    return {tap: {"channels": f"{built.channels} channels"} for tap in built.tap_names}


def show(rows: dict[str, Any], as_json: bool) -> int:
    """Print a mapping of mappings as aligned lines, or as JSON."""
    if as_json:
        print(json.dumps(rows))  # noqa: T201
        return 0
    width = max(len(name) for name in rows)
    for name, facts in rows.items():
        text = "  ".join(str(v) for v in facts.values()) if isinstance(facts, dict) else str(facts)
        print(f"{name:<{width}}  {text}")  # noqa: T201
    return 0
