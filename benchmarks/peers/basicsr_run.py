"""BasicSR 1.4.2 (Apache-2.0) in an environment of its own: how it is installed, configured and timed.

    python benchmarks/peers/basicsr_run.py ENV       makes the environment ENV

The environment sees the torch, NumPy and scikit-image of the Python that runs this, so that both sides compute with the
same libraries; everything else is its own. BasicSR imports six names of torchvision, which has no build beside this
torch; none of them is called in this training, and stand-ins that refuse to run take their place.
"""

from __future__ import annotations

import argparse
import json
import re
import site
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

BUILD = ("setuptools<80", "wheel", "cython")
PACKAGES = (
    *("basicsr==1.4.2", "addict==2.4.0", "lmdb==3.0.0", "opencv-python-headless==5.0.0.93"),
    *("pyyaml==6.0.3", "scipy==1.17.1", "tqdm==4.70.1", "yapf==0.43.0", "future==1.0.0"),
    *("platformdirs==4.14.7", "requests==2.34.2", "urllib3==2.8.0", "idna==3.20"),
    *("certifi==2026.10.18", "charset-normalizer==3.5.2"),
)
STAND_IN = {
    "": "from torchvision import models, ops, transforms, utils\n__version__ = '0.0'\n",
    "utils": ("make_grid",),
    "ops": ("deform_conv2d",),
    "models/": "from torchvision.models import vgg\n",
    "models/vgg": ("vgg19",),
    "transforms/": "from torchvision.transforms import functional, functional_tensor\n",
    "transforms/functional": ("normalize",),
    "transforms/functional_tensor": ("rgb_to_grayscale",),
}
# [a..][epoch:  0, iter:      20, lr:(1.000e-04,)] [eta: 0:00:12, time (data): 0.556 (0.001)] l_pix: 1.2e-01
LINE = re.compile(r"iter:\s*([\d,]+), .*time \(data\): ([\d.]+) \(([\d.]+)\)")
PARAMETERS = re.compile(r"with parameters: ([\d,]+)")
WINDOW = 200  # iterations after which its mean times begin afresh


def install(env: Path) -> Path:
    """Make the environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    python = env / "bin" / "python"
    packages = next(env.glob("lib/python*/site-packages"))
    (packages / "same_torch.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--ignore-installed", *BUILD], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", *PACKAGES], check=True)
    for name, content in STAND_IN.items():
        path = (
            packages
            / "torchvision"
            / (f"{name}__init__.py" if name.endswith("/") or not name else f"{name}.py")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else "".join(map(_refusal, content)))
    subprocess.run([str(python), "-c", "import basicsr"], check=True, stdout=subprocess.DEVNULL)
    return python


def _refusal(name: str) -> str:
    return (
        f"def {name}(*args, **kwargs):\n"
        f"    raise NotImplementedError('a stand-in: torchvision.{name} is not installed here')\n"
    )


def options(
    network: dict[str, Any],
    data: Path,
    scale: int,
    patch: int,
    batch: int,
    iterations: int,
    every: int,
) -> dict[str, Any]:
    """BasicSR's options for the training that srkd's recipe describes; pairs lie in `data`/hr and `data`/lr.

    network   its `network_g`             patch   LR px
    every     iterations from one line of its log to the next
    """
    return {
        "name": "peer",
        "model_type": "SRModel",
        "scale": scale,
        "num_gpu": 0,
        "manual_seed": 0,
        "datasets": {
            "train": {
                "name": "train",
                "type": "PairedImageDataset",
                "dataroot_gt": str(data / "hr"),
                "dataroot_lq": str(data / "lr"),
                "filename_tmpl": f"{{}}x{scale}",
                "io_backend": {"type": "disk"},
                "gt_size": scale * patch,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": 1,
                "batch_size_per_gpu": batch,
                "dataset_enlarge_ratio": 100,  # one pass over the images is no end of the loader
            }
        },
        "network_g": network,
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "ema_decay": 0.999,
            "optim_g": {"type": "Adam", "lr": 1e-4, "weight_decay": 0, "betas": [0.9, 0.999]},
            "scheduler": {"type": "MultiStepLR", "milestones": [100_000], "gamma": 0.1},
            "total_iter": iterations,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "logger": {
            "print_freq": every,
            "save_checkpoint_freq": 10 * iterations,
            "use_tb_logger": False,
        },
    }


def network_of(family: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Its `network_g` for a network of ours; None where it has none of the same layers."""
    usual = {"num_in_ch": 3, "num_out_ch": 3, "img_range": 255.0, "upscale": arguments.get("scale")}
    mean = {"rgb_mean": [0.4488, 0.4371, 0.4040]}
    if family == "edsr" and arguments["tail"] == "staged" and arguments["mean_shift"]:
        sizes = {"num_feat": arguments["channels"], "num_block": arguments["blocks"]}
        return {"type": "EDSR", **usual, **mean, **sizes, "res_scale": arguments["residual_scale"]}
    if family == "rcan":
        sizes = {
            "num_feat": arguments["channels"],
            "num_group": arguments["group_count"],
            "num_block": arguments["blocks"],
            "squeeze_factor": arguments["reduction"],
        }
        return {"type": "RCAN", **usual, **mean, **sizes, "res_scale": 1}
    return None


def command(python: Path, folder: Path, chosen: dict[str, Any]) -> list[str]:
    """The command that trains in `folder`; JSON is YAML too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.yml").write_text(json.dumps(chosen))
    code = f"from basicsr.train import train_pipeline; train_pipeline({str(folder)!r})"
    return [str(python), "-c", code, "-opt", str(folder / "options.yml")]


def laps(log: str) -> list[tuple[float, float]]:
    """(seconds of an iteration, share of it spent waiting for data) between the lines of its log.

    Its lines have means since the beginning, in ms; the first lap, which also starts the loader, is left out.
    """
    points = [(0, 0.0, 0.0)]
    for line in log.splitlines():
        if found := LINE.search(line):
            count = int(found[1].replace(",", ""))
            points.append((count, count * float(found[2]), count * float(found[3])))
    if points[-1][0] > WINDOW:
        raise ValueError(f"{points[-1][0]} iterations, but its means begin afresh after {WINDOW}")
    found = []
    for (n0, t0, d0), (n1, t1, d1) in pairwise(points[1:]):
        found.append(((t1 - t0) / (n1 - n0), (d1 - d0) / (t1 - t0)))
    return found


def parameters(log: str) -> int:
    """Number of weights of the network that it says it has built."""
    found = PARAMETERS.search(log)
    return int(found[1].replace(",", "")) if found else 0


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("env", type=Path, metavar="ENV", help="folder of the environment to make")
    print(install(p.parse_args().env))
    return 0


if __name__ == "__main__":
    sys.exit(main())
