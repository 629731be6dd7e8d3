"""Run a TensorRT engine (`.plan`), and read back in which precision it computes.

One code path for both libraries. TensorRT-RTX compiles kernels for the GPU at hand when an engine meets
it; they are kept beside the engine (`<file>.kernels`), so that this is paid once per GPU.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.cuda_stream import CudaStream
from deploy.engine_io import check_input
from deploy.engines import EngineRunError
from deploy.proof import Proof
from deploy.tensorrt_library import ELSEWHERE, kernels_file, listening, load_library, start
from srkd.errors import CheckFailedError, MissingError, SrkdError
from srkd.files import replacing

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from torch import Tensor

    from deploy.machine import Gpu
    from deploy.tensorrt_library import Library

log = logging.getLogger(__name__)

INPUT, OUTPUT = "lr", "sr"


class TensorRTEngine:
    """A built engine on the current GPU. Not for several threads at once: it has one context.

    `settings`: library, and `built`, the facts that `build` returned. Refused with `MissingError`: an
    engine that this machine cannot run (no GPU, another GPU, another version of the library).
    """

    def __init__(self, file: Path, scale: int, settings: dict[str, Any]) -> None:
        self.file, self.scale = file, scale
        self.library, self.module = load_library(settings["library"])
        built = settings["built"]
        if built["version"] != self.module.__version__:
            raise MissingError(
                f"{file.name} was built by {self.library.title} {built['version']}, and this machine has "
                f"{self.module.__version__}; an engine runs in the version that built it. Build it again "
                "here with deploy/export.py, or install that version."
            )
        with listening(self.module) as said:
            runtime = start(self.library, self.module, "Runtime", said)
            plan = _read(file)
            # Before the GPU is asked for: a damaged file is damaged everywhere.
            validity = _validity(self.library, self.module, runtime, plan)
            _refuse_malformed(self.module, file, validity)
            self.stream = CudaStream(
                f"{file.name} is built and cannot run here: torch finds no CUDA GPU. Take it with its "
                f"sidecar to a machine with {_where(self.library, built)}."
            )
            self.gpu = self.stream.gpu
            _refuse_other_gpu(self.library, file, built, self.gpu)
            _refuse_invalid(self.library, self.module, file, validity, self.gpu)
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise SrkdError(
                    f"{self.library.title} cannot open {file}: {said.first_error}. Build it again here "
                    "with deploy/export.py."
                )
            _check_tensors(self.module, engine, file)
            low, usual, high = engine.get_tensor_profile_shape(INPUT, 0)
            self.smallest, self.usual, self.largest = tuple(low), tuple(usual), tuple(high)
            # The context needs what made it, and nothing in it keeps that alive.
            self._runtime, self._engine = runtime, engine
            self._kernels = None
            if self.library.portable:
                self._kernels = Kernels(self.module, engine, kernels_file(file))
                self._context = engine.create_execution_context(self._kernels.config)
            else:
                self._context = engine.create_execution_context()
            if self._context is None:
                raise MissingError(
                    f"{file.name} does not start on {self.gpu.name}: {said.first_error}. It needs memory "
                    f"for pictures of {_size(self.largest)}: free some, or build it for smaller ones."
                )
            for warning in said.warnings:
                log.warning("%s: %s", file.name, warning)

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        """(N, 3, h, w) float32 in [0, 1] -> (N, 3, scale*h, scale*w) float32, not clamped.

        The engine takes one picture at a time; those of a batch run one after the other.
        """
        check_input(lr)
        return np.concatenate([self._run(picture[None]) for picture in lr])

    def _run(self, lr: np.ndarray) -> np.ndarray:
        h, w = lr.shape[2:]
        source = self.stream.upload(lr)
        target = self.stream.empty((1, 3, self.scale * h, self.scale * w))
        self.enqueue(source, target)
        sr = self.stream.download(target)
        if self._kernels is not None:
            self._kernels.keep((h, w))
        return sr

    def enqueue(self, lr: Tensor, sr: Tensor) -> None:
        """Put a run on the GPU's stream: `lr` (1, 3, h, w) and `sr` (1, 3, scale*h, scale*w) live there.

        Both are contiguous float32 and must outlive the run.
        """
        shape = tuple(lr.shape)
        pairs = zip(self.smallest, shape, self.largest, strict=True)
        if not all(low <= size <= high for low, size, high in pairs):
            raise EngineRunError(
                f"{self.file.name} was built for pictures of {_size(self.smallest)} to "
                f"{_size(self.largest)}, one at a time, and got {tuple(shape)}. Cut it into tiles, or "
                "build for this size: --size."
            )
        with listening(self.module) as said:
            context = self._context
            done = context.set_input_shape(INPUT, shape)
            # A wrong scale would write outside the buffer.
            if not done or tuple(context.get_tensor_shape(OUTPUT)) != tuple(sr.shape):
                raise EngineRunError(
                    f"{self.file.name} makes {tuple(context.get_tensor_shape(OUTPUT))} of {shape}, not "
                    f"{tuple(sr.shape)} as its record says; build it again."
                )
            context.set_tensor_address(INPUT, lr.data_ptr())
            context.set_tensor_address(OUTPUT, sr.data_ptr())
            if not context.execute_async_v3(self.stream.handle):
                raise EngineRunError(
                    f"{self.file.name} could not run on an input of {shape}: {said.first_error}."
                )

    def proof(self, lr: np.ndarray) -> Proof:
        """Layers that convolve or multiply matrices, by precision; all are on the GPU."""
        counts = layer_precisions(self)
        layers = {NAMES.get(kind, kind): n for kind, n in counts.items()}
        return Proof(layers, self.gpu.name, {self.gpu.name: sum(counts.values())})

    def layers(self) -> str:
        """All layers of the engine as the library's inspector describes them (JSON)."""
        # Formats of a dynamic engine are known once the context has a size.
        self._context.set_input_shape(INPUT, self.usual)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return inspector.get_engine_information(self.module.LayerInformationFormat.JSON)


