"""Faults of exports, each a function that spoils one link of a sound chain, and the edge that must be blamed.

To add one: its function, and one line in FAULTS.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from onnx import numpy_helper

import deploy.half
import srkd.tiling
from deploy.emulation import HalfEmulation
from deploy.engines import CUDA_PROVIDER
from deploy.half import to_half
from deploy.inputs import build_inputs
from deploy.openvino_engine import OpenVinoEngine
from deploy.parity import Chain, verify
from deploy.proof import Proof
from deploy.rescale import rescaled
from deploy.sizes import parse_sizes
from deploy.torch_engines import TorchEngine
from srkd.errors import MissingError
from srkd.networks.rcan import ChannelAttention
from srkd.networks.swinir import Body, SwinLayer

from .chain import Other, Sound, all_edited, copied, edited, tf32, to_bf16

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import onnx

    from deploy.parity import Parity
    from srkd.networks.base import Network

SIZES = parse_sizes("16x16:40x44:64x64")
K = 16  # what features are divided by in the faults of E0


# --- faults of the rescale (E0) -------------------------------------------------------------------


def divided(change: Callable[[Network], None], s: Sound) -> Chain:
    """The network divided by K, then spoilt by `change`."""
    network: Any = rescaled(s.network, K)
    with torch.no_grad():
        change(network)
    return s.deployed(network)


def keep_eps(network: Network) -> None:
    for module in network.modules():
        if isinstance(module, SwinLayer):
            module.norm1.eps *= K**2
            module.norm2.eps *= K**2
        if isinstance(module, Body):
            module.norm.eps *= K**2


def keep_range_at_the_end(network: Any) -> None:
    """The range of the output is that of the trained network, on features that are K times smaller."""
    network.tail.shift = copy.deepcopy(network.tail.shift)
    network.tail.shift.rgb_range *= K


def keep_gates(network: Network) -> None:
    for module in network.modules():
        if isinstance(module, ChannelAttention):
            module.excite.weight /= K


def keep_one_bias(network: Any) -> None:
    network.groups[0].conv1.bias *= K


# --- faults of the exporter (E1) ------------------------------------------------------------------


def weights(s: Sound, **changes: Callable[[np.ndarray], Any]) -> Chain:
    return s.exported(edited(s.graph, **changes))


def dcr(s: Sound) -> Chain:
    made = copied(s.graph)
    for node in made.graph.node:
        for attribute in node.attribute:
            if node.op_type == "DepthToSpace" and attribute.name == "mode":
                attribute.s = b"DCR"
    return s.exported(made)


def baked_shape(s: Sound) -> Chain:
    made = copied(s.graph)
    for dim, size in zip(
        made.graph.input[0].type.tensor_type.shape.dim, (1, 3, 40, 44), strict=True
    ):
        dim.dim_value = size
    return s.exported(made)


def flipped_rows(weight: np.ndarray) -> np.ndarray:
    """Channels are color * 4 + 2 * row + column before a pixel shuffle by 2."""
    return weight.reshape(-1, 2, 2, *weight.shape[1:])[:, ::-1].reshape(weight.shape)


def lost_shift_mask(s: Sound) -> Chain:
    """Pixels from both ends of the picture attend to each other in the windows that the roll joined."""
    made = copied(s.graph)
    masks = [t for t in made.graph.initializer if numpy_helper.to_array(t).tolist() == -100]
    masks += [
        a.t
        for n in made.graph.node
        for a in n.attribute
        if a.HasField("t") and numpy_helper.to_array(a.t).tolist() == -100
    ]
    assert masks, "no mask"
    for mask in masks:
        mask.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), mask.name))
    return s.exported(made)


def moved_windows(s: Sound) -> Chain:
    """The grid of windows begins three pixels further down and right."""
    sound, by = s.engine, 3

    def answer(lr: np.ndarray) -> np.ndarray:
        more = ((0, 0), (0, 0), (by, 0), (by, 0))
        return sound(np.pad(lr, more, mode="edge"))[..., s.scale * by :, s.scale * by :]

    made = Other(s.scale, answer)
    return s.chain(graph=made, engine=made)


# --- faults of float16 (E2) -----------------------------------------------------------------------


def loud(s: Sound, k: int) -> onnx.ModelProto:
    """The same pictures, bit for bit, with `2^k` times the values inside the second block."""
    return edited(
        s.graph,
        groups__1__conv1__weight=lambda w: w * 2.0**k,
        groups__1__conv1__bias=lambda b: b * 2.0**k,
        groups__1__conv2__weight=lambda w: w / 2.0**k,
    )


def overflow(s: Sound) -> Chain:
    wide = loud(s, 12)
    return s.halved(to_half(wide), wide)


def clipped_constants(s: Sound) -> Chain:
    """An island's weights go beyond 65504 and were clipped like all others."""
    wide = loud(s, 20)
    half = to_half(wide, ["groups.1"])
    return s.halved(all_edited(half, lambda w: w.clip(-65504, 65504)), wide)


