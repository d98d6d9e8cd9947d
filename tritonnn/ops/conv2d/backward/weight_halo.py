"""Gradient of a 3x3 filter from tiles with a halo: TMA and wgmma, 16-bit channels_last images, Hopper GPUs.

As in weight.py. The reduction runs over boxes of TILE_P rows x TILE_N images x TILE_Q columns of g. For a
column of the filter TMA loads the box of x under them, with a row more on either side, whose slices in shared memory
are what the filter's three rows see: a row, of all the images, is a multiple of the 1024 bytes after which the swizzle
repeats. So a box of g and one of x serve three taps. With stride 2 the box of x has of every other column first the odd
rows and then the even ones, as in forms/tma_halo.

A program has 64 filters x 64 channels x 3 taps in registers, and takes g from registers too, transposed on its way
there: a product of 64 x 64 then reads 64 bytes of shared memory a cycle. With g in shared memory it would read 128,
which is as much as a multiprocessor can, and TMA writes there beside it. Three programs share a multiprocessor: while
one waits for its products, or for g, the tensor cores are with another. On an H200 512 images of ResNet18 take 53 to 59
us so, tap by tap (weight_tma.py) 54 to 84.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....device.gluon_versions import (
    allocate_ring,
    barrier,
    barrier_before_expect,
    barrier_before_wait,
    load_box,
    ring_view,
)
from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.dependent_launch import dependent_launch
from ....runtime.launch_plan import launch
from ....runtime.memory_format import is_aligned
from ..forms.tma_halo import box_descriptor, rows_first
from ..forms.tma_halo.geometry import box_rows, edge_rows, first_row
from .weight_shares import add_up, segment_of, shares_of

LINE = gl.constexpr(64)
"""Channels of a line of shared memory, after which the swizzle begins again."""
STEP_PIXELS = 64
MOST_SLOTS = 4
PROGRAMS = 3
"""Programs of a multiprocessor."""
BARRIERS = 1280
"""Bytes of shared memory of a program besides its slots, at most: what the driver takes, and barriers."""


@gluon.jit
def fetch(
    descriptors,
    rings,
    number,
    box,
    end,
    tiles_p,
    tiles_q,
    place,
    STRIDE: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_P: gl.constexpr,
    TILE_Q: gl.constexpr,
):
    """Starts to load a box of g, and the lines of x under it, into the slot of that number, unless box >= end.

    descriptors: (g_desc, x_desc, edge_desc); rings: (g_ring, x_ring, bars); place: (k, c, row, column), where g's
    channels and x's begin, and how far x's rows and columns are from g's, in x as it is seen.
    """
    g_desc, x_desc, edge_desc = descriptors
    g_ring, x_ring, bars = rings
    k, c, row, column = place
    slot = number % bars.shape[0]
    q = box % tiles_q * TILE_Q
    p = box // tiles_q % tiles_p * TILE_P
    n = box // tiles_q // tiles_p * TILE_N
    pred = box < end
    bar = bars.index(slot)
    BYTES: gl.constexpr = g_desc.block_type.nbytes + STRIDE * x_desc.block_type.nbytes + edge_desc.block_type.nbytes
    mbarrier.expect(bar, BYTES, pred=pred)
    load_box(g_desc, [p, n, q, k], bar, g_ring.index(slot), pred=pred)
    BOX_ROWS: gl.constexpr = box_rows(TILE_P, STRIDE)
    BOX: gl.constexpr = [TILE_P, 1, TILE_N, TILE_Q, LINE]
    EDGE: gl.constexpr = [edge_rows(STRIDE), 1, TILE_N, TILE_Q, LINE]
    BOX_LAYOUT: gl.constexpr = x_desc.layout
    EDGE_LAYOUT: gl.constexpr = edge_desc.layout
    rows = ring_view(x_ring, slot, 0, BOX_ROWS, BOX, BOX_LAYOUT)
    edge = ring_view(x_ring, slot, TILE_P, BOX_ROWS, EDGE, EDGE_LAYOUT)
    load_box(x_desc, [p + row, STRIDE - 1, n, q + column, c], bar, rows, pred=pred)
    load_box(edge_desc, [p + row + TILE_P, STRIDE - 1, n, q + column, c], bar, edge, pred=pred)
    if STRIDE == 2:
        even = ring_view(x_ring, slot, TILE_P + 1, BOX_ROWS, BOX, BOX_LAYOUT)
        load_box(x_desc, [p, 0, n, q + column, c], bar, even, pred=pred)


@gluon.jit
def rows_under(x_ring, slot, r: gl.constexpr, STRIDE: gl.constexpr, TILE_P: gl.constexpr, PIXELS: gl.constexpr):
    """[PIXELS, 64]: the lines of x that the filter's row r sees."""
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    return ring_view(x_ring, slot, first_row(r, TILE_P, STRIDE), box_rows(TILE_P, STRIDE), [PIXELS, LINE], LINES)


