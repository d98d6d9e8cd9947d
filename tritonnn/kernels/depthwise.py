"""A convolution whose output channels read one input channel each: memory bounds it, not the tensor cores."""

import triton
import triton.language as tl

from .arithmetic import accumulator, index_type, round_to, round_to_tf32
from .block_sizes import ceil_div, pixel_blocks
from .dependent_launch import dependent_launch, start_successor, wait_for_predecessor
from .launch_plan import launch
from .memory_format import pixel_strides


@triton.jit
def conv2d_depthwise_forward_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    M,
    H,
    W,
    PIXELS,
    Q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_k,
    y_stride_pixel,
    K: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    ROUND_Y: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_C output channels; PIXELS = P * Q.

    Output channel k reads input channel k // MULTIPLIER; weight is [K, R, S], contiguous.
    """
    BLOCKS_C: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = (pid // BLOCKS_C).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = (offs_m // PIXELS).to(tl.int64)
    pixel = offs_m % PIXELS
    h_first = pixel // Q * STRIDE_H - PADDING_H
    w_first = pixel % Q * STRIDE_W - PADDING_W
    k = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask_k = k < K
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + ((k // MULTIPLIER).to(tl.int64) * x_stride_c)[None, :]

    wait_for_predecessor(DEPENDENT)
    acc = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    for tap in range(R * S):
        h = h_first + tap // S * DILATION_H
        w = w_first + tap % S * DILATION_W
        mask_x = (mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None] & mask_k[None, :]
        x = tl.load(
            x_ptrs + (h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w)[:, None], mask=mask_x, other=0.0
        )
        weight = tl.load(weight_ptr + k.to(tl.int64) * (R * S) + tap, mask=mask_k, other=0.0)
        acc += x.to(ACC) * weight.to(ACC)[None, :]

    start_successor(DEPENDENT)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + k, mask=mask_k, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(ACC)[None, :]
    offs_y = (n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel)[:, None] + (k.to(tl.int64) * y_stride_k)[None, :]
    mask_y = mask_m[:, None] & mask_k[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0).to(ACC)
    if RELU:
        acc = tl.maximum(acc, 0, propagate_nan=tl.PropagateNan.ALL)
    if ROUND_Y:
        acc = round_to_tf32(acc)
    tl.store(y_ptr + offs_y, round_to(acc, y_ptr.dtype.element_ty), mask=mask_y)


def depthwise_conv2d(x, weight, y, channels_last_y, stride, padding, dilation, epilogue) -> None:
    """Writes y [N, K, P, Q]; weight: [K, 1, R, S], contiguous."""
    N, C, H, W = x.shape
    K, P, Q = y.shape[1:]
    M = N * P * Q
    blocks = pixel_blocks(M, P * Q, K, channels_last_y)
    grid = (ceil_div(M, blocks.BLOCK_M) * ceil_div(K, blocks.BLOCK_C),)
    launch(
        conv2d_depthwise_forward_kernel,
        grid,
        x,
        weight,
        *epilogue[:3],
        y,
        M,
        H,
        W,
        P * Q,
        Q,
        *x.stride(),
        *pixel_strides(y, channels_last_y),
        K,
        K // C,
        *weight.shape[2:],
        *stride,
        *padding,
        *dilation,
        **epilogue.flags,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        INDEX=index_type(M + blocks.BLOCK_M),
        **blocks._asdict(),
    )
