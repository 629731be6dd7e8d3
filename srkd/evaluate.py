"""Score networks on sets of images: whole images, eval mode, float32, the metric of a named protocol.

    score(network, evaluation_set)      one network, one set: what validation during training calls
    evaluate(model, ["Set5", ...])      one model, several sets, self-ensemble, pictures kept
    evaluate_all(["bicubic", ...], ...) several MODELs: the rows of a table
    document, write_scores              these rows as JSON and CSV

A set's score is the mean over its images. `seconds` is the time of the upscaling alone; it tells how
long an evaluation takes and is no speed measurement (no warm-up, one pass, every image another size).
"""

from __future__ import annotations

import csv
import math
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srkd.data.degradation import upscale_uint8
from srkd.data.sets import EvaluationSet, open_set
from srkd.devices import pick_device, place, wait_for
from srkd.errors import MissingError, SrkdError
from srkd.files import replacing, write_json
from srkd.images import to_tensor, to_uint8, write_png
from srkd.metrics import PAPER_Y, Protocol, levels, psnr_ssim
from srkd.models import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    # (1, 3, h, w) in [0, 1] -> (1, 3, scale*h, scale*w) in about [0, 1]
    Upscaler = Callable[[Tensor], Tensor]
    # Called with the name of the set and the score of every image as soon as it is known.
    Progress = Callable[[str, "ImageScore"], None]


BICUBIC = "bicubic"  # the model that every table starts with


@dataclass(frozen=True)
class ImageScore:
    """One image: PSNR in dB (inf where identical), SSIM, seconds of upscaling."""

    name: str
    psnr: float
    ssim: float
    seconds: float


@dataclass(frozen=True)
class SetScore:
    """One network on one set. `lr_origin` says where the LR images come from."""

    name: str
    scale: int
    lr_origin: str
    protocol: Protocol
    images: tuple[ImageScore, ...]

    @property
    def psnr(self) -> float:
        """Mean over the images, in dB; inf as soon as one image is reproduced exactly."""
        return fmean(image.psnr for image in self.images)

    @property
    def ssim(self) -> float:
        return fmean(image.ssim for image in self.images)

    @property
    def seconds(self) -> float:
        """Sum over the images."""
        return sum(image.seconds for image in self.images)


def score(
    network: nn.Module,
    evaluation_set: EvaluationSet,
    protocol: Protocol = PAPER_Y,
    device: torch.device | None = None,
) -> SetScore:
    """Score a network, (N, 3, h, w) in [0, 1] -> (N, 3, H, W), on one set.

    Runs where the network is (`device` None) or moves it to `device`. Every submodule's train or eval
    mode is as before when it returns; autocast and TF32 are off meanwhile.
    """
    if device is not None:
        network.to(device)
    first = next(network.parameters(), None)
    with _eval_mode(network), plain_float32():
        return _score(
            network, evaluation_set, protocol, first.device if first is not None else "cpu"
        )


def score_bicubic(evaluation_set: EvaluationSet, protocol: Protocol = PAPER_Y) -> SetScore:
    """Score MATLAB's bicubic upscaling, the first row of every table."""
    return _score(Bicubic(evaluation_set.scale), evaluation_set, protocol, "cpu")


