"""Times what tuning tries beside cuDNN, each checked first: `python benchmarks/convolutions.py bf16 1024`.

ResNet18's 3x3 convolutions at 32x32 with bias and ReLU, channels_last, on this GPU; x has been rounded to TF32.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import DTYPES, flags
from tritonnn.clocks import captured, event_clock
from tritonnn.compile_ahead import compile_ahead
from tritonnn.ops.conv2d.dispatch import candidates, run
from tritonnn.ops.conv2d.problem import Problem
from tritonnn.runtime import hardware
from tritonnn.runtime.dependent_launch import launches_as_in_graphs
from tritonnn.tuning.harness import Harness, Wrong, operands

PRECISIONS = {"bf16": "ieee", "fp16": "ieee", "tf32": "tf32", "fp32": "tf32x3"}
SHAPES = (64, 64, 32, 1), (64, 128, 32, 2), (128, 128, 16, 1), (128, 256, 16, 2), (256, 256, 8, 1), (512, 512, 4, 1)
"""Channels of x and of y, the side of x, the stride."""
SAMPLES, CALLS = 7, 64


def cudnn_clock(harness: Harness, weight: torch.Tensor) -> Callable[[], float]:
    """Reads the microseconds of cuDNN's fused operation, the mean of those on images in L2, and out of it."""
    p, bias, clocks = harness.problem, harness.product.epilogue.bias.to(weight.dtype), []
    weight, settings = weight.to(memory_format=torch.channels_last), (p.stride, p.padding, p.dilation, p.groups)

    def call(images: Iterator[torch.Tensor]) -> torch.Tensor:
        return torch.ops.aten.cudnn_convolution_relu(next(images), weight, bias, *settings)

    for products in ([harness.product], harness.copies):
        call_next = partial(call, itertools.cycle([product.x for product in products]))
        call_next()
        clocks.append(event_clock(captured(call_next, CALLS), CALLS))
    return lambda: 1e3 * statistics.mean(read() for read in clocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("images", type=int)
    precision, n = vars(parser.parse_args()).values()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA GPU, and convolutions are timed on one")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cudnn.benchmark = True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {precision}, {n} images\n")
    for c, k, side, stride in SHAPES:
        sizes = n, c, side, side, k, 3, 3, (stride, stride), (1, 1), (1, 1), 1
        problem = Problem(*sizes, DTYPES[precision], PRECISIONS[precision], False, True, True, ("bias", "relu"))
        with torch.no_grad(), flags(precision), launches_as_in_graphs():
            harness = Harness(problem, device)
            choices = candidates(harness.product, hardware.gpu(device))
            compile_ahead([partial(run, harness.product, choice) for choice in choices], lambda total: None)
            rows = [("cuDNN", cudnn_clock(harness, operands(problem, device)[1]))]
            for choice in choices:
                try:
                    harness.check(choice)
                    rows.append((str(choice), harness.clock(choice)))
                except (Wrong, triton.runtime.OutOfResources) as error:
                    print(f"    {choice}: {error}")
            times = {name: statistics.median(read() for _ in range(SAMPLES)) for name, read in rows}
        print(problem)
        for name, us in sorted(times.items(), key=lambda row: row[1]):
            print(f"    {us:.1f} us, {times['cuDNN'] / us:.2f} of cuDNN's speed: {name}", flush=True)


if __name__ == "__main__":
    main()
