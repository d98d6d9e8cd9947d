"""3x3 convolution of stride 1 or 2 of channels_last images from tiles with a halo, for Hopper GPUs.

    y[n, p, q, k] = relu(bias[k] + residual[n, p, q, k] + scale[k]
                         * sum over r, s, c of x[n, p * stride + r - 1, q * stride + s - 1, c] * weight[k, r, s, c])

A tile is TILE_P rows x TILE_Q columns of TILE_N images. For each block of channels the copy engine brings the rows
under it and one more on either side three times, shifted by a column each time; what lies outside an image it fills
with zeros. The filter's rows are slices of the same box in shared memory, as a row, of all the images, is a multiple of
the 1024 bytes after which the swizzle repeats: a tile reads 3 (TILE_P + 2) rows of x from L2, where nine taps would
each read TILE_P. With stride 2 a box has of every other column the odd rows, which two rows of the filter share, and
then the even ones: 3 (2 TILE_P + 1) rows. Programs are persistent: while a box is multiplied the next ones arrive,
those of the next tile as well.
"""

import functools

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arithmetic import round_to_tf32
from .block_sizes import HaloBlocks, ceil_div
from .dependent_launch import dependent_launch, wait_for_predecessor
from .launch_plan import launch
from .product import Product
from .verified import gluon_is_verified


@gluon.constexpr_function
def box_rows(tile_p: int, stride: int) -> int:
    """The rows of x in a box for tile_p rows of y."""
    return stride * tile_p + edge_rows(stride)


@gluon.constexpr_function
def edge_rows(stride: int) -> int:
    """Those of them that are brought apart, as the sides of what the copy engine brings are powers of 2."""
    return 3 - stride


@gluon.constexpr_function
def first_row(r: int, tile_p: int, stride: int) -> int:
    """Where in a box the tile_p rows under the filter's row r begin."""
    return r if stride == 1 else (0, tile_p + 1, 1)[r]


