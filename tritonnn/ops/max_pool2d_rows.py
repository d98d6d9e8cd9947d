"""3x3 max pooling of stride 1 that remembers positions, for training: a row of x is looked at once for three windows.

The equations are those of max_pool2d.py and max_pool2d_backward.py. A program goes down STRIP rows of some columns.
Forward, it takes the maximum of three neighbours in each row of x, and of three such rows that of a window. Backward, a
row of g is added to the three rows of pixels that it may come from. So it loads and unpacks three pixels or windows
instead of nine. Instructions, and not memory, had set the time: it needs 2.3 times fewer forward, 2.1 times backward.
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..device.pixels import block_of_channels, block_of_pixels
from ..runtime.blocks import ceil_div, pixel_blocks
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import is_channels_last, pixel_strides

NO_TAP = tl.constexpr(255)
"""The position of a maximum that lies in no window: PyTorch's index 0 of a window of -inf."""
STRIP = 8


def takes(x: torch.Tensor, kernel_size, stride, dilation) -> bool:
    """Whether the kernels compute this pooling, and go along the memory of x."""
    window = tuple(kernel_size), tuple(stride), tuple(dilation)
    return window == ((3, 3), (1, 1), (1, 1)) and is_channels_last(x)


@triton.jit
def better(x, best):
    """Where x replaces the best before it: a larger one, or NaN."""
    return (x > best) | (x != x)


