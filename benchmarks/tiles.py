"""How much the joints of tiles show in networks that look at the whole image, with and without overlap.

    d      = tiled - whole, the network on the whole picture being the reference
    seam   = largest mean step of d across one line, over the mean step of the picture (deploy.difference)
    joints = mean step of d across the lines between tiles, over that across lines 9 to 16 LR px from them

The pictures are photographs, taken as LR images. Seam and PSNR are those of the worst picture, joints the mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np

    from srkd.loaded import LoadedModel

EXAMPLES = """\
examples:
  python benchmarks/tiles.py --data $SRKD_DATA/benchmarks/BSD100/HR
  python benchmarks/tiles.py rcan_c_x4 $SRKD_DATA/weights/rlfn_x4_bytedance.safetensors --data photos/ --json
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("models", nargs="*", metavar="MODEL", default=["rcan_c_x4"])
    p.add_argument("--data", metavar="FOLDER", help="photographs (default: the built-in ones)")
    p.add_argument("--pictures", type=int, default=4, help="how many, evenly spaced (default: 4)")
    p.add_argument("--tile", type=int, default=48, help="side in LR pixels (default: 48)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from srkd.models import load_model

    rows = [
        row
        for spec in args.models
        for row in measure(load_model(spec), [*pictures(args.data, args.pictures)], args.tile)
    ]
    if args.json:
        print(json.dumps(rows))
        return 0
    print(f"{'model':<24} {'overlap':>7} {'PSNR dB':>8} {'seam':>6} {'joints':>6}")
    for r in rows:
        print(
            f"{r['model']:<24} {r['overlap_px']:>7} {r['psnr_db']:8.2f} {r['seam']:6.3f} {r['joints']:6.2f}"
        )
    return 0


def pictures(folder: str | None, count: int) -> Iterator[np.ndarray]:
    """(1, 3, 128, 144) float32 in [0, 1], from the middle of photographs."""
    import numpy as np

    for rgb in photographs(folder, count):
        top, left = ((side - kept) // 2 for side, kept in zip(rgb.shape, (128, 144), strict=False))
        cut = rgb[top : top + 128, left : left + 144].astype(np.float32) / 255
        yield np.ascontiguousarray(cut.transpose(2, 0, 1)[None])


def photographs(folder: str | None, count: int) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8, evenly spaced over what there is."""
    from pathlib import Path

    from srkd.data.builtin import training_images
    from srkd.images import read_rgb8

    if folder is None:
        found = [rgb for _, rgb in training_images()]
        yield from found[:: max(1, len(found) // count)][:count]
        return
    files: list[Path] = sorted(p for p in Path(folder).iterdir() if p.suffix == ".png")
    for file in files[:: max(1, len(files) // count)][:count]:
        yield read_rgb8(file)


def measure(model: LoadedModel, lrs: list[np.ndarray], tile_px: int) -> list[dict[str, Any]]:
    import torch

    from deploy.difference import difference, seam_score
    from srkd import tiling

    usual = tiling.OVERLAP_PX
    rows = []
    with torch.inference_mode():
        wholes = [model.network(torch.from_numpy(lr)).numpy() for lr in lrs]
        for overlap in (0, usual):
            tiling.OVERLAP_PX = overlap
            tiled = [
                tiling.upscale_tiled(
                    model.network, torch.from_numpy(lr), model.facts, tile_px
                ).numpy()
                for lr in lrs
            ]
            pairs = [*zip(wholes, tiled, strict=True)]
            rows.append(
                {
                    "model": model.name,
                    "overlap_px": overlap,
                    "psnr_db": min(difference(x, y).psnr_db for x, y in pairs),
                    "seam": max(seam_score(x, y) for x, y in pairs),
                    "joints": fmean(joints(x, y, model.scale, tile_px) for x, y in pairs),
                }
            )
    tiling.OVERLAP_PX = usual
    return rows


def joints(whole: np.ndarray, tiled: np.ndarray, scale: int, tile_px: int) -> float:
    """Step across the joints over the step across lines beside them, beyond any overlap."""
    import numpy as np

    ratios = []
    for axis in (2, 3):
        others = tuple(a for a in range(4) if a != axis)
        line = np.abs(np.diff(tiled.astype(np.float64) - whole, axis=axis)).mean(axis=others)
        at = np.arange(tile_px, whole.shape[axis] // scale, tile_px) * scale - 1
        away = scale * np.arange(9, 17)
        beside = np.concatenate([at[:, None] - away, at[:, None] + away], axis=1)
        ratios.append(line[at].mean() / line[beside[beside < len(line)]].mean())
    return fmean(ratios)


if __name__ == "__main__":
    sys.exit(main())
