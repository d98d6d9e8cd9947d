"""The stages before a product: loading boxes of x and tiles of the weight into rings of slots, rounding x there."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .....device.arithmetic import round_to_tf32
from .....device.gluon_versions import barrier, barrier_before_wait, load_box, pinned, ring_view
from .geometry import box_rows, edge_rows, part


@gluon.jit
def place_of(
    tile,
    tiles_p,
    tiles_q,
    BLOCKS_N: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_P: gl.constexpr,
    TILE_Q: gl.constexpr,
):
    """(image, row, column, block of channels) at which a tile begins."""
    box = tile // BLOCKS_N
    n = box // tiles_q // tiles_p * TILE_N
    return n, box // tiles_q % tiles_p * TILE_P, box % tiles_q * TILE_Q, tile % BLOCKS_N


@gluon.jit
def first_channel(block, K: gl.constexpr, GROUP_C: gl.constexpr, GROUP_K: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first channel of x that a block of output channels reads: that of its first group."""
    return block * 0 if GROUP_K == K else block * BLOCK_N // GROUP_K * GROUP_C


@gluon.jit
def rows_of(x_ring, slot, FIRST: gl.constexpr, ROWS: gl.constexpr, BOX_ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """[ROWS * TILE_N * TILE_Q, BLOCK_K]: the rows of a box from FIRST on."""
    ROW: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    return ring_view(x_ring, slot, FIRST, BOX_ROWS, [ROWS * ROW, BLOCK_K], LAYOUT)


@gluon.jit
def wait_for_load(bars, number, pred=True):
    """Waits until a program's load of that number, counted from 0, has filled its slot of a ring; gives the slot."""
    SLOTS: gl.constexpr = bars.shape[0]
    number = pinned(number)
    slot = number % SLOTS
    mbarrier.wait(bars.index(slot), number // SLOTS & 1, pred=pred)
    return slot


@gluon.jit
def wait_for_weight(w_bars, step, block_c, TAP: gl.constexpr, RESIDENT: gl.constexpr, EXPAND: gl.constexpr):
    """Waits for the weight of a program's step of that number and gives its slot: RESIDENT, it keeps one for all tiles.

    block_c: which block of channels it is of; TAP: which of that block's nine steps. Where the program has put it there
    (EXPAND) there is nothing to wait for.
    """
    if RESIDENT:
        slot = block_c * 9 + TAP
        if not EXPAND:
            mbarrier.wait(w_bars.index(slot), 0)
    else:
        barrier_before_wait()
        slot = wait_for_load(w_bars, step)
    return slot


@gluon.jit
def fetch_box(
    images,
    slot,
    tile,
    box,
    grid,
    BLOCKS_N: gl.constexpr,
    CHANNELS: gl.constexpr,
    STRIDE: gl.constexpr,
    PADDING: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Starts to load a tile's box of that number into a slot, unless there is no such tile.

    images: (x_desc, edge_desc, x_ring, x_bars); grid: (tiles, tiles_p, tiles_q); CHANNELS: (C, K, GROUP_C, GROUP_K);
    PADDING: above and to the left; TILE: (TILE_N, TILE_P, TILE_Q).
    """
    x_desc, edge_desc, x_ring, x_bars = images
    tiles, tiles_p, tiles_q = grid
    TILE_N: gl.constexpr = TILE[0]
    TILE_P: gl.constexpr = TILE[1]
    TILE_Q: gl.constexpr = TILE[2]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    n, p, q, block = place_of(tile, tiles_p, tiles_q, BLOCKS_N, TILE_N, TILE_P, TILE_Q)
    # The filter's column s lies STRIDE * q + s - PADDING[1] columns right of x's first.
    column = box % 3 + STRIDE - PADDING[1]
    q += column // STRIDE - 1
    first = first_channel(block, CHANNELS[1], CHANNELS[2], CHANNELS[3], BLOCK_N)
    c = column % STRIDE * CHANNELS[0] + box // 3 * BLOCK_K + first
    pred = tile < tiles
    bar = x_bars.index(slot)
    BOX_ROWS: gl.constexpr = box_rows(TILE_P, STRIDE)
    BOX: gl.constexpr = [TILE_P, 1, TILE_N, TILE_Q, BLOCK_K]
    EDGE: gl.constexpr = [edge_rows(STRIDE), 1, TILE_N, TILE_Q, BLOCK_K]
    BOX_LAYOUT: gl.constexpr = x_desc.layout
    EDGE_LAYOUT: gl.constexpr = edge_desc.layout
    rows = ring_view(x_ring, slot, 0, BOX_ROWS, BOX, BOX_LAYOUT)
    edge = ring_view(x_ring, slot, TILE_P, BOX_ROWS, EDGE, EDGE_LAYOUT)
    mbarrier.expect(bar, STRIDE * x_desc.block_type.nbytes + edge_desc.block_type.nbytes, pred=pred)
    ODD: gl.constexpr = PADDING[0] if STRIDE == 2 else 0
    load_box(x_desc, [p - PADDING[0], ODD, n, q, c], bar, rows, pred=pred)
    load_box(edge_desc, [p - PADDING[0] + TILE_P, ODD, n, q, c], bar, edge, pred=pred)
    if STRIDE == 2:
        others = ring_view(x_ring, slot, TILE_P + 1, BOX_ROWS, BOX, BOX_LAYOUT)
        load_box(x_desc, [p, 1 - ODD, n, q, c], bar, others, pred=pred)


@gluon.jit
def fetch_weight(weights, slot, tile, step, tiles, BLOCKS_N: gl.constexpr):
    """Starts to load the weight of a tile's step of that number into a slot, unless there is no such tile.

    weights: (weight_desc, w_ring, w_bars).
    """
    weight_desc, w_ring, w_bars = weights
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = w_ring.shape[3]
    tap = step % 3 * 3 + step // 3 % 3
    pred = tile < tiles
    bar = w_bars.index(slot)
    mbarrier.expect(bar, weight_desc.block_type.nbytes, pred=pred)
    k, c = tile % BLOCKS_N * BLOCK_N, step // 9 * BLOCK_K
    load_box(weight_desc, [k, tap, c], bar, w_ring.index(slot), pred=pred)


@gluon.jit
def expand_weight(
    weight_ptr, w_ring, k, K: gl.constexpr, GROUP_C: gl.constexpr, GROUP_K: gl.constexpr, num_warps: gl.constexpr
):
    """Puts the weight of the block from channel k on into the slots, zero where a channel of x is of another group."""
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = w_ring.shape[3]
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // BLOCK_K, BLOCK_K // 8], [num_warps, 1], [1, 0])
    rows = gl.expand_dims(k + gl.arange(0, BLOCK_N, gl.SliceLayout(1, SPREAD)), 1)
    columns = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, SPREAD)), 0)
    c = columns - (rows // GROUP_K - k // GROUP_K) * GROUP_C
    mask = (c >= 0) & (c < GROUP_C) & (rows < K)
    for s in gl.static_range(3):
        for r in gl.static_range(3):
            weight = gl.load(weight_ptr + ((rows * 9 + 3 * r + s) * GROUP_C + c), mask=mask, other=0.0)
            w_ring.index(3 * s + r).reshape([BLOCK_N, BLOCK_K]).store(weight)
    fence_async_shared()
    barrier()


@gluon.jit
def fill_rings(
    images,
    weights,
    first,
    programs,
    grid,
    BOXES: gl.constexpr,
    X_LOADS: gl.constexpr,
    W_LOADS: gl.constexpr,
    BLOCKS_N: gl.constexpr,
    CHANNELS: gl.constexpr,
    STRIDE: gl.constexpr,
    PADDING: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Starts the first loads of a program, X_LOADS boxes and W_LOADS tiles of the weight; a tile has BOXES boxes."""
    for early in gl.static_range(X_LOADS):
        tile = first + early // BOXES * programs
        fetch_box(images, early, tile, early % BOXES, grid, BLOCKS_N, CHANNELS, STRIDE, PADDING, TILE, BLOCK_N)
    STEPS: gl.constexpr = 3 * BOXES
    for early in gl.static_range(W_LOADS):
        fetch_weight(weights, early, first + early // STEPS * programs, early % STEPS, grid[0], BLOCKS_N)


@gluon.jit
def fetch_next_box(
    images,
    box,
    tile,
    block_c,
    s: gl.constexpr,
    programs,
    grid,
    BOXES: gl.constexpr,
    BLOCKS_N: gl.constexpr,
    CHANNELS: gl.constexpr,
    STRIDE: gl.constexpr,
    PADDING: gl.constexpr,
    TILE: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Starts the load of the last box that the ring has room for while a program multiplies with its box `box`.

    That is of the tile's block block_c of channels and the filter's column s. The new one may be of the next tile.
    """
    SLOTS: gl.constexpr = images[3].shape[0]
    ahead = block_c * 3 + s + SLOTS - 1
    slot = (pinned(box) + SLOTS - 1) % SLOTS
    fetch_box(
        images,
        slot,
        tile + ahead // BOXES * programs,
        pinned(ahead % BOXES),
        grid,
        BLOCKS_N,
        CHANNELS,
        STRIDE,
        PADDING,
        TILE,
        BLOCK_N,
    )


@gluon.jit
def fetch_next_weight(
    weights,
    step,
    tile,
    block_c,
    TAP: gl.constexpr,
    programs,
    tiles,
    STEPS: gl.constexpr,
    BLOCKS_N: gl.constexpr,
):
    """As `fetch_next_box`, of the weight while a program multiplies in its step `step`."""
    SLOTS: gl.constexpr = weights[2].shape[0]
    ahead = block_c * 9 + TAP + SLOTS - 1
    slot = (pinned(step) + SLOTS - 1) % SLOTS
    fetch_weight(weights, slot, tile + ahead // STEPS * programs, pinned(ahead % STEPS), tiles, BLOCKS_N)


@gluon.jit
def round_box(x_ring, slot, STRIDE: gl.constexpr, TILE_P: gl.constexpr, LAYOUT: gl.constexpr, num_warps: gl.constexpr):
    """Rounds a box to TF32 where it lies."""
    EDGE: gl.constexpr = edge_rows(STRIDE)
    BOX_ROWS: gl.constexpr = box_rows(TILE_P, STRIDE)
    spread: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [num_warps, 1], [1, 0])
    rows = rows_of(x_ring, slot, 0, TILE_P, BOX_ROWS, LAYOUT)
    edge = rows_of(x_ring, slot, TILE_P, EDGE, BOX_ROWS, LAYOUT)
    x_rows = round_to_tf32(rows.load(spread))
    x_edge = round_to_tf32(edge.load(spread))
    rows.store(x_rows)
    edge.store(x_edge)
    if STRIDE == 2:
        even = rows_of(x_ring, slot, TILE_P + 1, TILE_P, BOX_ROWS, LAYOUT)
        even.store(round_to_tf32(even.load(spread)))
    fence_async_shared()
    barrier()


@gluon.jit
def round_rows(x_ring, slot, PART: gl.constexpr, BOX_ROWS: gl.constexpr, LAYOUT: gl.constexpr, num_warps: gl.constexpr):
    """Rounds part of a box to TF32 where it lies; for the tensor cores to see it takes a fence and a barrier."""
    spread: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [num_warps, 1], [1, 0])
    rows = rows_of(x_ring, slot, PART[0], PART[1], BOX_ROWS, LAYOUT)
    rows.store(round_to_tf32(rows.load(spread)))


@gluon.jit
def round_next_box(
    x_ring,
    x_bars,
    box,
    has_next,
    STRIDE: gl.constexpr,
    TILE_P: gl.constexpr,
    LAYOUT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Rounds a program's box `box`, if it has one, as soon as it is there."""
    slot = wait_for_load(x_bars, box, has_next)
    round_box(x_ring, slot, STRIDE, TILE_P, LAYOUT, num_warps)


@gluon.jit
def round_part_of_next_box(
    x_ring,
    x_bars,
    box,
    has_next,
    r: gl.constexpr,
    STRIDE: gl.constexpr,
    TILE_P: gl.constexpr,
    LAYOUT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """As `round_next_box`, a third of it beside the step r of the box before; after the last, products may read it."""
    slot = box % x_bars.shape[0]
    if r == 0:
        wait_for_load(x_bars, box, has_next)
    round_rows(x_ring, slot, part(r, TILE_P, STRIDE), box_rows(TILE_P, STRIDE), LAYOUT, num_warps)
    if r == 2:
        fence_async_shared()
        barrier()
