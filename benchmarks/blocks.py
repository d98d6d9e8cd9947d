"""Times block sizes of the convolution, each of them checked first: `python benchmarks/blocks.py bf16 1024`.

ResNet18's 3x3 convolutions with bias and ReLU, channels_last, on this GPU: cuDNN's fused operation beside the forms of
this project, the fastest blocks first. It is how the choices in `tritonnn/kernels/block_sizes.py` were found.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from tritonnn.candidates import HALO_TILES, HELD_TILES, HELD_WARPS  # noqa: E402
from tritonnn.compile_ahead import compile_ahead  # noqa: E402
from tritonnn.kernels.block_sizes import (  # noqa: E402
    MOST_HELD,
    DescriptorBlocks,
    HaloBlocks,
    HeldBlocks,
    SplitBlocks,
    ceil_div,
    held_registers,
    splits_of,
    tile,
)
from tritonnn.kernels.channels_last import pack_weight  # noqa: E402
from tritonnn.kernels.conv2d import run_gemm  # noqa: E402
from tritonnn.kernels.dependent_launch import launches_as_in_graphs  # noqa: E402
from tritonnn.kernels.epilogue import Epilogue  # noqa: E402
from tritonnn.kernels.product import Choice, Product  # noqa: E402

from benchmarks.timing import capture, clock  # noqa: E402

PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee", 4e-3),
    "fp16": (torch.float16, "ieee", 1e-3),
    "tf32": (torch.float32, "tf32", 1e-3),
    "fp32": (torch.float32, "tf32x3", 1e-6),
}
"""Type, input precision, and the largest error of a right result, relative in the 2-norm."""

SAMPLES = 7
Blocks = DescriptorBlocks | HaloBlocks | HeldBlocks | SplitBlocks


class Shape(NamedTuple):
    """A 3x3 convolution of images of size x size pixels."""

    in_channels: int
    out_channels: int
    size: int
    stride: int

    def __str__(self) -> str:
        return f"{self.in_channels} to {self.out_channels} channels, {self.size}x{self.size}/{self.stride}"


SHAPES = [
    Shape(64, 64, 32, 1),
    Shape(64, 128, 32, 2),
    Shape(128, 128, 16, 1),
    Shape(128, 256, 16, 2),
    Shape(256, 256, 8, 1),
    Shape(256, 512, 8, 2),
    Shape(512, 512, 4, 1),
]


def candidates(shape: Shape, n: int, precision: str) -> Iterator[Blocks]:
    """The blocks to try: large tiles over descriptors or with a halo, small ones held or split for few pixels."""
    dtype, input_precision, _ = PRECISIONS[precision]
    side = shape.size // shape.stride
    line = 128 // dtype.itemsize
    swapped = input_precision != "tf32x3"
    tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4)]
    if swapped:
        tiles += [(256, 64, 4), (256, 128, 8), (128, 256, 8), (128, 128, 8)]
    for block_m, block_n, warps in tiles:
        if block_n <= max(shape.out_channels, 64):
            for stages in (2, 3, 4):
                yield DescriptorBlocks(*tile(n, side, side, block_m), block_n, line, swapped, warps, stages)
    if swapped:
        for tile_n, tile_p, tile_q, block_n, *rest in HALO_TILES[dtype.itemsize, shape.stride]:
            whole = tile_n == 1 or (tile_p, tile_q) == (side, side)
            if whole and side % tile_p == side % tile_q == shape.out_channels % block_n == 0:
                yield HaloBlocks(tile_n, tile_p, tile_q, block_n, line, *rest)
    pixels = n * side * side
    if pixels * shape.out_channels <= 2**19:
        for _, block_n in HELD_TILES:
            for warps in HELD_WARPS:
                blocks = HeldBlocks(block_n, line, warps)
                if held_registers(blocks, 9 * shape.in_channels, dtype.itemsize) <= MOST_HELD:
                    yield blocks
        for block_m, block_n in ((16, 8), (16, 16), (16, 32), (32, 32)):
            for slices, warps, stages in ((4, 4, 3), (4, 4, 4), (8, 4, 3), (8, 8, 3), (8, 8, 4), (16, 8, 3)):
                tiles = ceil_div(pixels, block_m) * ceil_div(shape.out_channels, block_n)
                splits = splits_of(tiles, shape.in_channels * 9 // line, slices)
                yield SplitBlocks(splits, slices, block_m, block_n, line, warps, stages)


class Problem:
    """A convolution's operands, cuDNN's result and the exact one of the first images."""

    def __init__(self, shape: Shape, n: int, precision: str) -> None:
        dtype, self.input_precision, self.limit = PRECISIONS[precision]
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            t = torch.randn(sizes, device="cuda", generator=generator).to(dtype)
            return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

        C, K, size, stride = shape
        self.x, self.bias = normal(n, C, size, size), normal(K)
        self.weight = normal(K, C, 3, 3) / (9 * C) ** 0.5
        self.window = (stride, stride), (1, 1), (1, 1)
        self.packed = pack_weight(self.weight, self.input_precision)
        side = size // stride
        self.y = normal(n, K, side, side)
        self.flop = 2 * n * side * side * K * C * 9
        self.exact = F.conv2d(self.x[:16].double(), self.weight.double(), self.bias.double(), stride, 1).relu()

    def cudnn(self) -> Tensor:
        return torch.ops.aten.cudnn_convolution_relu(self.x, self.weight, self.bias, *self.window, 1)

    def ours(self, blocks: Blocks) -> Callable[[], Tensor]:
        rounds = self.input_precision == "tf32" and isinstance(blocks, HeldBlocks | SplitBlocks)
        settings = *self.window, 1, self.input_precision, rounds, Epilogue(bias=self.bias, relu=True)
        product = Product(self.x, self.packed, self.y, True, *settings)

        def call() -> Tensor:
            run_gemm(product, Choice(blocks, copies_x=False))
            return self.y

        return call

    def error(self, call: Callable[[], Tensor]) -> float:
        """Of the first images, relative in the 2-norm; infinite where the others differ from cuDNN's much more."""
        self.y.fill_(float("nan"))
        y = call()
        error = float((y[:16].double() - self.exact).norm() / self.exact.norm())
        expected = self.cudnn()
        apart = float((y.float() - expected.float()).norm() / expected.float().norm())
        return error if apart < 4 * self.limit + 1e-5 else float("inf")


