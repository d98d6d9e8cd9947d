"""The kernel of the form with a halo: a persistent loop over tiles, whose stages are in pipeline.py and store.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .....device.dependent_launch import wait_for_predecessor
from .....device.gluon_versions import allocate_ring, barrier, barrier_before_expect, pinned, ring_view
from .geometry import box_rows, first_row
from .pipeline import (
    expand_weight,
    fetch_next_box,
    fetch_next_weight,
    fill_rings,
    place_of,
    round_next_box,
    round_part_of_next_box,
    rows_of,
    wait_for_load,
    wait_for_weight,
)
from .store import fetch_residual, scaled, store_from_registers, store_staged, wait_for_stores


@gluon.jit
def start_successor_if(condition):
    """See device/dependent_launch.py. Around a branch the compiler would spill 720 bytes of a thread's sums."""
    asm: gl.constexpr = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p griddepcontrol.launch_dependents; mov.b32 $0, 0; }"
    gl.inline_asm_elementwise(asm, "=r,r", [condition.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def conv2d_tma_halo_forward_kernel(
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
    DEPTH: gl.constexpr,
    GROUP_C: gl.constexpr,
    GROUP_K: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
    ROUND_Y: gl.constexpr,
    DEPENDENT: gl.constexpr,
    ROUND_X: gl.constexpr,
    ROUND_AHEAD: gl.constexpr,
    WHOLE: gl.constexpr,
    MASKED: gl.constexpr,
    STRIDE: gl.constexpr,
    PADDING_H: gl.constexpr,
    PADDING_W: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    EXPAND: gl.constexpr,
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
    weight is loaded once: the programs are a multiple of the blocks of channels, so that each keeps to one. The
    descriptors of images have the dimensions [rows, images, columns, channels], and in this order are a tile's pixels;
    x's are [H / STRIDE, STRIDE, N, W / STRIDE, STRIDE * C], in which a tap picks which of the STRIDE rows and columns.
    y_desc and residual_desc are pointers unless y is STAGED, which it can be in CHANNELS_LAST only. WHOLE: a tile is as
    wide as the image and, if it is of several images, as high; unless it is MASKED, it lies inside. ROUND_AHEAD: a box
    is rounded in three parts, one beside each step of the box before it, and not as a whole beside the last of them,
    which it would outlast. Of GROUP_C channels of x come GROUP_K of y; with several groups a block of y's channels
    reads DEPTH channels of x, from those of its first group on, and the weight [K, 9, DEPTH] is zero where they belong
    to others. To EXPAND, all of it stays in shared memory and is put there by the program, from [K, 9, GROUP_C] at the
    pointer weight_desc.
    """
    BOX_ROWS: gl.constexpr = box_rows(TILE_P, STRIDE)
    BLOCK_M: gl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_N: gl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCKS_C: gl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    BOXES: gl.constexpr = 3 * BLOCKS_C
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

    x_ring = allocate_ring(DTYPE, X_SLOTS, BOX_ROWS, TILE_N * TILE_Q, BLOCK_K, LINES)
    w_ring = gl.allocate_shared_memory(DTYPE, [W_SLOTS, BLOCK_N, 1, BLOCK_K], gl.NVMMASharedLayout(128, BITS, 3))
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
    barrier()

    images = (x_desc, edge_desc, x_ring, x_bars)
    weights = (weight_desc, w_ring, w_bars)
    grid = (tiles, tiles_p, tiles_q)
    TILE: gl.constexpr = (TILE_N, TILE_P, TILE_Q)
    CHANNELS: gl.constexpr = (C, K, GROUP_C, GROUP_K)
    PADDING: gl.constexpr = (PADDING_H, PADDING_W)

    wait_for_predecessor(DEPENDENT)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    if EXPAND:
        expand_weight(weight_desc, w_ring, first % BLOCKS_N * BLOCK_N, K, GROUP_C, GROUP_K, num_warps)
    X_LOADS: gl.constexpr = X_SLOTS - 1
    W_LOADS: gl.constexpr = 0 if EXPAND else STEPS if RESIDENT else W_SLOTS - 1
    fill_rings(
        images,
        weights,
        first,
        programs,
        grid,
        BOXES,
        X_LOADS,
        W_LOADS,
        BLOCKS_N,
        CHANNELS,
        STRIDE,
        PADDING,
        TILE,
        BLOCK_N,
    )
    if ROUND_X:
        round_next_box(x_ring, x_bars, 0, True, STRIDE, TILE_P, LINES, num_warps)

    box = 0  # boxes and steps that this program has begun
    step = 0
    count = 0
    for tile in range(first, tiles, programs):
        n, p, q, block = place_of(tile, tiles_p, tiles_q, BLOCKS_N, TILE_N, TILE_P, TILE_Q)
        k = block * BLOCK_N
        if HAS_RESIDUAL and STAGED and not IN_SLOT:
            wait_for_stores()
            fetch_residual(residual_desc, residual_bar, y_stage, n, p, q, k)

        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
        for block_c in range(BLOCKS_C):
            for s in gl.static_range(3):
                slot = pinned(box) % X_SLOTS
                if not ROUND_X:
                    wait_for_load(x_bars, box)
                for r in gl.static_range(3):
                    w_slot = wait_for_weight(w_bars, step, block_c, 3 * s + r, RESIDENT, EXPAND)
                    x = rows_of(x_ring, slot, first_row(r, TILE_P, STRIDE), TILE_P, BOX_ROWS, LINES)
                    use_acc = True if s + r > 0 else block_c > 0
                    weight = w_ring.index(w_slot).reshape([BLOCK_N, BLOCK_K])
                    acc = warpgroup_mma(weight, x.permute([1, 0]), acc, use_acc=use_acc, is_async=True)
                    if r == 0 or not RESIDENT:
                        # All but this step's products are done: what they read can be overwritten.
                        acc = warpgroup_mma_wait(1, deps=[acc])
                        if IN_SLOT and s + r == 0:
                            tma.store_wait(0)
                        barrier_before_expect()
                    elif r == 2:
                        acc = warpgroup_mma_wait(3, deps=[acc])  # waits for nothing: a loop carries only tensors
                    if r == 0:
                        fetch_next_box(
                            images,
                            box,
                            tile,
                            block_c,
                            s,
                            programs,
                            grid,
                            BOXES,
                            BLOCKS_N,
                            CHANNELS,
                            STRIDE,
                            PADDING,
                            TILE,
                            BLOCK_N,
                        )
                    if not RESIDENT:
                        fetch_next_weight(weights, step, tile, block_c, 3 * s + r, programs, tiles, STEPS, BLOCKS_N)
                    if ROUND_AHEAD:
                        has_next = tile + (block_c * 3 + s + 1) // BOXES * programs < tiles
                        round_part_of_next_box(x_ring, x_bars, box + 1, has_next, r, STRIDE, TILE_P, LINES, num_warps)
                    step += 1
                box += 1
                if ROUND_X and not ROUND_AHEAD:
                    has_next = tile + (block_c * 3 + s + 1) // BOXES * programs < tiles
                    round_next_box(x_ring, x_bars, box, has_next, STRIDE, TILE_P, LINES, num_warps)
        if DEPENDENT:
            start_successor_if(tile + programs >= tiles)
        acc = warpgroup_mma_wait(0, deps=[acc])

        acc = scaled(acc, scale_ptr, bias_ptr, k, K, HAS_SCALE, HAS_BIAS)
        if STAGED:
            if IN_SLOT:
                barrier()  # every warp has read the last box
                Y_BOX: gl.constexpr = [TILE_P, TILE_N, TILE_Q, BLOCK_N]
                Y_LAYOUT: gl.constexpr = y_desc.layout
                y_box = ring_view(x_ring, (box + X_SLOTS - 1) % X_SLOTS, 0, BOX_ROWS, Y_BOX, Y_LAYOUT)
                if HAS_RESIDUAL:
                    fetch_residual(residual_desc, residual_bar, y_box, n, p, q, k)
            else:
                y_box = y_stage
                if not HAS_RESIDUAL:
                    wait_for_stores()
            phase = count & 1
            store_staged(acc, y_box, residual_bar, phase, y_desc, n, p, q, k, HAS_RESIDUAL, ACTIVATION, SLOPE, ROUND_Y)
        else:
            store_from_registers(
                acc,
                residual_desc,
                y_desc,
                n,
                p,
                q,
                k,
                N,
                P,
                Q,
                K,
                CHANNELS_LAST,
                HAS_RESIDUAL,
                ACTIVATION,
                SLOPE,
                ROUND_Y,
                WHOLE,
                MASKED,
                TILE_N,
                TILE_P,
                TILE_Q,
                INSTRUCTION_N,
            )
        count += 1
    if STAGED:
        tma.store_wait(0)
