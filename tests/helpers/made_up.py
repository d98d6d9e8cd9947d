"""A result with times as a GPU has them, made from one of a CPU: PyTorch's layers take 1 ms, Triton's half of it."""

import dataclasses

import torch

from lit_modules.evaluation_result import EvaluationResult, summarise_latency
from tritonnn.clocks import Timing
from tritonnn.latency import KernelLatency, Latency, LayerCall, LayerLatency
from tritonnn.roofline import Roofline, Work

CARD = "NVIDIA H100 80GB HBM3"


def as_on_a_gpu(result: EvaluationResult) -> EvaluationResult:
    """Layers take a millisecond with PyTorch and half of it with Triton; the fused network a quarter of PyTorch's."""
    layers = [
        LayerLatency(
            LayerCall(row.name, row.kind, row.shape, _contiguous(row.shape), torch.float32, torch.device("cuda")),
            _latency(1.0 + row.index / 100),
            _latency((1.0 + row.index / 100) / 2),
            None,
            Work(10**9, 10**6),
            "float32",
        )
        for row in result.latency.layers
    ]
    whole = sum(layer.pytorch.device.median for layer in layers)
    names = [variant.name for variant in result.proof.variants]
    networks = {"pytorch": _latency(whole)} | {name: _latency(whole * 0.99) for name in names}
    networks[result.proof.main.name] = _latency(whole / 2)
    kernels = []
    for kernel in result.latency.kernels:
        ms = sum(layers[index].pytorch.device.median for index in kernel.layers) / 4
        measured = KernelLatency(torch.nn.Identity(), _latency(ms), Work(10**9, 10**6), "float32")
        kernels.append((kernel.name, kernel.what, [layers[index].call.name for index in kernel.layers], measured))
    if result.proof.fused:
        networks[result.proof.fused.name] = _latency(whole / 4)
    roofline = Roofline({"float32": 1e13}, 2e12, 50 * 2**20)
    latency = summarise_latency(layers, networks, result.proof.main.name, kernels, roofline)
    environment = result.environment | {"device": CARD, "cudnn": "91900", "triton runs": "on the GPU"}
    return dataclasses.replace(result, latency=latency, environment=environment)


def _latency(ms: float) -> Latency:
    return Latency(Timing(ms * 1.1, ms, ms * 1.2, 40), Timing(ms, ms * 0.98, ms * 1.05, 40), "CUDA graph")


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