@gluon.constexpr_function
def part(i: int, tile_p: int, stride: int) -> tuple[int, int]:
    """The first and the number of the rows that are a box's part i of three: two alike, powers of 2, and the edge."""
    if i == 2:
        return tile_p, edge_rows(stride)
    rows = stride * tile_p // 2
    return (i * rows if stride == 1 else i * (tile_p + 1)), rows


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
def rows_of(x_ring, slot, FIRST: gl.constexpr, ROWS: gl.constexpr, BOX_ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """[ROWS * TILE_N * TILE_Q, BLOCK_K]: the rows of a box from FIRST on."""
    ROW: gl.constexpr = x_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    row = x_ring.index(slot * BOX_ROWS + FIRST)
    return row._reinterpret(x_ring.dtype, [ROWS * ROW, BLOCK_K], LAYOUT)


@gluon.jit
def fetch_box(
    x_desc,
    edge_desc,
    x_ring,
    x_bars,
    slot,
    tile,
    tiles,
    tiles_p,
    tiles_q,
    box,
    BLOCKS_N: gl.constexpr,
    C: gl.constexpr,
    STRIDE: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_P: gl.constexpr,
    TILE_Q: gl.constexpr,
):
    """Starts to bring a tile's box of that number into a slot, unless there is no such tile."""
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    EDGE: gl.constexpr = edge_rows(STRIDE)
    n, p, q, _ = place_of(tile, tiles_p, tiles_q, BLOCKS_N, TILE_N, TILE_P, TILE_Q)
    # The filter's column s lies STRIDE * q + s - 1 columns right of x's first.
    column = box % 3 + STRIDE - 1
    q += column // STRIDE - 1
    c = column % STRIDE * C + box // 3 * BLOCK_K
    pred = tile < tiles
    bar = x_bars.index(slot)
    row = slot * box_rows(TILE_P, STRIDE)
    rows = x_ring.index(row)._reinterpret(x_ring.dtype, [TILE_P, 1, TILE_N, TILE_Q, BLOCK_K], x_desc.layout)
    edge = x_ring.index(row + TILE_P)._reinterpret(x_ring.dtype, [EDGE, 1, TILE_N, TILE_Q, BLOCK_K], edge_desc.layout)
    mbarrier.expect(bar, STRIDE * x_desc.block_type.nbytes + edge_desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(x_desc, [p - 1, STRIDE - 1, n, q, c], bar, rows, pred=pred)
    tma.async_copy_global_to_shared(edge_desc, [p - 1 + TILE_P, STRIDE - 1, n, q, c], bar, edge, pred=pred)
    if STRIDE == 2:
        even = x_ring.index(row + TILE_P + 1)
        even = even._reinterpret(x_ring.dtype, [TILE_P, 1, TILE_N, TILE_Q, BLOCK_K], x_desc.layout)
        tma.async_copy_global_to_shared(x_desc, [p, 0, n, q, c], bar, even, pred=pred)


@gluon.jit
def fetch_weight(weight_desc, w_ring, w_bars, slot, tile, tiles, step, BLOCKS_N: gl.constexpr, C: gl.constexpr):
    """Starts to bring the weight of a tile's step of that number into a slot, unless there is no such tile."""
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = w_ring.shape[2]
    c = (step % 3 * 3 + step // 3 % 3) * C + step // 9 * BLOCK_K
    pred = tile < tiles
    bar = w_bars.index(slot)
    mbarrier.expect(bar, weight_desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(weight_desc, [tile % BLOCKS_N * BLOCK_N, c], bar, w_ring.index(slot), pred=pred)


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
    gl.thread_barrier()


@gluon.jit
def round_rows(x_ring, slot, PART: gl.constexpr, BOX_ROWS: gl.constexpr, LAYOUT: gl.constexpr, num_warps: gl.constexpr):
    """Rounds part of a box to TF32 where it lies; for the tensor cores to see it takes a fence and a barrier."""
    spread: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [num_warps, 1], [1, 0])
    rows = rows_of(x_ring, slot, PART[0], PART[1], BOX_ROWS, LAYOUT)
    rows.store(round_to_tf32(rows.load(spread)))


@gluon.jit
def halves_of(acc, RUN: gl.constexpr):
    """Every other RUN of columns, and those between."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    runs = acc.reshape([BLOCK_N, BLOCK_M // (2 * RUN), 2, RUN]).permute([0, 1, 3, 2])
    first, second = gl.split(runs)
    return first.reshape([BLOCK_N, BLOCK_M // 2]), second.reshape([BLOCK_N, BLOCK_M // 2])


@gluon.jit
def pixel_of(m, P, Q, TILE_N: gl.constexpr, TILE_Q: gl.constexpr):
    """Where in images of P x Q pixels, from the tile's first on, those of number m in the tile are."""
    return (m // TILE_Q % TILE_N * P + m // (TILE_N * TILE_Q)) * Q + m % TILE_Q


@gluon.jit
def store_pixels(
    acc,
    residual_ptr,
    y_ptr,
    n,
    p,
    q,
    N,
    P,
    Q,
    K: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    RELU: gl.constexpr,
    ROUND_Y: gl.constexpr,
    WHOLE: gl.constexpr,
    MASKED: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_P: gl.constexpr,
    TILE_Q: gl.constexpr,
    RUN: gl.constexpr,
    FIRST: gl.constexpr,
):
    """acc [channels, pixels] to y: every other RUN of pixels, from FIRST on, of the tile at (n, p, q) and at y_ptr."""
    ACC: gl.constexpr = acc.type.layout
    columns = gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))
    offs_m = FIRST + columns // RUN * (2 * RUN) + columns % RUN
    offs_n = gl.arange(0, acc.shape[0], gl.SliceLayout(1, ACC))
    if TILE_N == 1:
        offs_p, offs_q = offs_m // TILE_Q, offs_m % TILE_Q
        offs_pixel = offs_m if WHOLE else offs_p * Q + offs_q
        inside = (p + offs_p < P) & (q + offs_q < Q)
    else:
        # Of each 8 pixels the first, known to the compiler, and apart from it the place among them, which is a lane's.
        first, lane = offs_m // 8 * 8, offs_m % 8
        rows, columns = (TILE_P, TILE_Q) if WHOLE else (P, Q)
        offs_pixel = pixel_of(first, rows, columns, TILE_N, TILE_Q) + pixel_of(lane, rows, columns, TILE_N, TILE_Q)
        inside = offs_m // TILE_Q % TILE_N < N - n
        if not WHOLE:
            inside &= (offs_m // (TILE_N * TILE_Q) < P - p) & (offs_m % TILE_Q < Q - q)
    offs = gl.expand_dims(offs_pixel * K, 0) + gl.expand_dims(offs_n, 1)
    mask = gl.expand_dims(inside, 0) if MASKED else None
    if HAS_RESIDUAL:
        acc += gl.load(residual_ptr + offs, mask=mask, other=0.0 if MASKED else None).to(gl.float32)
    if RELU:
        acc = gl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ROUND_Y:
        acc = round_to_tf32(acc)
    gl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def start_successor_if(condition):
    """See dependent_launch.py. Around a branch the compiler would spill 720 bytes of a thread's sums."""
    asm: gl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p griddepcontrol.launch_dependents; mov.b32 $0, 0; }"
    gl.inline_asm_elementwise(asm, "=r,r", [condition.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def halo_gemm_forward_kernel(
    x_desc,
    edge_desc,
    weight_desc,
    scale_ptr,
    bias_ptr,
    residual_desc,
    y_desc,
    N,
    P,
    Q,
    tiles,
    tiles_p,
    tiles_q,
    C: gl.constexpr,
    K: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    RELU: gl.constexpr,
    ROUND_Y: gl.constexpr,
    DEPENDENT: gl.constexpr,
    ROUND_X: gl.constexpr,
    ROUND_AHEAD: gl.constexpr,
    WHOLE: gl.constexpr,
    MASKED: gl.constexpr,
    STRIDE: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_P: gl.constexpr,
    TILE_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    X_SLOTS: gl.constexpr,
    W_SLOTS: gl.constexpr,
    STAGED: gl.constexpr,
    IN_SLOT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A program owns every num_programs-th tile of BLOCK_M = TILE_N * TILE_P * TILE_Q pixels x BLOCK_N channels.

    acc [channels, pixels] = weight @ x.T, both in shared memory. Step t of a tile is the filter's row t % 3 of box
    t // 3; box b is the filter's column b % 3 and the block b // 3 of the channels. With W_SLOTS for every step the
    weight is brought once: the programs are a multiple of the blocks of channels, so that each keeps to one. The
    descriptors of images have the dimensions [rows, images, columns, channels], and in this order are a tile's pixels;
    x's are [H / STRIDE, STRIDE, N, W / STRIDE, STRIDE * C], in which a tap picks which of the STRIDE rows and columns.
    y_desc and residual_desc are pointers unless y is STAGED. WHOLE: a tile is as wide as the image and, if it is of
    several images, as high; unless it is MASKED, it lies inside. ROUND_AHEAD: a box is rounded in three parts, one
    beside each step of the box before it, and not as a whole beside the last of them, which it would outlast.
    """
    BOX_ROWS: gl.constexpr = box_rows(TILE_P, STRIDE)
    BLOCK_M: gl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_N: gl.constexpr = K // BLOCK_N
    BOXES: gl.constexpr = 3 * (C // BLOCK_K)
    STEPS: gl.constexpr = 3 * BOXES
    RESIDENT: gl.constexpr = W_SLOTS >= STEPS
    DTYPE: gl.constexpr = x_desc.dtype
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, BITS, 2)
    WARPS_M: gl.constexpr = num_warps if BLOCK_N >= 16 * num_warps else BLOCK_N // 16
    WARPS_N: gl.constexpr = num_warps // WARPS_M
    INSTRUCTION_N: gl.constexpr = BLOCK_M // WARPS_N if BLOCK_M // WARPS_N < 256 else 256
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS_M, WARPS_N], instr_shape=[16, INSTRUCTION_N, 256 // BITS]
    )

    x_ring = gl.allocate_shared_memory(DTYPE, [X_SLOTS * BOX_ROWS, TILE_N * TILE_Q, BLOCK_K], LINES)
    w_ring = gl.allocate_shared_memory(DTYPE, [W_SLOTS, BLOCK_N, BLOCK_K], LINES)
    x_bars = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    w_bars = gl.allocate_shared_memory(gl.int64, [W_SLOTS, 1], mbarrier.MBarrierLayout())
    residual_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if STAGED and not IN_SLOT:
        y_stage = gl.allocate_shared_memory(DTYPE, [TILE_P, TILE_N, TILE_Q, BLOCK_N], y_desc.layout)
    for i in gl.static_range(X_SLOTS):
        mbarrier.init(x_bars.index(i), count=1)
    for i in gl.static_range(W_SLOTS):
        mbarrier.init(w_bars.index(i), count=1)
    mbarrier.init(residual_bar, count=1)
    fence_async_shared()
    gl.thread_barrier()

    wait_for_predecessor(DEPENDENT)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    for early in gl.static_range(X_SLOTS - 1):
        fetch_box(
            x_desc,
            edge_desc,
            x_ring,
            x_bars,
            early,
            first + early // BOXES * programs,
            tiles,
            tiles_p,
            tiles_q,
            early % BOXES,
            BLOCKS_N,
            C,
            STRIDE,
            TILE_N,
            TILE_P,
            TILE_Q,
        )
    for early in gl.static_range(STEPS if RESIDENT else W_SLOTS - 1):
        fetch_weight(
            weight_desc,
            w_ring,
            w_bars,
            early,
            first + early // STEPS * programs,
            tiles,
            early % STEPS,
            BLOCKS_N,
            C,
        )
    if ROUND_X:
        mbarrier.wait(x_bars.index(0), 0)
        round_box(x_ring, 0, STRIDE, TILE_P, LINES, num_warps)

    box = 0  # boxes and steps that this program has begun
    step = 0
    count = 0
    for tile in range(first, tiles, programs):
        n, p, q, block = place_of(tile, tiles_p, tiles_q, BLOCKS_N, TILE_N, TILE_P, TILE_Q)
        k = block * BLOCK_N
        if HAS_RESIDUAL and STAGED and not IN_SLOT:
            tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.expect(residual_bar, y_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(residual_desc, [p, n, q, k], residual_bar, y_stage)

        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
        for block_c in range(C // BLOCK_K):
            for s in gl.static_range(3):
                slot = box % X_SLOTS
                if not ROUND_X:
                    mbarrier.wait(x_bars.index(slot), box // X_SLOTS & 1)
                for r in gl.static_range(3):
                    if RESIDENT:
                        w_slot = block_c * 9 + 3 * s + r
                        mbarrier.wait(w_bars.index(w_slot), 0)
                    else:
                        w_slot = step % W_SLOTS
                        mbarrier.wait(w_bars.index(w_slot), step // W_SLOTS & 1)
                    x = rows_of(x_ring, slot, first_row(r, TILE_P, STRIDE), TILE_P, BOX_ROWS, LINES)
                    use_acc = True if s + r > 0 else block_c > 0
                    acc = warpgroup_mma(w_ring.index(w_slot), x.permute([1, 0]), acc, use_acc=use_acc, is_async=True)
                    if r == 0 or not RESIDENT:
                        # All but this step's products are done: what they read can be overwritten.
                        acc = warpgroup_mma_wait(1, deps=[acc])
                        if IN_SLOT and s + r == 0:
                            tma.store_wait(0)
                        gl.thread_barrier()
                    elif r == 2:
                        acc = warpgroup_mma_wait(3, deps=[acc])  # waits for nothing: a loop carries only tensors
                    if r == 0:
                        box_next = block_c * 3 + s + X_SLOTS - 1
                        fetch_box(
                            x_desc,
                            edge_desc,
                            x_ring,
                            x_bars,
                            (box + X_SLOTS - 1) % X_SLOTS,
                            tile + box_next // BOXES * programs,
                            tiles,
                            tiles_p,
                            tiles_q,
                            box_next % BOXES,
                            BLOCKS_N,
                            C,
                            STRIDE,
                            TILE_N,
                            TILE_P,
                            TILE_Q,
                        )
                    if not RESIDENT:
                        step_next = block_c * 9 + 3 * s + r + W_SLOTS - 1
                        fetch_weight(
                            weight_desc,
                            w_ring,
                            w_bars,
                            (step + W_SLOTS - 1) % W_SLOTS,
                            tile + step_next // STEPS * programs,
                            tiles,
                            step_next % STEPS,
                            BLOCKS_N,
                            C,
                        )
                    if ROUND_AHEAD:
                        slot_next = (box + 1) % X_SLOTS
                        if r == 0:
                            has_next = (tile + (block_c * 3 + s + 1) // BOXES * programs) < tiles
                            mbarrier.wait(x_bars.index(slot_next), (box + 1) // X_SLOTS & 1, pred=has_next)
                        round_rows(x_ring, slot_next, part(r, TILE_P, STRIDE), BOX_ROWS, LINES, num_warps)
                        if r == 2:
                            fence_async_shared()
                            gl.thread_barrier()
                    step += 1
                box += 1
                if ROUND_X and not ROUND_AHEAD:
                    slot_next = box % X_SLOTS
                    has_next = (tile + (block_c * 3 + s + 1) // BOXES * programs) < tiles
                    mbarrier.wait(x_bars.index(slot_next), box // X_SLOTS & 1, pred=has_next)
                    round_box(x_ring, slot_next, STRIDE, TILE_P, LINES, num_warps)
        if DEPENDENT:
            start_successor_if(tile + programs >= tiles)
        acc = warpgroup_mma_wait(0, deps=[acc])

        offs_n = k + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ACC))
        if HAS_SCALE:
            acc *= gl.expand_dims(gl.load(scale_ptr + offs_n), 1).to(gl.float32)
        if HAS_BIAS:
            acc += gl.expand_dims(gl.load(bias_ptr + offs_n), 1).to(gl.float32)
        if STAGED:
            if IN_SLOT:
                gl.thread_barrier()  # every warp has read the last box
                y_box = x_ring.index((box + X_SLOTS - 1) % X_SLOTS * BOX_ROWS)._reinterpret(
                    DTYPE, [TILE_P, TILE_N, TILE_Q, BLOCK_N], y_desc.layout
                )
                if HAS_RESIDUAL:
                    mbarrier.expect(residual_bar, y_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(residual_desc, [p, n, q, k], residual_bar, y_box)
            else:
                y_box = y_stage
                if not HAS_RESIDUAL:
                    tma.store_wait(0)
                    gl.thread_barrier()
            y_lines = y_box.reshape([BLOCK_M, BLOCK_N]).permute([1, 0])
            if HAS_RESIDUAL:
                mbarrier.wait(residual_bar, count & 1)
                acc += y_lines.load(ACC).to(gl.float32)
            if RELU:
                acc = gl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if ROUND_Y:
                acc = round_to_tf32(acc)
            y_lines.store(acc.to(DTYPE))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(y_desc, [p, n, q, k], y_box)
        else:
            start = (n.to(gl.int64) * P * Q + p * Q + q) * K + k
            y_ptr = y_desc + start
            residual_ptr = residual_desc + start if HAS_RESIDUAL else y_ptr
            # With a residual in two parts: the whole of it would not fit the registers beside the sums.
            PARTS: gl.constexpr = 2 if HAS_RESIDUAL else 1
            RUN: gl.constexpr = INSTRUCTION_N // 2 if HAS_RESIDUAL else BLOCK_M
            parts = halves_of(acc, RUN) if HAS_RESIDUAL else (acc,)
            for i in gl.static_range(PARTS):
                store_pixels(
                    parts[i],
                    residual_ptr,
                    y_ptr,
                    n,
                    p,
                    q,
                    N,
                    P,
                    Q,
                    K,
                    HAS_RESIDUAL,
                    RELU,
                    ROUND_Y,
                    WHOLE,
                    MASKED,
                    TILE_N,
                    TILE_P,
                    TILE_Q,
                    RUN,
                    FIRST=i * RUN,
                )
        count += 1
    if STAGED:
        tma.store_wait(0)


def rounds_ahead(blocks: HaloBlocks) -> bool:
    """Whether x is rounded a box earlier than it has to be; the box after that arrives meanwhile, in a third slot.

    Measured on an H200, 1,024 images: 128 channels at 16x16 211 us for 227, 256 at 8x8 198 for 221; 256 channels at a
    time 234 for 211, as rounding then competes with more products.
    """
    return blocks.X_SLOTS > 2 and blocks.TILE_P > 1 and blocks.BLOCK_N <= 128


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fits_halo(
    x: torch.Tensor,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Whether this kernel takes x [N, C, H, W], once it is channels_last, and was verified here.

    A 3x3 filter over every pixel or, in images of even sides, every other; whole lines of 128 bytes of x's channels.
    """
    _, C, H, W = x.shape
    window = *kernel_size, *padding, *dilation, groups
    if window != (3, 3, 1, 1, 1, 1, 1) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if tuple(stride) not in ((1, 1), (2, 2)) or H % stride[0] != 0 or W % stride[0] != 0:
        return False
    if C * x.element_size() % 128 != 0 or out_channels % 64 != 0 or H * W * max(C, out_channels) >= 2**31:
        return False
    return gluon_is_verified(x.device)


def are_halo_blocks(blocks: HaloBlocks, output: torch.Size, C: int, stride: int, element_size: int) -> bool:
    """Whether the kernel can be compiled with them for y [N, K, P, Q], shared memory and registers permitting."""
    _, K, P, Q = output
    line = 128 // element_size
    staging = blocks.STAGED or not blocks.IN_SLOT
    # y's box is then in one of x's
    in_slot = not blocks.IN_SLOT or blocks.TILE_P * blocks.BLOCK_N <= box_rows(blocks.TILE_P, stride) * line
    slots = min(blocks.X_SLOTS, blocks.W_SLOTS) >= 2  # one is read while the next is filled
    divided = C % blocks.BLOCK_K == 0 and K % blocks.BLOCK_N == 0 and blocks.BLOCK_N % 64 == 0
    row = blocks.TILE_N * blocks.TILE_Q
    tile = row >= 8 and blocks.TILE_P * row >= 64 and blocks.num_warps >= 4  # the swizzle repeats after 8 lines
    indexed = blocks.TILE_N * P * Q * K < 2**31  # within a tile
    return blocks.BLOCK_K == line and staging and in_slot and slots and divided and tile and indexed


def _rows(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x [N, C, H, W], channels_last, as [H / stride, stride, N, W / stride, stride * C].

    In this order a box in shared memory has together what its images have of a row. With the strides of these sizes,
    even where one is 1.
    """
    N, C, H, W = x.shape
    sizes = H // stride, stride, N, W // stride, stride * C
    return x.as_strided(sizes, (stride * W * C, W * C, H * W * C, stride * C, 1))


@functools.lru_cache
def _layout(bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, bits, rank)


def _descriptor(x: torch.Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, box, _layout(8 * x.element_size(), len(box)))


def halo_gemm(product: Product, blocks: HaloBlocks) -> None:
    """A 3x3 filter of channels_last images (`fits_halo`), float32 in TF32."""
    x, weight, y, round_x, epilogue = product.x, product.packed, product.y, product.round_x, product.epilogue
    N, C, _, _ = x.shape
    K, P, Q = y.shape[1:]
    tile_n, tile_p, tile_q, block_n, block_k = blocks[:5]
    stride = product.stride[0]
    rows = _rows(x, stride)
    y_desc, residual_desc = y, epilogue.residual
    if blocks.STAGED:
        y_box = [tile_p, tile_n, tile_q, block_n]
        y_desc = _descriptor(_rows(y, 1)[:, 0], y_box)
        residual_desc = y_desc if epilogue.residual is None else _descriptor(_rows(epilogue.residual, 1)[:, 0], y_box)
    tiles_p, tiles_q, blocks_n = ceil_div(P, tile_p), ceil_div(Q, tile_q), K // block_n
    tiles = ceil_div(N, tile_n) * tiles_p * tiles_q * blocks_n
    options = blocks._asdict()
    programs = min(tiles, options.pop("PROGRAMS") * multiprocessors(x.device))
    programs = max(programs - programs % blocks_n, blocks_n)
    launch(
        halo_gemm_forward_kernel,
        (programs,),
        _descriptor(rows, [tile_p, 1, tile_n, tile_q, block_k]),
        _descriptor(rows, [edge_rows(stride), 1, tile_n, tile_q, block_k]),
        _descriptor(weight.view(K, -1), [block_n, block_k]),
        epilogue.scale,
        epilogue.bias,
        residual_desc,
        y_desc,
        N if tile_n > 1 else None,  # where it counts for nothing, it asks for no compilation of its own
        P,
        Q,
        tiles,
        tiles_p,
        tiles_q,
        C,
        K,
        **epilogue.flags,
        **dependent_launch(x),
        ROUND_X=round_x,
        ROUND_AHEAD=round_x and rounds_ahead(blocks),
        WHOLE=Q == tile_q and (tile_n == 1 or P == tile_p),
        MASKED=N % tile_n != 0 or P % tile_p != 0 or Q % tile_q != 0,
        STRIDE=stride,
        **options,
    )
