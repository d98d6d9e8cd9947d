"""2-D max pooling forward.

    y[n, c, p, q] = max over r, s of
        x[n, c, p*stride_h + r*dilation_h - padding_h, q*stride_w + s*dilation_w - padding_w]

x: [N, C, H, W], any strides; y and, where asked for, int64 indices h*W + w: [N, C, P, Q], channels_last where x is. As
in PyTorch the first of equal maxima wins, and a NaN, the last one, wins over everything. Without `signed_zeros` a zero
may come out with the sign of another zero of its window, which is faster. `as_taps`: instead of indices, an eighth of
their size, uint8 positions r*S + s in the window, for the gradient alone.
"""

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from ..device.arithmetic import INTERPRET, accumulator, index_type
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..device.pixels import block_of_channels, block_of_pixels
from ..runtime.blocks import ceil_div, pixel_blocks
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import empty_image, is_channels_last, pixel_strides
from ..runtime.operator import register
from . import max_pool2d_rows
from .max_pool2d_backward import max_pool2d_backward
from .max_pool2d_rows import NO_TAP
from .window import output_size


@triton.jit
def maximum(a, b):
    """The larger one, or NaN if either is; two 16-bit floats at a time where the GPU can."""
    PACKED: tl.constexpr = cuda_capability_geq(8, 0) and not INTERPRET
    if PACKED and a.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.bfloat16, True, 2)
    elif PACKED and a.dtype == tl.float16:
        y = tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.float16, True, 2)
    else:
        y = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def max_pool2d_forward_kernel(
    x_ptr,
    y_ptr,
    indices_ptr,
    M,
    C,
    H,
    W,
    PIXELS,
    Q,
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
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RETURN_INDICES: tl.constexpr,
    AS_TAPS: tl.constexpr,
    SIGNED_ZEROS: tl.constexpr,
    INDEX_0_OF_INFINITIES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_C channels; PIXELS = P * Q."""
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    n, pixel, mask_m = block_of_pixels(pid // blocks_c, M, PIXELS, INDEX, BLOCK_M)
    h_first = pixel // Q * STRIDE_H - PADDING_H
    w_first = pixel % Q * STRIDE_W - PADDING_W
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + (c * x_stride_c)[None, :]

    wait_for_predecessor(DEPENDENT)
    COMPARES: tl.constexpr = RETURN_INDICES or SIGNED_ZEROS
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), ACC if COMPARES or INTERPRET else x_ptr.dtype.element_ty)
    if RETURN_INDICES:  # of a window of -inf: its first pixel inside the image
        r = tl.where(h_first < 0, (DILATION_H - 1 - h_first) // DILATION_H, 0)
        s = tl.where(w_first < 0, (DILATION_W - 1 - w_first) // DILATION_W, 0)
        first = (h_first + r * DILATION_H).to(tl.int64) * W + w_first + s * DILATION_W
        if AS_TAPS:
            tap_of_first = r * S + s
            if INDEX_0_OF_INFINITIES:
                tap_of_first = tl.where(first == 0, tap_of_first, NO_TAP)
            best_index = tl.broadcast_to(tap_of_first[:, None], (BLOCK_M, BLOCK_C))
        elif INDEX_0_OF_INFINITIES:
            best_index = tl.full((BLOCK_M, BLOCK_C), 0, tl.int64)
        else:
            best_index = tl.broadcast_to(first[:, None], (BLOCK_M, BLOCK_C))
    for tap in tl.range(R * S, loop_unroll_factor=R * S if R * S <= 16 else 1):  # unrolled, loads do not wait
        h = h_first + tap // S * DILATION_H
        w = w_first + tap % S * DILATION_W
        inside = (mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & mask_c[None, :]
        x = tl.load(
            x_ptrs + (h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w)[:, None],
            mask=inside,
            other=float("-inf"),
        ).to(best.dtype)
        if COMPARES:
            better = (x > best) | (x != x)
            best = tl.where(better, x, best)
        else:
            best = maximum(best, x)
        if RETURN_INDICES and AS_TAPS:
            best_index = tl.where(better, tap, best_index)
        elif RETURN_INDICES:
            best_index = tl.where(better, (h.to(tl.int64) * W + w)[:, None], best_index)

    start_successor(DEPENDENT)
    y_offs = (n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel)[:, None] + (c * y_stride_c)[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(y_ptr + y_offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    if RETURN_INDICES:
        tl.store(indices_ptr + y_offs, best_index.to(indices_ptr.dtype.element_ty), mask=mask)


def _outputs(
    x, kernel_size, stride, padding, dilation, ceil_mode, return_indices, signed_zeros=True, as_taps=False
) -> tuple[torch.Tensor, torch.Tensor]:
    N, C, H, W = x.shape
    P = output_size(H, kernel_size[0], stride[0], padding[0], dilation[0], ceil_mode)
    Q = output_size(W, kernel_size[1], stride[1], padding[1], dilation[1], ceil_mode)
    channels_last = is_channels_last(x)
    y = empty_image((N, C, P, Q), x, channels_last)
    if not return_indices:
        return y, x.new_empty(0, dtype=torch.int64)
    return y, empty_image((N, C, P, Q), x, channels_last, torch.uint8 if as_taps else torch.int64)


def _launch(
    x, kernel_size, stride, padding, dilation, ceil_mode, return_indices, signed_zeros=True, as_taps=False
) -> tuple[torch.Tensor, torch.Tensor]:
    y, indices = _outputs(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices, signed_zeros, as_taps)
    if y.numel() == 0:
        return y, indices
    N, C, H, W = x.shape
    P, Q = y.shape[2:]
    channels_last = is_channels_last(x)
    index_0 = return_indices and channels_last and x.device.type == "cuda"  # as PyTorch's kernel there
    if return_indices and as_taps and max_pool2d_rows.takes(x, kernel_size, stride, dilation):
        max_pool2d_rows.run_forward(x, y, indices, padding, index_0)
        return y, indices
    M = N * P * Q
    blocks = pixel_blocks(M, P * Q, C, channels_last, x.device)
    grid = (ceil_div(M, blocks.BLOCK_M) * ceil_div(C, blocks.BLOCK_C),)
    launch(
        max_pool2d_forward_kernel,
        grid,
        x,
        y,
        indices,
        M,
        C,
        H,
        W,
        P * Q,
        Q,
        *x.stride(),
        *pixel_strides(y, channels_last),
        *kernel_size,
        *stride,
        *padding,
        *dilation,
        RETURN_INDICES=return_indices,
        AS_TAPS=as_taps,
        SIGNED_ZEROS=signed_zeros,
        INDEX_0_OF_INFINITIES=index_0,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        INDEX=index_type(M + blocks.BLOCK_M),
        **blocks._asdict(),
    )
    return y, indices


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.arguments, return_indices, _, _ = inputs
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)  # of those: PyTorch would fill zeros for them
    ctx.save_for_backward(x, indices if return_indices else None)


def _backward(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 9
    x, indices = ctx.saved_tensors
    if indices is None:
        indices = max_pool2d(x, *ctx.arguments, True)[1]
    return max_pool2d_backward(grad_y, x, *ctx.arguments, indices), *[None] * 8


max_pool2d = register(
    "max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode, "
    "bool return_indices, bool signed_zeros=True, bool as_taps=False) -> (Tensor, Tensor)",
    _launch,
    _outputs,
    _setup_context,
    _backward,
)
