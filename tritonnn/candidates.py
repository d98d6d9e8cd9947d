"""The forms and blocks worth trying for a convolution: few, as each costs a compilation."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

from .kernels.block_sizes import (
    HELD_PIXELS,
    LEAST_OF_ROWS,
    MOST_HELD,
    DescriptorBlocks,
    GemmBlocks,
    HaloBlocks,
    HeldBlocks,
    RowBlocks,
    SplitBlocks,
    ceil_div,
    held_registers,
    row_block_k,
    splits_of,
    tile,
)
from .kernels.halo_gemm import box_rows
from .kernels.implicit_gemm import pointer_blocks, spans_taps
from .kernels.product import Choice, Problem
from .kernels.row_gemm import fits_rows

# BLOCK_M, BLOCK_N, warps, stages
SWAPPED_TILES = [
    (64, 64, 4, 4),
    (128, 64, 4, 3),
    (256, 64, 4, 2),
    (64, 128, 4, 4),
    (128, 128, 4, 3),
    (128, 128, 4, 4),
    (128, 128, 8, 3),
    (256, 128, 8, 3),
    (256, 128, 8, 4),
    (128, 256, 8, 4),
]
ROUNDING_TILES = [(64, 64, 4, 4), (128, 128, 8, 3)]
"""Swapped, x rounded in shared memory."""
NATURAL_TILES = [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3)]
POINTER_TILES = [
    (32, 64, 4, 4),
    (64, 32, 4, 4),
    (64, 64, 4, 3),
    (64, 128, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 4, 4),
    (128, 128, 4, 3),
    (128, 128, 8, 3),
]
ROW_TILES = [
    (128, 64, 4, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 1),
    (64, 64, 4, 1),
    (64, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 1),
    (64, 64, 4, 2),
]
"""With one stage loads go through the L1 cache, where windows overlap; with more they come from L2, ahead of time."""
HALO_TILES = {
    (2, 1): [
        (1, 8, 32, 64, 2, 4, True, True, 4, 2),
        (1, 16, 16, 128, 3, 3, True, False, 8, 1),
        (1, 16, 16, 64, 2, 4, True, True, 4, 2),
        (1, 16, 32, 64, 2, 9, True, True, 8, 1),
        (1, 4, 32, 128, 2, 2, True, False, 4, 2),
        (1, 8, 32, 128, 2, 5, True, False, 8, 1),
        (1, 16, 16, 128, 2, 5, True, False, 8, 1),
        (4, 8, 8, 128, 2, 5, True, False, 8, 1),
        (2, 8, 8, 128, 2, 2, True, False, 4, 2),
        (4, 8, 8, 64, 2, 4, True, True, 4, 2),
        (16, 4, 4, 128, 2, 4, True, False, 8, 1),
        (8, 4, 4, 128, 2, 2, True, False, 4, 2),
        (8, 4, 4, 64, 3, 4, True, True, 4, 2),
    ],
    (4, 1): [
        (1, 8, 32, 64, 2, 4, False, False, 4, 2),
        (1, 16, 16, 128, 3, 6, False, False, 8, 1),
        (1, 16, 16, 64, 2, 4, False, False, 4, 2),
        (1, 16, 32, 64, 2, 8, False, False, 8, 1),
        (1, 4, 32, 128, 2, 4, False, False, 4, 2),
        (1, 8, 32, 128, 3, 6, False, False, 8, 1),
        (4, 8, 8, 128, 3, 6, False, False, 8, 1),
        (2, 8, 8, 128, 3, 3, False, False, 4, 2),
        (2, 8, 8, 256, 3, 5, False, False, 8, 1),
        (16, 4, 4, 128, 3, 4, False, False, 8, 1),
        (8, 4, 4, 128, 2, 4, False, False, 4, 2),
        (8, 4, 4, 256, 3, 4, False, False, 8, 1),
        (8, 4, 4, 64, 3, 4, False, False, 4, 2),
    ],
    (2, 2): [
        (1, 8, 16, 128, 3, 7, True, True, 8, 1),
        (1, 16, 16, 128, 2, 5, True, True, 8, 1),
        (1, 8, 16, 64, 2, 4, True, True, 4, 2),
        (2, 8, 8, 128, 3, 7, True, True, 8, 1),
        (4, 8, 8, 128, 2, 5, True, True, 8, 1),
        (2, 8, 8, 64, 2, 4, True, True, 4, 2),
        (8, 4, 4, 128, 3, 7, True, True, 8, 1),
        (16, 4, 4, 128, 2, 5, True, True, 8, 1),
        (8, 4, 4, 64, 2, 4, True, True, 4, 2),
    ],
    (4, 2): [
        (1, 8, 16, 128, 3, 7, False, False, 8, 1),
        (1, 16, 16, 128, 2, 5, False, False, 8, 1),
        (1, 8, 16, 64, 2, 4, False, False, 4, 2),
        (1, 4, 32, 128, 3, 7, False, False, 8, 1),
        (1, 8, 16, 256, 2, 4, False, False, 8, 1),
        (2, 8, 8, 128, 3, 7, False, False, 8, 1),
        (4, 8, 8, 128, 2, 5, False, False, 8, 1),
        (2, 8, 8, 256, 2, 4, False, False, 8, 1),
        (2, 8, 8, 64, 2, 4, False, False, 4, 2),
        (8, 4, 4, 128, 3, 7, False, False, 8, 1),
        (16, 4, 4, 128, 2, 5, False, False, 8, 1),
        (8, 4, 4, 256, 2, 4, False, False, 8, 1),
        (8, 4, 4, 64, 2, 4, False, False, 4, 2),
    ],
}
"""By the bytes of an element and the stride: the sizes of `HaloBlocks` but for BLOCK_K, which is 128 bytes."""
LEAST_OF_A_TILE = 0.75
"""The part of the tiles with a halo that is to lie inside the images."""
SPLIT_TILES = [(16, 8), (16, 16), (16, 32), (32, 32)]
SPLIT_SLICES = [(4, 4, 4), (8, 8, 3), (8, 8, 5), (4, 4, 6)]
"""SLICES, warps, stages."""
HELD_TILES = [(HELD_PIXELS, 8), (HELD_PIXELS, 16), (HELD_PIXELS, 32)]
HELD_WARPS = [4, 8]

BARRIERS = 256
"""Bytes of shared memory, at most."""
MOST_OF_A_FORM = 6
MOST_BESIDE_OTHERS = 1
MOST_SPLIT_OUTPUTS = 2**19

T = TypeVar("T", bound=Sequence[int])


class Gpu(NamedTuple):
    """What candidates have to fit: multiprocessors, and bytes of shared memory that a program may have."""

    multiprocessors: int
    shared_memory: int


def candidates(problem: Problem, default: Choice, descriptors: bool, halo: bool, held: bool, gpu: Gpu) -> list[Choice]:
    """The default first; `descriptors`, `halo` and `held` say whether these forms take x, as it is or copied."""
    choices = [default]
    if halo:
        choices += islice(_halo(problem, gpu), MOST_OF_A_FORM)
    if descriptors:
        choices += islice(_descriptors(problem, gpu), MOST_OF_A_FORM)
    if held:
        choices += _held(problem, gpu)
    choices += _split(problem, gpu)
    choices += islice(_rows(problem, gpu), MOST_OF_A_FORM)
    choices += islice(_pointers(problem, default, gpu), MOST_OF_A_FORM if len(choices) == 1 else MOST_BESIDE_OTHERS)
    return list(dict.fromkeys(choices))


def _by_waves(problem: Problem, tiles: Sequence[T], gpu: Gpu) -> list[T]:
    """Tiles no larger than the output and the GPU need, those first that make about two programs a multiprocessor."""
    least_n, least_m = min(tile[1] for tile in tiles), min(tile[0] for tile in tiles)

    def waves(tile: T) -> float:
        return problem.programs(tile[0], tile[1]) / gpu.multiprocessors

    fitting = [
        tile
        for tile in tiles
        if (tile[1] == least_n or tile[1] < 2 * problem.k // problem.groups)
        and (tile[0] == least_m or tile[0] < 2 * problem.pixels)
        and (tile[:2] == (least_m, least_n) or waves(tile) >= 0.5)
    ]
    return sorted(fitting, key=lambda tile: abs(math.log2(waves(tile) / 2)))


def _halo(problem: Problem, gpu: Gpu) -> Iterator[Choice]:
    """The tiles that waste least first. TF32's x is rounded on the way unless NCHW is copied."""
    (p, q), size, stride = problem.output, problem.dtype.itemsize, problem.stride[0]

    def waste(sizes: Sequence[int]) -> int:
        return math.prod(ceil_div(side, tile) * tile for side, tile in zip((problem.n, p, q), sizes))

    for tile_n, tile_p, tile_q, block_n, *rest in sorted(HALO_TILES[size, stride], key=waste):
        blocks = HaloBlocks(tile_n, tile_p, tile_q, block_n, 128 // size, *rest)
        whole = tile_n == 1 or (p <= tile_p and q <= tile_q)  # several images: all of them
        fits = problem.k % block_n == 0 and LEAST_OF_A_TILE * waste(blocks) <= problem.pixels
        busy = 2 * problem.programs(tile_n * tile_p * tile_q, block_n) >= gpu.multiprocessors
        lines = blocks.X_SLOTS * tile_n * box_rows(tile_p, stride) * tile_q + blocks.W_SLOTS * block_n
        stage = tile_n * tile_p * tile_q * block_n * size if blocks.STAGED and not blocks.IN_SLOT else 0
        memory = blocks.PROGRAMS * (128 * lines + stage + BARRIERS)
        if whole and fits and busy and memory <= gpu.shared_memory:
            yield Choice(blocks, copies_x=not problem.channels_last_x)


def _descriptors(problem: Problem, gpu: Gpu) -> Iterator[Choice]:
    """Both forms; TF32's x is to be rounded on the way to the product, or by a copy before it."""
    line = 128 // problem.dtype.itemsize
    swapped = problem.input_precision != "tf32x3"
    forms = [(SWAPPED_TILES, True, problem.round_x)] if swapped else [(NATURAL_TILES, False, False)]
    if swapped and problem.round_x and problem.channels_last_x:
        forms = [(NATURAL_TILES[:3], False, False), (ROUNDING_TILES, True, False), (SWAPPED_TILES, True, True)]
    for tiles, swapped, rounds in forms:
        for block_m, block_n, num_warps, num_stages in _by_waves(problem, tiles, gpu):
            rows = block_m + (block_n if swapped or problem.input_precision == "tf32" else 2 * block_n)
            if max(num_stages * rows * 128, block_m * block_n * problem.dtype.itemsize) <= gpu.shared_memory:
                box = tile(problem.n, *problem.output, block_m)
                blocks = DescriptorBlocks(*box, block_n, line, swapped, num_warps, num_stages)
                yield Choice(blocks, copies_x=rounds or not problem.channels_last_x)


def _held(problem: Problem, gpu: Gpu) -> Iterator[Choice]:
    size = problem.dtype.itemsize
    block_k = math.gcd(problem.c, 128 // size)
    if block_k * size < 64 or problem.pixels * problem.k > MOST_SPLIT_OUTPUTS:
        return
    for _, block_n in _by_waves(problem, HELD_TILES, gpu)[:2]:
        for num_warps in HELD_WARPS:
            blocks = HeldBlocks(block_n, block_k, num_warps)
            fits = num_warps * HELD_PIXELS * block_n * 4 <= gpu.shared_memory
            fits = fits and held_registers(blocks, problem.reduction, size) <= MOST_HELD
            if fits and problem.k % block_n == 0:
                yield Choice(blocks, copies_x=False)


def _split(problem: Problem, gpu: Gpu) -> Iterator[Choice]:
    size = problem.dtype.itemsize
    block_k = math.gcd(problem.c, 128 // size)
    if problem.groups > 1 or block_k < 16 or problem.pixels * problem.k > MOST_SPLIT_OUTPUTS:
        return
    for block_m, block_n in _by_waves(problem, SPLIT_TILES, gpu)[:2]:
        for slices, num_warps, num_stages in SPLIT_SLICES:
            shared_memory = num_stages * slices * (block_m + block_n) * block_k * size
            if slices * block_k <= problem.reduction and shared_memory <= gpu.shared_memory:
                splits = splits_of(
                    problem.programs(block_m, block_n), problem.reduction // block_k, slices, gpu.multiprocessors
                )
                blocks = SplitBlocks(splits, slices, block_m, block_n, block_k, num_warps, num_stages)
                yield Choice(blocks, copies_x=False)


def _rows(problem: Problem, gpu: Gpu) -> Iterator[Choice]:
    size, fits = problem.dtype.itemsize, fits_rows(problem.c, problem.dilation, problem.groups, problem.dtype)
    if not fits or problem.reduction <= LEAST_OF_ROWS[0]:
        return
    block_k = row_block_k(problem.s, size)
    split = problem.input_precision == "tf32x3"
    for block_m, block_n, num_warps, num_stages in ROW_TILES:
        if split and block_m > 16 * num_warps:  # takes all 255 registers
            continue
        rows = block_m + (2 if split else 1) * block_n
        if num_stages * rows * block_k * size <= gpu.shared_memory:
            yield Choice(RowBlocks(block_m, block_n, num_warps, num_stages), copies_x=False)


def _pointers(problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
    c, k, taps = problem.c // problem.groups, problem.k // problem.groups, problem.r * problem.s
    size = problem.dtype.itemsize
    usual = pointer_blocks(problem.pixels, k, c, taps, size, problem.input_precision)
    copies_x = default.copies_x or not (problem.channels_last_x or spans_taps(c, taps) or taps == 1)
    yield Choice(usual, copies_x)
    if problem.input_precision == "tf32x3":  # larger tiles, held in two parts, do not fit the registers
        tiles = [tile for tile in POINTER_TILES if tile[0] * tile[1] <= 64 * 64]
    else:
        tiles = POINTER_TILES
    for block_m, block_n, num_warps, num_stages in _by_waves(problem, tiles, gpu):
        if num_stages * (block_m + block_n) * usual.BLOCK_K * size <= gpu.shared_memory:
            yield Choice(GemmBlocks(block_m, block_n, usual.BLOCK_K, num_warps, num_stages), copies_x)
