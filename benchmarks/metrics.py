"""Time of PSNR-Y + SSIM-Y over 14 images of the sizes of Set14, against plain NumPy and scikit-image.

Every thread count runs in a process of its own, the implementations take turns within a round, and
the medians over the rounds are printed. The pictures are synthetic: the time depends on sizes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

SCALE = 4
# (height, width) of Set14 at x4: cut to multiples of 4.
SIZES = (
    (480, 500), (576, 720), (512, 512), (288, 352), (360, 248), (276, 276), (360, 500),
    (288, 352), (512, 512), (512, 512), (512, 768), (512, 512), (656, 528), (388, 584),
)  # fmt: skip
EXAMPLES = """\
examples:
  python benchmarks/metrics.py
  python benchmarks/metrics.py --threads 1 --rounds 15 --json
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        print(json.dumps(measure(args.threads[0], args.rounds)))
        return 0
    load = os.getloadavg()[0]
    results = [run_worker(threads, args.rounds) for threads in args.threads]
    if args.json:
        print(json.dumps({"load_before": load, "images": len(SIZES), "results": results}))
        return 0
    print(f"PSNR-Y + SSIM-Y of {len(SIZES)} images, ms for all, median of {args.rounds} rounds")
    print(
        f"{'threads':>7}  {'srkd':>8}  {'numpy':>8}  {'skimage':>8}   speed-up over numpy, skimage"
    )
    for r in results:
        ms = r["median_ms"]
        print(
            f"{r['threads']:>7}  {ms['srkd']:8.0f}  {ms['numpy']:8.0f}  {ms['skimage']:8.0f}   "
            f"{ms['numpy'] / ms['srkd']:.2f}x, {ms['skimage'] / ms['srkd']:.2f}x"
        )
    worst = {k: max(r["max_difference"][k] for r in results) for k in ("psnr_db", "ssim")}
    print(f"largest difference: {worst['psnr_db']:.1e} dB, {worst['ssim']:.1e} SSIM")
    print(f"load average before: {load:.2f} on {os.cpu_count()} CPUs (above 0.3, measure again)")
    return 0


def run_worker(threads: int, rounds: int) -> dict[str, Any]:
    """Measure in a new process, because thread pools are sized when libraries are loaded."""
    pools = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    # Waiting threads that spin would slow down whatever else this machine does, and be slowed by it.
    environment = {**os.environ, **pools, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--threads", str(threads)]
    done = subprocess.run(
        [*command, "--rounds", str(rounds)], env=environment, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def measure(threads: int, rounds: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from srkd.metrics import psnr_ssim

    torch.set_num_threads(threads)
    generator = np.random.default_rng(0)
    pairs = []
    for height, width in SIZES:
        ramp = np.linspace(0, 255, height * width).reshape(height, width, 1)
        hr = (ramp + generator.normal(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8)
        sr = (hr + generator.normal(0, 8, hr.shape)).clip(0, 255).round().astype(np.uint8)
        pairs.append((sr, hr))

    def ours(sr: np.ndarray, hr: np.ndarray) -> tuple[float, float]:
        x, y = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (sr, hr))
        in_db, similarity = psnr_ssim(x, y, SCALE)
        return in_db.item(), similarity.item()

    ways: dict[str, Callable[[np.ndarray, np.ndarray], tuple[float, float]]] = {
        "srkd": ours,
        "numpy": plain_numpy,
        "skimage": scikit_image,
    }
    values: dict[str, list[tuple[float, float]]] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            values[name] = [way(*pair) for pair in pairs]
            if round_:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - start))
    reference = np.array(values["srkd"])
    gap = np.max([np.abs(np.array(v) - reference).max(0) for v in values.values()], axis=0)
    return {
        "threads": threads,
        "rounds": rounds,
        "median_ms": {name: median(t) for name, t in times.items()},
        "min_ms": {name: min(t) for name, t in times.items()},
        "max_difference": {"psnr_db": float(gap[0]), "ssim": float(gap[1])},
    }


# -- what people write --------------------------------------------------------------------------


def luma(image: np.ndarray) -> np.ndarray:
    import numpy as np

    inner = image[SCALE:-SCALE, SCALE:-SCALE].astype(np.float64)
    return inner @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def peak_ratio(x: np.ndarray, y: np.ndarray) -> float:
    import numpy as np

    return float(10 * np.log10(255**2 / np.mean((x - y) ** 2)))


def plain_numpy(sr: np.ndarray, hr: np.ndarray) -> tuple[float, float]:
    """The formula of SSIM line by line, the window as two one-dimensional filters."""
    import numpy as np
    from numpy.lib.stride_tricks import sliding_window_view

    x, y = luma(sr), luma(hr)
    kernel = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def blur(m: np.ndarray) -> np.ndarray:
        rows = sliding_window_view(m, 11, axis=0) @ kernel
        return sliding_window_view(rows, 11, axis=1) @ kernel

    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2
    covariance = blur(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    ssim = above / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return peak_ratio(x, y), float(ssim.mean())


def scikit_image(sr: np.ndarray, hr: np.ndarray) -> tuple[float, float]:
    from skimage.metrics import structural_similarity

    x, y = luma(sr), luma(hr)
    ssim: Any = structural_similarity(
        x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    return peak_ratio(x, y), float(ssim)


if __name__ == "__main__":
    sys.exit(main())