def island_rounded(s: Sound) -> Chain:
    """An island's weights went through float16 all the same; its small ones lost most of their bits."""
    wide = loud(s, 14)
    half = to_half(wide, ["groups.1"])
    return s.halved(all_edited(half, lambda w: w.astype(np.float16)), wide)


def bf16_weights(s: Sound) -> Chain:
    return s.halved(to_half(all_edited(s.graph, to_bf16)))


def lost_guard(s: Sound) -> Chain:
    """The constant that keeps a division from 0 / 0 became 0."""
    with patch.object(deploy.half, "fixed_islands", lambda graph, types: []):
        return s.halved(to_half(s.graph))


# --- faults of the engine (E3, E4) ----------------------------------------------------------------


def unpinned(s: Sound) -> Chain:
    """OpenVINO without the hint for its precision takes bf16 where the CPU has it."""
    engine = OpenVinoEngine(s.engine.file, s.scale, threads=1)
    del engine.options["INFERENCE_PRECISION_HINT"]
    if "bf16" not in engine.proof(np.zeros((1, 3, 16, 16), np.float32)).layers:
        raise MissingError("this CPU has no bf16, so OpenVINO stays in fp32")
    return s.chain(engine=engine)


def elsewhere(s: Sound) -> Chain:
    told = replace(s.engine.proof(np.zeros((1, 3, 16, 16), np.float32)), place=CUDA_PROVIDER)
    return s.chain(engine=Other(s.scale, s.engine, told))


def wide_instead_of_half(s: Sound) -> Chain:
    """Asked for float16, it computes in float32, which pictures cannot show."""
    half = to_half(s.graph)
    made = Other(s.scale, s.engine)
    return s.chain(precision="fp16", engine=made, half=HalfEmulation(half, s.scale, threads=1))


def previous_picture(s: Sound) -> Chain:
    kept: dict[tuple[int, ...], np.ndarray] = {}

    def answer(lr: np.ndarray) -> np.ndarray:
        sr = s.engine(lr)
        late, kept[lr.shape] = kept.get(lr.shape, sr), sr
        return late

    return s.answered(answer)


def first_of_batch(s: Sound) -> Chain:
    return s.answered(lambda lr: np.repeat(s.engine(lr[:1]), len(lr), axis=0))


def one_size(s: Sound) -> Chain:
    """Built for 40x44: what is larger is cut, what is smaller is put on black."""

    def answer(lr: np.ndarray) -> np.ndarray:
        h, w = lr.shape[-2:]
        baked = np.zeros((len(lr), 3, 40, 44), np.float32)
        baked[..., :h, :w] = lr[..., :40, :44]
        sr = np.zeros((len(lr), 3, s.scale * h, s.scale * w), np.float32)
        part = s.engine(baked)[..., : s.scale * h, : s.scale * w]
        sr[..., : part.shape[-2], : part.shape[-1]] = part
        return sr

    return s.answered(answer)


