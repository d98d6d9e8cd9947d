"""The roofline: the least time that a layer can take on this GPU, by its arithmetic and by the memory it must move.

Both rates are measured where they are used, by a matrix product and a copy, so that no card has to be known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .clocks import alternate, event_clock, repeated, repeats_for
from .runtime.precision import convolutions_in_tf32, matmuls_in_tf32

WARM_UP_CALLS = 3
SAMPLE_MS, BUDGET_S = 5.0, 0.1
PRODUCT, COPIED = 4096, 2**30
"""Rows and columns of the matrices that are multiplied, bytes that are copied; a larger product is no faster."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a call, two for each product that is summed up, and bytes it reads and writes."""

    flop: int
    bytes: int


def work_of(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Work:
    """The work of one call of a layer or fused layer, with every number read and written once.

    A layer of a convolution or linear kind has a `weight` [K, C / groups, ...]; of other layers the arithmetic does not
    count. Of an image, a strided filter that is smaller than its stride reads only what lies under it.
    """
    weight = getattr(layer, "weight", None)
    products = weight is not None and weight.dim() > 1
    flop = 2 * y.numel() * math.prod(weight.shape[1:]) if products else 0
    x, *others = inputs
    read = x.numel()
    if products and weight.dim() == 4 and x.dim() == y.dim() == 4:
        read = x.shape[0] * x.shape[1]
        for size, outputs, taps in zip(x.shape[2:], y.shape[2:], weight.shape[2:], strict=True):
            read *= min(size, outputs * taps)
    tensors = (*layer.parameters(), *layer.buffers())
    parameters = sum(t.nbytes for t in tensors if t.dim())
    return Work(flop, read * x.element_size() + sum(t.nbytes for t in others) + y.nbytes + parameters)


@dataclass(frozen=True)
class Roofline:
    """Rates of a GPU: operations a second by the type of arithmetic, bytes a second of a copy, read and written.

    `cache` are the bytes of its L2 cache: what fits is not bound by memory.
    """

    flop_per_s: dict[str, float]
    bytes_per_s: float
    cache: int

    def bound_ms(self, work: Work, arithmetic: str) -> float | None:
        """The least milliseconds, or None for work that is bound by neither."""
        compute = work.flop / self.flop_per_s[arithmetic] if work.flop else 0.0
        memory = work.bytes / self.bytes_per_s if work.bytes > 2 * self.cache else 0.0
        return max(compute, memory) * 1e3 or None


def arithmetic_of(kind: str, dtype: torch.dtype) -> str:
    """The arithmetic of a kind of layer for inputs of a type, by the autocast and TF32 switches of this moment.

    "float32" is as precise as that, by whatever the GPU does fastest.
    """
    convolves, multiplies = "conv2d" in kind, "linear" in kind
    if (convolves or multiplies) and dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    tf32 = (convolves and convolutions_in_tf32()) or (multiplies and not convolves and matmuls_in_tf32())
    return "tf32" if dtype == torch.float32 and tf32 else str(dtype).removeprefix("torch.")


def measured_roofline(device: torch.device, arithmetics: set[str]) -> Roofline:
    """Measures a GPU now: the rates of a product of random matrices in each kind of arithmetic, and of a copy.

    Products as precise as float32 are counted as three in TF32 where that is faster, as Triton's kernels make them.
    """
    generator = torch.Generator(device).manual_seed(0)
    rates = {}
    with torch.autocast(device.type, enabled=False), torch.cuda.device(device):
        for name in arithmetics | ({"tf32"} if "float32" in arithmetics else set()):
            dtype = torch.float32 if name == "tf32" else getattr(torch, name)
            a, b = (torch.randn(PRODUCT, PRODUCT, generator=generator, device=device).to(dtype) for _ in range(2))
            rates[name] = 2 * PRODUCT**3 / _seconds(_product(a, b, name == "tf32"))
        if "float32" in arithmetics:
            rates["float32"] = max(rates["float32"], rates["tf32"] / 3)
        source = torch.empty(COPIED, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bytes_per_s = 2 * COPIED / _seconds(lambda: target.copy_(source))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return Roofline({name: rates[name] for name in sorted(arithmetics)}, bytes_per_s, cache)


def _product(a: Tensor, b: Tensor, tf32: bool) -> Callable[[], Tensor]:
    switch = torch.backends.cuda.matmul

    def multiply() -> Tensor:
        before, switch.fp32_precision = switch.fp32_precision, "tf32" if tf32 else "ieee"
        try:
            return a @ b
        finally:
            switch.fp32_precision = before

    return multiply


def _seconds(call: Callable[[], object]) -> float:
    for _ in range(WARM_UP_CALLS):
        call()
    torch.cuda.synchronize()
    repeats = repeats_for(event_clock(call, 1)(), SAMPLE_MS)
    timings, _ = alternate({"": event_clock(repeated(call, repeats), repeats)}, BUDGET_S, (3, 20))
    return timings[""].median / 1e3
