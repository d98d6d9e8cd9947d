"""2-D average pooling forward, with windows of a fixed size or (adaptive) as many windows as the output has pixels.

    y[n, c, p, q] = (sum of x[n, c, h, w] over the window inside x) / divisor

x: [N, C, H, W], any strides; y: [N, C, P, Q], channels_last where x is. Sums in float32 (float64 for float64 and
for adaptive windows of float32, which may be large).
"""

import torch
import triton
import triton.language as tl

from .arithmetic import accumulator, index_type, round_to
from .block_sizes import ceil_div, pixel_blocks
from .dependent_launch import dependent_launch, start_successor, wait_for_predecessor
from .launch_plan import launch
from .memory_format import empty_image, is_channels_last, pixel_strides
from .operator import register
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
    offs_m = (pid // blocks_c).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = (offs_m // PIXELS).to(tl.int64)
    pixel = offs_m % PIXELS
    p = pixel // Q
    q = pixel % Q
    c = (pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    mask_c = c < C

    if ADAPTIVE:
        h_first = p * H // P
        w_first = q * W // Q
        h_end = ((p + 1) * H + P - 1) // P
        w_end = ((q + 1) * W + Q - 1) // Q
        divisor = (h_end - h_first).to(ACC) * (w_end - w_first).to(ACC)
    else:
        h_first = p * STRIDE_H - PADDING_H
        w_first = q * STRIDE_W - PADDING_W
        h_end = tl.minimum(h_first + R, H + PADDING_H)  # a ceil_mode window ends with the padding
        w_end = tl.minimum(w_first + S, W + PADDING_W)
        if DIVISOR_OVERRIDE != 0:
            divisor = tl.full((BLOCK_M,), DIVISOR_OVERRIDE, ACC)
        elif COUNT_INCLUDE_PAD:
            divisor = (h_end - h_first).to(ACC) * (w_end - w_first).to(ACC)
        else:
            rows = tl.minimum(h_end, H) - tl.maximum(h_first, 0)
            columns = tl.minimum(w_end, W) - tl.maximum(w_first, 0)
            divisor = rows.to(ACC) * columns.to(ACC)
        h_end = tl.minimum(h_end, H)
        w_end = tl.minimum(w_end, W)

    wait_for_predecessor(DEPENDENT)
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (c * x_stride_c)[None, :]
    total = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    for r in range(R):
        row = tl.full((BLOCK_M, BLOCK_C), 0, ACC)  # a sum of sums: large windows round half as far off
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


def _run(x, y, kernel_size, stride, padding, adaptive, count_include_pad, divisor_override) -> torch.Tensor:
    if y.numel() == 0:
        return y
    N, C, H, W = x.shape
    P, Q = y.shape[2:]
    channels_last = is_channels_last(x)
    M = N * P * Q
    blocks = pixel_blocks(M, P * Q, C, channels_last)
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
        *kernel_size,
        *stride,
        *padding,
        ADAPTIVE=adaptive,
        COUNT_INCLUDE_PAD=count_include_pad,
        DIVISOR_OVERRIDE=divisor_override or 0,
        **dependent_launch(x),
        ACC=tl.float64 if adaptive and x.dtype == torch.float32 else accumulator(x.dtype),
        INDEX=index_type(largest_index),
        **blocks._asdict(),
    )
    return y


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
    return torch.ops.aten.avg_pool2d_backward(grad_y, x, *ctx.arguments), None, None, None, None, None, None


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
    """A mean of whole images asks x for nothing but its shape: x may be overwritten."""
    x, output_size = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(None if tuple(output_size) == (1, 1) else x)


def _backward_adaptive(ctx, grad_y):
    (x,) = ctx.saved_tensors
    if x is None:  # PyTorch's mean: unlike the general formula deterministic
        return grad_y.expand(ctx.shape) / ctx.shape[2:].numel(), None
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad_y, x), None


adaptive_avg_pool2d = register(
    "adaptive_avg_pool2d(Tensor x, int[2] output_size) -> Tensor",
    _launch_adaptive,
    _adaptive_output,
    _setup_context_adaptive,
    _backward_adaptive,
)
