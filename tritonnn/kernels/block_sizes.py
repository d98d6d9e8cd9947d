"""Block sizes by shape and device: small tiles that fill a GPU, or few large ones for the interpreter.

A program of Triton's interpreter costs milliseconds whatever its size, an element nanoseconds; there, one program takes
as much as Triton's limit on a tile (2^20 elements) allows.
"""

import math
from typing import NamedTuple

import triton

INTERPRETER_TILE = 2**18
MULTIPROCESSORS = 132
FLUSH_STEPS = 8
"""Steps of a float32 product whose results are added up apart before they join the sum (see `dot_of_split`)."""


class PixelBlocks(NamedTuple):
    """A tile of BLOCK_M pixels x BLOCK_C channels."""

    BLOCK_M: int
    BLOCK_C: int


class GemmBlocks(NamedTuple):
    """A tile of BLOCK_M x BLOCK_N outputs, reduced BLOCK_K at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class SplitBlocks(NamedTuple):
    """A tile of BLOCK_M x BLOCK_N outputs, reduced SLICES blocks of BLOCK_K at a time."""

    SLICES: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class DescriptorBlocks(NamedTuple):
    """A tile of TILE_N images x TILE_P rows x TILE_Q columns x BLOCK_N channels, reduced BLOCK_K channels at a time."""

    TILE_N: int
    TILE_P: int
    TILE_Q: int
    BLOCK_N: int
    BLOCK_K: int
    SWAPPED: bool
    num_warps: int
    num_stages: int


def _power_of_2(size: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), least), most)


def elementwise_block(numel: int) -> int:
    """Elements a program of an element-wise kernel owns."""
    return _power_of_2(numel, 1, INTERPRETER_TILE) if triton.knobs.runtime.interpret else 2048


def pixel_blocks(pixels: int, pixels_per_image: int, channels: int, channels_last: bool) -> PixelBlocks:
    """For kernels that treat every channel alike (pooling, batch norm): the tile runs along what is contiguous."""
    if triton.knobs.runtime.interpret:
        block_c = _power_of_2(channels, 1, 1024)
        return PixelBlocks(_power_of_2(pixels, 1, INTERPRETER_TILE // block_c), block_c)
    if not channels_last and pixels_per_image >= 16:
        return PixelBlocks(_power_of_2(pixels, 16, 1024), 1)
    block_c = _power_of_2(channels, 1, 128)
    return PixelBlocks(1024 // block_c, block_c)


def transpose_blocks(pixels: int, channels: int) -> PixelBlocks:
    """For a copy that turns contiguous pixels into contiguous channels: a square serves both sides."""
    if triton.knobs.runtime.interpret:
        return pixel_blocks(pixels, 1, channels, True)
    return PixelBlocks(_power_of_2(pixels, 16, 64), _power_of_2(channels, 1, 64))


def gemm_blocks(m: int, n: int, k: int, element_size: int, input_precision: str) -> GemmBlocks:
    """For a product of [m, k] and [k, n]; `k` is the length over which a block of the reduction is contiguous.

    Measured on an H200, ResNet18's convolution of 128 channels, 1,024 images. bfloat16: 149 us with 4 warps, 158 with
    8; TF32: 312 us with BLOCK_N 128 and 4 stages, 422 with 64 and 3; tf32x3: 997 us with BLOCK_N 64, 1,053 with 128.
    """
    if triton.knobs.runtime.interpret:
        block_n, block_k = _power_of_2(n, 1, 1024), _power_of_2(k, 1, 1024)
        return GemmBlocks(_power_of_2(m, 1, INTERPRETER_TILE // max(block_n, block_k)), block_n, block_k, 4, 1)
    block_k = _power_of_2(k, 16, 128 // element_size)  # 128 bytes: one line of shared memory
    if element_size == 8:
        return GemmBlocks(_power_of_2(m, 16, 64), _power_of_2(n, 16, 32), block_k, 4, 2)
    block_m = _power_of_2(m, 16, 128)
    block_n = _power_of_2(n, 16, 64 if input_precision == "tf32x3" else 128)
    num_warps = 8 if input_precision == "tf32x3" and block_m == 128 else 4
    return GemmBlocks(block_m, block_n, block_k, num_warps, 4 if input_precision == "tf32" and block_n == 128 else 3)


def split_blocks(m: int, n: int, c: int, taps: int, element_size: int) -> SplitBlocks | None:
    """For so few pixels that larger tiles would leave multiprocessors idle; None where there are enough of them."""
    block_k = math.gcd(c, 128 // element_size)
    if triton.knobs.runtime.interpret or element_size == 8 or block_k * element_size < 32 or taps * c < 256:
        return None
    for block_m, block_n, most in ((16, 8, 16), (16, 16, 16), (16, 32, 8), (32, 32, 8)):
        if triton.cdiv(m, 2 * block_m) * triton.cdiv(n, block_n) < 2 * MULTIPROCESSORS:
            slices = min(most, triton.next_power_of_2(taps * c // block_k))
            return SplitBlocks(slices, block_m, block_n, block_k, slices, 3)
    return None


def tile(n: int, p: int, q: int, pixels: int) -> tuple[int, int, int]:
    """The box of `pixels` (images, rows, columns), powers of 2, that wastes least of an output of n images of p x q."""

    def waste(box: tuple[int, int, int]) -> tuple[int, int]:
        covered = math.prod(triton.cdiv(size, tile) * tile for size, tile in zip((n, p, q), box))
        return covered, -box[2], -box[1]

    powers = [1 << i for i in range(pixels.bit_length())]
    return min(((pixels // a // b, a, b) for a in powers for b in powers if a * b <= pixels), key=waste)


def descriptor_blocks(n: int, p: int, q: int, k: int, c: int, element_size: int, split: bool, in_registers: bool):
    """For y [n, p, q, k] and c channels: `split` into two TF32 numbers each, or rounded `in_registers`.

    Measured on an H200: benchmarks/results.
    """
    block_k = 128 // element_size
    pixels = n * p * q
    if split:
        blocks = (128, 64, 8, 3)
    elif k <= 64:
        blocks = (128, 64, 4, 3) if in_registers else (256, 64, 8, 4)
    elif in_registers:
        blocks = (128, 128, 8, 4)
    else:
        blocks = (256, 128, 8, 4)
    block_m, block_n, num_warps, num_stages = blocks
    while block_m > 64 and triton.cdiv(pixels, block_m) * triton.cdiv(k, block_n) < MULTIPROCESSORS:
        block_m, num_warps = block_m // 2, 4
    while block_n > 32 and triton.cdiv(pixels, block_m) * triton.cdiv(k, block_n) < MULTIPROCESSORS:
        block_n, num_warps = block_n // 2, 4
    return DescriptorBlocks(
        *tile(n, p, q, block_m), block_n, block_k, not split and not in_registers, num_warps, num_stages
    )
