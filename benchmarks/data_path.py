"""What one training sample costs: slices of the decoded cache against decoding PNGs per crop.

Both take the same crops of the same images and apply the same symmetries. The batches are compared
before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from srkd.data.cache import TrainingSet
    from srkd.data.sampling import PatchSampler

SCALE, PATCH, BATCH = 4, 48, 16


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each (default 15)")
    parser.add_argument(
        "--images", type=int, default=60, help="photographs used at most (default 60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.images < 1:
        parser.error("--rounds and --images must be at least 1")
    return args


def run(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    from srkd.data.cache import open_training_set
    from srkd.data.sampling import PatchSampler
    from srkd.files import write_json

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save_pngs(folder, args.images)
        images = open_training_set(
            folder / "hr", SCALE, lr=folder / "lr", cache=folder / "cache", progress=show
        )
        sampler = PatchSampler(images, PATCH, BATCH, seed=0)
        paths = {
            "decoded cache (this data path)": sampler.batch,
            "PNG pair decoded per crop": png_path(folder, images, sampler),
        }
        check_equal(paths)
        ms = measure(paths, args.rounds)
    pixels = [images.size(i) for i in range(len(images))]
    result = {
        "images": f"{len(images)} images of {source}, up to {max(w for _, w in pixels)} px wide",
        "scale": SCALE,
        "patch_px": PATCH,
        "batch": BATCH,
        "rounds": args.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "load_average": round(os.getloadavg()[0], 2),
        "ms_per_sample": {name: round(value, 4) for name, value in ms.items()},
    }
    print(table(result))
    if args.json:
        write_json(args.json, result)
    return 0


def save_pngs(folder: Path, most: int) -> str:
    """HR and LR as PNG files in `folder`/hr and /lr; returns where the photographs come from."""
    from srkd.data.builtin import training_images
    from srkd.data.degradation import crop_to_multiple, downscale_uint8
    from srkd.data.folders import list_images
    from srkd.images import read_rgb8, write_png

    train = Path(os.environ.get("SRKD_DATA", "")) / "train"
    folders = sorted(train.iterdir()) if os.environ.get("SRKD_DATA") and train.is_dir() else []
    if folders:
        source = folders[0].name
        images = [(path.stem, read_rgb8(path)) for path in list_images(folders[0])[:most]]
    else:
        source, images = "the built-in set", training_images()[:most]
    (folder / "hr").mkdir()
    (folder / "lr").mkdir()
    for name, image in images:
        hr = crop_to_multiple(image, SCALE)
        write_png(folder / "hr" / f"{name}.png", hr)
        write_png(folder / "lr" / f"{name}x{SCALE}.png", downscale_uint8(hr, SCALE))
    return source


def png_path(
    folder: Path, images: TrainingSet, sampler: PatchSampler
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The usual loader: open and decode both files of every sample, then crop."""
    import numpy as np
    import torch

    from srkd.data.sampling import apply_symmetry, draw
    from srkd.images import read_rgb8

    sizes = np.array([images.size(i) for i in range(len(images))]) // SCALE

    def batch(step: int) -> tuple[Tensor, Tensor]:
        lrs, hrs = [], []
        for image, top, left, code in draw(0, step, range(BATCH), sizes, PATCH).tolist():
            name = images.names[image]
            lr = read_rgb8(folder / "lr" / f"{name}x{SCALE}.png")
            hr = read_rgb8(folder / "hr" / f"{name}.png")
            for crops, picture, scale in ((lrs, lr, 1), (hrs, hr, SCALE)):
                rows = slice(scale * top, scale * (top + PATCH))
                columns = slice(scale * left, scale * (left + PATCH))
                crops.append(apply_symmetry(picture[rows, columns], code).transpose(2, 0, 1))
        return torch.from_numpy(np.stack(lrs)), torch.from_numpy(np.stack(hrs))

    return batch


def check_equal(paths: dict[str, Callable[[int], tuple[Tensor, Tensor]]]) -> None:
    import torch

    (lr_a, hr_a), (lr_b, hr_b) = (batch(0) for batch in paths.values())
    if not (torch.equal(lr_a, lr_b) and torch.equal(hr_a, hr_b)):
        raise SystemExit("the two paths gave different patches; their times would not compare")


def measure(
    paths: dict[str, Callable[[int], tuple[Tensor, Tensor]]], rounds: int
) -> dict[str, float]:
    """Median ms per sample; rounds take turns, so that other load falls on both alike."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for step in range(rounds):
        for name, batch in paths.items():
            start = time.perf_counter()
            batch(step)
            times[name].append((time.perf_counter() - start) * 1e3 / BATCH)
        show(step + 1, rounds)
    return {name: median(values) for name, values in times.items()}


def table(result: dict) -> str:
    ms = result["ms_per_sample"]
    slowest = max(ms.values())
    lines = [
        f"{result['images']}, x{SCALE}, patch {PATCH}, batch {BATCH}, one thread, "
        f"median of {result['rounds']} rounds",
        "",
        f"{'path':<32}{'ms per sample':>15}{'ms per batch':>14}{'times as fast':>15}",
    ]
    for name, value in ms.items():
        lines.append(f"{name:<32}{value:>15.3f}{value * BATCH:>14.2f}{slowest / value:>15.0f}")
    return "\n".join(lines)


def show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    from srkd.console import run_command

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
