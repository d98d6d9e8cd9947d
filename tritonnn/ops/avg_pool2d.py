"""2-D average pooling forward, with windows of a fixed size or (adaptive) as many windows as the output has pixels.

    y[n, c, p, q] = (sum of x[n, c, h, w] over the window inside x) / divisor

x: [N, C, H, W], any strides; y: [N, C, P, Q], channels_last where x is. Sums in float32 (float64 for float64 and
for adaptive windows of float32, which may be large). Small windows are added up one pixel after the other, by programs
that own many of them; the pixels of a large window by many threads and, where there are few windows, many programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..device.pixels import block_of_channels, block_of_pixels
from ..device.pooling import window_of
from ..runtime import hardware
from ..runtime.blocks import ceil_div, pixel_blocks, power_of_2
from ..runtime.dependent_launch import dependent_launch
from ..runtime.hardware import Gpu
from ..runtime.launch_plan import launch, launch_semaphores
from ..runtime.memory_format import empty_image, is_channels_last, pixel_strides
from ..runtime.operator import register
from .avg_pool2d_backward import adaptive_avg_pool2d_backward, avg_pool2d_backward
from .window import output_size


@triton.jit
def avg_pool2d_forward_kernel(
    x_ptr,
    y_ptr,
    M,
    C,
    H,
    W,
    P,
    Q,
    PIXELS,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_pixel,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr,
    DIVISOR_OVERRIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_C channels; PIXELS = P * Q.

    ADAPTIVE windows differ in size; R x S is the largest.
    """
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    n, pixel, mask_m = block_of_pixels(pid // blocks_c, M, PIXELS, INDEX, BLOCK_M)
    p = pixel // Q
    q = pixel % Q
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)

    h_first, w_first, h_end, w_end, divisor = window_of(
        p,
        q,
        H,
        W,
        P,
        Q,
        R,
        S,
        STRIDE_H,
        STRIDE_W,
        PADDING_H,
        PADDING_W,
        ADAPTIVE,
        COUNT_INCLUDE_PAD,
        DIVISOR_OVERRIDE,
        ACC,
    )

    wait_for_predecessor(DEPENDENT)
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (c * x_stride_c)[None, :]
    total = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    for r in range(R):
        row = tl.full((BLOCK_M, BLOCK_C), 0, ACC)  # rows are added up apart, which halves a large window's error
        for s in range(S):
            h = h_first + r
            w = w_first + s
            inside = (mask_m & (h >= 0) & (h < h_end) & (w >= 0) & (w < w_end))[:, None] & mask_c[None, :]
            offs_x = (h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w)[:, None]
            row += tl.load(x_ptrs + offs_x, mask=inside, other=0.0).to(ACC)
        total += row

    start_successor(DEPENDENT)
    y = total / divisor[:, None]
    y_ptrs = y_ptr + (n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel)[:, None] + (c * y_stride_c)[None, :]
    tl.store(y_ptrs, round_to(y, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def avg_pool2d_large_forward_kernel(
    x_ptr,
    y_ptr,
    partial_ptr,
    semaphores_ptr,
    C,
    H,
    W,
    P,
    Q,
    IMAGE,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_pixel,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr,
    DIVISOR_OVERRIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    LANE: tl.constexpr,
    ACC: tl.constexpr,
    SPLITS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """SPLITS programs own one output pixel x BLOCK_C channels, of whose window BLOCK_W pixels are added up at a time.

    WHOLE: the window is the image, whose rows follow each other: its IMAGE pixels are one row of memory. With several
    SPLITS, partial [tiles, SPLITS, BLOCK_C] takes their sums, and semaphores [tiles], zero before and after, count
    them; the last program adds them up in a fixed order. A thread adds up its few pixels in LANE, the rest is in ACC.
    """
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    m = tile // blocks_c
    n = (m // (P * Q)).to(tl.int64)
    pixel = m % (P * Q)
    p = pixel // Q
    q = pixel % Q
    c, mask_c = block_of_channels(tile % blocks_c, C, BLOCK_C)
    h_first, w_first, h_end, w_end, divisor = window_of(
        p.to(tl.int64),
        q.to(tl.int64),
        H,
        W,
        P,
        Q,
        R,
        S,
        STRIDE_H,
        STRIDE_W,
        PADDING_H,
        PADDING_W,
        ADAPTIVE,
        COUNT_INCLUDE_PAD,
        DIVISOR_OVERRIDE,
        ACC,
    )
    h_first = tl.maximum(h_first, 0).to(tl.int32)
    w_first = tl.maximum(w_first, 0).to(tl.int32)
    h_end = h_end.to(tl.int32)
    w_end = w_end.to(tl.int32)
    columns = w_end - w_first
    pixels = IMAGE if WHOLE else tl.maximum(h_end - h_first, 0) * tl.maximum(columns, 0)
    x_ptrs = x_ptr + n * x_stride_n + (c * x_stride_c)[None, :]  # [1, BLOCK_C]
    if not WHOLE:
        x_ptrs += h_first.to(tl.int64) * x_stride_h + w_first.to(tl.int64) * x_stride_w

    wait_for_predecessor(DEPENDENT)
    STEPS: tl.constexpr = (R * S + BLOCK_W * SPLITS - 1) // (BLOCK_W * SPLITS)
    sums = tl.full((BLOCK_W, BLOCK_C), 0, LANE)
    for step in tl.range(STEPS, loop_unroll_factor=UNROLL):  # unrolled, loads do not wait for each other
        i = (step * SPLITS + split) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
        if WHOLE:
            offs = i.to(tl.int64) * x_stride_w
        else:
            offs = (i // columns).to(tl.int64) * x_stride_h + (i % columns).to(tl.int64) * x_stride_w
        mask = (i < pixels)[:, None] & mask_c[None, :]
        sums += tl.load(x_ptrs + offs[:, None], mask=mask, other=0.0).to(LANE)
    total = tl.sum(sums.to(ACC), 0)  # [BLOCK_C]

    start_successor(DEPENDENT)
    last = True
    if SPLITS > 1:
        parts = partial_ptr + tile * (SPLITS * BLOCK_C) + tl.arange(0, BLOCK_C)
        tl.store(parts + split * BLOCK_C, total)
        tl.debug_barrier()  # all threads have stored before one of them tells
        last = tl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            total = tl.load(parts, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                total += tl.load(parts + other * BLOCK_C, cache_modifier=".cg")
            tl.store(semaphores_ptr + tile, 0)
        y_ptrs = y_ptr + n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel + c * y_stride_c
        tl.store(y_ptrs, round_to(total / divisor, y_ptr.dtype.element_ty), mask=mask_c)


class LargeWindows(NamedTuple):
    """Tiles of BLOCK_W pixels of a window x BLOCK_C channels; each of SPLITS programs loads UNROLL of them at once."""

    SPLITS: int
    UNROLL: int
    BLOCK_W: int
    BLOCK_C: int


LEAST_WINDOW = 32
"""Windows of at least so many pixels are added up by many threads."""
TILE_BYTES = {True: 8192, False: 4096}
"""Bytes that a program loads at a time, in channels_last or not: 128 threads load 16 bytes four times, or twice."""
WIDE_BYTES, FEW_PIXELS = 1024, 64
"""Of a pixel's channels, for a program of a window of up to so many pixels."""
MOST_SPLITS = 64


def is_large(window: int) -> bool:
    """Whether many threads add up the pixels of a window; in the interpreter one program is the fastest."""
    return window >= LEAST_WINDOW and not triton.knobs.runtime.interpret


def large_windows(outputs: int, C: int, window: int, element_size: int, channels_last: bool, gpu: Gpu) -> LargeWindows:
    """The tile runs along what is contiguous; few windows are split until the programs fill the GPU four times.

    Small windows of many 16-bit channels in channels_last have few programs, with whole kilobytes of a pixel each: 64
    images in bfloat16 (H200), 2,048 channels of 7x7 4.1 us for 7.6, 1,536 3.9 for 6.1, 512 2.6 for 2.9, 2,048 of 8x8
    4.3 for 7.8.
    """
    wide = WIDE_BYTES // element_size
    blocks_c = ceil_div(C, wide)
    fills = wide <= C and 3 * blocks_c * wide <= 4 * C and 9 * outputs * blocks_c >= 4 * gpu.multiprocessors
    if channels_last and element_size == 2 and window <= FEW_PIXELS and fills:
        block_w = power_of_2(window, 1, 2 * TILE_BYTES[True] // WIDE_BYTES)
        return LargeWindows(1, ceil_div(window, block_w), block_w, wide)
    elements = TILE_BYTES[channels_last] // element_size
    if channels_last:  # whole sectors of 32 bytes, as many as leave few lanes without a channel
        blocks = [sectors * 32 // element_size for sectors in (4, 2, 1)]
        block_c = power_of_2(C, 1, min(blocks, key=lambda block: 10 * ceil_div(C, block) * block // C))
        block_w = power_of_2(window, 1, elements // block_c)
    else:
        block_w = power_of_2(window, 1, elements)
        block_c = power_of_2(C, 1, elements // block_w)
    steps, tiles, splits = ceil_div(window, block_w), outputs * ceil_div(C, block_c), 1
    while 2 * splits * tiles <= 4 * gpu.multiprocessors and 4 * splits <= steps and splits < MOST_SPLITS:
        splits *= 2
    return LargeWindows(splits, min(ceil_div(steps, splits), 4), block_w, block_c)


def _run(x, y, kernel_size, stride, padding, adaptive, count_include_pad, divisor_override) -> torch.Tensor:
    if y.numel() == 0:
        return y
    N, C, H, W = x.shape
    P, Q = y.shape[2:]
    channels_last = is_channels_last(x)
    M = N * P * Q
    acc = tl.float64 if adaptive and x.dtype == torch.float32 else accumulator(x.dtype)
    windows = (
        *kernel_size,
        *stride,
        *padding,
        adaptive,
        count_include_pad,
        divisor_override or 0,
    )
    if is_large(kernel_size[0] * kernel_size[1]):
        _run_large(x, y, windows, acc)
        return y
    blocks = pixel_blocks(M, P * Q, C, channels_last, x.device)
    largest_index = M + blocks.BLOCK_M
    if adaptive:  # windows begin at p * H // P
        largest_index = max(largest_index, (P + 1) * H, (Q + 1) * W)
    grid = (ceil_div(M, blocks.BLOCK_M) * ceil_div(C, blocks.BLOCK_C),)
    launch(
        avg_pool2d_forward_kernel,
        grid,
        x,
        y,
        M,
        C,
        H,
        W,
        P,
        Q,
        P * Q,
        *x.stride(),
        *pixel_strides(y, channels_last),
        *windows,
        **dependent_launch(x),
        ACC=acc,
        INDEX=index_type(largest_index),
        **blocks._asdict(),
    )
    return y


def _run_large(x: torch.Tensor, y: torch.Tensor, windows: tuple, acc: tl.dtype) -> None:
    """Fills y; `windows` are the kernel's arguments from R to DIVISOR_OVERRIDE."""
    N, C, H, W = x.shape
    P, Q = y.shape[2:]
    channels_last, window = is_channels_last(x), windows[0] * windows[1]
    config = large_windows(N * P * Q, C, window, x.element_size(), channels_last, hardware.gpu(x.device))
    tiles = N * P * Q * ceil_div(C, config.BLOCK_C)
    partial = counts = None
    if config.SPLITS > 1:
        dtype = torch.float64 if acc == tl.float64 else torch.float32
        partial = x.new_empty(tiles * config.SPLITS * config.BLOCK_C, dtype=dtype)
        counts = launch_semaphores(x.device, tiles)
    launch(
        avg_pool2d_large_forward_kernel,
        (tiles * config.SPLITS,),
        x,
        y,
        partial,
        counts,
        C,
        H,
        W,
        P,
        Q,
        H * W,
        *x.stride(),
        *pixel_strides(y, channels_last),
        *windows,
        WHOLE=(P, Q) == (1, 1) and windows[:2] == (H, W) and windows[4:6] == (0, 0) and x.stride(2) == W * x.stride(3),
        **dependent_launch(x),
        LANE=accumulator(x.dtype),
        ACC=acc,
        **config._asdict(),
    )


def _output(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override) -> torch.Tensor:
    N, C, H, W = x.shape
    P = output_size(H, kernel_size[0], stride[0], padding[0], 1, ceil_mode)
    Q = output_size(W, kernel_size[1], stride[1], padding[1], 1, ceil_mode)
    return empty_image((N, C, P, Q), x, is_channels_last(x))


def _launch(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override) -> torch.Tensor:
    y = _output(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _run(x, y, kernel_size, stride, padding, False, count_include_pad, divisor_override)


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.arguments = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad_y):
    (x,) = ctx.saved_tensors
    return avg_pool2d_backward(grad_y, x, *ctx.arguments), None, None, None, None, None, None


avg_pool2d = register(
    "avg_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, "
    "int? divisor_override) -> Tensor",
    _launch,
    _output,
    _setup_context,
    _backward,
)


def _adaptive_output(x, output_size) -> torch.Tensor:
    return empty_image((*x.shape[:2], *output_size), x, is_channels_last(x))


def _launch_adaptive(x, output_size) -> torch.Tensor:
    y = _adaptive_output(x, output_size)
    sizes = zip(x.shape[2:], output_size)
    largest = [max((-(-(i + 1) * n // m) - i * n // m for i in range(m)), default=0) for n, m in sizes]
    return _run(x, y, largest, (1, 1), (0, 0), True, False, None)


def _setup_context_adaptive(ctx, inputs, output) -> None:
    """Saves what PyTorch does, although the shape of x is enough: of a mean of whole images nothing.

    So a plan of the backward pass is told what that depends on (see `Recorded`).
    """
    x, output_size = inputs
    ctx.size, ctx.channels_last = tuple(x.shape[2:]), is_channels_last(x)
    ctx.constants = tuple(output_size), ctx.size, ctx.channels_last
    ctx.save_for_backward(None if tuple(output_size) == (1, 1) else x)


def _backward_adaptive(ctx, grad_y):
    _ = ctx.saved_tensors  # which complains where x was overwritten, as PyTorch does
    return adaptive_avg_pool2d_backward(grad_y, ctx.size, ctx.channels_last), None


adaptive_avg_pool2d = register(
    "adaptive_avg_pool2d(Tensor x, int[2] output_size) -> Tensor",
    _launch_adaptive,
    _adaptive_output,
    _setup_context_adaptive,
    _backward_adaptive,
)
