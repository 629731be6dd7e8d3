"""Train a student, with or without a teacher. No arguments: the quick start."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srkd.recipe import Recipe

QUICK_START = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.toml"
FIRST = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
EXAMPLES = """\
examples:
  python scripts/distill.py
      the quick start: a few minutes on two CPU cores, ends with a verified ONNX file
  python scripts/distill.py --method logits --student rcan_a --scale 4 --teacher rcan_c \\
         --data DIV2K_train_HR --iterations 50000 --out runs/rcan_a --with-baseline
  python scripts/distill.py recipes/rcan_a_x4_logits.toml --set train.batch=8 --out runs/b
  python scripts/distill.py --resume runs/rcan_a
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="distill.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE.toml")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a recipe key (repeatable)",
    )
    p.add_argument("--out", type=Path, help="run folder to make (default: runs/NAME)")
    p.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue a run exactly")
    p.add_argument("--method", help="a method or a composition like a+b (see --list-methods)")
    p.add_argument("--student", metavar="NETWORK", help="network to train (see --list-networks)")
    p.add_argument("--scale", type=int, choices=(2, 3, 4))
    p.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="MODEL",
        help="repeat for several teachers",
    )
    p.add_argument(
        "--stage1",
        metavar="RUN",
        help="use the first stage (mtkd, pisr) of this run instead of training one",
    )
    p.add_argument(
        "--cache-teachers",
        action="store_true",
        help="compute the teachers' outputs over the training images once, not in every step",
    )
    p.add_argument(
        "--data", metavar="FOLDER", help="folder of HR images (default: the built-in set)"
    )
    p.add_argument(
        "--lr-data", metavar="FOLDER", help="folder of LR images (default: made from HR)"
    )
    p.add_argument("--validate", action="append", default=[], metavar="SET_OR_FOLDER")
    p.add_argument("--iterations", type=int)
    p.add_argument("--precision", choices=("fp32", "bf16", "auto"))
    p.add_argument("--seed", type=int)
    p.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: cuda if there is one)"
    )
    p.add_argument(
        "--tune",
        action="store_true",
        help="measure which precision, layout, threads and compilation are fastest here, and use them",
    )
    p.add_argument(
        "--with-baseline", action="store_true", help="also train the same student from scratch"
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, measure a step, write no run folder",
    )
    p.add_argument("--list-methods", action="store_true")
    p.add_argument("--list-networks", action="store_true")
    p.add_argument("--list-taps", metavar="NETWORK")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def overrides(args: argparse.Namespace) -> list[str]:
    """Options are short names of recipe keys; they win over --set, which wins over the file."""
    named = {
        "method.name": args.method,
        "student.network": args.student,
        "student.scale": args.scale,
        "teacher.models": args.teacher or None,
        "teacher.cache": args.cache_teachers or None,
        "stage1.run": args.stage1,
        "data.train": args.data,
        # Other photographs than the recipe's have other LR images: made from them unless given.
        "data.lr": "" if args.data and args.lr_data is None else args.lr_data,
        "validate.sets": args.validate or None,
        "train.iterations": args.iterations,
        "train.precision": args.precision,
        "seed": args.seed,
        "with_baseline": args.with_baseline or None,
    }
    given = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in named.items()
        if value is not None
    ]
    return [*args.set, *given]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from srkd import listing

    if (args.list_methods or args.list_networks or args.list_taps) and not FIRST:
        return 0
    if args.list_methods:
        return listing.show(listing.methods(), args.json)
    if args.list_networks:
        return listing.show(listing.networks(), args.json)
    if args.list_taps:
        return listing.show(listing.taps(args.list_taps, args.scale), args.json)

    from srkd.errors import SrkdError
    from srkd.recipe import load_recipe

    changes = overrides(args)
    if args.resume is not None:
        return resume(args, changes)
    quick = is_quick_start(args)
    if (quick or args.dry_run) and os.environ.get("WORLD_SIZE", "1") != "1":
        if not FIRST:
            return SrkdError.exit_code
        raise SrkdError(
            "torchrun trains a recipe with several processes; start the quick start and --dry-run without it."
        )
    recipe = load_recipe(QUICK_START if quick else args.recipe, changes)
    if not args.tune:
        return start(args, recipe, quick)
    import srkd.ranks as ranks
    from srkd.tuning import tuned

    # One group for both: a second one would find what the first left with torchrun.
    with ranks.group(args.device):
        fixed = {change.partition("=")[0].strip() for change in changes}
        recipe = tuned(recipe, args.device, fixed, quiet=args.quiet)
        return start(args, recipe, quick)


