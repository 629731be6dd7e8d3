"""Local attribution maps: which input pixels decide what a network draws in a window of its output.

Paper: Gu and Dong, "Interpreting Super-Resolution Networks with Local Attribution Maps", CVPR 2021,
arXiv 2011.11036; methods.md 1.10.

    g_j  = x blurred with an l x l Gaussian of sigma_j = sigma_max (1 - j/m),  j = 0..m       (1)
    D(I) = sum over window and channels of sqrt((d_h I)^2 + (d_w I)^2)                         (2)
    LAM  = 1/m * sum_{j=1..m} dD(F(g_j))/dg * m (g_j - g_{j-1})                                (3)
    map  = |sum over channels of LAM|, divided by its maximum                                  (4)
    G    = sum_{i=1..n} (2i - n - 1) a_i / (n sum a),   a = sorted map + 1e-7                  (5)
    DI   = (1 - G) * 100                                                                       (6)
    S_t  = sum over the channels and pixels of image t of |LAM| / the same over all images     (7)

    x     (1, C, h, w)  in [0, 1]   the sharp input; g_m = x, g_0 is the most blurred one
    F(x)  (1, C', H, W)             window = x,y,size in pixels of this OUTPUT
    d_h   I(row + 1) - I(row), d_w likewise: the window reads one row and one column beyond itself,
          and where it ends at the border of the output its last row or column has no difference
    DI    0..100; higher = more pixels take part. Depends on h, w and m: compare on one input and path

Of an aggregated teacher (MTKD, srkd/aggregate.py), F is the aggregation network and x are the SR images of
its N teachers on 3N channels: blurred together, one gradient, LAM split into N maps. Then h, w are H, W:
sigma_max and l count SR pixels, and DI is not to be compared with that of a network, whose x is the LR image.
S_t is ours; the paper has one image.

The blur mirrors the image at its borders without repeating the border pixel. Departs from the public
demo in one point: at a pixel where both differences are 0 the root has no gradient; 0 is taken there, for
that pixel alone, where the demo loses the gradient of every input pixel that this output pixel sees.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srkd.aggregate import Aggregate
from srkd.data.degradation import downscale_uint8
from srkd.devices import pick_device
from srkd.errors import MissingError, SrkdError
from srkd.images import read_rgb8, to_tensor, to_uint8
from srkd.loaded import LoadedModel
from srkd.models import load_model
from srkd.tiling import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Window(NamedTuple):
    """A square of the output, in output pixels; x counts columns and y rows, both from 0."""

    x: int
    y: int
    size: int


@dataclass(frozen=True)
class BlurPath:
    """How the input goes from blurred to sharp; the values of the paper's demo."""

    sigma_max: float = 1.2  # pixels of x
    steps: int = 50  # m
    kernel_px: int = 9  # l

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma_max) and self.sigma_max > 0):
            raise SrkdError(
                f"sigma_max is {self.sigma_max}, but a blur needs a positive width in pixels; "
                "the paper's demo has 1.2."
            )
        if self.steps < 1:
            raise SrkdError(
                f"a path of {self.steps} steps goes nowhere; take 1 or more (the paper's demo has 50)."
            )
        if self.kernel_px < 3 or self.kernel_px % 2 == 0:
            raise SrkdError(
                f"the blur kernel has {self.kernel_px} px, but it needs an odd number from 3 on; "
                "the paper's demo has 9."
            )

    def sigma(self, j: int) -> float:  # Eq. (1)
        """Width at step j: sigma_max at 0, 0 at `steps`."""
        return self.sigma_max * (1 - j / self.steps)


DEMO_PATH = BlurPath()


# --- the equations ------------------------------------------------------------------------------


def gaussian(sigma: float, kernel_px: int) -> Tensor:
    """Weights (l,) float64 with sum 1. The l x l kernel is their outer product, so it has sum 1 too."""
    offsets = torch.arange(kernel_px, dtype=torch.float64) - kernel_px // 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    return weights / weights.sum()


def blur(x: Tensor, sigma: float, kernel_px: int) -> Tensor:  # Eq. (1)
    """g(x, sigma): (N, C, h, w) -> (N, C, h, w), mirrored at the borders; sigma 0 gives x itself."""
    if sigma == 0:
        return x
    least = kernel_px // 2 + 1
    if min(x.shape[-2:]) < least:
        raise SrkdError(
            f"an input of {x.shape[-1]}x{x.shape[-2]} px is too small for a blur kernel of {kernel_px} px, "
            f"which needs {least} px on each side; take a larger image or a smaller kernel."
        )
    weights = gaussian(sigma, kernel_px).tolist()
    return _along_rows(_along_rows(x, weights).mT, weights).mT


