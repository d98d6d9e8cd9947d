"""A convolution whose output channels read one input channel each: memory bounds it, not the tensor cores.

y[n, k, p, q] = activation(bias[k] + residual[n, k, p, q] + scale[k]
                           * sum over r, s of x[n, k / multiplier, p*stride + r*dilation - padding, ...]
                                              * weight[k, r, s])
"""

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ....device.arithmetic import accumulator, index_type, round_to
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....device.epilogue import apply_epilogue
from ....runtime.blocks import ceil_div, pixel_blocks
from ....runtime.dependent_launch import dependent_launch
from ....runtime.launch_plan import launch
from ....runtime.memory_format import pixel_strides
from ..problem import Choice, Product
from .form import Config, Form


@dataclass(frozen=True, kw_only=True)
class DepthwiseConfig(Config):
    """A tile of BLOCK_M pixels x BLOCK_C channels."""

    form: ClassVar[str] = "depthwise"

    BLOCK_M: int
    BLOCK_C: int


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
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
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
    offs_y = (n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel)[:, None] + (k.to(tl.int64) * y_stride_k)[None, :]
    mask_y = mask_m[:, None] & mask_k[None, :]
    acc = apply_epilogue(
        acc,
        scale_ptr,
        bias_ptr,
        residual_ptr,
        k,
        mask_k,
        offs_y,
        mask_y,
        HAS_SCALE,
        HAS_BIAS,
        HAS_RESIDUAL,
        ACTIVATION,
        SLOPE,
        ROUND_Y,
    )
    tl.store(y_ptr + offs_y, round_to(acc, y_ptr.dtype.element_ty), mask=mask_y)


class DepthwiseForm(Form):
    """One input channel an output channel, of several groups; any x and y. The weight need not have been rounded."""

    config = DepthwiseConfig
    kernels = (conv2d_depthwise_forward_kernel,)
    packs_weight = False

    def fits(self, product: Product) -> bool:
        return product.is_depthwise

    def default(self, product: Product) -> Choice | None:
        if not product.is_depthwise:
            return None
        _, K, P, Q = product.y.shape
        blocks = pixel_blocks(product.pixels, P * Q, K, product.channels_last_y, product.x.device)
        return Choice(DepthwiseConfig(BLOCK_M=blocks.BLOCK_M, BLOCK_C=blocks.BLOCK_C))

    def run(self, product: Product, config: DepthwiseConfig) -> None:
        x, y, epilogue = product.x, product.y, product.epilogue
        N, C, H, W = x.shape
        K, P, Q = y.shape[1:]
        weight = product.packed[-K:]
        M = N * P * Q
        grid = (ceil_div(M, config.BLOCK_M) * ceil_div(K, config.BLOCK_C),)
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
            *pixel_strides(y, product.channels_last_y),
            K,
            K // C,
            *weight.shape[1:3],
            *product.stride,
            *product.padding,
            *product.dilation,
            **epilogue.flags,
            **dependent_launch(x),
            ACC=accumulator(x.dtype),
            INDEX=index_type(M + config.BLOCK_M),
            **config.constants,
        )
