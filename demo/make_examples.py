"""Make the pictures that the demo ships in demo/examples, with their terms in index.json.

Six hard cases, each as an HR picture and the LR picture that the usual bicubic reduction by 4 makes of it. HR
sides are multiples of 12, so that reductions by 2 and 3 fit as well. Photographs are crops of those that
srkd/data/builtin.py holds out of training; the rest is drawn by demo/drawings.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srkd.console import run_command

if TYPE_CHECKING:
    import numpy as np

SCALE = 4
FOLDER = Path(__file__).resolve().parent / "examples"
# Of the compressed LR picture: low enough for blocks and ringing that every eye sees.
JPEG_QUALITY = 45


@dataclass(frozen=True)
class Case:
    """One example; `photograph` names one of srkd.data.builtin, `crop` is (top, left, height, width) of it.

    Without a photograph the function `name` of demo/drawings.py draws the picture.
    """

    name: str
    title: str
    about: str
    photograph: str | None = None
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    suffix: str = ".png"


CASES = (
    Case(
        "text",
        "Text",
        "How far down can each network still be read, and which letters are made up?",
    ),
    Case("foliage", "Foliage", "Fine leaves in every direction: detail against smear."),
    Case(
        "texture",
        "Texture",
        "Cloth, seams, embroidered letters and reflections in glass.",
        "astronaut",
        (212, 8, 300, 480),
    ),
    Case("line_art", "Line art", "Spokes thinner than a pixel: breaks, moiré and false curves."),
    Case(
        "jpeg",
        "Compressed photo",
        f"The small picture is a JPEG of quality {JPEG_QUALITY}; networks that never saw one enlarge its blocks too.",
        "coffee",
        (20, 40, 360, 480),
        ".jpg",
    ),
    Case(
        "logo",
        "Transparent logo",
        "Soft shadow, glass and holes: look at the edges on light and dark.",
    ),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="make_examples.py",
        description=__doc__,
        epilog="example:\n  python demo/make_examples.py --out elsewhere",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: demo/examples"
    )
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    make(args.out)
    return 0


def make(folder: Path) -> None:
    """Write all pictures and index.json into `folder`."""
    from srkd.files import make_folder, write_text

    make_folder(folder)
    records = [_make_one(folder, case) for case in CASES]
    write_text(folder / "index.json", json.dumps(records, indent=2, ensure_ascii=False) + "\n")


def _make_one(folder: Path, case: Case) -> dict[str, str | int]:
    """Write the two pictures; the record for index.json, `scale` lying between them."""
    from PIL import Image

    from srkd.data.builtin import LICENCES
    from srkd.files import replacing
    from srkd.images import write_png

    file, truth = f"{case.name}{case.suffix}", f"{case.name}_hr.png"
    hr = _hr(case)
    lr = _reduced(hr)
    write_png(folder / truth, hr)
    if case.suffix == ".jpg":
        with replacing(folder / file) as temporary:
            Image.fromarray(lr).save(temporary, quality=JPEG_QUALITY, subsampling="4:2:0")
    else:
        write_png(folder / file, lr)
    licence, source = "Apache-2.0, as this project", "drawn by demo/drawings.py"
    if case.photograph:
        of = next(p for p in LICENCES if p.name == case.photograph)
        licence = of.licence
        source = f"{of.origin}: '{of.name}' of scikit-image, cropped; no network was trained on it"
    return {
        "file": file,
        "truth": truth,
        "scale": SCALE,
        "title": case.title,
        "about": case.about,
        "licence": licence,
        "source": source,
    }


def _hr(case: Case) -> np.ndarray:
    """(H, W, 3) or, with transparency, (H, W, 4) uint8."""
    from demo import drawings
    from srkd.data.builtin import held_out_images

    if case.photograph is None:
        return getattr(drawings, case.name)()
    top, left, height, width = case.crop
    whole = dict(held_out_images())[case.photograph]
    return whole[top : top + height, left : left + width]


def _reduced(hr: np.ndarray) -> np.ndarray:
    """The protocol's LR picture; transparent colour is weighed by its alpha before it is averaged."""
    import torch

    from demo.drawings import premultiplied, straight
    from srkd.data.degradation import downscale, downscale_uint8

    if hr.shape[2] == 3:
        return downscale_uint8(hr, SCALE)
    planes = torch.from_numpy(premultiplied(hr)).permute(2, 0, 1)[None]
    return straight(downscale(planes, SCALE)[0].permute(1, 2, 0).numpy())


if __name__ == "__main__":
    sys.exit(run_command(main))
