"""Gradient of 2-D max pooling: each pixel of x adds up the gradients of the windows whose maximum it is.

    grad_x[n, c, h, w] = sum of g[n, c, p, q] over the windows (p, q) over (h, w) with indices[n, c, p, q] == h*W + w

g: [N, C, P, Q], any strides; indices: the same shape, any strides, or as uint8 r*S + s, positions in a window;
grad_x: [N, C, H, W]. No atomics: the windows are added up in their order, in float32.
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..device.pixels import block_of_channels, block_of_pixels
from ..runtime.blocks import ceil_div, pixel_blocks
from ..runtime.launch_plan import launch
from ..runtime.memory_format import empty_image, is_channels_last, pixel_strides
from ..runtime.operator import register_gradient
from . import max_pool2d_rows

MOST_TAPS = 255
"""Pixels of a window whose positions fit into a uint8, beside `NO_TAP`."""


@triton.jit
def max_pool2d_backward_kernel(
    g_ptr,
    indices_ptr,
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
    i_stride_n,
    i_stride_c,
    i_stride_p,
    i_stride_q,
    x_stride_n,
    x_stride_c,
    x_stride_pixel,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BY_TAPS: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * H * W pixels of x x BLOCK_C channels."""
    ROWS: tl.constexpr = (R - 1) * DILATION_H // STRIDE_H + 1  # of windows over a pixel, at most
    COLUMNS: tl.constexpr = (S - 1) * DILATION_W // STRIDE_W + 1
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    n, pixel, mask_m = block_of_pixels(pid // blocks_c, M, H * W, INDEX, BLOCK_M)
    h = pixel // W + PADDING_H  # in the padded image
    w = pixel % W + PADDING_W
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    g_ptrs = g_ptr + (n * g_stride_n)[:, None] + (c * g_stride_c)[None, :]
    i_ptrs = indices_ptr + (n * i_stride_n)[:, None] + (c * i_stride_c)[None, :]

    grad_x = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    for window in tl.range(ROWS * COLUMNS, loop_unroll_factor=ROWS * COLUMNS if ROWS * COLUMNS <= 16 else 1):
        p = h // STRIDE_H - (ROWS - 1) + window // COLUMNS
        q = w // STRIDE_W - (COLUMNS - 1) + window % COLUMNS
        over = mask_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
        if BY_TAPS:
            r = h - p * STRIDE_H
            s = w - q * STRIDE_W
            wanted = r // DILATION_H * S + s // DILATION_W
            over &= (r // DILATION_H < R) & (s // DILATION_W < S)
            over &= (r % DILATION_H == 0) & (s % DILATION_W == 0)
        else:
            wanted = pixel
        mask = over[:, None] & mask_c[None, :]
        p = p.to(tl.int64)
        q = q.to(tl.int64)
        index = tl.load(i_ptrs + (p * i_stride_p + q * i_stride_q)[:, None], mask=mask)
        g = tl.load(g_ptrs + (p * g_stride_p + q * g_stride_q)[:, None], mask=mask, other=0.0).to(ACC)
        grad_x += tl.where(mask & (index.to(wanted.dtype) == wanted[:, None]), g, 0)
    offs_x = (n * x_stride_n + pixel.to(tl.int64) * x_stride_pixel)[:, None] + (c * x_stride_c)[None, :]
    tl.store(grad_x_ptr + offs_x, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


def _output(g, x, kernel_size, stride, padding, dilation, ceil_mode, indices) -> torch.Tensor:
    return empty_image(x.shape, x, is_channels_last(x))


def _launch(g, x, kernel_size, stride, padding, dilation, ceil_mode, indices) -> torch.Tensor:
    grad_x = _output(g, x, kernel_size, stride, padding, dilation, ceil_mode, indices)
    if x.numel() == 0:
        return grad_x
    N, C, H, W = x.shape
    if indices.dtype == torch.uint8 and max_pool2d_rows.takes(x, kernel_size, stride, dilation):
        max_pool2d_rows.run_backward(g, indices, grad_x, padding)
        return grad_x
    M = N * H * W
    channels_last = is_channels_last(x)
    blocks = pixel_blocks(M, H * W, C, channels_last, x.device)
    launch(
        max_pool2d_backward_kernel,
        (ceil_div(M, blocks.BLOCK_M) * ceil_div(C, blocks.BLOCK_C),),
        g,
        indices,
        grad_x,
        M,
        C,
        H,
        W,
        *g.shape[2:],
        *g.stride(),
        *indices.stride(),
        *pixel_strides(grad_x, channels_last),
        *kernel_size,
        *stride,
        *padding,
        *dilation,
        BY_TAPS=indices.dtype == torch.uint8,
        ACC=accumulator(x.dtype),
        INDEX=index_type(M + blocks.BLOCK_M),
        **blocks._asdict(),
    )
    return grad_x


def _formula(g, x, kernel_size, stride, padding, dilation, ceil_mode, indices) -> torch.Tensor:
    if indices.dtype == torch.uint8:
        indices = torch.ops.aten.max_pool2d_with_indices(x, kernel_size, stride, padding, dilation, ceil_mode)[1]
    return torch.ops.aten.max_pool2d_with_indices_backward(
        g, x, kernel_size, stride, padding, dilation, ceil_mode, indices
    )


max_pool2d_backward = register_gradient(
    "max_pool2d_backward(Tensor g, Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode, Tensor indices) -> Tensor",
    _launch,
    _output,
    _formula,
)
"""grad_x, of which x gives shape and memory format."""