@gluon.jit
def store_tap(partial_ptr, acc, ACC: gl.constexpr):
    """Stores a sum of 64 filters x 64 channels."""
    offs_m = gl.arange(0, LINE, gl.SliceLayout(1, ACC))
    offs_n = gl.arange(0, LINE, gl.SliceLayout(0, ACC))
    gl.store(partial_ptr + offs_m[:, None] * LINE + offs_n[None, :], acc)


@gluon.jit
def conv2d_backward_weight_halo_kernel(
    g_desc,
    x_desc,
    edge_desc,
    partial_ptr,
    SHARE,
    FULL,
    REST,
    BOXES,
    tiles_p,
    tiles_q,
    C: gl.constexpr,
    K: gl.constexpr,
    STRIDE: gl.constexpr,
    PADDING_H: gl.constexpr,
    PADDING_W: gl.constexpr,
    SEGMENTS: gl.constexpr,
    DEPENDENT: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_P: gl.constexpr,
    TILE_Q: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """One program owns a share of tiles of 64 filters x 64 channels x a column of the filter.

    g_desc has the dimensions [rows, images, columns, channels], those of x [H / STRIDE, STRIDE, images, W / STRIDE,
    STRIDE * C], in which a tap picks which of the STRIDE rows and columns. partial is [places, 3, 64, 64]. The products
    of a box are awaited with g among what is kept, so that no register of it is written before.
    """
    PIXELS: gl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_M: gl.constexpr = K // LINE
    BLOCKS_N: gl.constexpr = C // LINE
    DTYPE: gl.constexpr = x_desc.dtype
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    G: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    x_ring = allocate_ring(DTYPE, SLOTS, box_rows(TILE_P, STRIDE), TILE_N * TILE_Q, LINE, LINES)
    g_ring = gl.allocate_shared_memory(DTYPE, [SLOTS, TILE_P, TILE_N, TILE_Q, LINE], gl.NVMMASharedLayout(128, 16, 4))
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()

    descriptors = (g_desc, x_desc, edge_desc)
    rings = (g_ring, x_ring, bars)
    pid = gl.program_id(0)
    first = (pid - FULL) * SHARE
    wait_for_predecessor(DEPENDENT)
    number = 0  # boxes that this program has taken
    for segment in range(SEGMENTS):
        tile, begin, end, stored, first = segment_of(
            pid, segment, first, SHARE, FULL, REST, BOXES, BLOCKS_M * BLOCKS_N * 3, SEGMENTS
        )
        k = tile % BLOCKS_M * LINE
        c = tile // BLOCKS_M % BLOCKS_N * LINE
        s = tile // (BLOCKS_M * BLOCKS_N)
        if STRIDE == 1:
            place = (k, c, 0 - PADDING_H, s - PADDING_W)
        else:  # row and column 2 * p + r - 1 of x
            place = (k, c + (s + 1) % 2 * C, -1, (s + 1) // 2 - 1)
        for i in gl.static_range(SLOTS):
            fetch(
                descriptors, rings, number + i, begin + i, end, tiles_p, tiles_q, place, STRIDE, TILE_N, TILE_P, TILE_Q
            )
        acc0 = gl.zeros([LINE, LINE], gl.float32, ACC)
        acc1 = gl.zeros([LINE, LINE], gl.float32, ACC)
        acc2 = gl.zeros([LINE, LINE], gl.float32, ACC)
        for box in range(begin, end):
            slot = number % SLOTS
            barrier_before_wait()
            mbarrier.wait(bars.index(slot), number // SLOTS & 1)
            g = g_ring.index(slot).reshape([PIXELS, LINE]).permute([1, 0]).load(G)
            acc0 = warpgroup_mma(g, rows_under(x_ring, slot, 0, STRIDE, TILE_P, PIXELS), acc0, is_async=True)
            acc1 = warpgroup_mma(g, rows_under(x_ring, slot, 1, STRIDE, TILE_P, PIXELS), acc1, is_async=True)
            acc2 = warpgroup_mma(g, rows_under(x_ring, slot, 2, STRIDE, TILE_P, PIXELS), acc2, is_async=True)
            acc0, acc1, acc2, g = warpgroup_mma_wait(0, deps=[acc0, acc1, acc2, g])
            barrier_before_expect()
            next = number + SLOTS
            fetch(descriptors, rings, next, box + SLOTS, end, tiles_p, tiles_q, place, STRIDE, TILE_N, TILE_P, TILE_Q)
            number += 1
        if begin < end:
            tap_ptr = partial_ptr + stored.to(gl.int64) * (3 * LINE * LINE)
            store_tap(tap_ptr, acc0, ACC)
            store_tap(tap_ptr + LINE * LINE, acc1, ACC)
            store_tap(tap_ptr + 2 * LINE * LINE, acc2, ACC)
    start_successor(DEPENDENT)


class Config(NamedTuple):
    """A box of TILE_N images x TILE_P rows x TILE_Q columns, of which a program keeps SLOTS."""

    TILE_N: int
    TILE_P: int
    TILE_Q: int
    SLOTS: int


def takes(g_shape: Sequence[int], x_shape: Sequence[int], filter_size: Sequence[int], window: tuple) -> bool:
    """3x3 filters over every pixel or, in images of even sides, every other; whole lines of 128 bytes of channels."""
    stride, padding, dilation = map(tuple, window)
    lines = g_shape[1] % LINE.value == 0 and x_shape[1] % LINE.value == 0
    halved = stride == (2, 2) and padding == (1, 1) and x_shape[2] % 2 == 0 and x_shape[3] % 2 == 0
    return lines and tuple(filter_size) == (3, 3) and dilation == (1, 1) and (stride == (1, 1) or halved)


def fits(g: torch.Tensor, x: torch.Tensor, filter_size: Sequence[int], window: tuple, groups: int) -> bool:
    """Whether the kernel runs here, for these images."""
    if x.element_size() != 2 or groups > 1 or not hardware.gluon_is_verified(x.device):
        return False
    return is_aligned(x) and is_aligned(g) and takes(g.shape, x.shape, filter_size, window)


def default_config(g_shape: Sequence[int], stride: int, shared_memory: int) -> Config:
    """The box of STEP_PIXELS whose products or, where these are more, bytes of shared memory take the fewest cycles.

    A cycle of a multiprocessor is 2048 products of the tensor cores, or 128 bytes.
    """
    N, _, P, Q = g_shape
    lines = 128 * STEP_PIXELS

    def cycles(box: tuple[int, int, int]) -> float:
        tile_n, tile_p, tile_q = box
        boxes = ceil_div(N, tile_n) * ceil_div(P, tile_p) * ceil_div(Q, tile_q)
        return boxes * max(3 * STEP_PIXELS * 64 * 64 / 2048, (bytes_of(box, stride) + 4 * lines) / 128)

    sizes = [1 << bit for bit in range(STEP_PIXELS.bit_length())]
    boxes = [(n, p, STEP_PIXELS // n // p) for n in sizes for p in sizes if n * p <= STEP_PIXELS]
    box = min((box for box in boxes if box[0] * box[2] >= 8), key=cycles)  # the swizzle repeats after 8 lines
    return Config(*box, min((shared_memory // PROGRAMS - BARRIERS) // bytes_of(box, stride), MOST_SLOTS))


def bytes_of(box: tuple[int, int, int], stride: int) -> int:
    """The bytes of a slot: the lines of g and of x."""
    tile_n, tile_p, tile_q = box
    return 128 * tile_n * tile_q * (tile_p + box_rows(tile_p, stride))


def run(g: torch.Tensor, x: torch.Tensor, grad_weight: torch.Tensor, window: tuple, config: Config) -> None:
    """Fills grad_weight [K, C, 3, 3], any strides; g [N, K, P, Q] and x [N, C, H, W] are channels_last."""
    (stride, _), padding, _ = window
    N, K, P, Q = g.shape
    C = x.shape[1]
    tile_n, tile_p, tile_q = config[:3]
    tiles = K // LINE.value * (C // LINE.value) * 3
    tiles_p, tiles_q = ceil_div(P, tile_p), ceil_div(Q, tile_q)
    boxes = ceil_div(N, tile_n) * tiles_p * tiles_q
    shares = shares_of(boxes, tiles, PROGRAMS * hardware.gpu(x.device).multiprocessors)
    tile = 3, LINE.value, LINE.value
    partial = shares.partial_sums(tile, x.device)
    launch(
        conv2d_backward_weight_halo_kernel,
        (shares.programs,),
        box_descriptor(rows_first(g, 1)[:, 0], [tile_p, tile_n, tile_q, LINE.value]),
        box_descriptor(rows_first(x, stride), [tile_p, 1, tile_n, tile_q, LINE.value]),
        box_descriptor(rows_first(x, stride), [edge_rows(stride), 1, tile_n, tile_q, LINE.value]),
        partial,
        *shares.work,
        tiles_p,
        tiles_q,
        C,
        K,
        stride,
        *padding,
        SEGMENTS=shares.SEGMENTS,
        **dependent_launch(x),
        TILE_N=tile_n,
        TILE_P=tile_p,
        TILE_Q=tile_q,
        SLOTS=config.SLOTS,
        num_warps=4,
    )
    add_up(partial, grad_weight, shares, tile, (1, 3))
