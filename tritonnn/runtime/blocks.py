"""What one program of an element-wise kernel owns: a small tile, as many fill a GPU, or a large one in the interpreter.

A program of Triton's interpreter costs milliseconds whatever its size, an element nanoseconds; there, one program takes
as much as Triton's limit on a tile (2^20 elements) allows.
"""

import functools
from typing import NamedTuple

import torch
import triton

from . import hardware

INTERPRETER_TILE = 2**18


class PixelBlocks(NamedTuple):
    """A tile of BLOCK_M pixels x BLOCK_C channels."""

    BLOCK_M: int
    BLOCK_C: int


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. (A call of `triton.cdiv` takes 4 us on the host.)"""
    return -(-a // b)


def power_of_2(size: int, least: int, most: int) -> int:
    """The next power of 2 from `size` on, within these limits."""
    return min(max(triton.next_power_of_2(size), least), most)


@functools.lru_cache
def elementwise_block(numel: int, element_size: int) -> int:
    """Elements that a program of an element-wise kernel owns: 4 KB on a GPU.

    On an H200 2^26 elements of float32 take 135 us with 8 KB, 128 with 4 KB, as a copy does (eight warps; with four 1 %
    longer).
    """
    return power_of_2(numel, 1, INTERPRETER_TILE) if triton.knobs.runtime.interpret else 4096 // element_size


def pixel_blocks(
    pixels: int, pixels_per_image: int, channels: int, channels_last: bool, device: torch.device
) -> PixelBlocks:
    """For kernels that treat every channel alike (pooling, batch norm): the tile runs along what is contiguous."""
    if triton.knobs.runtime.interpret:
        block_c = power_of_2(channels, 1, 1024)
        return PixelBlocks(power_of_2(pixels, 1, INTERPRETER_TILE // block_c), block_c)
    if not channels_last and pixels_per_image >= 16:
        return PixelBlocks(power_of_2(pixels, 16, 1024), 1)
    return busy_blocks(pixels, channels, power_of_2(channels, 1, 128), 1024, device)


def busy_blocks(pixels: int, channels: int, block_c: int, elements: int, device: torch.device) -> PixelBlocks:
    """Blocks of so many elements, or of fewer, down to 256, where that leaves multiprocessors without a program."""
    enough = hardware.gpu(device).multiprocessors
    while elements > 256 and ceil_div(pixels * block_c, elements) * ceil_div(channels, block_c) < enough:
        elements //= 2
    return PixelBlocks(max(elements // block_c, 1), block_c)


def transpose_blocks(pixels: int, channels: int) -> PixelBlocks:
    """For a copy from contiguous pixels to contiguous channels: a square tile reads and writes long rows alike."""
    if triton.knobs.runtime.interpret:
        block_c = power_of_2(channels, 1, 1024)
        return PixelBlocks(power_of_2(pixels, 1, INTERPRETER_TILE // block_c), block_c)
    return PixelBlocks(power_of_2(pixels, 16, 64), power_of_2(channels, 1, 64))