def start(args: argparse.Namespace, recipe: Recipe, quick: bool) -> int:
    """Train a recipe, or only look at it."""
    from srkd import listing

    if args.dry_run:
        from srkd.dryrun import dry_run

        return listing.show(dry_run(recipe, args.device), args.json)
    if quick:
        from deploy.quickstart import quickstart

        return quickstart(
            recipe,
            args.out,
            device=args.device,
            overwrite=args.overwrite,
            as_json=args.json,
            quiet=args.quiet,
        )
    from srkd.train import distill

    out = args.out or Path("runs") / default_name(args, recipe)
    if not args.quiet and FIRST:
        print(recipe.summary(), file=sys.stderr)
    result = distill(recipe, out, device=args.device, overwrite=args.overwrite, quiet=args.quiet)
    return finish(result, args.json)


def is_quick_start(args: argparse.Namespace) -> bool:
    """Nothing says what to train: the quick start, whose seed, length and precision may be set."""
    what = (
        args.recipe,
        args.method,
        args.student,
        args.scale,
        args.data,
        args.lr_data,
        args.stage1,
    )
    return not any((*what, args.cache_teachers)) and not (args.set or args.teacher or args.validate)


def default_name(args: argparse.Namespace, recipe: Recipe) -> str:
    if args.recipe is not None:
        return args.recipe.stem
    if recipe.stages == "first":
        return f"x{recipe.student.scale}_{recipe.method.name}_stage1"
    return f"{recipe.student.network}_x{recipe.student.scale}_{recipe.method.name}"


def resume(args: argparse.Namespace, changes: list[str]) -> int:
    """Continue a run; anything that would make it another run is refused with the difference."""
    from srkd.errors import SrkdError
    from srkd.recipe import load_recipe
    from srkd.train import resume

    saved = args.resume / "recipe.toml"
    if args.dry_run or args.overwrite:
        raise SrkdError("--resume continues a run; drop --dry-run and --overwrite.")
    if args.tune:
        raise SrkdError("--resume goes on with the settings that the run began with; drop --tune.")
    if args.recipe is not None or args.out is not None:
        raise SrkdError("--resume RUN takes its recipe and folder from RUN; drop RECIPE and --out.")
    if saved.is_file() and changes:
        different = load_recipe(saved).differences(load_recipe(saved, changes))
        if different:
            raise SrkdError(
                f"{args.resume} was started with another recipe, so it cannot be resumed exactly: "
                f"{'; '.join(different)}. Drop these options, or start a new run with "
                f"--set student.weights={args.resume} --out ..."
            )
    return finish(resume(args.resume, device=args.device, quiet=args.quiet), args.json)


def finish(result: object, as_json: bool) -> int:
    from srkd.console import INTERRUPTED
    from srkd.files import plain
    from srkd.report import print_table
    from srkd.train import INTERRUPTED_HINT, Result

    assert isinstance(result, Result)
    if not FIRST:
        pass
    elif as_json:
        print(json.dumps(plain(result.to_dict())))
    elif result.interrupted:
        print(INTERRUPTED_HINT.format(folder=result.folder))
    else:
        print_table(result.rows)
        print(f"\n{result.folder}/  weights.safetensors, model.json, report.md, samples/")
    return INTERRUPTED if result.interrupted else 0


if __name__ == "__main__":
    from srkd.console import run_command

    sys.exit(run_command(main))
