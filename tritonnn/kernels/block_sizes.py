"""Block sizes by shape and device: small tiles that fill a GPU, or few large ones for the interpreter.

A program of Triton's interpreter costs milliseconds whatever its size, an element nanoseconds; there, one program takes
as much as Triton's limit on a tile (2^20 elements) allows.
"""

import functools
import math
from typing import NamedTuple

import triton

INTERPRETER_TILE = 2**18
MULTIPROCESSORS = 132
"""Of an H100 or H200."""
ENOUGH_PROGRAMS = 3 * MULTIPROCESSORS // 4
SHARED_MEMORY = 2**17
"""Bytes that a program of few takes on a GPU for what it loads ahead."""
FLUSH_STEPS = 8
"""Steps of a float32 product whose results are added up apart before they join the sum (see `add_split_dot`)."""


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


class RowBlocks(NamedTuple):
    """A tile of BLOCK_M x BLOCK_N outputs, reduced a row of the filter, or a line of shared memory of it, at a time."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class PaddedRowBlocks(NamedTuple):
    """A tile of BLOCK_H rows x BLOCK_W columns."""

    BLOCK_H: int
    BLOCK_W: int


class SplitBlocks(NamedTuple):
    """A tile of BLOCK_M x BLOCK_N outputs, of SPLITS programs that each reduce SLICES blocks of BLOCK_K at a time.

    SPLITS and SLICES are powers of 2.
    """

    SPLITS: int
    SLICES: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


HELD_PIXELS = 16
"""Of a tile of `HeldBlocks`: the least that a tensor core takes."""


class HeldBlocks(NamedTuple):
    """A tile of HELD_PIXELS x BLOCK_N outputs, of whose reduction each warp takes a block of BLOCK_K in turn."""

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


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


class HaloBlocks(NamedTuple):
    """A tile of TILE_N images x TILE_P rows x TILE_Q columns x BLOCK_N channels, reduced BLOCK_K channels at a time.

    X_SLOTS boxes of x and W_SLOTS tiles of the weight in shared memory; y is STAGED there (IN_SLOT: in a box of x) or
    stored from registers; PROGRAMS run on a multiprocessor.
    """

    TILE_N: int
    TILE_P: int
    TILE_Q: int
    BLOCK_N: int
    BLOCK_K: int
    X_SLOTS: int
    W_SLOTS: int
    STAGED: bool
    IN_SLOT: bool
    num_warps: int
    PROGRAMS: int


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` takes 4 us to say so on the host."""
    return -(-a // b)


def _power_of_2(size: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), least), most)


@functools.lru_cache
def elementwise_block(numel: int, element_size: int) -> int:
    """Elements a program of an element-wise kernel owns.

    4 KB: on an H200 2^26 elements of float32 take 135 us with 8 KB, 128 with 4 KB, as a copy does (eight warps; with
    four 1 % longer).
    """
    return _power_of_2(numel, 1, INTERPRETER_TILE) if triton.knobs.runtime.interpret else 4096 // element_size


