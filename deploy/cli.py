"""The console command `srkd`: a name for each command of the project."""

from __future__ import annotations

import sys
from importlib import import_module

from deploy.machine import srkd_version
from srkd.console import run_command
from srkd.errors import nearest

# name -> (module with main(argv), what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "distill": ("scripts.distill", "train a student, with or without a teacher"),
    "evaluate": ("scripts.evaluate", "PSNR and SSIM of networks on sets of images"),
    "upscale": ("scripts.upscale", "enlarge a picture or a folder of pictures"),
    "compare": ("scripts.compare", "one table and one plot over finished runs, beside the papers"),
    "attribute": ("scripts.attribute", "which input pixels decide a window of the output"),
    "cost": ("scripts.cost", "parameters, multiply-adds, memory, receptive field"),
    "matrix": ("scripts.matrix", "train methods x students x scales x seeds and report the gains"),
    "publish": ("scripts.publish", "make a finished run a shipped network with a model card"),
    "export": ("deploy.export", "write a deployable file and prove it gives the same picture"),
    "audit": ("deploy.audit", "how close a network comes to the end of half precision"),
    "benchmark": ("deploy.benchmark", "how fast models and exported files are, with the evidence"),
}
BAD_REQUEST = 2


def usage() -> str:
    lines = "\n".join(f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items())
    return (
        "usage: srkd COMMAND [options]\n\n"
        "Knowledge distillation for image super-resolution networks.\n\n"
        f"commands:\n{lines}\n\n"
        "srkd COMMAND --help lists the options of a command; srkd --version prints the version.\n\n"
        "examples:\n"
        "  srkd distill                                   the quick start, a few minutes on a CPU\n"
        "  srkd evaluate runs/quickstart --data builtin\n"
        "  srkd export runs/quickstart --engine onnx\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        print(usage(), file=sys.stderr)
        return BAD_REQUEST
    name, rest = words[0], words[1:]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"srkd {srkd_version()}")
        return 0
    if name not in COMMANDS:
        print(
            f"error: there is no command '{name}'; {nearest(name, list(COMMANDS))}", file=sys.stderr
        )
        return BAD_REQUEST
    if argv is None:
        sys.argv[0] = f"srkd {name}"  # the name that the command's own --help shows
    return run_command(import_module(COMMANDS[name][0]).main, rest)


if __name__ == "__main__":
    sys.exit(main())
