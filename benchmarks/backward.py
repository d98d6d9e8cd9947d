"""The gradients of layers, each alone, by Triton's kernels and by PyTorch's: times on the GPU, and errors.

    python benchmarks/backward.py                           # ResNet18, 512 images of 32x32, bfloat16, channels_last
    python benchmarks/backward.py --case bf16-nhwc tf32-nchw --network resnet50 grouped

A line for each gradient: its time in PyTorch and here, in microseconds, how many times faster that is, both errors
against float64 in the 2-norm, and whether a second run gave the same bits. Calls are replayed from CUDA graphs, in
turns; cuDNN picks its algorithm by `--cudnn-benchmark` or as it does by default.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from tritonnn.clocks import alternate, captured, event_clock, repeated
from tritonnn.ops import avg_pool2d_backward, batch_norm2d_backward, linear_backward, max_pool2d_backward, relu_backward
from tritonnn.ops.conv2d.backward import op as conv2d_backward

CASES = {
    f"{name}-{layout}": (dtype, tf32, layout == "nhwc")
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
        ("fp16", torch.float16, False),
    )
    for layout in ("nhwc", "nchw")
}
CONVOLUTIONS = {
    "resnet18": [
        (3, 64, 32, 3, 1),
        (64, 64, 32, 3, 1),
        (64, 128, 32, 3, 2),
        (64, 128, 32, 1, 2),
        (128, 128, 16, 3, 1),
        (128, 256, 16, 3, 2),
        (128, 256, 16, 1, 2),
        (256, 256, 8, 3, 1),
        (256, 512, 8, 3, 2),
        (256, 512, 8, 1, 2),
        (512, 512, 4, 3, 1),
    ],
    "resnet50": [
        (3, 64, 224, 7, 2),
        (64, 64, 56, 1, 1),
        (64, 64, 56, 3, 1),
        (64, 256, 56, 1, 1),
        (256, 64, 56, 1, 1),
        (256, 128, 56, 1, 1),
        (128, 128, 56, 3, 2),
        (128, 512, 28, 1, 1),
        (256, 512, 56, 1, 2),
        (512, 128, 28, 1, 1),
        (128, 128, 28, 3, 1),
        (512, 256, 28, 1, 1),
        (256, 256, 28, 3, 2),
        (256, 1024, 14, 1, 1),
        (1024, 256, 14, 1, 1),
        (256, 256, 14, 3, 1),
        (512, 512, 14, 3, 2),
        (512, 2048, 7, 1, 1),
        (2048, 512, 7, 1, 1),
        (512, 512, 7, 3, 1),
    ],
    "grouped": [
        (32, 32, 112, 3, 1, 32),
        (96, 96, 112, 3, 2, 96),
        (144, 144, 56, 3, 1, 144),
        (192, 192, 28, 3, 1, 192),
        (384, 384, 14, 3, 1, 384),
        (576, 576, 14, 3, 2, 576),
        (960, 960, 7, 3, 1, 960),
        (96, 96, 56, 7, 1, 96),
        (128, 128, 56, 3, 1, 32),
        (256, 256, 56, 3, 2, 32),
        (256, 256, 28, 3, 1, 32),
        (1024, 1024, 7, 3, 1, 32),
    ],
}
"""Channels in and out, side of the image, of the filter, stride, groups where there are several."""
IMAGES = {"resnet18": 512, "resnet50": 64, "grouped": 64}
NORMS = {
    "resnet18": [(64, 32), (128, 16), (256, 8), (512, 4)],
    "resnet50": [(64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)],
    "grouped": [],
}
"""Channels and side of what is normalised, and goes through ReLU."""
POOLS = {
    "resnet18": [("max", 64, 32, 3, 1, 1), ("avg", 512, 4, 4, 4, 0), ("adaptive", 512, 4, 4, 4, 0)],
    "resnet50": [("max", 64, 112, 3, 2, 1), ("adaptive", 2048, 7, 7, 7, 0)],
    "grouped": [],
}
LINEAR = {"resnet18": [(512, 10)], "resnet50": [(2048, 1000)], "grouped": []}


class Gradient(NamedTuple):
    """An operator, PyTorch's formula for it, and their arguments; outputs that are not wanted are None or empty."""

    name: str
    ours: Callable
    formula: Callable
    arguments: tuple


