"""A picture of 8K through scripts/upscale.py in a process whose memory is limited.

The picture is a photograph continued by its mirror images. The limit is on the address space, libraries
included, so that every allocation beyond it fails. The features of a whole pass would not fit, as is printed; the result
is compared with the network's own on windows of the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NETWORK, SCALE = "edsr_tiny", 2
WINDOW_PX = 64
MIB = 2**20
EXAMPLES = """\
examples:
  python benchmarks/large_image.py
  python benchmarks/large_image.py --size 1920x1080 --limit-mib 1500 --json
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", default="7680x4320", metavar="WxH", help="of the input (default: 8K)")
    p.add_argument("--limit-mib", type=int, default=2048, help="address space (default: 2048)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    w, h = (int(side) for side in args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), h, w, args.limit_mib, args.threads)
    if args.json:
        print(json.dumps(found))
        return 0
    print(
        f"{NETWORK} x{SCALE}, {w}x{h} -> {SCALE * w}x{SCALE * h}, {args.threads} threads, address space of "
        f"{args.limit_mib} MiB\n"
        f"tiles of {found['tile_px']} px, {found['tiles']} of them, {found['seconds']:.0f} s\n"
        f"peak resident memory {found['peak_rss_mib']:.0f} MiB; the output in float32 "
        f"{found['output_mib']:.0f} MiB, one feature of the whole picture {found['feature_mib']:.0f} MiB\n"
        f"largest difference from the network on {found['windows']} windows: {found['max_levels']} of 255"
    )
    return 0


def measure(folder: Path, h: int, w: int, limit_mib: int, threads: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from srkd.data.builtin import training_images
    from srkd.images import read_picture, write_png
    from srkd.models import save_model
    from srkd.networks import build

    torch.manual_seed(0)
    network = build(NETWORK, SCALE).eval()
    save_model(folder / "model", network, {})
    _, photo = next(iter(training_images()))
    lr = np.pad(photo, ((0, h - photo.shape[0]), (0, w - photo.shape[1]), (0, 0)), "symmetric")
    write_png(folder / "lr.png", lr)
    start = time.perf_counter()
    done = run_limited(folder, limit_mib * MIB, threads)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    (report,) = json.loads(done)["pictures"]
    if report["notes"]:
        raise SystemExit(f"not a clean run: {'; '.join(report['notes'])}")
    sr = read_picture(folder / "sr.png", max_pixels=SCALE**2 * h * w).rgb
    assert sr.shape == (SCALE * h, SCALE * w, 3), sr.shape
    gaps = [window_gap(network, lr, sr, y, x) for y in thirds(h) for x in thirds(w)]
    feature_bytes = network.channels * SCALE**2 * h * w * 4
    return {
        "size": [h, w],
        "network": NETWORK,
        "scale": SCALE,
        "threads": threads,
        "limit_mib": limit_mib,
        "tile_px": report["tile_px"],
        "tiles": report["tiles"],
        "seconds": seconds,
        "peak_rss_mib": peak / MIB,
        "output_mib": 3 * SCALE**2 * h * w * 4 / MIB,
        "feature_mib": feature_bytes / MIB,
        "windows": len(gaps),
        "max_levels": max(gaps),
    }


def run_limited(folder: Path, limit: int, threads: int) -> str:
    """What scripts/upscale.py prints as JSON, from a process with so many bytes of address space."""
    script = str(ROOT / "scripts" / "upscale.py")
    words = [script, "lr.png", "sr.png", "--model", "model", "--device", "cpu", "--json", "--quiet"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    return done.stdout


def thirds(size: int) -> tuple[int, int, int]:
    """Where windows start: at the first pixel, in the middle, at the end."""
    return 0, (size - WINDOW_PX) // 2, size - WINDOW_PX


def window_gap(network: Any, lr: np.ndarray, sr: np.ndarray, y: int, x: int) -> int:
    """Largest difference in 8-bit levels of a window of `sr` from the network on its surroundings."""
    import numpy as np
    import torch

    from srkd.images import to_tensor, to_uint8

    reach = network.facts.receptive_field_px
    top, left = max(0, y - reach), max(0, x - reach)
    with torch.inference_mode():
        cut = lr[top : y + WINDOW_PX + reach, left : x + WINDOW_PX + reach]
        near = to_uint8(network(to_tensor(np.ascontiguousarray(cut))))
    rows, columns = SCALE * (y - top), SCALE * (x - left)
    side = SCALE * WINDOW_PX
    want = near[rows : rows + side, columns : columns + side].astype(int)
    got = sr[SCALE * y : SCALE * y + side, SCALE * x : SCALE * x + side]
    return int(np.abs(got - want).max())


if __name__ == "__main__":
    sys.exit(main())