@triton.jit
def max_pool2d_rows_forward_kernel(
    x_ptr,
    y_ptr,
    taps_ptr,
    M,
    C,
    H,
    W,
    P,
    Q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_pixel,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    INDEX_0_OF_INFINITIES: tl.constexpr,
    STRIP: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns STRIP rows of BLOCK_M of M = N * Q columns of y x BLOCK_C channels."""
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    strips = (P + STRIP - 1) // STRIP
    n, q, mask_m = block_of_pixels(pid // blocks_c // strips, M, Q, INDEX, BLOCK_M)
    p_first = pid // blocks_c % strips * STRIP
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    w_first = q - PADDING_W
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (c * x_stride_c)[None, :]
    y_offs = (n * y_stride_n + q.to(tl.int64) * y_stride_pixel)[:, None] + (c * y_stride_c)[None, :]
    s_inside = tl.where(w_first < 0, -w_first, 0)

    wait_for_predecessor(DEPENDENT)
    best0 = tl.full((BLOCK_M, BLOCK_C), float("-inf"), ACC)  # of the rows r = 0, 1, 2 of a window
    best1, best2 = best0, best0
    s0 = tl.full((BLOCK_M, BLOCK_C), 0, tl.int32)
    s1, s2 = s0, s0
    for i in tl.static_range(STRIP + 2):
        h = tl.full((BLOCK_M,), p_first + i - PADDING_H, tl.int32)
        best0, s0, best1, s1 = best1, s1, best2, s2
        best2 = tl.full((BLOCK_M, BLOCK_C), float("-inf"), ACC)
        s2 = tl.full((BLOCK_M, BLOCK_C), 0, tl.int32)
        for s in tl.static_range(3):
            w = w_first + s
            inside = (mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & mask_c[None, :]
            offs = h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w
            x = tl.load(x_ptrs + offs[:, None], mask=inside, other=float("-inf")).to(ACC)
            replaces = better(x, best2)
            best2 = tl.where(replaces, x, best2)
            s2 = tl.where(replaces, s, s2)
        if i >= 2:
            p = tl.full((BLOCK_M,), p_first + i - 2, tl.int32)
            h_first = p - PADDING_H
            r_inside = tl.where(h_first < 0, -h_first, 0)
            first = r_inside * 3 + s_inside  # of a window of -inf: its first pixel inside the image
            if INDEX_0_OF_INFINITIES:
                first = tl.where((h_first + r_inside == 0) & (w_first + s_inside == 0), first, NO_TAP)
            tap = tl.broadcast_to(first[:, None], (BLOCK_M, BLOCK_C))
            best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), ACC)
            replaces = better(best0, best)
            best, tap = tl.where(replaces, best0, best), tl.where(replaces, s0, tap)
            replaces = better(best1, best)
            best, tap = tl.where(replaces, best1, best), tl.where(replaces, s1 + 3, tap)
            replaces = better(best2, best)
            best, tap = tl.where(replaces, best2, best), tl.where(replaces, s2 + 6, tap)
            mask = (mask_m & (p < P))[:, None] & mask_c[None, :]
            offs = y_offs + ((p * Q).to(tl.int64) * y_stride_pixel)[:, None]
            tl.store(y_ptr + offs, best.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(taps_ptr + offs, tap.to(tl.uint8), mask=mask)
    start_successor(DEPENDENT)


@triton.jit
def max_pool2d_rows_backward_kernel(
    g_ptr,
    taps_ptr,
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
    t_stride_n,
    t_stride_c,
    t_stride_p,
    t_stride_q,
    x_stride_n,
    x_stride_c,
    x_stride_pixel,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    STRIP: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns STRIP rows of BLOCK_M of M = N * W columns of x x BLOCK_C channels."""
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    strips = (H + STRIP - 1) // STRIP
    n, w, mask_m = block_of_pixels(pid // blocks_c // strips, M, W, INDEX, BLOCK_M)
    h_first = pid // blocks_c % strips * STRIP
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    g_ptrs = g_ptr + (n * g_stride_n)[:, None] + (c * g_stride_c)[None, :]
    taps_ptrs = taps_ptr + (n * t_stride_n)[:, None] + (c * t_stride_c)[None, :]
    x_offs = (n * x_stride_n + w.to(tl.int64) * x_stride_pixel)[:, None] + (c * x_stride_c)[None, :]

    wait_for_predecessor(DEPENDENT)
    sum0 = tl.full((BLOCK_M, BLOCK_C), 0, ACC)  # of the rows of pixels under r = 0, 1, 2 of a row of windows
    sum1, sum2 = sum0, sum0
    for i in tl.static_range(STRIP + 2):
        p = tl.full((BLOCK_M,), h_first + PADDING_H - 2 + i, tl.int32)
        sum0, sum1 = sum1, sum2
        sum2 = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
        for back in tl.static_range(3):
            s = 2 - back
            q = w + PADDING_W - s
            mask = (mask_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None] & mask_c[None, :]
            offs = p.to(tl.int64) * g_stride_p + q.to(tl.int64) * g_stride_q
            g = tl.load(g_ptrs + offs[:, None], mask=mask, other=0.0).to(ACC)
            offs = p.to(tl.int64) * t_stride_p + q.to(tl.int64) * t_stride_q
            tap = tl.load(taps_ptrs + offs[:, None], mask=mask, other=NO_TAP).to(tl.int32)
            sum0 += tl.where(tap == s, g, 0)
            sum1 += tl.where(tap == 3 + s, g, 0)
            sum2 += tl.where(tap == 6 + s, g, 0)
        if i >= 2:
            h = tl.full((BLOCK_M,), h_first + i - 2, tl.int32)
            mask = (mask_m & (h < H))[:, None] & mask_c[None, :]
            offs = x_offs + ((h * W).to(tl.int64) * x_stride_pixel)[:, None]
            tl.store(grad_x_ptr + offs, round_to(sum0, grad_x_ptr.dtype.element_ty), mask=mask)
    start_successor(DEPENDENT)


def run_forward(x: torch.Tensor, y: torch.Tensor, taps: torch.Tensor, padding, index_0_of_infinities: bool) -> None:
    """Fills y and taps [N, C, P, Q], channels_last."""
    N, C, H, W = x.shape
    P, Q = y.shape[2:]
    blocks = pixel_blocks(N * Q, Q, C, True, x.device)
    strip = min(STRIP, P)
    launch(
        max_pool2d_rows_forward_kernel,
        (ceil_div(N * Q, blocks.BLOCK_M) * ceil_div(P, strip) * ceil_div(C, blocks.BLOCK_C),),
        x,
        y,
        taps,
        N * Q,
        C,
        H,
        W,
        P,
        Q,
        *x.stride(),
        *pixel_strides(y, True),
        *padding,
        INDEX_0_OF_INFINITIES=index_0_of_infinities,
        STRIP=strip,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        INDEX=index_type(N * Q + blocks.BLOCK_M),
        **blocks._asdict(),
    )


def run_backward(g: torch.Tensor, taps: torch.Tensor, grad_x: torch.Tensor, padding) -> None:
    """Fills grad_x [N, C, H, W], channels_last; g and taps have any strides."""
    N, C, H, W = grad_x.shape
    blocks = pixel_blocks(N * W, W, C, True, g.device)
    strip = min(STRIP, H)
    launch(
        max_pool2d_rows_backward_kernel,
        (ceil_div(N * W, blocks.BLOCK_M) * ceil_div(H, strip) * ceil_div(C, blocks.BLOCK_C),),
        g,
        taps,
        grad_x,
        N * W,
        C,
        H,
        W,
        *g.shape[2:],
        *g.stride(),
        *taps.stride(),
        *pixel_strides(grad_x, True),
        *padding,
        STRIP=strip,
        **dependent_launch(g),
        ACC=accumulator(g.dtype),
        INDEX=index_type(N * W + blocks.BLOCK_M),
        **blocks._asdict(),
    )
