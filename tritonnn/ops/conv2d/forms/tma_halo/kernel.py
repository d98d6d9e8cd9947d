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
from .....device.gluon_versions import allocate_ring, barrier, load_box, of_any_size, ring_view
from .geometry import box_rows, first_row, part
from .pipeline import expand_weight, fetch_box, fetch_weight, fill_rings, place_of, round_box, round_rows, rows_of
from .store import store_from_registers, store_staged


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

    wait_for_predecessor(DEPENDENT)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    if EXPAND:
        expand_weight(weight_desc, w_ring, first % BLOCKS_N * BLOCK_N, K, GROUP_C, GROUP_K, num_warps)
    fill_rings(
        x_desc,
        edge_desc,
        weight_desc,
        x_ring,
        x_bars,
        w_ring,
        w_bars,
        first,
        programs,
        tiles,
        tiles_p,
        tiles_q,
        BOXES,
        X_SLOTS - 1,
        0 if EXPAND else STEPS if RESIDENT else W_SLOTS - 1,
        BLOCKS_N,
        C,
        K,
        GROUP_C,
        GROUP_K,
        STRIDE,
        TILE_N,
        TILE_P,
        TILE_Q,
        BLOCK_N,
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
            barrier()
            mbarrier.expect(residual_bar, y_desc.block_type.nbytes)
            load_box(residual_desc, [p, n, q, k], residual_bar, y_stage)

        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
        for block_c in range(BLOCKS_C):
            for s in gl.static_range(3):
                slot = box % X_SLOTS
                if not ROUND_X:
                    mbarrier.wait(x_bars.index(slot), box // X_SLOTS & 1)
                for r in gl.static_range(3):
                    if RESIDENT:
                        w_slot = block_c * 9 + 3 * s + r
                        if not EXPAND:
                            mbarrier.wait(w_bars.index(w_slot), 0)
                    else:
                        w_slot = step % W_SLOTS
                        mbarrier.wait(w_bars.index(w_slot), step // W_SLOTS & 1)
                    x = rows_of(x_ring, slot, first_row(r, TILE_P, STRIDE), TILE_P, BOX_ROWS, LINES)
                    use_acc = True if s + r > 0 else block_c > 0
                    weight = w_ring.index(w_slot).reshape([BLOCK_N, BLOCK_K])
                    acc = warpgroup_mma(weight, x.permute([1, 0]), acc, use_acc=use_acc, is_async=True)
                    if r == 0 or not RESIDENT:
                        # All but this step's products are done: what they read can be overwritten.
                        acc = warpgroup_mma_wait(1, deps=[acc])
                        if IN_SLOT and s + r == 0:
                            tma.store_wait(0)
                        barrier()
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
                            of_any_size(box_next % BOXES),
                            BLOCKS_N,
                            C,
                            K,
                            GROUP_C,
                            GROUP_K,
                            STRIDE,
                            TILE_N,
                            TILE_P,
                            TILE_Q,
                            BLOCK_N,
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
                            of_any_size(step_next % STEPS),
                            BLOCKS_N,
                        )
                    if ROUND_AHEAD:
                        slot_next = (box + 1) % X_SLOTS
                        if r == 0:
                            has_next = (tile + (block_c * 3 + s + 1) // BOXES * programs) < tiles
                            mbarrier.wait(x_bars.index(slot_next), (box + 1) // X_SLOTS & 1, pred=has_next)
                        round_rows(x_ring, slot_next, part(r, TILE_P, STRIDE), BOX_ROWS, LINES, num_warps)
                        if r == 2:
                            fence_async_shared()
                            barrier()
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
        mask_n = offs_n < K if K % BLOCK_N else None
        other = 0.0 if K % BLOCK_N else None
        if HAS_SCALE:
            acc *= gl.expand_dims(gl.load(scale_ptr + offs_n, mask=mask_n, other=other), 1).to(gl.float32)
        if HAS_BIAS:
            acc += gl.expand_dims(gl.load(bias_ptr + offs_n, mask=mask_n, other=other), 1).to(gl.float32)
        if STAGED:
            if IN_SLOT:
                barrier()  # every warp has read the last box
                Y_BOX: gl.constexpr = [TILE_P, TILE_N, TILE_Q, BLOCK_N]
                Y_LAYOUT: gl.constexpr = y_desc.layout
                y_box = ring_view(x_ring, (box + X_SLOTS - 1) % X_SLOTS, 0, BOX_ROWS, Y_BOX, Y_LAYOUT)
                if HAS_RESIDUAL:
                    mbarrier.expect(residual_bar, y_desc.block_type.nbytes)
                    load_box(residual_desc, [p, n, q, k], residual_bar, y_box)
            else:
                y_box = y_stage
                if not HAS_RESIDUAL:
                    tma.store_wait(0)
                    barrier()
            store_staged(
                acc,
                y_box,
                residual_bar,
                count & 1,
                y_desc,
                n,
                p,
                q,
                k,
                HAS_RESIDUAL,
                ACTIVATION,
                SLOPE,
                ROUND_Y,
            )
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
