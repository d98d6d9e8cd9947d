"""What Gluon, which is experimental, names or allows otherwise from version to version of Triton: the one place to ask.

Written for 3.6 to 3.9.
"""

import math

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of all threads of a program; `thread_barrier` in 3.6."""
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Starts to load a box by TMA; `async_copy_global_to_shared` in 3.6 and 3.7."""
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
"""Starts to store a box by TMA; `async_copy_shared_to_global` in 3.6 and 3.7."""
SLICES = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Whether shared memory can be sliced at any row and the slice be reinterpreted, from 3.9 on.

Before, a view that begins at any row is one row, found by its index, and is then taken for several. 3.8 asks that both
be of one size, by their layouts: the ring has one whose rows reach over all that is ever seen from them on.
"""
VECTORIZES = gl.constexpr(VERSION >= (3, 8))
"""Whether LLVM computes numbers of several steps of a loop together, as vectors, before the first of these steps."""
EXPECT_IS_A_BARRIER = gl.constexpr((3, 8) <= VERSION <= (3, 9))
"""Whether `mbarrier.expect` begins with a barrier of all threads, as what was compiled shows."""
BARRIER_AFTER_WAIT = gl.constexpr(VERSION >= (3, 7))
"""Whether, between the load of what a product reads and the product, all threads meet after they waited for the load.

In 3.6 they meet before.
"""


@gluon.jit
def pinned(i):
    """i, a 32-bit integer of which LLVM is to know nothing, so that what depends on it is computed from here on.

    Computed as vectors before, numbers stand in registers of each thread, from where the addresses of products must
    come back to those of a warp; constant divisors are no constants any more; and small numbers are pairs of 16 bits.
    """
    if VECTORIZES:
        i = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)
    return i


@gluon.jit
def barrier_before_expect():
    """A barrier of all threads before `mbarrier.expect`, unless that begins with one."""
    if not EXPECT_IS_A_BARRIER:
        barrier()


@gluon.jit
def barrier_before_wait():
    """Has all threads meet before they wait for what a product reads, where they would do so afterwards."""
    if BARRIER_AFTER_WAIT:
        barrier()


@gluon.constexpr_function
def _reach(box_rows: int) -> int:
    """Rows, a power of 2, that every view of a box lies in."""
    return 1 << (box_rows - 1).bit_length()


@gluon.constexpr_function
def _views(shape: list[int], elements: int) -> list[int]:
    """So many of a shape that they are so many elements together."""
    sizes = [getattr(size, "value", size) for size in shape]  # constexpr within a list stays wrapped
    return [elements // math.prod(sizes), *sizes]


@gluon.constexpr_function
def _ring_layout(layout, pixels: int, channels: int, box_rows: int):
    """Of a ring of boxes of rows [pixels, channels]; where it is not sliced, one that is never read by."""
    if SLICES:
        return layout
    bases = [[0, 1 << bit] for bit in range(channels.bit_length() - 1)]
    bases += [[1 << bit, 0] for bit in range(pixels.bit_length() - 1)]
    nowhere = [[0, 0]] * (_reach(box_rows).bit_length() - 1)
    return gl.SharedLinearLayout(bases + nowhere, alignment=1024)


@gluon.jit
def allocate_ring(
    DTYPE: gl.constexpr,
    SLOTS: gl.constexpr,
    BOX_ROWS: gl.constexpr,
    PIXELS: gl.constexpr,
    CHANNELS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Shared memory [SLOTS * BOX_ROWS, PIXELS, CHANNELS], to be seen by `ring_view`."""
    RING: gl.constexpr = _ring_layout(LAYOUT, PIXELS, CHANNELS, BOX_ROWS)
    return gl.allocate_shared_memory(DTYPE, [SLOTS * BOX_ROWS, PIXELS, CHANNELS], RING)


@gluon.jit
def ring_view(ring, slot, FIRST: gl.constexpr, BOX_ROWS: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """A ring from row FIRST of a slot on, in another shape and layout."""
    if SLICES:  # at rows known to the compiler: of all slots one is picked
        box = ring.slice(0, BOX_ROWS)
        for i in gl.static_range(1, ring.shape[0] // BOX_ROWS):
            if slot == i:
                box = ring.slice(i * BOX_ROWS, BOX_ROWS)
        view = box.slice(FIRST, BOX_ROWS - FIRST).reinterpret(ring.dtype, SHAPE, LAYOUT)
    else:
        VIEWS: gl.constexpr = _views(SHAPE, _reach(BOX_ROWS) * ring.shape[1] * ring.shape[2])
        view = ring.index(slot * BOX_ROWS + FIRST)._reinterpret(ring.dtype, VIEWS, LAYOUT).index(0)
    return view
