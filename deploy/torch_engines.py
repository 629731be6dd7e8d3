"""The network itself in torch, on the CPU or on CUDA: engines `torch` and `torch-compile`.

    fp32         the reference: NCHW, layer by layer as defined, no TF32 in convolutions and matrix products
    bf16, fp16   channels_last under autocast: convolutions and matrix products are reduced, the rest and
                 what the networks guard (`srkd.networks.precision`) stay float32; fp16 on CUDA alone

TF32 is off by default for matrix products only; cuDNN uses it in convolutions unless told otherwise.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from deploy.engine_io import check_input, first_line
from deploy.engines import EngineRunError
from srkd.compiler import cpp_compiler
from srkd.errors import MissingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import Tensor, nn

    from srkd.loaded import LoadedModel


class TorchEngine:
    """A copy of the network in eval mode."""

    def __init__(
        self,
        network: nn.Module,
        scale: int,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int = 0,
        *,
        fast: bool = False,
    ) -> None:
        """`threads` inside one operator on the CPU; 0 leaves torch's own number alone. `fast`: fp32 in
        channels_last, as `srkd.upscale` runs on a CPU, where upsampling is collapsed: equal up to rounding."""
        import torch

        from srkd.devices import place

        if device == "cuda" and not torch.cuda.is_available():
            raise MissingError(
                f"device cuda was asked for, but torch {torch.__version__} sees no CUDA GPU here; use "
                "device cpu, or install a CUDA build of torch on a machine with an NVIDIA GPU."
            )
        self.scale = scale
        self.precision = precision
        self.device = device
        self.threads = threads
        # A copy: the caller's network may be in training mode, on a GPU, or in another precision.
        self.network = copy.deepcopy(network).float().eval()
        self.channels_last = fast or precision != "fp32"
        place(self.network, torch.device(device), channels_last=self.channels_last)

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        import torch

        check_input(lr)
        return self.run(torch.from_numpy(lr.copy()).to(self.device)).float().cpu().numpy()

    def run(self, lr: Tensor) -> Tensor:
        """`lr` on the engine's device -> `sr` there: the network alone, without copies."""
        import torch

        if self.channels_last:
            lr = lr.contiguous(memory_format=torch.channels_last)
        with self._policy():
            return self.network(lr)

    @contextmanager
    def _policy(self) -> Iterator[None]:
        """Precision and threads of one call; torch keeps them for the whole process, so they go back."""
        import torch

        matmul, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
        reduced = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
        with ExitStack() as stack:
            stack.callback(torch.set_float32_matmul_precision, matmul)
            torch.set_float32_matmul_precision("highest")
            if self.device == "cuda":
                # The reference takes the same algorithm every time; the reduced ones the fastest.
                stack.enter_context(
                    torch.backends.cudnn.flags(
                        enabled=True, benchmark=reduced is not None, allow_tf32=False
                    )
                )
            if self.threads:
                stack.callback(torch.set_num_threads, threads)
                torch.set_num_threads(self.threads)
            stack.enter_context(torch.inference_mode())
            stack.enter_context(
                torch.autocast(self.device, dtype=reduced, enabled=reduced is not None)
            )
            yield


class DoubleTorchEngine(TorchEngine):
    """The network in float64, its result rounded to float32: what tells how much float32 loses."""

    def __init__(self, network: nn.Module, scale: int) -> None:
        super().__init__(network, scale)
        self.network.double()

    def run(self, lr: Tensor) -> Tensor:
        try:
            return super().run(lr.double())
        except RuntimeError as error:
            raise EngineRunError(
                f"the network cannot run in float64 ({first_line(error)}), so it is not known how much "
                "float32 loses; make its constants follow the type of its input."
            ) from error


class CompiledTorchEngine(TorchEngine):
    """The same through torch.compile. The first pictures of new sizes take seconds to a minute."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        import torch

        super().__init__(*args, **settings)
        if self.device == "cpu" and cpp_compiler() is None:
            raise MissingError(
                "engine 'torch-compile' needs a C++ compiler on the CPU, and there is none; install g++, "
                "or use engine 'torch'."
            )
        # fullgraph: after too many sizes torch would go on uncompiled, and say nothing.
        self.network = torch.compile(self.network, fullgraph=True)

    def run(self, lr: Tensor) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return super().run(lr)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise EngineRunError(
                f"torch.compile could not compile the network for a picture of {tuple(lr.shape)} "
                f"({first_line(error)}); use engine 'torch'."
            ) from error


def open_torch(model: LoadedModel, precision: str, settings: dict[str, Any]) -> TorchEngine:
    """Opener of the engine `torch`."""
    return TorchEngine(model.network, model.scale, precision, **settings)


def open_compiled(
    model: LoadedModel, precision: str, settings: dict[str, Any]
) -> CompiledTorchEngine:
    """Opener of the engine `torch-compile`."""
    return CompiledTorchEngine(model.network, model.scale, precision, **settings)