@functools.lru_cache
def pixel_blocks(pixels: int, pixels_per_image: int, channels: int, channels_last: bool) -> PixelBlocks:
    """For kernels that treat every channel alike (pooling, batch norm): the tile runs along what is contiguous."""
    if triton.knobs.runtime.interpret:
        block_c = _power_of_2(channels, 1, 1024)
        return PixelBlocks(_power_of_2(pixels, 1, INTERPRETER_TILE // block_c), block_c)
    if not channels_last and pixels_per_image >= 16:
        return PixelBlocks(_power_of_2(pixels, 16, 1024), 1)
    block_c = _power_of_2(channels, 1, 128)
    elements = 1024
    while elements > 256 and ceil_div(pixels * block_c, elements) * ceil_div(channels, block_c) < MULTIPROCESSORS:
        elements //= 2
    return PixelBlocks(max(elements // block_c, 1), block_c)


@functools.lru_cache
def transpose_blocks(pixels: int, channels: int) -> PixelBlocks:
    """For a copy that turns contiguous pixels into contiguous channels: a square serves both sides."""
    if triton.knobs.runtime.interpret:
        return pixel_blocks(pixels, 1, channels, True)
    return PixelBlocks(_power_of_2(pixels, 16, 64), _power_of_2(channels, 1, 64))


@functools.lru_cache
def gemm_blocks(m: int, n: int, k: int, element_size: int, input_precision: str) -> GemmBlocks:
    """For a product of [m, k] and [k, n]; `k` is the length over which a block of the reduction is contiguous.

    In bfloat16 ResNet18's convolution of 128 channels takes 149 us with 4 warps, 158 with 8 (H200, 1,024 images). Tiles
    of float32 are small: what they hold twice, rounded or split and not, would not fit the registers. Without tensor
    cores ("ieee") they hold it once: the first layer takes 235 us for 354 with 64 pixels (H100, 1,024 images).
    """
    if triton.knobs.runtime.interpret:
        block_n, block_k = _power_of_2(n, 1, 1024), _power_of_2(k, 1, 1024)
        return GemmBlocks(_power_of_2(m, 1, INTERPRETER_TILE // max(block_n, block_k)), block_n, block_k, 4, 1)
    block_k = _power_of_2(k, 16, 128 // element_size)  # 128 bytes: one line of shared memory
    if element_size == 8:
        return GemmBlocks(_power_of_2(m, 16, 64), _power_of_2(n, 16, 32), block_k, 4, 2)
    once, strict = element_size == 2 or input_precision == "ieee", element_size == 4 and input_precision != "tf32"
    block_m, block_n = _power_of_2(m, 16, 128 if once else 64), _power_of_2(n, 16, 64 if strict else 128)
    while block_m > 16 and ceil_div(m, block_m) * ceil_div(n, block_n) < ENOUGH_PROGRAMS:
        block_m //= 2
    return GemmBlocks(block_m, block_n, block_k, 4, 3)


ROW_CHANNELS = 4
"""Those of an image whose rows are padded: a pixel is one load of 16 bytes, in 16-bit types of 8."""
LEAST_OF_ROWS = 64, 2**14
"""From a longer reduction and so many pixels on the copy of x should pay for itself: reasoned, not measured."""


def row_width(s: int) -> int:
    """The columns that a row of a filter of s columns is padded to: at least one block of 16 elements."""
    return max(triton.next_power_of_2(s), 4)


def row_block_k(s: int, element_size: int) -> int:
    """Elements of a row of a filter of s columns, or of one line of shared memory."""
    return min(ROW_CHANNELS * row_width(s), 128 // element_size)


@functools.lru_cache
def row_blocks(pixels: int, k: int, reduction: int, element_size: int, input_precision: str) -> RowBlocks | None:
    """For a filter of few channels, its rows padded; None where gathering each element of x costs little.

    Measured on an H200 on ResNet18's first layer, 128 images of 224x224: TF32 386 us for 1,344 by single elements,
    strict float32 725 for 1,660, bfloat16, whose loads go through L1, where windows overlap, 237 for 474.
    """
    least_reduction, least_pixels = LEAST_OF_ROWS
    if triton.knobs.runtime.interpret or reduction <= least_reduction or pixels < least_pixels:
        return None
    block_n = _power_of_2(k, 16, 64)
    if element_size == 2:
        return RowBlocks(128, block_n, 4, 1)
    return RowBlocks(128, block_n, 8, 3) if input_precision == "tf32" else RowBlocks(64, block_n, 4, 3)


@functools.lru_cache
def padded_row_blocks(rows: int, columns: int) -> PaddedRowBlocks:
    """For a copy of rows to longer ones, of four channels."""
    elements = INTERPRETER_TILE if triton.knobs.runtime.interpret else 4096
    block_w = _power_of_2(columns, 1, min(elements // ROW_CHANNELS, 256))
    return PaddedRowBlocks(_power_of_2(rows, 1, elements // ROW_CHANNELS // block_w), block_w)


MOST_HELD = 216
"""Registers of a thread for what it loads: with more, or as many warps as would halve them, some are spilled."""


def held_registers(blocks: HeldBlocks, reduction: int, element_size: int) -> int:
    """Of a thread, for its parts of x and the weight."""
    block_n, block_k, num_warps = blocks
    steps = ceil_div(reduction // block_k, num_warps)
    return steps * block_k * (HELD_PIXELS + block_n) * element_size // (32 * 4)


@functools.lru_cache
def held_blocks(m: int, n: int, c: int, taps: int, element_size: int) -> HeldBlocks | None:
    """For so few pixels that a program's whole reduction fits its registers; None where it does not.

    Measured on an H200 on ResNet18's layers of one image (`benchmarks/results`): that a thread loads 16 bytes at a time
    is worth more than that no warp is idle in the last step. Eight warps take 46.7 us over the network, four 48.2. A
    reduction of a few steps takes four, and pays for more pixels: 1x1, 64 to 128 channels, one image of 32x32 in
    bfloat16 1.3 us for 2.0 by pointers, strict float32 1.7 for 3.0, eight images 2.8 for 3.4 (H100).
    """
    block_k, short = math.gcd(c, 128 // element_size), taps * c < 256
    if block_k * element_size < 64 or m * n > (2**18 if short else 2**17) or n % 8 != 0:
        return None
    for block_n in (32, 16, 8):
        if n % block_n == 0 and ceil_div(m, HELD_PIXELS) * (n // block_n) >= ENOUGH_PROGRAMS:
            break
    blocks = HeldBlocks(block_n, block_k, 4 if short else 8)
    return blocks if held_registers(blocks, taps * c, element_size) <= MOST_HELD else None


@functools.lru_cache
def split_blocks(m: int, n: int, c: int, taps: int, element_size: int) -> SplitBlocks | None:
    """For so few pixels that larger tiles would leave multiprocessors idle; None where there are enough of them.

    Measured on an H200 in ResNet18 on one image (`benchmarks/results`): to wait for other programs costs 2 us, which is
    less than what it saves only where even the least tiles are few, on 512 channels. From 512 features to 10 classes
    two tiles of 8 take 2.0 us, one of 16 takes 2.7 (H100, bfloat16, one image; in float32 they are alike).
    """
    block_k = math.gcd(c, 128 // element_size)
    if triton.knobs.runtime.interpret or element_size == 8 or block_k < 16 or taps * c < 256:
        return None
    if m * n > 2**17:
        return None
    blocks_k, splits, slices = taps * c // block_k, 1, 4
    if taps * c <= 512:  # a step or two
        block_m, block_n, slices = 16, 8 if n <= 16 and element_size == 2 else 16, 8
    else:
        for block_m, block_n in ((16, 32), (16, 16), (16, 8)):
            if ceil_div(m, block_m) * ceil_div(n, block_n) >= ENOUGH_PROGRAMS:
                break
        else:
            block_m, block_n = 16, 16
            programs = MULTIPROCESSORS * (2 if element_size == 4 else 1)
            splits = splits_of(ceil_div(m, block_m) * ceil_div(n, block_n), blocks_k, slices, programs)
    num_stages = split_stages(slices, block_m, block_n, block_k * element_size, ceil_div(blocks_k, splits))
    return SplitBlocks(splits, slices, block_m, block_n, block_k, slices, num_stages)


def split_stages(slices: int, block_m: int, block_n: int, line: int, blocks_k: int) -> int:
    """As many loads in flight as there are steps and memory for: every byte is waited for, none is used twice."""
    return min(ceil_div(blocks_k, slices) + 1, SHARED_MEMORY // (slices * (block_m + block_n) * line), 6)


def splits_of(tiles: int, blocks_k: int, slices: int = 8, programs: int = MULTIPROCESSORS) -> int:
    """The power of 2 into which a reduction of blocks_k is split so that there are about so many programs."""
    splits = 1
    while 2 * splits * tiles <= programs and 2 * splits * slices <= blocks_k:
        splits *= 2
    return splits


def tile(n: int, p: int, q: int, pixels: int) -> tuple[int, int, int]:
    """The box of `pixels` (images, rows, columns), powers of 2, that wastes least of an output of n images of p x q."""

    def waste(box: tuple[int, int, int]) -> tuple[int, int]:
        covered = math.prod(ceil_div(size, tile) * tile for size, tile in zip((n, p, q), box))
        return covered, -box[2], -box[1]

    powers = [1 << i for i in range(pixels.bit_length())]
    return min(((pixels // a // b, a, b) for a in powers for b in powers if a * b <= pixels), key=waste)


PAIRED = 128, 4, 3
"""BLOCK_N, warps and stages of which two programs run on a multiprocessor. One alone loads too late.

On an H100, 128 images, a program a multiprocessor: bfloat16, 128 to 256 channels, stride 2, 12.7 us, with a fourth
stage 9.8; strict float32, 512 channels, 145, with half as many columns and a fourth stage 102.
"""


@functools.lru_cache
def descriptor_blocks(
    n: int, p: int, q: int, k: int, reduction: int, element_size: int, swapped: bool
) -> DescriptorBlocks:
    """For y [n, p, q, k] as sums of `reduction` products, in the swapped or the natural form.

    Measured on an H200, and on an H100, over ResNet18's convolutions, 128 and 1,024 images (benchmarks/results).
    """
    half = element_size == 2
    if not swapped:
        shapes = [(64, 64, 4, 3)] if k <= 64 else [(64, 128, 4, 3), (64, 64, 4, 4)]
    elif k <= 64:
        shapes = [(256, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 4)] if half else [(128, 64, 4, 4), (64, 64, 4, 4)]
    elif half and reduction <= 1152:
        shapes = [(128, 128, 4, 3), (128, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4)]
    else:
        shapes = [(256, 128, 8, 3 if half else 4), (128, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4)]
    # The largest tiles that keep most multiprocessors busy, those of pairs all of them.
    for block_m, block_n, num_warps, num_stages in shapes:
        least = MULTIPROCESSORS + 1 if (block_n, num_warps, num_stages) == PAIRED else ENOUGH_PROGRAMS
        if ceil_div(n * p * q, block_m) * ceil_div(k, block_n) >= least:
            break
    box = tile(n, p, q, block_m)
    return DescriptorBlocks(*box, block_n, 128 // element_size, swapped, num_warps, num_stages)


class HaloSide(NamedTuple):
    """3x3 convolutions to images of one size, of as many channels as those before times the stride: tiles with a halo.

    The blocks for 16-bit numbers, TF32 and TF32 that is rounded on the way, each with the number of tiles from which on
    they are taken; None where another form is faster.
    """

    half: tuple[HaloBlocks, int] | None
    tf32: tuple[HaloBlocks, int] | None
    rounded: tuple[HaloBlocks, int] | None


_HALF_64, _TF32_64 = (
    HaloBlocks(1, 8, 32, 64, 64, 2, 4, True, True, 4, 2),
    HaloBlocks(1, 8, 32, 64, 32, 2, 4, False, False, 4, 2),
)
_HALF_128, _TF32_128 = (
    HaloBlocks(1, 16, 16, 128, 64, 3, 3, True, False, 8, 1),
    HaloBlocks(1, 16, 16, 128, 32, 3, 6, False, False, 8, 1),
)
_HALF_8, _TF32_8 = (
    HaloBlocks(4, 8, 8, 128, 64, 2, 5, True, False, 8, 1),
    HaloBlocks(4, 8, 8, 128, 32, 3, 6, False, False, 8, 1),
)
_HALF_4 = HaloBlocks(16, 4, 4, 128, 64, 2, 4, True, False, 8, 1)
_HALF_BY_2, _TF32_BY_2, _TF32_28_BY_2 = (
    HaloBlocks(1, 8, 16, 128, 64, 3, 7, True, True, 8, 1),
    HaloBlocks(1, 8, 16, 128, 32, 3, 7, False, False, 8, 1),
    HaloBlocks(1, 4, 32, 128, 32, 3, 7, False, False, 8, 1),
)
_HALF_8_BY_2, _TF32_8_BY_2, _ROUNDED_8_BY_2 = (
    HaloBlocks(2, 8, 8, 128, 64, 3, 7, True, True, 8, 1),
    HaloBlocks(2, 8, 8, 128, 32, 3, 7, False, False, 8, 1),
    HaloBlocks(2, 8, 8, 256, 32, 2, 4, False, False, 8, 1),
)
_HALF_4_BY_2, _TF32_4_BY_2, _ROUNDED_4_BY_2 = (
    HaloBlocks(16, 4, 4, 128, 64, 2, 5, True, True, 8, 1),
    HaloBlocks(16, 4, 4, 128, 32, 2, 5, False, False, 8, 1),
    HaloBlocks(8, 4, 4, 256, 32, 2, 4, False, False, 8, 1),
)
HALO_SIDES = {
    (64, 32, 1): HaloSide((_HALF_64, 512), (_TF32_64, 512), (_TF32_64, 512)),
    (64, 56, 1): HaloSide((_HALF_64, 512), (_TF32_64, 512), (_TF32_64, 512)),
    (128, 16, 1): HaloSide((_HALF_128, 512), (_TF32_128, 128), (_TF32_128, 128)),
    (128, 28, 1): HaloSide(None, None, (_TF32_128, 512)),
    (256, 8, 1): HaloSide((_HALF_8, 512), (_TF32_8, 512), (_TF32_8, 512)),
    (512, 4, 1): HaloSide((_HALF_4, 256), None, None),
    (64, 16, 2): HaloSide((_HALF_BY_2, 512), (_TF32_BY_2, 512), (_TF32_BY_2, 256)),
    (64, 28, 2): HaloSide((_HALF_BY_2, 512), (_TF32_28_BY_2, 512), (_TF32_28_BY_2, 512)),
    (128, 8, 2): HaloSide((_HALF_8_BY_2, 512), (_TF32_8_BY_2, 512), (_ROUNDED_8_BY_2, 256)),
    (128, 14, 2): HaloSide(None, (_TF32_BY_2, 512), None),
    (256, 4, 2): HaloSide((_HALF_4_BY_2, 256), (_TF32_4_BY_2, 256), (_ROUNDED_4_BY_2, 256)),
    (256, 7, 2): HaloSide(None, None, (_ROUNDED_8_BY_2, 128)),
}
"""By channels, side of y and stride. Measured, 1,024 images, or 128 where it says so; us, in brackets the next form.

Stride 1 on an H200 (benchmarks/results): 64 at 32x32 in bfloat16 114 (193), TF32 that is rounded on the way 278 (445);
64 at 56x56, 128 images, 51 (79), TF32 100 (145), rounded 126 (172); 128 at 16x16 104 (119), rounded 211 (294), of 128
images 31 (40); 128 at 28x28, 128 images, rounded 109 (117); 256 at 8x8 97 (106), TF32 185 (195), rounded 198 (229); 512
at 4x4 95 (99).

Stride 2 on an H100: 64 to 16x16 in bfloat16 78 (92), TF32 150 (179), rounded 176 (214), of 128 images 29 (34); 64 to
28x28, 128 images, 37 (40), TF32 65 (80), rounded 80 (84); 128 to 8x8 59 (69), TF32 109 (131), rounded 126 (185); 128 to
14x14, 128 images, TF32 56 (61); 256 to 4x4 53 (56), TF32 96 (107), rounded 117 (153); 256 to 7x7, 128 images, rounded
61 (70).
"""


@functools.lru_cache
def halo_blocks(
    n: int, p: int, q: int, c: int, k: int, stride: int, element_size: int, round_x: bool
) -> HaloBlocks | None:
    """For a 3x3 convolution to n images of p x q pixels, c to k channels; None where it is not known to be the fastest.

    `round_x`: to TF32, on the way.
    """
    side = HALO_SIDES.get((c, p, stride)) if k == c * stride and p == q else None
    found = side and (side.half if element_size == 2 else side.rounded if round_x else side.tf32)
    if not found:
        return None
    blocks, least = found
    boxes = math.prod(ceil_div(size, tile) for size, tile in zip((n, p, q), blocks))
    return blocks if boxes * (k // blocks.BLOCK_N) >= least else None
