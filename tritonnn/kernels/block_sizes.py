"""Block sizes by shape and device: small tiles that fill a GPU, or few large ones for the interpreter.

A program of Triton's interpreter costs milliseconds whatever its size, an element nanoseconds; there, one program takes
as much as Triton's limit on a tile (2^20 elements) allows.
"""

from typing import NamedTuple

import triton

INTERPRETER_TILE = 2**18


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
    return GemmBlocks(block_m, block_n, block_k, 4, 4 if input_precision == "tf32" and block_n == 128 else 3)
