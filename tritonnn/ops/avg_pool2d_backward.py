"""Gradient of 2-D average pooling: each pixel of x adds up the gradients of the windows over it.

    grad_x[n, c, h, w] = sum of g[n, c, p, q] / divisor(p, q) over the windows (p, q) over (h, w)

g: [N, C, P, Q], any strides; grad_x: [N, C, H, W]. No atomics: the windows are added up in their order, in float32
(float64 for adaptive windows of float32, as in forward).
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..device.pixels import block_of_channels, block_of_pixels
from ..device.pooling import window_of
from ..runtime.blocks import ceil_div, pixel_blocks
from ..runtime.launch_plan import launch
from ..runtime.memory_format import empty_image, is_channels_last, pixel_strides
from ..runtime.operator import register_gradient


@triton.jit
def avg_pool2d_backward_kernel(
    g_ptr,
    grad_x_ptr,
    M,
    C,
    H,
    W,
    P,
    Q,
    g_stride_n,
    g_stride_c,
    g_stride_p,
    g_stride_q,
    x_stride_n,
    x_stride_c,
    x_stride_pixel,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_INCLUDE_PAD: tl.constexpr,
    DIVISOR_OVERRIDE: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * H * W pixels of x x BLOCK_C channels.

    ROWS x COLUMNS: windows over a pixel, at most.
    """
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    n, pixel, mask_m = block_of_pixels(pid // blocks_c, M, H * W, INDEX, BLOCK_M)
    h = pixel // W
    w = pixel % W
    if ADAPTIVE:
        p_first = h * P // H
        q_first = w * Q // W
    else:
        p_first = (h + PADDING_H) // STRIDE_H - (ROWS - 1)
        q_first = (w + PADDING_W) // STRIDE_W - (COLUMNS - 1)
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    g_ptrs = g_ptr + (n * g_stride_n)[:, None] + (c * g_stride_c)[None, :]

    grad_x = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    for window in tl.range(ROWS * COLUMNS, loop_unroll_factor=ROWS * COLUMNS if ROWS * COLUMNS <= 16 else 1):
        p = p_first + window // COLUMNS
        q = q_first + window % COLUMNS
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
        over = (h >= h_first) & (h < h_end) & (w >= w_first) & (w < w_end)
        inside = mask_m & over & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        offs_g = (p.to(tl.int64) * g_stride_p + q.to(tl.int64) * g_stride_q)[:, None]
        g = tl.load(g_ptrs + offs_g, mask=inside[:, None] & mask_c[None, :], other=0.0).to(ACC)
        grad_x += g / tl.where(inside, divisor, 1)[:, None]
    offs_x = (n * x_stride_n + pixel.to(tl.int64) * x_stride_pixel)[:, None] + (c * x_stride_c)[None, :]
    tl.store(grad_x_ptr + offs_x, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


def _run(g, grad_x, channels_last, kernel_size, stride, padding, adaptive, count_include_pad, divisor_override):
    """Fills grad_x, dense, in channels_last or not."""
    if grad_x.numel() == 0:
        return grad_x
    N, C, H, W = grad_x.shape
    P, Q = g.shape[2:]
    M = N * H * W
    if adaptive:
        rows, columns = (_most_windows(size, outputs) for size, outputs in ((H, P), (W, Q)))
    else:
        rows, columns = ((k - 1) // s + 1 for k, s in zip(kernel_size, stride))
    acc = tl.float64 if adaptive and g.dtype == torch.float32 else accumulator(g.dtype)
    blocks = pixel_blocks(M, H * W, C, channels_last, g.device)
    largest_index = M + blocks.BLOCK_M
    if adaptive:
        largest_index = max(largest_index, (P + 2) * (H + 1), (Q + 2) * (W + 1))
    launch(
        avg_pool2d_backward_kernel,
        (ceil_div(M, blocks.BLOCK_M) * ceil_div(C, blocks.BLOCK_C),),
        g,
        grad_x,
        M,
        C,
        H,
        W,
        P,
        Q,
        *g.stride(),
        *pixel_strides(grad_x, channels_last),
        rows,
        columns,
        *kernel_size,
        *stride,
        *padding,
        adaptive,
        count_include_pad,
        divisor_override or 0,
        ACC=acc,
        INDEX=index_type(largest_index),
        **blocks._asdict(),
    )
    return grad_x


def _most_windows(size: int, outputs: int) -> int:
    """How many of `outputs` adaptive windows over `size` rows see the same row, at most."""
    return max(-(-(i + 1) * outputs // size) - i * outputs // size for i in range(size))


def _output(g, x, *_) -> torch.Tensor:
    return empty_image(x.shape, x, is_channels_last(x))


def _launch(g, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override) -> torch.Tensor:
    grad_x, channels_last = _output(g, x), is_channels_last(x)
    return _run(g, grad_x, channels_last, kernel_size, stride, padding, False, count_include_pad, divisor_override)


avg_pool2d_backward = register_gradient(
    "avg_pool2d_backward(Tensor g, Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
    "bool count_include_pad, int? divisor_override) -> Tensor",
    _launch,
    _output,
    lambda g, x, *arguments: torch.ops.aten.avg_pool2d_backward(g, x, *arguments),
)
"""grad_x, of which x gives shape and memory format."""


def _adaptive_output(g, size, channels_last) -> torch.Tensor:
    return empty_image((*g.shape[:2], *size), g, channels_last)


def _launch_adaptive(g, size, channels_last) -> torch.Tensor:
    grad_x = _adaptive_output(g, size, channels_last)
    return _run(g, grad_x, channels_last, (1, 1), (1, 1), (0, 0), True, False, None)


def _adaptive_formula(g, size, channels_last) -> torch.Tensor:
    return torch.ops.aten._adaptive_avg_pool2d_backward(g, g.new_empty(()).expand(*g.shape[:2], *size))


adaptive_avg_pool2d_backward = register_gradient(
    "adaptive_avg_pool2d_backward(Tensor g, SymInt[2] size, bool channels_last) -> Tensor",
    _launch_adaptive,
    _adaptive_output,
    _adaptive_formula,
)
"""grad_x [N, C, *size], channels_last or contiguous."""