def _along_rows(x: Tensor, weights: list[float]) -> Tensor:
    """Written as x + sum of w (neighbour - x), so that what is flat stays flat to the last bit: a rounding
    error would be a step of the path, and the map of a flat image would be that noise, divided by its maximum."""
    reach, width = len(weights) // 2, x.shape[-1]
    padded = F.pad(x, (reach, reach, 0, 0), mode="reflect")
    change = torch.zeros_like(x)
    for k, weight in enumerate(weights):
        change += weight * (padded[..., k : k + width] - x)
    return x + change


def detail(sr: Tensor, window: Window) -> Tensor:  # Eq. (2)
    """D: (N, C, H, W) -> (N,). Its gradient is 0 where both differences are 0."""
    x, y, size = window
    seen = sr[..., y : y + size + 1, x : x + size + 1]
    here = seen[..., :-1, :-1]
    squared = (seen[..., 1:, :-1] - here) ** 2 + (seen[..., :-1, 1:] - here) ** 2
    flat = squared == 0
    # The inner `where` keeps the root away from 0: 0 * inf would be NaN in the gradient.
    root = torch.where(flat, 1.0, squared).sqrt()
    return torch.where(flat, 0.0, root).sum((1, 2, 3))


def heat_map(signed: Tensor) -> Tensor:  # Eq. (4)
    """(C, h, w) -> (h, w) in [0, 1]; all zero when no pixel takes part."""
    amount = signed.sum(0).abs()
    return amount / amount.max() if bool(amount.any()) else amount


def gini(heat: Tensor) -> float:  # Eq. (5)
    """Inequality of the values of a map: 0 when all are equal, (n - 1)/n when one has all. NaN for zeros."""
    if not bool(heat.any()):
        return math.nan
    a = (heat.flatten().double() + 1e-7).sort().values
    n = len(a)
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=a.device)
    return (((2 * rank - n - 1) * a).sum() / (n * a.sum())).item()


def diffusion_index(gini: float) -> float:  # Eq. (6)
    return (1 - gini) * 100


def shares(signed: Tensor, channels: int = 3) -> list[float]:  # Eq. (7)
    """(C, h, w) -> one share in 0..1 for each group of `channels`, their sum 1; NaN when all are zero."""
    amounts = torch.stack([group.abs().sum() for group in signed.double().split(channels)])
    return (amounts / amounts.sum()).tolist()


# --- the path through a network -----------------------------------------------------------------


@dataclass(frozen=True)
class Attribution:
    """What `attribution` finds.

    signed     (C, h, w) float64, LAM of Eq. (3); its sum approaches `rise` as the steps get finer
    rise       D(F(x)) - D(F(g_0)): what the network draws in the window more than from the blurred input
    undefined  entries of the gradient, of steps * C * h * w, that were not finite and counted as 0
    """

    signed: Tensor
    rise: float
    undefined: int


@dataclass(frozen=True)
class Heat:
    """The map of one image of x.

    map                    (h, w) in [0, 1]
    gini, diffusion_index  of the map; NaN when it is zero
    share                  of the image in what all images of x contribute, 0..1; NaN when nothing does
    """

    map: Tensor
    gini: float
    diffusion_index: float
    share: float

    @property
    def known(self) -> bool:
        """Whether there is an index: whether any pixel takes part."""
        return not math.isnan(self.diffusion_index)