def clamped(s: Sound) -> Chain:
    """Of a network with more contrast than fresh weights give."""
    wide = s.open(edited(s.graph, tail__last__weight=lambda w: 4 * w))
    return s.chain(trained=wide, graph=wide, engine=Other(s.scale, lambda lr: wide(lr).clip(0, 1)))


def odd_widths(s: Sound) -> Chain:
    """A kernel that works on pairs of columns never writes the last of an odd number."""

    def answer(lr: np.ndarray) -> np.ndarray:
        sr = s.engine(lr).copy()
        if lr.shape[-1] % 2:
            sr[..., -s.scale :] = 0
        return sr

    return s.answered(answer)


def reduced_between(s: Sound) -> Chain:
    """Pictures between the declared sizes get a kernel that rounds to 10 bits."""
    fast = s.open(tf32(s.graph))
    (h, w), (high, wide) = SIZES.usual, SIZES.largest

    def answer(lr: np.ndarray) -> np.ndarray:
        return (fast if h * w < lr.shape[-2] * lr.shape[-1] < high * wide else s.engine)(lr)

    return s.answered(answer)


def one_buffer(s: Sound) -> Chain:
    """Every result lies in the same memory, and the next picture overwrites it."""
    memory = np.empty(10**6, np.float32)

    def answer(lr: np.ndarray) -> np.ndarray:
        sr = s.engine(lr)
        memory[: sr.size] = sr.ravel()
        return memory[: sr.size].reshape(sr.shape)

    return s.answered(answer)


# --- faults of tiles (E5) -------------------------------------------------------------------------


