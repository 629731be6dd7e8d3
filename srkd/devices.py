"""Which device and precision this machine should use, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import srkd.ranks as ranks
from srkd.errors import MissingError, SrkdError

if TYPE_CHECKING:
    from torch import nn


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; a device that is missing is refused.

    Of several processes on a machine each takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.world() > 1:
        name = f"cuda:{ranks.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SrkdError(f"unknown device '{name}'; use cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise SrkdError(f"device '{name}' is not supported; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            f"device '{name}' was asked for, but this machine has no CUDA device that torch "
            f"{torch.__version__} can use; use --device cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingError(
            f"device '{name}' was asked for, but there are {torch.cuda.device_count()} CUDA devices; "
            "choose a lower number."
        )
    return device


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """fp32 or bf16 for training on `device`, and the reason."""
    if name != "auto":
        return name, "asked for"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has bf16 units") if fast else ("fp32", "the GPU has no bf16 units")
    if device.type == "cpu" and (units := bf16_units()):
        return "bf16", f"the CPU has {units}"
    return "fp32", "this device has no fast bf16 units"


def bf16_units() -> str:
    """The CPU's hardware for bf16 products, empty when it has none (bf16 is then emulated and slow)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    units = (("amx_bf16", "AMX bf16 tiles"), ("avx512_bf16", "AVX-512 bf16 products"))
    return next((name for key, name in units if capabilities.get(key)), "")


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def place(network: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Move a network in place, its 2-D convolutions in the memory layout that CPUs and tensor cores prefer.

    `Module.to(memory_format=...)` refuses networks that also have a 3-D convolution (HAN).
    """
    network.to(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