def attribution(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    window: Window | tuple[int, int, int],
    path: BlurPath = DEMO_PATH,
    *,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:  # Eq. (3)
    """Attribute the window of `network(x)` to the elements of x, (1, C, h, w) on the network's device.

    `network` is any differentiable function (N, C, h, w) -> (N, C', H, W) that treats images one by
    one; a module runs in eval mode and is left as it was. `batch` steps share a pass. `progress` is called
    with (steps done, steps).
    """
    if x.ndim != 4 or len(x) != 1:
        raise SrkdError(
            f"an attribution is about one input, (1, C, h, w), not {tuple(x.shape)}; call it per image."
        )
    if batch < 1:
        raise SrkdError(f"{batch} steps at once are none; take 1 or more.")
    window = Window(*window)
    # The steps between neighbours on the path are small, so the path is made in float64.
    sharp = x.detach().double()
    previous = blur(sharp, path.sigma(0), path.kernel_px)
    signed = torch.zeros_like(sharp)
    undefined = 0
    with _frozen(network), _memory_named("the network's gradient", x), torch.enable_grad():
        with torch.no_grad():
            start = _drawn(network, previous.to(x.dtype), window).item()
        drawn = torch.zeros(1)
        for first in range(1, path.steps + 1, batch):
            last = min(first + batch - 1, path.steps)
            points = torch.cat(
                [blur(sharp, path.sigma(j), path.kernel_px) for j in range(first, last + 1)]
            )
            change = points - torch.cat([previous, points[:-1]])
            previous = points[-1:]
            g = points.to(x.dtype).requires_grad_()
            drawn = _drawn(network, g, window)
            if not drawn.requires_grad:
                raise SrkdError(
                    "the network gives outputs without a gradient, but an attribution follows it; "
                    "give a network that torch can differentiate."
                )
            (gradient,) = torch.autograd.grad(drawn.sum(), g)
            finite = gradient.isfinite()
            undefined += gradient.numel() - int(finite.sum())
            # m and 1/m cancel.
            signed += (torch.where(finite, gradient, 0.0) * change).sum(0)
            if progress is not None:
                progress(last, path.steps)
    return Attribution(signed[0], drawn[-1].item() - start, undefined)


def split(signed: Tensor, channels: int = 3) -> list[Heat]:
    """(C, h, w) -> one map with its diffusion index for each group of `channels`, in order."""
    if len(signed) % channels:
        raise SrkdError(
            f"{len(signed)} channels do not split into groups of {channels}; give a divisor."
        )
    maps = [heat_map(group) for group in signed.split(channels)]
    return [
        Heat(m, g := gini(m), diffusion_index(g), share)
        for m, share in zip(maps, shares(signed, channels), strict=True)
    ]


def check_window(window: Window, height: int, width: int) -> None:
    """Refuse a window that is not inside an output of height x width."""
    x, y, size = window
    if size < 2:
        raise SrkdError(
            f"a window of {size} px has no differences between pixels; take 2 or more (the default is 16)."
        )
    if x < 0 or y < 0 or x + size > width or y + size > height:
        raise SrkdError(
            f"window {x},{y},{size} is not inside the output, which is {width}x{height} px; "
            f"it needs x <= {width - size} and y <= {height - size}."
            if size <= min(width, height)
            else f"a window of {size} px does not fit into the output, which is {width}x{height} px; "
            "take a smaller one."
        )


def _drawn(network: Callable[[Tensor], Tensor], g: Tensor, window: Window) -> Tensor:
    """D(F(g)), (N,), checked."""
    sr = network(g)
    check_window(window, sr.shape[-2], sr.shape[-1])
    drawn = detail(sr, window)
    if not bool(drawn.isfinite().all()):
        raise SrkdError(
            "the network's output in the window is not finite, so nothing can be attributed; "
            "check its weights and that the input is in [0, 1]."
        )
    return drawn


@contextmanager
def _frozen(network: Any) -> Iterator[None]:
    """Eval mode, and no gradient towards the weights: convolutions then need not keep their inputs.

    float32 stays float32 meanwhile. A plain function has no modes.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    weights = list(network.parameters()) if isinstance(network, nn.Module) else []
    before = [m.training for m in modules], [w.requires_grad for w in weights]
    try:
        for module in modules:
            module.training = False
        for weight in weights:
            weight.requires_grad_(False)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            yield
    finally:
        for module, training in zip(modules, before[0], strict=True):
            module.training = training
        for weight, needed in zip(weights, before[1], strict=True):
            weight.requires_grad_(needed)


@contextmanager
def _memory_named(what: str, x: Tensor) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MissingError(
            f"{what} for an input of {x.shape[-1]}x{x.shape[-2]} px does not fit into the "
            f"memory of {x.device}; take one step at once, another device, or a part of the picture."
        ) from error


# --- models and pictures ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The map of one network, or of one teacher of an aggregated one, on one picture.

    name         what tells the model from the others
    lr           (h, w, 3) uint8, what the model was given
    image        uint8, what the map is of: `lr`, or the teacher's SR image, clamped, (scale*h, scale*w, 3)
    attribution  of the 3 channels of that image; `rise` and `undefined` are those of the whole network
    teacher      its name, unlike the other teachers' of this model; "" for a network
    """

    name: str
    model: LoadedModel
    lr: np.ndarray
    image: np.ndarray
    window: Window
    attribution: Attribution
    heat: Heat
    teacher: str = ""

    @property
    def label(self) -> str:
        """`name`, or `name: teacher`."""
        return f"{self.name}: {self.teacher}" if self.teacher else self.name


def attribute(
    model: LoadedModel | str | Path,
    image: str | Path | np.ndarray,
    window: Window | tuple[int, int, int],
    *,
    scale: int | None = None,
    **options: Any,
) -> Row:
    """`attribute_all` for one network: `.heat.map` is the map (h, w), `.heat.diffusion_index` the number."""
    loaded = _opened(model, scale)
    if isinstance(loaded.network, Aggregate):
        raise SrkdError(
            f"{loaded.name} is an aggregated teacher, which has a map for each of its teachers "
            f"({', '.join(loaded.network.names)}), but one was asked for; call "
            "srkd.attribution.attribute_all([model], ...)."
        )
    return attribute_all([loaded], image, window, **options)[0]


def attribute_all(
    models: Sequence[LoadedModel | str | Path],
    image: str | Path | np.ndarray,
    window: Window | tuple[int, int, int],
    *,
    scale: int | None = None,
    hr: bool = False,
    path: BlurPath = DEMO_PATH,
    batch: int = 1,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Attribute a window (x, y, size in output pixels) of what MODELs of one scale make of a picture.

    A network gives one row. An aggregated teacher gives one for each of its teachers, in its order.

    image   a file, or (h, w, 3) uint8: the input as it is given, or with `hr` the picture that is first
            made smaller by the scale, as the LR images of the benchmarks were
    Every model is opened before any runs; `progress` is called with (done, total) steps of all.
    """
    target, window = pick_device(device), Window(*window)
    pixels = image if isinstance(image, np.ndarray) else read_rgb8(Path(image))
    loaded = [_opened(model, scale) for model in models]
    scales = sorted({model.scale for model in loaded})
    if len(scales) > 1:
        raise SrkdError(
            f"the models enlarge by {' and '.join(f'x{s}' for s in scales)}, so a window means another "
            "place in each; give models of one scale."
        )
    lr = downscale_uint8(pixels, scales[0]) if hr else pixels
    for model in loaded:
        _check_input(model, lr, window)
    names = [model.name for model in loaded]
    rows = []
    for i, model in enumerate(loaded):

        def advance(done: int, total: int, before: int = i) -> None:
            if progress is not None:
                progress(before * total + done, len(loaded) * total)

        network, x = _attributed(model, to_tensor(lr).to(target))
        found = attribution(network, x, window, path, batch=batch, progress=advance)
        signed = found.signed.cpu()
        name = model.name if names.count(model.name) == 1 else str(model.source)
        for teacher, image_of_x, part, heat in zip(
            _teachers(model), x[0].split(3), signed.split(3), split(signed), strict=True
        ):
            seen = to_uint8(image_of_x) if teacher else lr
            own = replace(found, signed=part)
            rows.append(Row(name, model, lr, seen, window, own, heat, teacher))
    return rows


def _opened(model: LoadedModel | str | Path, scale: int | None) -> LoadedModel:
    return model if isinstance(model, LoadedModel) else load_model(model, scale)


def _attributed(model: LoadedModel, lr: Tensor) -> tuple[nn.Module, Tensor]:
    """F and x: a network and `lr`, or the aggregation network and its teachers' images, (1, 3N, H, W)."""
    network = model.network.to(lr.device)
    if not isinstance(network, Aggregate):
        return network, lr
    with _frozen(network), _memory_named("the teachers' pass", lr), torch.no_grad():
        return network.network, network.stack(lr)


def _teachers(model: LoadedModel) -> list[str]:
    """A name for each image of x: of each teacher, with its place where two have one name; "" for a network."""
    if not isinstance(model.network, Aggregate):
        return [""]
    names = model.network.names
    return [
        name if names.count(name) == 1 else f"{i} {name}" for i, name in enumerate(names, start=1)
    ]


def _check_input(model: LoadedModel, lr: np.ndarray, window: Window) -> None:
    if lr.ndim != 3 or lr.shape[2] != 3 or lr.dtype != np.uint8:
        raise SrkdError(
            f"a picture as an array must be (height, width, 3) uint8, not {lr.dtype} of shape "
            f"{lr.shape}; convert it first."
        )
    (h, w), least = lr.shape[:2], model.facts.minimum_px
    if min(h, w) < least:
        raise SrkdError(
            f"the input is {w}x{h} px, but {model.name} needs at least {least} px on each side; "
            "take a larger picture."
        )
    check_window(window, model.scale * h, model.scale * w)