def open_tensorrt(file: Path, scale: int, settings: dict[str, Any]) -> TensorRTEngine:
    """Opener of the engines `trt` and `trt-rtx`."""
    return TensorRTEngine(file, scale, settings)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SrkdError(f"cannot read {file}: {error}. Build it with deploy/export.py.") from error


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[3]}"


# --- may it run here? -----------------------------------------------------------------------------

# What TensorRT-RTX has against an engine, as bits of one number, and the sentence for each.
OBJECTIONS = {
    "CUDA_ERROR": "the CUDA driver or runtime is not installed as it should be (see nvidia-smi)",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old; update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old; update it",
    "VERSION_MISMATCH": "another version of TensorRT-RTX built it; build it again here",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little free memory; free some, or build for smaller sizes",
}


def _validity(library: Library, module: ModuleType, runtime: Any, plan: bytes) -> Any:
    """TensorRT-RTX's own (verdict, objections); None from TensorRT, which is not asked."""
    return runtime.get_engine_validity(plan) if library.portable else None


def _objects(module: ModuleType, validity: Any, name: str) -> bool:
    return bool(int(validity[1]) & int(getattr(module.EngineInvalidityDiagnostics, name)))


def _refuse_malformed(module: ModuleType, file: Path, validity: Any) -> None:
    if validity is not None and _objects(module, validity, "MALFORMED_ENGINE"):
        raise SrkdError(
            f"{file} is no TensorRT-RTX engine, or one cut short; build it again with deploy/export.py."
        )


def _refuse_invalid(
    library: Library, module: ModuleType, file: Path, validity: Any, gpu: Gpu
) -> None:
    if validity is None or validity[0] == module.EngineValidity.VALID:
        return
    if validity[0] == module.EngineValidity.SUBOPTIMAL:
        log.warning("%s runs on %s, but was not built for it and may be slow", file.name, gpu.name)
        return
    if _objects(module, validity, "UNSUPPORTED_CC"):
        raise MissingError(
            f"{library.title} does not support {gpu}; it supports {', '.join(supported(module))}. "
            f"On this GPU {ELSEWHERE}."
        )
    told = [said for name, said in OBJECTIONS.items() if _objects(module, validity, name)]
    raise MissingError(
        f"{file.name} cannot run on {gpu.name}: {'; '.join(told) or 'the library gives no reason'}."
    )


def _refuse_other_gpu(library: Library, file: Path, built: dict[str, Any], gpu: Gpu) -> None:
    if library.portable or gpu.capability in built["compute_capabilities"]:
        return
    raise MissingError(
        f"{file.name} was built on {built['gpu']} (compute capability "
        f"{', '.join(built['compute_capabilities'])}) and this is {gpu.name} "
        f"({gpu.capability}). Build it again here with deploy/export.py."
    )


def _where(library: Library, built: dict[str, Any]) -> str:
    if not library.portable:
        return f"{built['gpu']} and {library.title} {built['version']}"
    # What an engine is built for when no GPU is named; older ones must be asked for.
    return "an RTX GPU of the Ampere generation or later"


