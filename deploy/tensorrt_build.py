"""An ONNX graph to a TensorRT engine (`.plan`).

Precision is a matter of the graph: the network is strongly typed, so every layer computes in the types
that the graph gives it and no builder flag can change that. TF32 is the exception: it is fp32 in
memory and less in the multipliers, hence off unless the settings ask for it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from deploy.cuda_stream import current_gpu
from deploy.sidecar import record_hash
from deploy.tensorrt_library import kernels_file, listening, load_library, start
from srkd.errors import CheckFailedError, SrkdError
from srkd.files import replacing, sha256

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from deploy.machine import Gpu
    from deploy.sizes import Sizes
    from deploy.tensorrt_library import Library, Said

INPUT = "lr"
# The types as the precision proof of a built engine names them (tensorrt_engine.py).
PRECISIONS = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16"}


def engine_key(
    graph_sha256: str,
    sizes: Sizes,
    settings: dict[str, Any],
    version: str,
    compute_capabilities: list[str],
) -> str:
    """sha256 over all that decides whether a built engine can be used again.

    `settings` name the library and its switches; `compute_capabilities` is empty for a portable engine.
    """
    return record_hash(
        {
            "graph": graph_sha256,
            "sizes": sizes.to_json(),
            "settings": settings,
            "version": version,
            "compute_capabilities": compute_capabilities,
        }
    )


def target_of(library_name: str) -> tuple[str, list[str]]:
    """(version of the library, compute capabilities that an engine built here is for: [] any it supports)."""
    library, module = load_library(library_name)
    gpu = _gpu_to_build_on(library)
    return module.__version__, [] if gpu is None else [gpu.capability]


def _gpu_to_build_on(library: Library) -> Gpu | None:
    if library.portable:
        return None
    return current_gpu(
        f"{library.title} builds an engine on the GPU that it is for, and torch finds no CUDA GPU "
        "here. Export on that machine, or with --engine trt-rtx, which needs none to build."
    )


def build(graph: Path, target: Path, sizes: Sizes, settings: dict[str, Any]) -> dict[str, Any]:
    """Build `graph` for pictures of `sizes` (one at a time) and write the engine to `target`.

    `settings`: library (tensorrt, tensorrt_rtx), tf32. Returns what is known of the engine, which
    `TensorRTEngine` needs as settings["built"]. Raises `MissingError` for a library or GPU that is not
    here, `SrkdError` for a graph the library does not take, `CheckFailedError` when it builds nothing.
    """
    library, module = load_library(settings["library"])
    gpu = _gpu_to_build_on(library)
    if not graph.is_file():
        raise SrkdError(f"there is no graph {graph} to build; export it with --engine onnx first.")
    begin = time.perf_counter()
    with listening(module) as said:
        builder = start(library, module, "Builder", said)
        network = _parse(builder, library, module, graph, said)
        config = builder.create_builder_config()
        # Layer types can be read back from the engine only if they are recorded at this level.
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        (config.set_flag if settings["tf32"] else config.clear_flag)(module.BuilderFlag.TF32)
        config.add_optimization_profile(_profile(builder, sizes))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise CheckFailedError(
                f"{library.title} {module.__version__} built nothing from {graph.name} for sizes {sizes}: "
                f"{said.first_error}. Smaller sizes (--size) need less memory; --engine onnx runs "
                "the same graph elsewhere."
            )
        with replacing(target) as temporary:
            temporary.write_bytes(plan)
        kernels_file(target).unlink(missing_ok=True)  # of the engine that was here before
        capabilities = [] if gpu is None else [gpu.capability]
        return {
            "library": settings["library"],
            "version": module.__version__,
            "flags": {"strongly_typed": True, "tf32": settings["tf32"]},
            "compute_capabilities": capabilities,
            "gpu": None if gpu is None else gpu.name,
            "layers": network.num_layers,
            "precisions": _precisions(module, network),
            "profile": sizes.to_json(),
            "seconds": round(time.perf_counter() - begin, 2),
            "bytes": target.stat().st_size,
            "key": engine_key(sha256(graph), sizes, settings, module.__version__, capabilities),
            "warnings": sorted(set(said.warnings)),
        }


def _parse(builder: Any, library: Library, module: ModuleType, graph: Path, said: Said) -> Any:
    typed = module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    parser = module.OnnxParser(network, builder.logger)
    if parser.parse_from_file(str(graph)):
        return network
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    told = "; ".join(
        f"node '{e.node_name()}' ({e.node_operator()}): {' '.join(e.desc().split())}"
        for e in errors
    )
    raise SrkdError(
        f"{library.title} {module.__version__} cannot read {graph.name}: {told or said.first_error}. "
        "Use --engine onnx or ort for this network, or another version of the library."
    )


def _profile(builder: Any, sizes: Sizes) -> Any:
    profile = builder.create_optimization_profile()
    # One picture at a time: a larger batch would make every buffer and every kernel choice larger.
    shapes = [(1, 3, *size) for size in (sizes.smallest, sizes.usual, sizes.largest)]
    profile.set_shape(INPUT, *shapes)
    return profile


def _precisions(module: ModuleType, network: Any) -> dict[str, int]:
    """Convolutions and matrix products of the parsed network by the type they compute in.

    It is what the graph asked for; `layer_precisions` reads what the engine does.
    """
    products = (
        module.LayerType.CONVOLUTION,
        module.LayerType.DECONVOLUTION,
        module.LayerType.MATRIX_MULTIPLY,
        module.LayerType.EINSUM,
    )
    counts: dict[str, int] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in products:
            kind: str = layer.get_input(0).dtype.name
            precision = PRECISIONS.get(kind, kind)
            counts[precision] = counts.get(precision, 0) + 1
    return counts