def gradients(network: str, dtype: torch.dtype, channels_last: bool) -> Iterator[Gradient]:
    """The gradients of a network's layers, each shape once."""
    N = IMAGES[network]

    def image(*shape: int) -> torch.Tensor:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format)

    for C, side in NORMS[network]:
        x, g = image(N, C, side, side), image(N, C, side, side)
        mean, var = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3), unbiased=False)
        arguments = g, x, torch.rand(C, device="cuda"), mean, var, 1e-5, True, (True, True, True)
        ours, formula = batch_norm2d_backward.batch_norm2d_backward, batch_norm2d_backward._formula
        yield Gradient(f"batch norm {C}x{side}", ours, formula, arguments)
        yield Gradient(f"relu {C}x{side}", relu_backward.relu_backward, relu_backward._formula, (g, x.relu()))
    for C, K, side, size, stride, *several in CONVOLUTIONS[network]:
        groups = several[0] if several else 1
        x, weight = image(N, C, side, side), image(K, C // groups, size, size) / (C // groups * size * size) ** 0.5
        padding = (size - 1) // 2
        out = (side + 2 * padding - size) // stride + 1
        g, window = image(N, K, out, out), ((stride,) * 2, (padding,) * 2, (1, 1), groups)
        name = f"{C}x{side} to {K}, {size}x{size}/{stride}" + (f", {groups} groups" if several else "")
        if C > 3:
            arguments = g, weight, tuple(x.shape), channels_last, *window
            ours, formula = conv2d_backward.conv2d_backward_input, conv2d_backward._input_formula
            yield Gradient(f"conv input {name}", ours, formula, arguments)
        arguments = g, x, tuple(weight.shape), channels_last, *window
        ours, formula = conv2d_backward.conv2d_backward_weight, conv2d_backward._weight_formula
        yield Gradient(f"conv weight {name}", ours, formula, arguments)
    for kind, C, side, size, stride, padding in POOLS[network]:
        x = image(N, C, side, side)
        window = (size, size), (stride, stride), (padding, padding)
        if kind == "max":
            y, indices = torch.nn.functional.max_pool2d(x, *window, return_indices=True)
            arguments = torch.randn_like(y), x, *window, (1, 1), False, indices
            ours, formula = max_pool2d_backward.max_pool2d_backward, max_pool2d_backward._formula
        elif kind == "avg":
            y = torch.nn.functional.avg_pool2d(x, *window)
            arguments = torch.randn_like(y), x, *window, False, True, None
            ours, formula = avg_pool2d_backward.avg_pool2d_backward, torch.ops.aten.avg_pool2d_backward
        else:
            arguments = image(N, C, 1, 1), (side, side), channels_last
            ours = avg_pool2d_backward.adaptive_avg_pool2d_backward

            def formula(g, size, channels_last):
                return g.expand(*g.shape[:2], *size) / (size[0] * size[1])

        yield Gradient(f"{kind} pool {C}x{side}, {size}x{size}/{stride}", ours, formula, arguments)
    for C, K in LINEAR[network]:
        g, x, weight = (torch.randn(shape, device="cuda").to(dtype) for shape in ((N, K), (N, C), (K, C)))
        yield Gradient(f"linear input {C} to {K}", linear_backward.linear_backward_input, torch.matmul, (g, weight))
        ours = linear_backward.linear_backward_weight
        yield Gradient(f"linear weight {C} to {K}", ours, lambda g, x: g.T @ x, (g, x))


def wanted(outputs: object) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [y for y in outputs if isinstance(y, torch.Tensor) and y.numel() > 0]


def errors(gradient: Gradient) -> tuple[float, float, bool]:
    """PyTorch's and ours against float64, of the worst output, and whether ours are the same bits twice."""
    exact = wanted(
        gradient.formula(
            *(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in gradient.arguments)
        )
    )
    found = []
    for compute in (gradient.formula, gradient.ours):
        outputs = wanted(compute(*gradient.arguments))
        assert len(outputs) == len(exact)
        found.append(max(float((y.double() - e).norm() / e.norm()) for y, e in zip(outputs, exact)))
    first, second = (wanted(gradient.ours(*gradient.arguments)) for _ in range(2))
    return *found, all(map(torch.equal, first, second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["bf16-nhwc"])
    parser.add_argument("--network", nargs="+", choices=CONVOLUTIONS, default=["resnet18"])
    parser.add_argument("--only", default="", help="gradients whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.1, help="for the clocks of a gradient")
    parser.add_argument("--minutes", type=float, default=10, help="after which no other gradient of a network is begun")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--cudnn-benchmark", action="store_true")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for case in args.case:
        for network in args.network:
            measure(case, network, args)


def measure(case: str, network: str, args: argparse.Namespace) -> None:
    """Prints the lines of a network's gradients."""
    dtype, tf32, channels_last = CASES[case]
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    start = time.perf_counter()
    measured = [g for g in gradients(network, dtype, channels_last) if args.only in g.name]
    with ThreadPoolExecutor(16) as pool:  # kernels are compiled beside each other
        list(pool.map(first_call, measured))
    torch.cuda.synchronize()
    print(f"{network}, {case}: compiled in {time.perf_counter() - start:.0f} s")
    for gradient in measured:
        if time.perf_counter() - start > 60 * args.minutes:
            print("out of time")
            break
        try:
            said = "" if args.no_errors else "   errors {:.1e} {:.1e}{}".format(*describe(errors(gradient)))
            clocks = {}
            for name, compute in (("pytorch", gradient.formula), ("ours", gradient.ours)):
                for _ in range(2):
                    compute(*gradient.arguments)
                call = captured(partial(compute, *gradient.arguments), 4)
                clocks[name] = event_clock(repeated(call, 3), 12)
                clocks[name]()
            timings, _ = alternate(clocks, args.seconds, (3, 20))
            pytorch, ours = (1e3 * timings[name].median for name in ("pytorch", "ours"))
            print(f"{gradient.name:44} {pytorch:8.1f} {ours:8.1f} {pytorch / ours:6.2f}x{said}", flush=True)
        except Exception as error:
            print(f"{gradient.name:44} {type(error).__name__}: {str(error)[:200]}", flush=True)


def first_call(gradient: Gradient) -> None:
    """What fails here fails again where it is measured, and is reported there."""
    with contextlib.suppress(Exception):
        gradient.ours(*gradient.arguments)


def describe(found: tuple[float, float, bool]) -> tuple[float, float, str]:
    pytorch, ours, same = found
    return pytorch, ours, "" if same else "   DIFFERENT BITS"


if __name__ == "__main__":
    main()
