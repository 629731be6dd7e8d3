"""TensorRT-RTX engines of every family, built on a CPU: what they hold, how large they are, how long it takes.

    python benchmarks/trt_rtx_builds.py
    python benchmarks/trt_rtx_builds.py --networks edsr_baseline:4,rcan_a:4 --staged

Graphs as deploy/export.py writes them, of fresh weights, for sizes 16x16:64x64:512x512, in fp32 and in fp16 with the islands that
every network keeps. Layers are those of the parsed network, before fusion; seconds are CPU time of the build alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

NETWORKS = (
    "edsr_baseline:4,rcan_a:4,swinir_lightweight:4,edsr_tiny:2,edsr_mlperf_f32b5:2,rdn_tiny:4,san_tiny:4,"
    "han_tiny:4,bsrn:4,rlfn_ntire:4,smfanet:4"
)
SIZES = "16x16:64x64:512x512"
SETTINGS = {"library": "tensorrt_rtx", "tf32": False}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--networks", default=NETWORKS, help="NAME:SCALE of the zoo, comma-separated")
    p.add_argument("--staged", action="store_true", help="with the upsampling as trained")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from srkd.files import write_json

    print(
        "| network | precision | ONNX nodes | layers | convolutions and products | build, CPU s | engine, MB |\n"
        "|---|---|---|---|---|---|---|"
    )
    rows = []
    for spec in args.networks.split(","):
        for row in builds(spec, staged=args.staged):
            rows.append(row)
            products = ", ".join(f"{n} {kind}" for kind, n in row["products"].items())
            print(
                f"| `{row['network']}` x{row['scale']} | {row['precision']} | {row['nodes']} | {row['layers']} | "
                f"{products} | {row['cpu_s']:.1f} | {row['bytes'] / 1e6:.2f} |",
                flush=True,
            )
    if args.json:
        write_json(args.json, {"sizes": SIZES, "staged": args.staged, "rows": rows})
    return 0


def builds(spec: str, *, staged: bool) -> Iterator[dict[str, Any]]:
    """A row for fp32, a row for fp16."""
    import onnx
    import torch

    from deploy.graph import export_graph
    from deploy.half import to_half
    from deploy.island_search import unfit_blocks
    from deploy.sizes import parse_sizes
    from deploy.tensorrt_build import build
    from srkd.errors import SrkdError
    from srkd.models import load_model, save_model
    from srkd.networks import build as build_network

    name, _, scale = spec.partition(":")
    if not scale.isdecimal():
        raise SrkdError(f"'{spec}' is no NAME:SCALE, such as rcan_a:4.")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        save_model(run / "run", build_network(name, int(scale)), {})
        graph = export_graph(load_model(run / "run"), run / "fp32.onnx", staged=staged)
        wide = onnx.load(graph.path)
        onnx.save(to_half(wide, unfit_blocks(wide)), run / "fp16.onnx")
        for precision in ("fp32", "fp16"):
            path = run / f"{precision}.onnx"
            begin = time.process_time()
            facts = build(path, run / f"{precision}.plan", parse_sizes(SIZES), SETTINGS)
            yield {
                "network": name,
                "scale": int(scale),
                "precision": precision,
                "collapsed": graph.collapsed,
                "nodes": len(onnx.load(path).graph.node),
                "layers": facts["layers"],
                "products": facts["precisions"],
                "cpu_s": time.process_time() - begin,
                "bytes": facts["bytes"],
                "version": facts["version"],
            }


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