@torch.inference_mode()
def score_parts(
    network: nn.Module,
    parts: Callable[[Tensor], dict[str, Tensor]],
    evaluation_set: EvaluationSet,
    protocol: Protocol = PAPER_Y,
) -> dict[str, SetScore]:
    """Score every image that one pass makes: `parts(lr)` runs `network` and names (1, 3, H, W) outputs."""
    first = next(network.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    found: dict[str, list[ImageScore]] = {}
    with _eval_mode(network), plain_float32():
        for image in evaluation_set:
            start = time.perf_counter()
            made = parts(to_tensor(image.lr).to(device))
            hr = torch.tensor(image.hr, device=device).permute(2, 0, 1)[None]
            for name, sr in made.items():
                psnr, ssim = psnr_ssim(levels(sr), hr, evaluation_set.scale, protocol)
                taken = time.perf_counter() - start
                own = ImageScore(image.name, psnr.item(), ssim.item(), taken)
                found.setdefault(name, []).append(own)
    s = evaluation_set
    return {
        name: SetScore(s.name, s.scale, s.lr_origin, protocol, tuple(scores))
        for name, scores in found.items()
    }


def evaluate(
    model: LoadedModel | Upscaler,
    sets: Sequence[str | EvaluationSet],
    *,
    scale: int | None = None,
    protocol: Protocol = PAPER_Y,
    self_ensemble: bool = False,
    device: str = "cpu",
    save: Path | None = None,
    progress: Progress | None = None,
) -> list[SetScore]:
    """Score a model on sets, in order.

    `model` is what `load_model` returns, or any function (1, 3, h, w) -> (1, 3, H, W) in [0, 1], whose
    scale has to be given. Sets are opened ones, or what `open_set` understands. `save` is a folder that
    receives save/<set>/<image>.png. A network is moved to `device`.
    """
    target = pick_device(device)
    if isinstance(model, LoadedModel):
        if scale is not None and scale != model.scale:
            raise SrkdError(
                f"{model.name} is a x{model.scale} network, but x{scale} was asked for; "
                f"choose a x{scale} model."
            )
        network, scale, least_px = model.network, model.scale, model.facts.minimum_px
    else:
        network, least_px = model, 1
        if scale is None:
            raise SrkdError("a function does not tell its scale; give evaluate(..., scale=2|3|4).")
    if isinstance(network, nn.Module):
        # Convolutions of float32 run 1.2 to 1.5 times as fast in this layout on CPUs.
        place(network, target, channels_last=target.type == "cpu")
    upscale = eightfold(network) if self_ensemble else network
    opened = open_sets(sets, scale)
    with _eval_mode(network), plain_float32():
        return [_score(upscale, s, protocol, target, least_px, save, progress) for s in opened]


def open_sets(specs: Sequence[str | EvaluationSet], scale: int) -> list[EvaluationSet]:
    """Open every set at one scale; two sets of one name are refused, tables could not tell them apart."""
    opened = [open_set(spec, scale) if isinstance(spec, str) else spec for spec in specs]
    names = [s.name for s in opened]
    for spec, evaluation_set in zip(specs, opened, strict=True):
        if evaluation_set.scale != scale:
            raise SrkdError(
                f"set {evaluation_set.name} was opened at x{evaluation_set.scale}, the model is "
                f"x{scale}; open it at x{scale}."
            )
        if names.count(evaluation_set.name) > 1:
            raise SrkdError(
                f"two sets are named '{evaluation_set.name}' (one is {spec}), so results could not be "
                "told apart; rename a folder or leave one out."
            )
    return opened


class Bicubic:
    """MATLAB's bicubic upscaling of the 8-bit image, as an upscaler."""

    def __init__(self, scale: int) -> None:
        self.scale = scale

    def __call__(self, lr: Tensor) -> Tensor:
        """(1, 3, h, w) in [0, 1] -> (1, 3, scale*h, scale*w), float32 on the device of `lr`."""
        return to_tensor(upscale_uint8(to_uint8(lr), self.scale)).to(lr.device)


def eightfold(upscale: Upscaler) -> Upscaler:
    """Geometric self-ensemble: the mean of the results over the eight symmetries, each undone.

    Source: EDSR (CVPRW 2017), section 3.4; tables mark it with a plus ("EDSR+").
    """

    def ensemble(lr: Tensor) -> Tensor:
        results = []
        for transpose in (False, True):
            for flips in ((), (-1,), (-2,), (-2, -1)):
                turned = (lr.mT if transpose else lr).flip(flips)
                sr = upscale(turned.contiguous()).flip(flips)
                results.append(sr.mT if transpose else sr)
        return torch.stack(results).mean(0)

    return ensemble


# -- one set ------------------------------------------------------------------------------------


@torch.inference_mode()
def _score(
    upscale: Upscaler,
    evaluation_set: EvaluationSet,
    protocol: Protocol,
    device: torch.device | str,
    least_px: int = 1,
    save: Path | None = None,
    progress: Progress | None = None,
) -> SetScore:
    device = torch.device(device)
    scores = []
    for image in evaluation_set:
        where = f"{evaluation_set.name}/{image.name}"
        h, w = image.lr.shape[:2]
        if min(h, w) < least_px:
            raise SrkdError(
                f"{where}: the LR image is {w}x{h} px, the network needs at least {least_px} px on "
                "each side. Leave the image out of the set."
            )
        lr = to_tensor(image.lr).to(device)
        try:
            sr, seconds = _timed(upscale, lr)
        except torch.OutOfMemoryError as error:
            raise MissingError(
                f"{where}: the whole image ({w}x{h} px LR) does not fit into the memory of {device}, "
                "and scores are those of whole images; use --device cpu."
            ) from error
        hr = torch.tensor(image.hr, device=sr.device).permute(2, 0, 1)[None]
        try:
            # Rounded once, so that the pictures kept are the ones that were scored.
            sr = levels(sr)
            psnr_db, ssim = psnr_ssim(sr, hr, evaluation_set.scale, protocol)
        except SrkdError as error:
            raise SrkdError(f"{where}: {error}") from error
        if save is not None:
            picture = sr[0].permute(1, 2, 0).cpu().numpy()
            write_png(save / evaluation_set.name / f"{image.name}.png", picture)
        scores.append(ImageScore(image.name, psnr_db.item(), ssim.item(), seconds))
        if progress is not None:
            progress(evaluation_set.name, scores[-1])
    if not scores:
        raise SrkdError(
            f"set {evaluation_set.name} holds no images, so it has no score; choose another."
        )
    return SetScore(
        evaluation_set.name,
        evaluation_set.scale,
        evaluation_set.lr_origin,
        protocol,
        tuple(scores),
    )


def _timed(upscale: Upscaler, lr: Tensor) -> tuple[Tensor, float]:
    wait_for(lr.device)
    start = time.perf_counter()
    sr = upscale(lr)
    wait_for(lr.device)
    return sr, time.perf_counter() - start


@contextmanager
def _eval_mode(network: Any) -> Iterator[None]:
    """Eval mode inside, every submodule's own mode afterwards; a plain function has none."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        if isinstance(network, nn.Module):
            network.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def plain_float32() -> Iterator[None]:
    """Plain float32 arithmetic: no autocast, no TF32, no bf16 products, whatever training has set."""
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            # Every image has another size, so trying algorithms out would cost more than it gains.
            torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(products)


# -- several models, and the files --------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One row of a table: a model (or bicubic, without parameters) and its scores on every set."""

    label: str
    source: str
    scale: int
    parameters: int | None
    self_ensemble: bool
    notes: tuple[str, ...]  # what was assumed in reading the model's file
    scores: tuple[SetScore, ...] = ()


def evaluate_all(
    specs: Sequence[str],
    sets: Sequence[str],
    *,
    scale: int | None = None,
    protocol: Protocol = PAPER_Y,
    self_ensemble: bool = False,
    device: str = "cpu",
    save: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    load: Callable[[str, int | None], LoadedModel] = load_model,
) -> list[Entry]:
    """Score several MODELs on the same sets, in order; every model and set is opened before any runs.

    A spec is what `load` understands, or "bicubic", which is scored at `scale`, else at every
    scale that the other models have. `self_ensemble` adds a second row for each network. `save`
    receives <model>/<set>/<image>.png, `progress` is called with (done, total) forward passes.
    """
    pick_device(device)
    loaded = {spec: load(spec, scale) for spec in specs if spec != BICUBIC}
    scales = sorted({model.scale for model in loaded.values()} or ({scale} if scale else set()))
    if not scales:
        raise SrkdError("bicubic has no scale of its own; add --scale 2, 3 or 4.")
    opened = {s: open_sets(sets, s) for s in scales}

    rows: list[tuple[Entry, LoadedModel | Upscaler]] = []
    names = [model.name for model in loaded.values()]
    for spec in dict.fromkeys(specs):
        if spec == BICUBIC:
            rows += [
                (Entry(BICUBIC, BICUBIC, s, None, False, notes=()), Bicubic(s)) for s in scales
            ]
            continue
        model = loaded[spec]
        label = model.name if names.count(model.name) == 1 else spec
        # An exported file holds weights, but no parameters that torch could count.
        count = sum(p.numel() for p in model.network.parameters()) or model.info.get("parameters")
        plain = Entry(label, str(model.source), model.scale, count, False, model.notes)
        rows.append((plain, model))
        if self_ensemble:
            marked = f"{label} + self-ensemble"
            rows.append((replace(plain, label=marked, self_ensemble=True), model))

    passes = [8 if entry.self_ensemble else 1 for entry, _ in rows]
    total = sum(
        n * sum(len(s) for s in opened[entry.scale])
        for n, (entry, _) in zip(passes, rows, strict=True)
    )
    done = 0
    entries = []
    for n, (entry, model) in zip(passes, rows, strict=True):

        def advance(_set: str, _image: ImageScore, n: int = n) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress(done, total)

        scores = evaluate(
            model,
            opened[entry.scale],
            scale=entry.scale,
            protocol=protocol,
            self_ensemble=entry.self_ensemble,
            device=device,
            save=save / _folder_name(entry) if save is not None else None,
            progress=advance,
        )
        entries.append(replace(entry, scores=tuple(scores)))
    return entries


def _folder_name(entry: Entry) -> str:
    name = re.sub(r"[^\w.+-]+", "_", entry.label).strip("._")
    return name if f"_x{entry.scale}" in name else f"{name}_x{entry.scale}"


def document(entries: Sequence[Entry], protocol: Protocol, device: str) -> dict[str, Any]:
    """Everything as plain values for JSON. A PSNR of null is infinite: the images are identical."""
    return {
        "protocol": protocol.name,
        "protocol_about": protocol.about,
        "device": device,
        "torch": torch.__version__,
        "models": [
            {
                "model": entry.label,
                "source": entry.source,
                "scale": entry.scale,
                "parameters": entry.parameters,
                "self_ensemble": entry.self_ensemble,
                "notes": list(entry.notes),
                "sets": [_set_values(s) for s in entry.scores],
            }
            for entry in entries
        ],
    }


def _set_values(result: SetScore) -> dict[str, Any]:
    return {
        "set": result.name,
        "lr_origin": result.lr_origin,
        "images": len(result.images),
        "psnr_db": _finite(result.psnr),
        "ssim": result.ssim,
        "seconds": result.seconds,
        "per_image": [
            {
                "image": image.name,
                "psnr_db": _finite(image.psnr),
                "ssim": image.ssim,
                "seconds": image.seconds,
            }
            for image in result.images
        ],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


CSV_COLUMNS = (
    "protocol",
    "model",
    "scale",
    "self_ensemble",
    "set",
    "lr_origin",
    "image",
    "psnr_db",
    "ssim",
    "seconds",
)


def write_scores(
    folder: Path, entries: Sequence[Entry], protocol: Protocol, device: str
) -> tuple[Path, Path]:
    """Write scores_<protocol>.json (means and images) and scores_<protocol>.csv (one line per image)."""
    as_json = folder / f"scores_{protocol.name}.json"
    as_csv = folder / f"scores_{protocol.name}.csv"
    write_json(as_json, document(entries, protocol, device))
    with replacing(as_csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for entry in entries:
            for s in entry.scores:
                head = (protocol.name, entry.label, entry.scale, entry.self_ensemble)
                for i in s.images:
                    writer.writerow((*head, s.name, s.lr_origin, i.name, i.psnr, i.ssim, i.seconds))
    return as_json, as_csv