def supported(module: ModuleType) -> list[str]:
    """Compute capabilities of this version of TensorRT-RTX: SM89 is 8.9, SM120 is 12.0."""
    names = [n for n in module.ComputeCapability.__members__ if n.startswith("SM")]
    return [f"{name[2:-1]}.{name[-1]}" for name in names]


def _check_tensors(module: ModuleType, engine: Any, file: Path) -> None:
    """Refuse an engine whose buffers are not what they are taken for: its bytes would be misread."""
    found = {
        engine.get_tensor_name(i): engine.get_tensor_dtype(engine.get_tensor_name(i))
        for i in range(engine.num_io_tensors)
    }
    need = dict.fromkeys((INPUT, OUTPUT), module.DataType.FLOAT)
    if found != need:
        told = ", ".join(f"{name} {kind.name}" for name, kind in found.items())
        raise SrkdError(
            f"{file.name} has inputs and outputs {told}, and needs lr FLOAT, sr FLOAT; build it from a "
            "graph of deploy/export.py."
        )


# --- kernels that TensorRT-RTX compiled -----------------------------------------------------------


class Kernels:
    """How TensorRT-RTX runs an engine: kernels of every size compiled at its first run, and kept.

    The file is for one GPU, driver and version; the library ignores what another wrote.
    """

    def __init__(self, module: ModuleType, engine: Any, file: Path) -> None:
        self.file, self.sizes, self.kept = file, set(), b""
        self.config = engine.create_runtime_config()
        # The other strategies change kernels in the background while the engine is measured.
        strategies = module.DynamicShapesKernelSpecializationStrategy
        self.config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        # Held here: the configuration does not keep it alive, and running without it is a crash.
        self.cache = self.config.create_runtime_cache()
        if file.is_file() and self.cache.deserialize(file.read_bytes()):
            self.kept = file.read_bytes()
        self.config.set_runtime_cache(self.cache)

    def keep(self, size: tuple[int, int]) -> None:
        """Write what was compiled, after the first run at a size (h, w)."""
        if size in self.sizes:
            return
        self.sizes.add(size)
        compiled = bytes(self.cache.serialize())
        if compiled == self.kept:
            return
        try:
            # Engines of one process share a temporary name; the lock keeps them apart.
            with self.file.with_name(f"{self.file.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with replacing(self.file) as temporary:
                    temporary.write_bytes(compiled)
        except (OSError, SrkdError) as error:
            log.warning("compiled kernels are lost when this process ends: %s", error)
        self.kept = compiled


# --- precision proof ------------------------------------------------------------------------------

# How the inspectors of TensorRT 10, 11 and RTX name layers that convolve or multiply matrices: by their
# type (CaskConvolution, correlation, gemm), or by a fused name (__myl_CorrMulMax, __myl_FcAdd).
PRODUCT_TYPE = re.compile(r"conv|correlation|gemm|matrix|matmul|mha", re.IGNORECASE)
PRODUCT_NAME = re.compile(r"__myl_\w*?(Corr|Conv|Fc|Gemm|Mha)")
TYPES = (  # word in the description of a tensor, type; the first that fits
    ("BF16", "BF16"),
    ("BFloat16", "BF16"),
    ("FP16", "FP16"),
    ("Half", "FP16"),
    ("FP32", "FP32"),
    ("Float", "FP32"),
)


def layer_precisions(engine: TensorRTEngine) -> dict[str, int]:
    """Layers that convolve or multiply matrices, by the type they read, for example {"FP16": 36, "FP32": 2}."""
    return count_precisions(engine.layers())


def count_precisions(information: str) -> dict[str, int]:
    """`layer_precisions` of an inspector's JSON. In a strongly typed network a layer computes in what it
    reads."""
    layers = json.loads(information)["Layers"]
    if not all(isinstance(layer, dict) for layer in layers):
        raise CheckFailedError(
            "the engine was built without layer types, so its precision cannot be read; build it again "
            "with deploy/export.py."
        )
    counts: dict[str, int] = {}
    for layer in layers:
        if PRODUCT_TYPE.search(layer["LayerType"]) or PRODUCT_NAME.match(layer["Name"]):
            kind = _type(layer["Inputs"][0]) if layer["Inputs"] else "unknown"
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def _type(tensor: dict[str, Any]) -> str:
    # TensorRT 10 has both in one ("Row major linear FP32", or just "Half"), newer ones a key for each.
    told = tensor.get("Datatype") or tensor.get("Format/Datatype", "")
    return next((name for word, name in TYPES if word in told), "unknown")


NAMES = {"FP32": "fp32", "FP16": "fp16", "BF16": "bf16"}  # as `Proof` has them