def microseconds(call: Callable[[], Tensor]) -> float:
    replay, _ = capture(call)
    read = clock(replay, torch.device("cuda"))
    return 1e3 * sorted(read() for _ in range(SAMPLES))[SAMPLES // 2]


def rows(problem: Problem, tried: list[Blocks]) -> Iterator[tuple[float, float, Blocks]]:
    """Microseconds and error of the blocks that are right; prints which are wrong or do not run."""
    for blocks in tried:
        call = problem.ours(blocks)
        try:
            error = problem.error(call)
        except triton.runtime.OutOfResources:
            continue
        except Exception as reason:
            torch.cuda.synchronize()  # raises where the GPU is lost
            print(f"    {type(reason).__name__}: {reason}".splitlines()[0][:120], blocks, sep=": ")
            continue
        if error > problem.limit:
            print(f"    WRONG, error {error:.1e}: {blocks}")
        else:
            yield microseconds(call), error, blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("images", type=int)
    parser.add_argument("--top", type=int, default=5, help="blocks to print for each shape")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA GPU, and block sizes are timed on one")
    n, precision = options.images, options.precision
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {precision}, {n} images\n")
    with torch.no_grad(), launches_as_in_graphs():
        for shape in SHAPES:
            problem = Problem(shape, n, precision)
            tried = list(candidates(shape, n, precision))
            compile_ahead(map(problem.ours, tried), lambda total: None)
            cudnn = microseconds(problem.cudnn)
            print(f"{shape}: cuDNN {cudnn:.1f} us, {problem.flop / cudnn / 1e6:.0f} TFLOP/s")
            for us, error, blocks in sorted(rows(problem, tried))[: options.top]:
                print(f"    {us:.1f} us, {cudnn / us:.2f} of cuDNN's speed, error {error:.1e}: {blocks}", flush=True)


if __name__ == "__main__":
    main()
