"""The network itself as an engine: precision, threads and TF32 of one call and of no other."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from deploy.engines import EngineRunError, open_network_engine
from deploy.torch_engines import CompiledTorchEngine, TorchEngine
from srkd.devices import place
from srkd.errors import MissingError, SrkdError
from srkd.networks import build, subpixel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.conftest import _Exports


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, dtype=np.float32)


def test_torch_engine_is_the_network_in_eval_fp32(exported: _Exports) -> None:
    network = copy.deepcopy(exported("rcan_a").model.network)
    lr = image(2, 3, 9, 11)
    with torch.no_grad():
        expected = network(torch.from_numpy(lr)).numpy()
    network.train().half()
    engine = TorchEngine(network, 3)
    assert network.training and next(network.parameters()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        got = engine(lr)
    assert got.dtype == np.float32 and got.shape == (2, 3, 27, 33)
    # the weights went through half precision, the computation did not
    assert 0 < np.abs(got - expected).max() < 1e-3


def test_bf16_is_reduced_and_close(exported: _Exports) -> None:
    model = exported("edsr_tiny").model
    lr = image(1, 3, 12, 10)
    reduced = open_network_engine("torch", model, "bf16")
    got, expected = reduced(lr), TorchEngine(model.network, 2)(lr)
    assert got.dtype == np.float32 and got.shape == (1, 3, 24, 20)
    # bf16 keeps 8 bits: off, but by less than a few levels of 255
    assert 1e-4 < np.abs(got - expected).max() < 2e-2
    weight = next(p for p in reduced.network.parameters() if p.ndim == 4 and p.shape[1] > 1)  # type: ignore[attr-defined]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.is_autocast_enabled("cpu")


class Spy(torch.nn.Module):
    """Notes what torch is set to while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        self.seen["threads"] = torch.get_num_threads()
        self.seen["matmul"] = torch.get_float32_matmul_precision()
        self.seen["autocast"] = torch.is_autocast_enabled("cpu")
        return lr.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_settings_hold_for_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_float32_matmul_precision("high")
    try:
        engine = TorchEngine(Spy(), 2, threads=before + 1)
        engine(image(1, 3, 4, 4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert engine.network.seen == {"threads": before + 1, "matmul": "highest", "autocast": False}
    assert torch.get_num_threads() == before
    engine = TorchEngine(Spy(), 2, "bf16")
    engine(image(1, 3, 4, 4))
    assert engine.network.seen["autocast"]


def test_the_reference_is_the_definition_whatever_the_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network that has run elsewhere lies in channels_last, where its upsampling is collapsed."""
    seen: list[int] = []
    whole = subpixel.collapse
    monkeypatch.setattr(subpixel, "collapse", lambda *a: seen.append(1) or whole(*a))
    torch.manual_seed(0)
    network = build("rcan_a", 4)
    lr = image(1, 3, subpixel.LEAST_SIDE, subpixel.LEAST_SIDE)
    plain = TorchEngine(network, 4)(lr)
    place(network, torch.device("cpu"), channels_last=True)
    assert np.array_equal(TorchEngine(network, 4)(lr), plain)
    assert not seen
    np.testing.assert_allclose(TorchEngine(network, 4, fast=True)(lr), plain, atol=1e-5)
    assert seen


def test_no_gpu_and_no_fp16_on_the_cpu(exported: _Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported("edsr_tiny").model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match="sees no CUDA GPU"):
        open_network_engine("torch", model, "fp16", {"device": "cuda", "threads": 0})
    with pytest.raises(SrkdError, match="fp32 or bf16 on cpu, not in 'fp16'"):
        open_network_engine("torch", model, "fp16", {"device": "cpu", "threads": 0})
    with pytest.raises(SrkdError, match=r"opens an exported file, not a network; export edsr_tiny"):
        open_network_engine("ort", model)


def test_compile_asks_for_one_whole_graph(
    exported: _Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes a minute; what torch is asked for, and what its failures become, takes none.
    asked: dict[str, Any] = {}

    def compile_(network: torch.nn.Module, **options: Any) -> torch.nn.Module:
        asked.update(options)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    model = exported("edsr_tiny").model
    engine = open_network_engine("torch-compile", model)
    lr = image(1, 3, 6, 7)
    assert asked == {"fullgraph": True}
    assert np.array_equal(engine(lr), TorchEngine(model.network, 2)(lr))

    def too_many_sizes(_: torch.Tensor) -> torch.Tensor:
        raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached\nstack")

    engine = CompiledTorchEngine(model.network, 2)
    monkeypatch.setattr(engine, "network", too_many_sizes)
    with pytest.raises(EngineRunError, match=r"\(1, 3, 6, 7\) \(recompile_limit reached\)"):
        engine(lr)
    monkeypatch.setattr("deploy.torch_engines.cpp_compiler", lambda: None)
    with pytest.raises(MissingError, match="install g"):
        CompiledTorchEngine(model.network, 2)


def test_cuda_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    # What torch is told on CUDA during a call, seen without a GPU.
    told: list[dict[str, Any]] = []

    @contextmanager
    def note(*device: str, **flags: Any) -> Iterator[None]:
        told.append({**flags, "device": device})
        yield

    monkeypatch.setattr(torch.backends.cudnn, "flags", note)
    monkeypatch.setattr(torch, "autocast", note)
    for precision in ("fp32", "fp16"):
        engine = TorchEngine(Spy(), 2, precision)
        engine.device = "cuda"
        engine.run(torch.zeros(1, 3, 4, 4))
    exact, plain, quick, half = told
    assert exact == {"device": (), "enabled": True, "benchmark": False, "allow_tf32": False}
    assert quick == {**exact, "benchmark": True}
    assert plain == {"device": ("cuda",), "dtype": None, "enabled": False}
    assert half == {"device": ("cuda",), "dtype": torch.float16, "enabled": True}
