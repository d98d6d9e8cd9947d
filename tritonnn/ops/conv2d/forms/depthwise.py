"""A convolution whose output channels read one input channel each: memory bounds it, not the tensor cores.

    y[n, k, p, q] = activation(bias[k] + residual[n, k, p, q] + scale[k]
                               * sum over r, s of x[n, k / multiplier, p*stride + r*dilation - padding, ...]
                                                  * weight[k, r, s])

A thread computes a strip of STRIP output rows in one column, of a few channels in channels_last: the rows of x under
it are loaded once and serve all of them. Lanes are neighbours along what is contiguous, channels or columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

from ....device.arithmetic import accumulator, index_type, round_to
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....device.epilogue import apply_epilogue
from ....runtime import hardware
from ....runtime.blocks import ceil_div, pixel_blocks, power_of_2
from ....runtime.dependent_launch import dependent_launch
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch
from ....runtime.memory_format import pixel_strides, stride_unit
from ..pack import pack_filters
from ..problem import Choice, Problem, Product
from .form import Config, Form

MOST_TAPS = 64
"""The largest filter whose taps are unrolled."""


@dataclass(frozen=True, kw_only=True)
class DepthwiseConfig(Config):
    """A tile of BLOCK_M strips of STRIP rows x BLOCK_C channels; UNROLLED: all taps of the filter."""

    form: ClassVar[str] = "depthwise"

    UNROLLED: bool
    STRIP: int
    BLOCK_M: int
    BLOCK_C: int
    num_warps: int


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
    P,
    Q,
    strips_p,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_k,
    y_stride_pixel,
    weight_stride_k,
    weight_stride_tap,
    K,
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
    UNIT: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * strips_p * Q strips of STRIP output rows x BLOCK_C output channels.

    Output channel k reads input channel k // MULTIPLIER. Of each column of the filter the rows of x under the strip are
    loaded, then multiplied for each of its output rows. K and the strides, but for those of channels, are in units of
    UNIT elements.
    """
    K = K * UNIT
    x_stride_n, x_stride_h, x_stride_w = x_stride_n * UNIT, x_stride_h * UNIT, x_stride_w * UNIT
    y_stride_n, y_stride_pixel, weight_stride_tap = y_stride_n * UNIT, y_stride_pixel * UNIT, weight_stride_tap * UNIT
    blocks_c = (K + BLOCK_C - 1) // BLOCK_C
    ROWS: tl.constexpr = (STRIP - 1) * STRIDE_H + (R - 1) * DILATION_H + 1
    pid = tl.program_id(0)
    offs_m = (pid // blocks_c).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = (offs_m // Q // strips_p).to(tl.int64)
    p = (offs_m // Q % strips_p).to(tl.int32) * STRIP
    q = (offs_m % Q).to(tl.int32)
    h_first = p * STRIDE_H - PADDING_H
    w_first = q * STRIDE_W - PADDING_W
    k = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask_k = k < K
    x_ptrs = x_ptr + (n * x_stride_n)[:, None] + ((k // MULTIPLIER).to(tl.int64) * x_stride_c)[None, :]
    weight_ptrs = weight_ptr + k.to(tl.int64) * weight_stride_k

    wait_for_predecessor(DEPENDENT)
    sums = ()
    for _ in tl.static_range(STRIP):
        sums = sums + (tl.full((BLOCK_M, BLOCK_C), 0, ACC),)
    for s in tl.static_range(S):
        w = w_first + s * DILATION_W
        mask_w = mask_m & (w >= 0) & (w < W)
        columns = x_ptrs + (w.to(tl.int64) * x_stride_w)[:, None]
        rows = ()
        for i in tl.static_range(ROWS):
            h = h_first + i
            inside = (mask_w & (h >= 0) & (h < H))[:, None] & mask_k[None, :]
            rows = rows + (tl.load(columns + (h.to(tl.int64) * x_stride_h)[:, None], mask=inside, other=0.0),)
        weights = ()
        for r in tl.static_range(R):
            weights = weights + (tl.load(weight_ptrs + (r * S + s) * weight_stride_tap, mask=mask_k, other=0.0),)
        added = ()
        for t in tl.static_range(STRIP):
            total = sums[t]
            for r in tl.static_range(R):
                total += rows[t * STRIDE_H + r * DILATION_H].to(ACC) * weights[r].to(ACC)[None, :]
            added = added + (total,)
        sums = added

    start_successor(DEPENDENT)
    for t in tl.static_range(STRIP):
        acc = sums[t]
        pixel = (p + t).to(tl.int64) * Q + q
        offs_y = (n * y_stride_n + pixel * y_stride_pixel)[:, None] + (k.to(tl.int64) * y_stride_k)[None, :]
        mask_y = (mask_m & (p + t < P))[:, None] & mask_k[None, :]
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


@triton.jit
def conv2d_depthwise_general_forward_kernel(
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
    weight_stride_k,
    weight_stride_tap,
    K,
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
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_C output channels; PIXELS = P * Q.

    Output channel k reads input channel k // MULTIPLIER. One filter tap after the other: for large filters. Units as
    above.
    """
    K = K * UNIT
    x_stride_n, x_stride_h, x_stride_w = x_stride_n * UNIT, x_stride_h * UNIT, x_stride_w * UNIT
    y_stride_n, y_stride_pixel, weight_stride_tap = y_stride_n * UNIT, y_stride_pixel * UNIT, weight_stride_tap * UNIT
    blocks_c = (K + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = (pid // blocks_c).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = (offs_m // PIXELS).to(tl.int64)
    pixel = offs_m % PIXELS
    h_first = pixel // Q * STRIDE_H - PADDING_H
    w_first = pixel % Q * STRIDE_W - PADDING_W
    k = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
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
        weight = tl.load(
            weight_ptr + k.to(tl.int64) * weight_stride_k + tap * weight_stride_tap, mask=mask_k, other=0.0
        )
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
    """Each output channel reads one input channel, of several; any x and y. The weight need not have been rounded."""

    config = DepthwiseConfig
    kernels = (conv2d_depthwise_forward_kernel, conv2d_depthwise_general_forward_kernel)

    def pack(self, weight: torch.Tensor, input_precision: str) -> torch.Tensor:
        return pack_filters(weight, "ieee", groups=weight.shape[0])

    def fits(self, product: Product) -> bool:
        return product.is_depthwise

    def takes(self, product: Product, choice: Choice) -> bool:
        unrolled = choice.config.UNROLLED
        return product.taps <= MOST_TAPS if unrolled else choice.config.STRIP == 1

    def default(self, product: Product) -> Choice | None:
        if not product.is_depthwise:
            return None
        (N, K, P, Q), size = product.y.shape, product.x.element_size()
        last, device = product.channels_last_y, product.x.device
        if product.taps > MOST_TAPS or triton.knobs.runtime.interpret:
            blocks = pixel_blocks(product.pixels, P * Q, K, last, device)
            return Choice(
                DepthwiseConfig(UNROLLED=False, STRIP=1, BLOCK_M=blocks.BLOCK_M, BLOCK_C=blocks.BLOCK_C, num_warps=4)
            )
        return Choice(default_config(N, P, Q, K, product.stride[1], size, last, hardware.gpu(device)))

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        if problem.r * problem.s > MOST_TAPS:
            return
        (p, q), size, last = problem.output, problem.dtype.itemsize, problem.channels_last_y
        for strip, vector in ((7, 8), (4, 8), (4, 16), (2, 8), (8, 8)):
            if strip < 2 * p and (vector == 8 or last):
                yield Choice(config_of(strip, problem.n, p, q, problem.k, size, last, vector))

    def run(self, product: Product, config: DepthwiseConfig) -> None:
        x, y, epilogue = product.x, product.y, product.epilogue
        N, C, H, W = x.shape
        K, P, Q = y.shape[1:]
        weight = product.packed[-K:]  # [K, R, S, 1]
        strips_p = ceil_div(P, config.STRIP)
        M = N * strips_p * Q
        sizes, constants = (P, Q, strips_p), config.constants
        (x_n, x_c, x_h, x_w), (y_n, y_k, y_pixel) = x.stride(), pixel_strides(y, product.channels_last_y)
        weight_k, weight_tap, unit = weight.stride(0), weight.stride(2), 1
        if x_c == y_k == weight_k == 1:
            unit = stride_unit(x.element_size(), x_n, x_h, x_w, y_n, y_pixel, weight_tap, K)
        kernel = conv2d_depthwise_forward_kernel
        if not constants.pop("UNROLLED"):
            kernel, sizes = conv2d_depthwise_general_forward_kernel, (P * Q, Q)
            del constants["STRIP"]
        launch(
            kernel,
            (ceil_div(M, config.BLOCK_M) * ceil_div(K, config.BLOCK_C),),
            x,
            weight,
            *epilogue[:3],
            y,
            M,
            H,
            W,
            *sizes,
            x_n // unit,
            x_c,
            x_h // unit,
            x_w // unit,
            y_n // unit,
            y_k,
            y_pixel // unit,
            weight_k,
            weight_tap // unit,
            K // unit,
            K // C,
            *weight.shape[1:3],
            *product.stride,
            *product.padding,
            *product.dilation,
            **epilogue.flags,
            **dependent_launch(x),
            ACC=accumulator(x.dtype),
            INDEX=index_type(M + config.BLOCK_M),
            UNIT=unit,
            **constants,
        )


def config_of(
    strip: int, n: int, p: int, q: int, k: int, element_size: int, channels_last_y: bool, vector: int
) -> DepthwiseConfig:
    """For 128 threads, each of which takes `vector` bytes of channels in channels_last, else as many columns."""
    strips, elements = n * ceil_div(p, strip) * q, 128 * vector // element_size
    block_c = power_of_2(k, 1, 128 // element_size) if channels_last_y else 1
    half = block_c // 2
    if block_c * element_size == 128 and 5 * ceil_div(k, half) * half <= 4 * ceil_div(k, block_c) * block_c:
        block_c = half  # which leaves far fewer lanes without a channel
    block_m = power_of_2(strips, 1, elements // block_c if channels_last_y else 128)
    return DepthwiseConfig(UNROLLED=True, STRIP=strip, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4)


def default_config(
    n: int, p: int, q: int, k: int, stride: int, element_size: int, channels_last_y: bool, gpu: Gpu
) -> DepthwiseConfig:
    """Strips that waste least of an image, the longest of them first; shorter where programs are few.

    Measured on an H100, 64 images: bfloat16 in channels_last, 3x3, 192 channels of 28x28, seven rows and 8 bytes of
    channels a thread 19.8 us, four rows 21.3, with 16 bytes 23.9 (cuDNN 21.2); float32 in NCHW, 240 channels, stride 2,
    two rows 21.3 us, seven 28.5, as lanes then read every other column (cuDNN 37.9).
    """
    longest = sorted((7, 8, 6, 5, 4), key=lambda strip: ceil_div(p, strip) * strip)[0]
    if not channels_last_y and stride > 1:
        longest = 2
    for strip in (longest, 4, 2, 1):
        config = config_of(strip, n, p, q, k, element_size, channels_last_y, 8)
        strips = n * ceil_div(p, strip) * q
        enough = ceil_div(strips, config.BLOCK_M) * ceil_div(k, config.BLOCK_C) >= gpu.multiprocessors
        if strip <= longest and enough:
            break
    return config
