"""The stage after the products: scale, bias, residual, activation, and the store of y.

y is stored from registers, or by TMA from shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .....device.epilogue import finish
from .....device.gluon_versions import barrier, load_box, store_box


@gluon.jit
def scaled(acc, scale_ptr, bias_ptr, k, K: gl.constexpr, HAS_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """scale * acc + bias, as much of it as there is, of acc [channels, pixels] from channel k on."""
    offs_n = k + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    mask_n = offs_n < K if K % acc.shape[0] else None
    other = 0.0 if K % acc.shape[0] else None
    if HAS_SCALE:
        acc *= gl.expand_dims(gl.load(scale_ptr + offs_n, mask=mask_n, other=other), 1).to(gl.float32)
    if HAS_BIAS:
        acc += gl.expand_dims(gl.load(bias_ptr + offs_n, mask=mask_n, other=other), 1).to(gl.float32)
    return acc


@gluon.jit
def wait_for_stores():
    """Waits, with all threads, until the stores by TMA have read what they store: it may be overwritten then."""
    tma.store_wait(0)
    barrier()


@gluon.jit
def fetch_residual(residual_desc, residual_bar, box, n, p, q, k):
    """Starts to load the residual of the tile at (n, p, q) and channel k."""
    mbarrier.expect(residual_bar, residual_desc.block_type.nbytes)
    load_box(residual_desc, [p, n, q, k], residual_bar, box)


@gluon.jit
def halves_of(acc, RUN: gl.constexpr):
    """Every other RUN of columns, and those between."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    runs = acc.reshape([BLOCK_N, BLOCK_M // (2 * RUN), 2, RUN]).permute([0, 1, 3, 2])
    first, second = gl.split(runs)
    return first.reshape([BLOCK_N, BLOCK_M // 2]), second.reshape([BLOCK_N, BLOCK_M // 2])


@gluon.jit
def pixel_of(m, P, Q, IMAGES: gl.constexpr, TILE_N: gl.constexpr, TILE_Q: gl.constexpr):
    """Where in images of P x Q pixels, from the tile's first on, those of number m in the tile are.

    An image is as far from the next as IMAGES of one channel are large.
    """
    return (m // TILE_Q % TILE_N * (IMAGES * P) + m // (TILE_N * TILE_Q)) * Q + m % TILE_Q


@gluon.jit
def store_pixels(
    acc,
    residual_ptr,
    y_ptr,
    n,
    p,
    q,
    k,
    N,
    P,
    Q,
    K: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
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
        IMAGES: gl.constexpr = 1 if CHANNELS_LAST else K
        offs_pixel = pixel_of(first, rows, columns, IMAGES, TILE_N, TILE_Q)
        offs_pixel += pixel_of(lane, rows, columns, IMAGES, TILE_N, TILE_Q)
        inside = offs_m // TILE_Q % TILE_N < N - n
        if not WHOLE:
            inside &= (offs_m // (TILE_N * TILE_Q) < P - p) & (offs_m % TILE_Q < Q - q)
    if CHANNELS_LAST:
        offs = gl.expand_dims(offs_pixel * K, 0) + gl.expand_dims(offs_n, 1)
    else:
        offs = gl.expand_dims(offs_pixel, 0) + gl.expand_dims(offs_n * (P * Q), 1)
    ENDS: gl.constexpr = K % acc.shape[0] != 0  # within the last block of channels
    mask = None
    if MASKED and ENDS:
        mask = gl.expand_dims(inside, 0) & gl.expand_dims(offs_n < K - k, 1)
    elif MASKED:
        mask = gl.expand_dims(inside, 0)
    elif ENDS:
        mask = gl.expand_dims(offs_n < K - k, 1)
    if HAS_RESIDUAL:
        acc += gl.load(residual_ptr + offs, mask=mask, other=0.0 if MASKED or ENDS else None).to(gl.float32)
    acc = finish(acc, ACTIVATION, SLOPE, ROUND_Y)
    gl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def store_from_registers(
    acc,
    residual_ptr,
    y_ptr,
    n,
    p,
    q,
    k,
    N,
    P,
    Q,
    K: gl.constexpr,
    CHANNELS_LAST: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
    ROUND_Y: gl.constexpr,
    WHOLE: gl.constexpr,
    MASKED: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_P: gl.constexpr,
    TILE_Q: gl.constexpr,
    INSTRUCTION_N: gl.constexpr,
):
    """acc [channels, pixels] to y, the tile at (n, p, q) and channel k.

    With a residual in two parts: the whole of it would not fit the registers beside the sums.
    """
    if CHANNELS_LAST:
        start = (n.to(gl.int64) * P * Q + p * Q + q) * K + k
    else:
        start = (n.to(gl.int64) * K + k) * P * Q + p * Q + q
    y_ptr += start
    residual_ptr = residual_ptr + start if HAS_RESIDUAL else y_ptr
    PARTS: gl.constexpr = 2 if HAS_RESIDUAL else 1
    RUN: gl.constexpr = INSTRUCTION_N // 2 if HAS_RESIDUAL else TILE_N * TILE_P * TILE_Q
    parts = halves_of(acc, RUN) if HAS_RESIDUAL else (acc,)
    for i in gl.static_range(PARTS):
        store_pixels(
            parts[i],
            residual_ptr,
            y_ptr,
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
            RUN,
            FIRST=i * RUN,
        )


@gluon.jit
def store_staged(
    acc,
    y_box,
    residual_bar,
    phase,
    y_desc,
    n,
    p,
    q,
    k,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
    ROUND_Y: gl.constexpr,
):
    """acc [channels, pixels] to y_box in shared memory, where the residual arrives before it, and by TMA to y."""
    y_lines = y_box.reshape([acc.shape[1], acc.shape[0]]).permute([1, 0])
    if HAS_RESIDUAL:
        mbarrier.wait(residual_bar, phase)
        acc += y_lines.load(acc.type.layout).to(gl.float32)
    acc = finish(acc, ACTIVATION, SLOPE, ROUND_Y)
    y_lines.store(acc.to(y_box.dtype))
    fence_async_shared()
    barrier()
    store_box(y_desc, [p, n, q, k], y_box)
