"""A stand-in for `tensorrt` and `tensorrt_rtx` that notes every name of the interface that is used.

It has no more than what our code uses, in the libraries' shapes and types, and it "runs" an engine by
repeating pixels `SCALE` times at the addresses it is given. The names it notes are looked up in the real
bindings by test_tensorrt_contract.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from deploy.machine import Gpu

SCALE = 2
PLAN = b"vtrt: an engine"
VERSION = "10.13.3.9"


class Api:
    """One object, class or enumeration of the interface: its members, and which of them were used."""

    def __init__(self, kind: str, used: set[str], **members: Any) -> None:
        self.__dict__.update(_kind=kind, _used=used, _members=members)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in self._members:
            raise AttributeError(name)  # what the import system asks of a module
        self._used.add(f"{self._kind}.{name}".lstrip("."))
        try:
            return self._members[name]
        except KeyError:
            raise AttributeError(f"{self._kind}.{name} is not in the stand-in") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._used.add(f"{self._kind}.{name}")
        self._members[name] = value

    def __int__(self) -> int:
        return self._members["value"]


class StandIn(Api):
    """The module. Its own switches (lower case, not of the interface) are set by tests."""

    def __init__(self, rtx: bool) -> None:
        used: set[str] = set()
        super().__init__("", used, __version__=VERSION)
        self.__dict__.update(
            used=used,
            calls=[],  # (name, arguments) of calls that change something
            starts=True,
            parse_errors=[],
            plan=PLAN,
            validity=("VALID", 0),
            opens=True,
            shape_scale=SCALE,
            runs=True,
            tensors={"lr": "FLOAT", "sr": "FLOAT"},
            layers='{"Layers": []}',
            compiled=b"kernels",  # what the runtime cache holds after a run
            cache_fits=True,
        )
        self._members.update(self._enumerations(rtx), **self._classes())

    def switch(self, **switches: Any) -> None:
        """Make it behave otherwise; see the list in the constructor."""
        assert switches.keys() <= self.__dict__.keys()
        self.__dict__.update(switches)

    def api(self, kind: str, **members: Any) -> Api:
        return Api(kind, self.used, **members)

    def enumeration(self, kind: str, names: str, values: tuple[int, ...] = ()) -> Api:
        members = {
            name: self.api(kind, name=name, value=values[i] if values else i)
            for i, name in enumerate(names.split())
        }
        return self.api(kind, **members, __members__=members)

    def call(self, name: str, result: Any = None) -> Any:
        def made(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            return result

        return made

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of all calls of one method."""
        return [given for called, given in self.calls if called == name]

    def _enumerations(self, rtx: bool) -> dict[str, Any]:
        found = {
            "BuilderFlag": self.enumeration("BuilderFlag", "TF32"),
            "DataType": self.enumeration("DataType", "FLOAT HALF"),
            "LayerInformationFormat": self.enumeration("LayerInformationFormat", "ONELINE JSON"),
            "LayerType": self.enumeration(
                "LayerType", "CONVOLUTION DECONVOLUTION MATRIX_MULTIPLY EINSUM SHUFFLE"
            ),
            "NetworkDefinitionCreationFlag": self.enumeration(
                "NetworkDefinitionCreationFlag", "STRONGLY_TYPED", (1,)
            ),
            "ProfilingVerbosity": self.enumeration("ProfilingVerbosity", "DETAILED"),
        }
        if rtx:
            bits = "VERSION_MISMATCH UNSUPPORTED_CC OLD_CUDA_DRIVER OLD_CUDA_RUNTIME "
            bits += "INSUFFICIENT_GPU_MEMORY MALFORMED_ENGINE CUDA_ERROR"
            found |= {
                "ComputeCapability": self.enumeration("ComputeCapability", "NONE SM89 SM120"),
                "DynamicShapesKernelSpecializationStrategy": self.enumeration(
                    "DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE"
                ),
                "EngineInvalidityDiagnostics": self.enumeration(
                    "EngineInvalidityDiagnostics", bits, (1, 2, 4, 8, 16, 32, 64)
                ),
                "EngineValidity": self.enumeration("EngineValidity", "VALID SUBOPTIMAL INVALID"),
            }
        return found

    def _classes(self) -> dict[str, Any]:
        used = self.used

        class Noted(type):
            def __getattribute__(cls, name: str) -> Any:
                if not name.startswith("_"):
                    used.add(f"ILogger.{name}")
                return super().__getattribute__(name)

        class ILogger(metaclass=Noted):
            INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

            def log(self, severity: int, msg: str) -> None:
                raise AssertionError("a logger that does not log")

        def class_of(make: Any) -> Any:
            def made(*arguments: Any) -> Api:
                self.__dict__["logger"] = next(a for a in arguments if isinstance(a, ILogger))
                if not self.starts:
                    self.say(ILogger.INTERNAL_ERROR, "CUDA driver version is\ninsufficient")
                    raise TypeError("factory function returned nullptr")
                return make()

            return made

        return {
            "ILogger": ILogger,
            "Builder": class_of(self._builder),
            "OnnxParser": class_of(self._parser),
            "Runtime": class_of(self._runtime),
        }

    def say(self, severity: int, message: str) -> None:
        self.used.add("ILogger.log")
        self.logger.log(severity, message)

    # --- building ---

    def _builder(self) -> Api:
        def build(network: Api, config: Api) -> bytes | None:
            self.say(2, "a layer may be slow")
            if self.plan is None:
                self.say(1, "out of memory")
                self.say(1, "no engine")
            return self.plan

        config = self.api(
            "IBuilderConfig",
            set_flag=self.call("set_flag"),
            clear_flag=self.call("clear_flag"),
            add_optimization_profile=self.call("add_optimization_profile", 0),
        )
        self.__dict__["config"] = config
        return self.api(
            "Builder",
            logger=self.logger,
            create_network=self.call("create_network", self._network()),
            create_builder_config=self.call("create_builder_config", config),
            create_optimization_profile=self.call(
                "create_optimization_profile",
                self.api("IOptimizationProfile", set_shape=self.call("set_shape")),
            ),
            build_serialized_network=build,
        )

    def _network(self) -> Api:
        kinds, types = self._members["LayerType"]._members, self._members["DataType"]._members
        layers = [("CONVOLUTION", "HALF"), ("SHUFFLE", "HALF"), ("MATRIX_MULTIPLY", "FLOAT")]
        made = [
            self.api(
                "ILayer",
                type=kinds[kind],
                get_input=self.call("get_input", self.api("ITensor", dtype=types[dtype])),
            )
            for kind, dtype in layers
        ]
        return self.api("INetworkDefinition", num_layers=len(made), get_layer=made.__getitem__)

    def _parser(self) -> Api:
        errors = [
            self.api(
                "ParserError",
                node_name=self.call("node_name", name),
                node_operator=self.call("node_operator", operator),
                desc=self.call("desc", text),
            )
            for name, operator, text in self.parse_errors
        ]
        return self.api(
            "OnnxParser",
            parse_from_file=self.call("parse_from_file", not errors),
            num_errors=len(errors),
            get_error=errors.__getitem__,
        )

    # --- running ---

    def _runtime(self) -> Api:
        def validity(plan: bytes) -> tuple[Api, int]:
            verdict, bits = self.validity
            return self._members["EngineValidity"]._members[verdict], bits

        def open_plan(plan: bytes) -> Api | None:
            assert plan == PLAN
            if self.opens:
                return self._engine()
            return self.say(1, "magic tag is wrong")

        return self.api("Runtime", get_engine_validity=validity, deserialize_cuda_engine=open_plan)

    def _engine(self) -> Api:
        types = self._members["DataType"]._members
        names = [*self.tensors]
        context = self._context()
        inspector = self.api("EngineInspector", get_engine_information=lambda form: self.layers)
        return self.api(
            "ICudaEngine",
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_dtype=lambda name: types[self.tensors[name]],
            get_tensor_profile_shape=lambda name, index: [
                (1, 3, 4, 4),
                (1, 3, 8, 8),
                (1, 3, 16, 12),
            ],
            create_runtime_config=self._config_of_run,
            create_execution_context=self.call("create_execution_context", context),
            create_engine_inspector=lambda: inspector,
        )

    def _config_of_run(self) -> Api:
        def load(blob: bytes) -> bool:
            self.calls.append(("deserialize", (blob,)))
            return self.cache_fits

        cache = self.api("IRuntimeCache", deserialize=load, serialize=lambda: self.compiled)
        config = self.api(
            "IRuntimeConfig",
            create_runtime_cache=lambda: cache,
            set_runtime_cache=self.call("set_runtime_cache", True),
        )
        self.__dict__["run_config"] = config
        return config

    def _context(self) -> Api:
        state: dict[str, Any] = {}

        def run(stream: int) -> bool:
            assert stream == HostStream.handle
            if not self.runs:
                self.say(1, "illegal address")
                return False
            n, c, h, w = state["shape"]
            lr = _floats(state["lr"], (n, c, h, w))
            _floats(state["sr"], (n, c, SCALE * h, SCALE * w))[:] = enlarged(lr)
            return True

        def shape_of(name: str) -> tuple[int, ...]:
            n, c, h, w = state["shape"]
            return (n, c, self.shape_scale * h, self.shape_scale * w)

        return self.api(
            "IExecutionContext",
            set_input_shape=lambda name, shape: bool(state.update(shape=shape) or True),
            get_tensor_shape=shape_of,
            set_tensor_address=lambda name, address: bool(state.update({name: address}) or True),
            execute_async_v3=run,
        )


def _floats(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


def enlarged(lr: np.ndarray) -> np.ndarray:
    return lr.repeat(SCALE, axis=2).repeat(SCALE, axis=3)


class HostStream:
    """What `deploy.cuda_stream.CudaStream` is to an engine, in host memory."""

    gpu, handle = Gpu("Stand-in GPU", "8.9"), 7

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy())

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, torch.nan)

    def download(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.numpy()
