"""An ONNX graph in ONNX Runtime: engines `onnx` and `ort`, on the CPU or on CUDA.

The provider asked for and no other: ONNX Runtime replaces one that fails to start by the CPU and only logs it.
On CUDA: no TF32 (it is on by default), and the algorithm of a convolution by rule, because the search
for the fastest is repeated at every new size of picture.

The CPU has no float16 arithmetic in ONNX Runtime: a float16 graph is computed in float32 there, with float16
weights. That shows that the graph loads, and neither its range nor its speed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from deploy.engine_io import check_input, check_output, first_line, one_by_one
from deploy.engines import CPU_PROVIDER, CUDA_PROVIDER, EngineRunError, require_provider
from deploy.proof import Proof
from srkd.errors import MissingError, SrkdError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import onnxruntime

PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    CUDA_PROVIDER: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
}
# Operators of convolutions and matrix products contain one of these, fused ones included.
ARITHMETIC = ("Conv", "MatMul", "Gemm", "Attention")
PRECISION_NAMES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class OrtEngine:
    """A graph on one provider."""

    def __init__(
        self, file: Path, scale: int, provider: str = CPU_PROVIDER, threads: int = 0
    ) -> None:
        """`threads` inside one operator; 0 lets ONNX Runtime take every core."""
        import onnxruntime

        self.scale = scale
        self.file = file
        self.provider = provider
        self.threads = threads
        require_provider(onnxruntime, provider, file.name)
        if provider == CUDA_PROVIDER:
            onnxruntime.preload_dlls()  # CUDA and cuDNN may lie in torch's own packages alone
        self.session = self._open(onnxruntime.SessionOptions())
        used = self.session.get_providers()
        # Only the session tells the truth: a provider that fails to start is replaced silently.
        if used[0] != provider:
            raise MissingError(
                f"ONNX Runtime runs {file.name} on {used[0]} although {provider} was asked for; its "
                "start-up failed. Repair that installation, or export for the CPU."
            )
        dims = self.session.get_inputs()[0].shape
        self.size = (dims[2], dims[3]) if all(isinstance(d, int) for d in dims) else None

    def _open(self, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        import onnxruntime

        options.intra_op_num_threads = self.threads
        chosen = [(self.provider, PROVIDER_OPTIONS.get(self.provider, {}))]
        try:
            session = onnxruntime.InferenceSession(str(self.file), options, providers=chosen)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise SrkdError(
                f"ONNX Runtime cannot open {self.file} ({first_line(error)}); export it again."
            ) from error
        session.disable_fallback()  # a run that fails on CUDA is not repeated on the CPU
        return session

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        check_input(lr)
        if self.size is not None:
            return one_by_one(self._run, lr, self.size, self.file)
        return self._run(lr)

    def _run(self, lr: np.ndarray) -> np.ndarray:
        try:
            if self.provider == CUDA_PROVIDER:
                sr = run_bound(self.session, lr, "cuda")
            else:
                sr: np.ndarray = self.session.run(["sr"], {"lr": lr})[0]  # type: ignore[assignment]
        except Exception as error:
            raise EngineRunError(
                f"ONNX Runtime could not run {self.file.name} on an input of {tuple(lr.shape)}: "
                f"{first_line(error)}"
            ) from error
        check_output(sr, lr, self.scale, self.file)
        return sr

    def proof(self, lr: np.ndarray) -> Proof:
        """Read from the profile of one run in a session of its own, opened like this one."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        with TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._open(options)
            session.run(["sr"], {"lr": lr})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return count_layers(events, self.provider)


def run_bound(session: onnxruntime.InferenceSession, lr: np.ndarray, device: str) -> np.ndarray:
    """One run with input and output in the memory of `device` (cuda or cpu): one copy in, one out."""
    import onnxruntime

    binding = session.io_binding()
    binding.bind_ortvalue_input("lr", onnxruntime.OrtValue.ortvalue_from_numpy(lr, device, 0))
    binding.bind_output("sr", device)
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0]


def count_layers(events: Iterable[dict[str, Any]], provider: str) -> Proof:
    """The proof in a profile of ONNX Runtime: what ran where, on values of which type."""
    layers: Counter[str] = Counter()
    places: Counter[str] = Counter()
    for event in events:
        about = event.get("args", {})
        if "provider" not in about or not any(a in about["op_name"] for a in ARITHMETIC):
            continue
        kind: str = next(iter(about["input_type_shape"][0]))
        layers[PRECISION_NAMES.get(kind, kind)] += 1
        places[about["provider"]] += 1
    return Proof(dict(layers), provider, dict(places))


def open_ort(file: Path, scale: int, settings: dict[str, Any]) -> OrtEngine:
    """Opener of the engines `onnx` and `ort`."""
    return OrtEngine(file, scale, settings["provider"], settings["threads"])
