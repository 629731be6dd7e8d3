"""Does the parity check catch every seeded fault, and let every sound network pass?

    python benchmarks/parity_faults.py --faults                 the verdict of each fault, and the edge that is blamed
    python benchmarks/parity_faults.py --sound [MODEL...]       networks of every family with fresh weights, and
                                                                trained ones, through deploy/export.py

Both without an option. `--scale 4`: tails of several stages, which exports collapse. A fault (`faults/seeded.py`) spoils one link of the chain that an export verifies, in a small
network. It is caught if the verdict is FAIL and the edge blamed is the one that it belongs to. A sound network must
PASS in every engine and precision. The exit code is 1 if any fault escapes or any sound network does not pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faults.chain import Sound

    from srkd.loaded import LoadedModel

# The smallest network of each family that has all its parts.
NETWORKS: dict[str, dict[str, Any]] = {
    "edsr": {"channels": 16, "blocks": 3},
    "rcan": {"channels": 16, "blocks": 1, "group_count": 2, "reduction": 4},
    "swinir": {"channels": 12, "depths": (2,), "heads": 2},
    "rdn": {"channels": 8, "blocks": 2, "layers": 2, "growth": 8},
    "san": {"channels": 8, "blocks": 1, "group_count": 1, "reduction": 4},
    "han": {"channels": 8, "blocks": 1, "group_count": 1, "reduction": 4},
    "bsrn": {"channels": 16, "blocks": 1},
    "rlfn": {"channels": 16, "mid_channels": 16, "blocks": 2, "esa_channels": 8},
    "smfanet": {"channels": 16, "blocks": 2},
}
EXPORTS = (("onnx", "fp32"), ("openvino", "fp32"), ("onnx", "fp16"), ("openvino", "bf16"))
SIZES = "16x16:40x44:64x64"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("models", nargs="*", metavar="MODEL", default=["rcan_c_x4"])
    p.add_argument("--faults", action="store_true", help="the seeded faults alone")
    p.add_argument("--sound", action="store_true", help="the sound networks alone")
    p.add_argument(
        "--scale",
        type=int,
        choices=(2, 3, 4),
        default=2,
        help="of the sound networks with fresh weights",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write both tables there too")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from srkd.files import write_json

    both = args.faults == args.sound
    result: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if both or args.faults:
            print("| fault | network | edge | verdict, blame | because |\n|---|---|---|---|---|")
            result["faults"] = [show_fault(row) for row in check_faults(Path(folder))]
        if both or args.sound:
            print(
                "| network | engine | precision | verdict | E1 | E2 | E3 |\n|---|---|---|---|---|---|---|"
            )
            result["sound"] = [
                show_sound(row) for row in check_sound(args.models, Path(folder), args.scale)
            ]
    if args.json:
        write_json(args.json, result)
    escaped = [row["fault"] for row in result.get("faults", []) if row["caught"] is False]
    alarms = [row["network"] for row in result.get("sound", []) if row["verdict"] != "PASS"]
    for told, names in (("escaped", escaped), ("sound, but stopped", alarms)):
        print(f"{told}: {', '.join(names) or 'none'}", file=sys.stderr)
    return 1 if escaped or alarms else 0


# --- seeded faults --------------------------------------------------------------------------------


def check_faults(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every fault; `caught` is None where this machine cannot have it."""
    from faults.seeded import FAULTS, check

    from srkd.errors import MissingError

    sounds: dict[str, Sound] = {}
    for name, fault in FAULTS.items():
        key = json.dumps([fault.network, fault.more])
        if key not in sounds:
            sounds[key] = sound(fault.network, folder / f"sound_{len(sounds)}", **fault.more)
        row = {"fault": name, "network": fault.network, "edge": fault.edge}
        try:
            found = check(fault, sounds[key])
        except MissingError as error:
            yield {**row, "caught": None, "verdict": "not here", "blame": "", "reason": str(error)}
            continue
        blame = found.blame or ""
        yield {
            **row,
            "caught": (found.verdict, blame) == ("FAIL", fault.edge),
            "verdict": found.verdict,
            "blame": blame,
            "reason": found.edge(blame or fault.edge).reason,
        }


def sound(family: str, folder: Path, **more: Any) -> Sound:
    """A fresh network at x2 with its graph, to be spoilt."""
    import onnx
    from faults.chain import Sound

    from deploy.graph import export_graph
    from deploy.photographs import load_photographs

    model = fresh(family, folder, **more)
    graph = onnx.load(export_graph(model, folder / "graph.onnx").path)
    return Sound(model.network, graph, folder, load_photographs("builtin", model.scale))


def fresh(family: str, folder: Path, **more: Any) -> LoadedModel:
    """A network of the family with random weights, as a run folder."""
    import torch

    from srkd.models import load_model, save_model
    from srkd.networks import build_family

    torch.manual_seed(0)
    save_model(folder, build_family(family, {"scale": 2, **NETWORKS[family], **more}), {})
    return load_model(folder)


def show_fault(row: dict[str, Any]) -> dict[str, Any]:
    escaped = " (ESCAPED)" if row["caught"] is False else ""
    reason = row["reason"].replace("|", "/")
    print(
        f"| {row['fault']} | {row['network']} | {row['edge']} | {row['verdict']} {row['blame']}{escaped} "
        f"| {reason} |",
        flush=True,
    )
    return row


# --- sound networks -------------------------------------------------------------------------------


def check_sound(models: list[str], folder: Path, scale: int) -> Iterator[dict[str, Any]]:
    """A row for every network, engine and precision."""
    from deploy.export import export
    from deploy.sizes import parse_sizes
    from srkd.models import load_model

    every = (load_model(spec) for spec in models)
    fresh_ones = (fresh(family, folder / f"fresh_{family}", scale=scale) for family in NETWORKS)
    for model in (*fresh_ones, *every):
        for engine, precision in EXPORTS:
            begin = time.perf_counter()
            found = export(
                model,
                engine,
                precision=precision,
                out=folder / "exports" / model.name,
                sizes=parse_sizes(SIZES),
                quiet=True,
            )
            assert found.record is not None
            yield {
                "network": model.name,
                "engine": engine,
                "precision": precision,
                "verdict": found.verdict,
                "blame": found.record["blame"],
                "seconds": round(time.perf_counter() - begin, 1),
                "edges": {e["name"]: [e["status"], e["reason"]] for e in found.record["edges"]},
            }


def show_sound(row: dict[str, Any]) -> dict[str, Any]:
    told = [" ".join(row["edges"][name]) for name in ("E1", "E2", "E3")]
    short = ["" if text.startswith("NOT RUN") else text.removeprefix("PASS ") for text in told]
    blame = f" {row['blame']}" if row["blame"] else ""
    print(
        f"| {row['network']} | {row['engine']} | {row['precision']} | {row['verdict']}{blame} | "
        f"{' | '.join(short)} |",
        flush=True,
    )
    return row


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
