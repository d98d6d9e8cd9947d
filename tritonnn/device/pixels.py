"""Arithmetic of pixels."""

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
