"""Which pixels and channels a program owns, and arithmetic of pixels."""

import triton
import triton.language as tl

MOST_PIXELS = 2**20
"""`quotient` is exact for numbers below this."""


@triton.jit
def quotient(a, inverse):
    """a // b of whole numbers, a below MOST_PIXELS and not negative; `inverse` is 1 / b in float32.

    A division of integers takes some 25 instructions, and each thread does several before it loads anything.
    """
    return ((a.to(tl.float32) + 0.5) * inverse).to(tl.int32)


@triton.jit
def block_of_pixels(tile, M, PIXELS, INDEX: tl.constexpr, BLOCK_M: tl.constexpr):
    """(n, pixel, mask_m) of BLOCK_M of M pixels, PIXELS an image: in which image, which there, and whether they are."""
    offs_m = tile.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    return (offs_m // PIXELS).to(tl.int64), offs_m % PIXELS, mask_m


@triton.jit
def block_of_channels(tile, C, BLOCK_C: tl.constexpr):
    """(c, mask_c) of BLOCK_C of C channels."""
    c = (tile * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    return c, c < C
