"""torch's current CUDA GPU: which it is, memory on it, a stream. Torch tensors are the buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deploy.machine import Gpu
from srkd.errors import MissingError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def current_gpu(refusal: str) -> Gpu:
    """The GPU that torch works on; `refusal` is the sentence (exit 3) for a machine where torch finds none."""
    if not torch.cuda.is_available():
        raise MissingError(refusal)
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


class CudaStream:
    """A stream of its own on the current GPU (`current_gpu`): all work of one engine runs in order on it."""

    def __init__(self, refusal: str) -> None:
        self.gpu = current_gpu(refusal)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)

    @property
    def handle(self) -> int:
        return self.stream.cuda_stream

    def upload(self, array: np.ndarray) -> Tensor:
        """A contiguous copy of `array` on the GPU, in the order of the stream."""
        with torch.cuda.stream(self.stream):
            return torch.from_numpy(array).to(self.device).contiguous()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Room for float32 values on the GPU; what is in it is undefined."""
        with torch.cuda.stream(self.stream):
            return torch.empty(shape, dtype=torch.float32, device=self.device)

    def download(self, tensor: Tensor) -> np.ndarray:
        """`tensor` on the host, after all that was put on the stream before."""
        with torch.cuda.stream(self.stream):
            return tensor.cpu().numpy()