def far_sighted(s: Sound) -> Chain:
    """A network that depends strongly on the very edge of its receptive field: every layer moves by a pixel."""
    network = copy.deepcopy(s.network)
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
            if value.ndim == 4:
                for i in range(value.shape[0]):
                    value[i, i * value.shape[1] // value.shape[0], 2, 2] = 1.0
    made = TorchEngine(network, s.scale, threads=1)
    return s.chain(trained=made, graph=made, engine=Other(s.scale, made))


def in_half(s: Sound) -> Chain:
    """A sound engine in float16."""
    half = HalfEmulation(to_half(s.graph), s.scale, threads=1)
    told = Proof({"fp16": 1}, "CPU", {"CPU": 1})
    return s.chain(precision="fp16", half=half, engine=Other(s.scale, half, told))


def short_halo() -> AbstractContextManager[Any]:
    sound = srkd.tiling.halo_px
    return patch.object(srkd.tiling, "halo_px", lambda facts: sound(facts) - 1)


def no_halo() -> AbstractContextManager[Any]:
    return patch.object(srkd.tiling, "halo_px", lambda facts: 0)


def no_halo_no_overlap() -> AbstractContextManager[Any]:
    return patch.multiple(srkd.tiling, GLOBAL_HALO_PX=0, OVERLAP_PX=0)


def no_grid() -> AbstractContextManager[Any]:
    """Tiles begin anywhere, not on the grid of windows."""
    sound = srkd.tiling.plan_band
    return patch.object(
        srkd.tiling,
        "plan_band",
        lambda top, size, tile, facts, *more: sound(
            top, size, tile, replace(facts, size_multiple=1), *more
        ),
    )


def failed_tile() -> AbstractContextManager[Any]:
    """A tile whose run failed stays black."""
    sound, runs = srkd.tiling.run_padded, []

    def run(engine: Any, lr: Any, *more: Any) -> Any:
        runs.append(sound(engine, lr, *more))
        return runs[-1].zero_() if len(runs) == 3 else runs[-1]

    return patch.object(srkd.tiling, "run_padded", run)


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """`spoil` makes the faulty chain, `around` holds while it is verified; `edge` must be blamed."""

    edge: str
    network: str
    spoil: Callable[[Sound], Chain]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    more: dict[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Fault] = {
    "eps of layer norms left as it was": Fault("E0", "swinir", partial(divided, keep_eps)),
    "range of the output left as it was": Fault(
        "E0", "edsr", partial(divided, keep_range_at_the_end)
    ),
    "gates of channel attention not undone": Fault("E0", "rcan", partial(divided, keep_gates)),
    "one bias not divided": Fault("E0", "edsr", partial(divided, keep_one_bias)),
    "pixel shuffle in DCR order": Fault("E1", "edsr", dcr),
    "rows of sub-pixels flipped": Fault(
        "E1",
        "edsr",
        partial(
            weights, tail__upsample__0__weight=flipped_rows, tail__upsample__0__bias=flipped_rows
        ),
    ),
    "bias of the last layer dropped": Fault(
        "E1", "edsr", partial(weights, tail__last__bias=np.zeros_like)
    ),
    "one weight tensor off by 1 %": Fault(
        "E1", "edsr", partial(weights, groups__1__conv1__weight=lambda w: 1.01 * w)
    ),
    "input channels swapped": Fault(
        "E1", "edsr", partial(weights, head__conv__weight=lambda w: w[:, ::-1])
    ),
    "output channels swapped": Fault(
        "E1",
        "edsr",
        partial(weights, tail__last__weight=lambda w: w[::-1], tail__last__bias=lambda b: b[::-1]),
    ),
    "weights rounded to bf16, fp32 file": Fault(
        "E1", "edsr", lambda s: s.exported(all_edited(s.graph, to_bf16))
    ),
    "shape baked into the graph": Fault("E1", "edsr", baked_shape),
    "mask of shifted windows lost": Fault("E1", "swinir", lost_shift_mask),
    "grid of windows moved": Fault("E1", "swinir", moved_windows),
    "overflow in one block without island": Fault("E2", "edsr", overflow),
    "constants clipped at 65504": Fault("E2", "edsr", clipped_constants),
    "island's weights rounded to float16": Fault("E2", "edsr", island_rounded),
    "weights rounded to bf16 before float16": Fault("E2", "edsr", bf16_weights),
    "guard against division by zero lost": Fault("E2", "smfanet", lost_guard),
    "TF32 rounding in an fp32 engine": Fault(
        "E3", "edsr", lambda s: s.answered(s.open(tf32(s.graph)))
    ),
    "OpenVINO in bf16, unasked": Fault("E3", "edsr", unpinned),
    "another provider than asked": Fault("E3", "edsr", elsewhere),
    "fp32 arithmetic in an fp16 engine": Fault("E3", "edsr", wide_instead_of_half),
    "output clamped to [0, 1]": Fault("E3", "edsr", clamped),
    "output in 0..255": Fault("E3", "edsr", lambda s: s.answered(lambda lr: 255 * s.engine(lr))),
    "result of the previous picture": Fault("E3", "edsr", previous_picture),
    "second image of a batch ignored": Fault("E3", "edsr", first_of_batch),
    "engine of one baked size": Fault("E3", "edsr", one_size),
    "last column of odd widths missing": Fault("E3", "edsr", odd_widths),
    "another kernel between the sizes": Fault("E4", "edsr", reduced_between),
    "one buffer for all results": Fault("E4", "edsr", one_buffer),
    "halo one pixel short": Fault("E5", "edsr", far_sighted, short_halo, {"mean_shift": False}),
    "tiles off the grid of windows": Fault("E5", "swinir", Sound.chain, no_grid),
    "a tile that failed left black": Fault("E5", "edsr", Sound.chain, failed_tile),
    "a tile that failed left black, fp16": Fault("E5", "edsr", in_half, failed_tile),
    "no halo, fp16": Fault("E5", "edsr", in_half, no_halo),
    "no halo and overlap, channel attention": Fault("E5", "rcan", Sound.chain, no_halo_no_overlap),
}


def check(fault: Fault, sound: Sound) -> Parity:
    chain = fault.spoil(sound)
    inputs = build_inputs(sound.photos, SIZES, sound.facts)
    with fault.around():
        return verify(chain, sound.facts, inputs, sound.photos)
