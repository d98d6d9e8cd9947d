"""Split-K: programs that share a tile leave their sums in memory, and the last to arrive adds them up.

In the order of their numbers, whoever is the last: sums are the same bits every time. No program waits for another.
"""

import triton
import triton.language as tl

MOST_UNROLLED = tl.constexpr(32 * 32)
"""Sums of parts that are all loaded at the same time. Of larger ones so many would not fit a thread's registers."""


@triton.jit
def parts_of(partial_ptr, tile, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile's first part is stored, [ROWS, COLUMNS]; partial is [tiles, SPLITS, ROWS, COLUMNS]."""
    offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return partial_ptr + tile * (SPLITS * ROWS * COLUMNS) + offs


@triton.jit
def leave_part(acc, parts, split, semaphore_ptr, SPLITS: tl.constexpr):
    """Stores the part of the number `split`, and says whether it is the last of the tile's to be stored."""
    tl.store(parts + split * (acc.shape[0] * acc.shape[1]), acc)
    tl.debug_barrier()  # all threads have stored before one of them tells
    return tl.atomic_add(semaphore_ptr, 1, sem="acq_rel") == SPLITS - 1


@triton.jit
def sum_of_parts(parts, semaphore_ptr, SPLITS: tl.constexpr):
    """The sum of a tile's parts, from L2, where other multiprocessors left them; its semaphore is zero again."""
    PART: tl.constexpr = parts.shape[0] * parts.shape[1]
    acc = tl.load(parts, cache_modifier=".cg")
    if PART <= MOST_UNROLLED:
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(parts + other * PART, cache_modifier=".cg")
    else:
        for other in range(1, SPLITS):
            acc += tl.load(parts + other * PART, cache_modifier=".cg")
    tl.store(semaphore_ptr, 0)
    return acc
