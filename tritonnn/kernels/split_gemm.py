"""Convolution of few pixels: the reduction is split among the warps of a program, so that small tiles fill the GPU.

    y[n, k, p, q] = relu(bias[k] + residual[n, k, p, q] + shortcut[n, k, p, q] + scale[k]
                         * sum over r, s, c of x[n, c, p*stride + r*dilation - padding, ...] * weight[k, r, s, c])

As in implicit_gemm.py, but a step takes SLICES blocks of the reduction at once, a batched product of which each warp
does one; they are added up at the end, in the same order every time. A shortcut is a second convolution, of one tap.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .arithmetic import accumulator, add, dot, index_type, round_to, round_to_tf32, split_to_tf32
from .block_sizes import SplitBlocks, ceil_div
from .dependent_launch import dependent_launch, start_successor, wait_for_predecessor
from .epilogue import Epilogue
from .launch_plan import launch


@triton.jit
def split_product(
    x_ptrs,
    weight_ptr,
    h_first,
    w_first,
    mask_m,
    channel,
    mask_n,
    H,
    W,
    stride_h,
    stride_w,
    stride_c,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_X: tl.constexpr,
    ACC: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums [BLOCK_M, BLOCK_N] of the products of weight [K, R, S, C] and the pixels from h_first, w_first on.

    x_ptrs [1, BLOCK_M, 1] point to the images; h_first and w_first have this shape too.
    """
    BLOCKS_C: tl.constexpr = C // BLOCK_K
    BLOCKS: tl.constexpr = R * S * BLOCKS_C
    STEPS: tl.constexpr = (BLOCKS + SLICES - 1) // SLICES
    offs_k = tl.arange(0, BLOCK_K)[None, None, :]
    weight_ptrs = weight_ptr + (channel * (R * S * C))[None, :, None] + offs_k
    slices = tl.arange(0, SLICES)[:, None, None]
    acc = tl.full((SLICES, BLOCK_M, BLOCK_N), 0, ACC)
    small = acc
    for step in range(STEPS):
        block = step * SLICES + slices  # [SLICES, 1, 1]
        tap = block // BLOCKS_C
        c = block % BLOCKS_C * BLOCK_K + offs_k  # [SLICES, 1, BLOCK_K]
        h = h_first + tap // S * DILATION_H  # [SLICES, BLOCK_M, 1]
        w = w_first + tap % S * DILATION_W
        mask_x = mask_m[None, :, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (block < BLOCKS)
        offs_x = h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w + c.to(tl.int64) * stride_c
        x = tl.load(x_ptrs + offs_x, mask=mask_x, other=0.0)  # [SLICES, BLOCK_M, BLOCK_K]
        mask_weight = mask_n[None, :, None] & (block < BLOCKS)
        weight = tl.load(weight_ptrs + block * BLOCK_K, mask=mask_weight, other=0.0)  # [SLICES, BLOCK_N, BLOCK_K]
        weight = tl.permute(weight, (0, 2, 1))
        if INPUT_PRECISION == "tf32x3":
            x_high, x_low = split_to_tf32(x)
            weight_high, weight_low = split_to_tf32(weight)
            # Two chains of products: the small ones may all be added up in the tensor core, whose sums are truncated.
            small = tl.dot(x_low, weight_high, small, input_precision="tf32")
            small = tl.dot(x_high, weight_low, small, input_precision="tf32")
            acc = add(acc, tl.dot(x_high, weight_high, input_precision="tf32"))
        else:
            if ROUND_X:
                x = round_to_tf32(x)
            acc = dot(x, weight, acc, INPUT_PRECISION)
    if INPUT_PRECISION == "tf32x3":
        acc += small
    return tl.sum(acc, 0)


@triton.jit
def split_gemm_forward_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    shortcut_ptr,
    shortcut_weight_ptr,
    shortcut_scale_ptr,
    shortcut_bias_ptr,
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
    shortcut_stride_n,
    shortcut_stride_c,
    shortcut_stride_h,
    shortcut_stride_w,
    C: tl.constexpr,
    K: tl.constexpr,
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
    HAS_SHORTCUT: tl.constexpr,
    HAS_SHORTCUT_SCALE: tl.constexpr,
    HAS_SHORTCUT_BIAS: tl.constexpr,
    SHORTCUT_C: tl.constexpr,
    SHORTCUT_STRIDE_H: tl.constexpr,
    SHORTCUT_STRIDE_W: tl.constexpr,
    SHORTCUT_PRECISION: tl.constexpr,
    ROUND_SHORTCUT: tl.constexpr,
    RELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_X: tl.constexpr,
    ROUND_Y: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_N output channels; PIXELS = P * Q.

    weight is [K, R, S, C], contiguous; C is a multiple of BLOCK_K; the residual has the strides of y. The shortcut is a
    second image under a filter of one tap and no padding, whose products are added.
    """
    BLOCKS_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N

    pid = tl.program_id(0)
    offs_m = (pid // BLOCKS_N).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = (offs_m // PIXELS).to(tl.int64)
    pixel = offs_m % PIXELS
    channel = pid % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = channel < K
    offs_y = (n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel)[:, None] + (channel.to(tl.int64) * y_stride_k)[
        None, :
    ]
    mask_y = mask_m[:, None] & mask_n[None, :]
    wait_for_predecessor(DEPENDENT)
    y = tl.full((BLOCK_M, BLOCK_N), 0, ACC)  # what the sum starts from, asked for before anything waits
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=mask_n, other=0.0).to(ACC)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0).to(ACC)

    if HAS_SHORTCUT:
        x_ptrs = shortcut_ptr + (n * shortcut_stride_n)[None, :, None]
        h_first = (pixel // Q * SHORTCUT_STRIDE_H)[None, :, None]
        w_first = (pixel % Q * SHORTCUT_STRIDE_W)[None, :, None]
        total = split_product(
            x_ptrs,
            shortcut_weight_ptr,
            h_first,
            w_first,
            mask_m,
            channel,
            mask_n,
            2**30,
            2**30,
            shortcut_stride_h,
            shortcut_stride_w,
            shortcut_stride_c,
            SHORTCUT_C,
            1,
            1,
            1,
            1,
            SHORTCUT_PRECISION,
            ROUND_SHORTCUT,
            ACC,
            SLICES,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if HAS_SHORTCUT_SCALE:
            total *= tl.load(shortcut_scale_ptr + channel, mask=mask_n, other=0.0).to(ACC)[None, :]
        if HAS_SHORTCUT_BIAS:
            total += tl.load(shortcut_bias_ptr + channel, mask=mask_n, other=0.0).to(ACC)[None, :]
        y += total
    x_ptrs = x_ptr + (n * x_stride_n)[None, :, None]
    h_first = (pixel // Q * STRIDE_H - PADDING_H)[None, :, None]
    w_first = (pixel % Q * STRIDE_W - PADDING_W)[None, :, None]
    total = split_product(
        x_ptrs,
        weight_ptr,
        h_first,
        w_first,
        mask_m,
        channel,
        mask_n,
        H,
        W,
        x_stride_h,
        x_stride_w,
        x_stride_c,
        C,
        R,
        S,
        DILATION_H,
        DILATION_W,
        INPUT_PRECISION,
        ROUND_X,
        ACC,
        SLICES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    start_successor(DEPENDENT)
    if HAS_SCALE:
        total *= tl.load(scale_ptr + channel, mask=mask_n, other=0.0).to(ACC)[None, :]
    y += total
    if RELU:
        y = tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL)
    if ROUND_Y:
        y = round_to_tf32(y)
    tl.store(y_ptr + offs_y, round_to(y, y_ptr.dtype.element_ty), mask=mask_y)


class Shortcut(NamedTuple):
    """scale * conv2d(x, weight) + bias, of one tap and no padding, to be added to another convolution.

    x: [N, C, H, W], any strides; weight: [K, 1, 1, C], contiguous, of a type with x; scale, bias: [K], contiguous.
    """

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    stride: tuple[int, int]
    input_precision: str
    round_x: bool


def split_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    y_strides: tuple[int, int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    input_precision: str,
    round_x: bool,
    epilogue: Epilogue,
    blocks: SplitBlocks,
    shortcut: Shortcut | None = None,
) -> None:
    """Fills y [N, K, P, Q] from x [N, C, H, W], any strides, and weight [K, R, S, C], contiguous.

    The other arguments are those of `implicit_gemm`.
    """
    N, C, H, W = x.shape
    K, P, Q = y.shape[1:]
    M = N * P * Q
    grid = (ceil_div(M, blocks.BLOCK_M) * ceil_div(K, blocks.BLOCK_N),)
    launch(
        split_gemm_forward_kernel,
        grid,
        x,
        weight,
        *epilogue[:3],
        *(shortcut[:4] if shortcut else [None] * 4),
        y,
        M,
        H,
        W,
        P * Q,
        Q,
        *x.stride(),
        *y_strides,
        *(shortcut.x.stride() if shortcut else [0] * 4),
        C,
        K,
        *weight.shape[1:3],
        *stride,
        *padding,
        *dilation,
        **epilogue.flags,
        **_flags(shortcut),
        **dependent_launch(x),
        INPUT_PRECISION=input_precision,
        ROUND_X=round_x,
        ACC=accumulator(x.dtype),
        INDEX=index_type(M + blocks.BLOCK_M),
        **blocks._asdict(),
    )


NO_SHORTCUT = {
    "HAS_SHORTCUT": False,
    "HAS_SHORTCUT_SCALE": False,
    "HAS_SHORTCUT_BIAS": False,
    "SHORTCUT_C": 0,
    "SHORTCUT_STRIDE_H": 1,
    "SHORTCUT_STRIDE_W": 1,
    "SHORTCUT_PRECISION": "ieee",
    "ROUND_SHORTCUT": False,
}


def _flags(shortcut: Shortcut | None) -> dict[str, object]:
    """The kernel's constexpr arguments."""
    if shortcut is None:
        return NO_SHORTCUT
    return {
        "HAS_SHORTCUT": True,
        "HAS_SHORTCUT_SCALE": shortcut.scale is not None,
        "HAS_SHORTCUT_BIAS": shortcut.bias is not None,
        "SHORTCUT_C": shortcut.x.shape[1],
        "SHORTCUT_STRIDE_H": shortcut.stride[0],
        "SHORTCUT_STRIDE_W": shortcut.stride[1],
        "SHORTCUT_PRECISION": shortcut.input_precision,
        "ROUND_SHORTCUT": shortcut.round_x,
    }
