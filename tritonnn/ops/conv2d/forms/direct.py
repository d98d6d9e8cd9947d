"""A convolution of short sums, in float32 without tensor cores, for images in NCHW: few channels, or few a group.

    y[n, k, p, q] = activation(bias[k] + residual[n, k, p, q] + scale[k]
                               * sum over c, r, s of x[n, group(k) + c, p*stride + r*dilation - padding, ...]
                                                     * weight[k, r, s, c])

A thread computes a strip of STRIP output rows in one column, of BLOCK_N channels of a group: what it loads of x serves
all of them. Lanes are neighbours along columns, and the weight is the same for all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ....device.arithmetic import accumulator, index_type, round_to
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....device.epilogue import apply_epilogue
from ....runtime import hardware
from ....runtime.blocks import ceil_div, power_of_2
from ....runtime.dependent_launch import dependent_launch
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch
from ....runtime.memory_format import pixel_strides
from ..problem import Choice, Problem, Product
from .form import Config, Form

MOST_TAPS = 25
"""Taps of a filter, at most, as they are unrolled."""
MOST_SUMS = 64
"""Sums of a thread, at most: all are in registers."""
MOST_PRODUCTS = 288
"""Products of a sum, at most, with which tuning tries this form."""
LONGEST_OF_GROUPS = 80
"""Up to so many products of a sum this form is the default: with 16 channels a group others are faster."""
FEW_FILTERS, FEW_PRODUCTS = 32, 48
"""Up to so many filters, and products of a sum, this form is the default without groups."""
STRIPS = [(7, 8), (4, 8), (4, 16), (4, 4), (2, 8)]
"""STRIP, and the most for BLOCK_N, that tuning tries."""


@dataclass(frozen=True, kw_only=True)
class DirectConfig(Config):
    """A tile of BLOCK_M strips of STRIP rows x BLOCK_N channels of a group."""

    form: ClassVar[str] = "direct"

    STRIP: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int


@triton.jit
def conv2d_direct_forward_kernel(
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
    groups,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_k,
    y_stride_pixel,
    GROUP_C: tl.constexpr,
    GROUP_K: tl.constexpr,
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
    STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * strips_p * Q strips of STRIP output rows x BLOCK_N channels of a group.

    weight is [groups * GROUP_K, R, S, GROUP_C], contiguous; BLOCK_N divides GROUP_K.
    """
    BLOCKS_N: tl.constexpr = GROUP_K // BLOCK_N
    ROWS: tl.constexpr = (STRIP - 1) * STRIDE_H + (R - 1) * DILATION_H + 1
    pid = tl.program_id(0)
    group = (pid // BLOCKS_N % groups).to(tl.int64)
    first_k = group * GROUP_K + pid % BLOCKS_N * BLOCK_N
    offs_m = (pid // BLOCKS_N // groups).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = (offs_m // Q // strips_p).to(tl.int64)
    p = (offs_m // Q % strips_p).to(tl.int32) * STRIP
    q = (offs_m % Q).to(tl.int32)
    h_first = p * STRIDE_H - PADDING_H
    w_first = q * STRIDE_W - PADDING_W
    x_ptrs = x_ptr + group * GROUP_C * x_stride_c + n * x_stride_n
    weight_ptr += first_k * (R * S * GROUP_C)

    wait_for_predecessor(DEPENDENT)
    sums = ()
    for _ in tl.static_range(STRIP * BLOCK_N):
        sums = sums + (tl.full((BLOCK_M,), 0, ACC),)
    for c in range(GROUP_C):
        for s in tl.static_range(S):
            w = w_first + s * DILATION_W
            mask_w = mask_m & (w >= 0) & (w < W)
            columns = x_ptrs + w.to(tl.int64) * x_stride_w
            rows = ()
            for i in tl.static_range(ROWS):
                h = h_first + i
                inside = mask_w & (h >= 0) & (h < H)
                rows = rows + (tl.load(columns + h.to(tl.int64) * x_stride_h, mask=inside, other=0.0).to(ACC),)
            added = ()
            for j in tl.static_range(BLOCK_N):
                weights = ()
                for r in tl.static_range(R):
                    weights = weights + (tl.load(weight_ptr + ((j * R + r) * S + s) * GROUP_C + c).to(ACC),)
                for t in tl.static_range(STRIP):
                    total = sums[j * STRIP + t]
                    for r in tl.static_range(R):
                        total += rows[t * STRIDE_H + r * DILATION_H] * weights[r]
                    added = added + (total,)
            sums = added
        x_ptrs += x_stride_c

    start_successor(DEPENDENT)
    for j in tl.static_range(BLOCK_N):
        k = first_k + j + tl.arange(0, 1)  # [1]
        mask_k = k >= 0
        for t in tl.static_range(STRIP):
            pixel = (p + t).to(tl.int64) * Q + q
            offs_y = (n * y_stride_n + pixel * y_stride_pixel)[:, None] + (k * y_stride_k)[None, :]
            mask_y = (mask_m & (p + t < P))[:, None]
            acc = apply_epilogue(
                sums[j * STRIP + t][:, None],
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


class DirectForm(Form):
    """Short sums over any x. The weight need not have been rounded."""

    config = DirectConfig
    kernels = (conv2d_direct_forward_kernel,)
    packs_weight = False

    def fits(self, product: Product) -> bool:
        return product.taps <= MOST_TAPS and product.x.element_size() <= 4 and not product.is_depthwise

    def takes(self, product: Product, choice: Choice) -> bool:
        config, group_k = choice.config, product.y.shape[1] // product.groups
        return group_k % config.BLOCK_N == 0 and config.STRIP * config.BLOCK_N <= MOST_SUMS and not choice.copies_x

    def default(self, product: Product) -> Choice | None:
        """For images in NCHW of a few channels, or a few a group, unless they are rounded to TF32.

        Measured on an H200, 64 images, float32: 8 channels a group, 3x3, 256 of 28x28 88 us (pointers 238, cuDNN on an
        H100 151), stride 2 101 (247, 277); 4 a group, 128 of 56x56 112 (1,118, 301). Without groups, in brackets by
        pointers and cuDNN's: 3 to 24 channels of 224x224, 3x3, stride 2 62 (158, 112), to 32 72 (160, 112), of 299x299
        128 (283, 198); one tap, 48 to 24 of 56x56 55 (78, 22), 32 to 16 of 112x112 75 (78, 60).
        """
        x, (N, K, P, Q), groups = product.x, product.y.shape, product.groups
        nchw = x.stride(3) == 1 and x.stride(1) != 1 and not product.channels_last_y
        if not nchw or triton.knobs.runtime.interpret or not self.fits(product):
            return None
        gpu, reduction = hardware.gpu(x.device), product.packed[0].numel()
        if groups == 1:
            few = K <= FEW_FILTERS and K % 8 == 0 and reduction <= FEW_PRODUCTS
            if not few or product.input_precision != "ieee" or x.element_size() != 4:
                return None
            config = config_of(4, 16 if product.taps > 1 else 8, N, P, Q, K)
            programs = ceil_div(N * ceil_div(P, config.STRIP) * Q, config.BLOCK_M) * K // config.BLOCK_N
            return Choice(config) if programs >= 2 * gpu.multiprocessors else None
        if product.input_precision == "tf32" or reduction > LONGEST_OF_GROUPS:
            return None
        return Choice(default_config(N, P, Q, groups, K // groups, product.stride[0], gpu))

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        """Where lanes read neighbouring columns, and sums are short."""
        if problem.channels_last_x or problem.reduction > MOST_PRODUCTS:
            return
        (p, q), group_k = problem.output, problem.k // problem.groups
        for strip, most_n in STRIPS:
            if strip < 2 * p:
                yield Choice(config_of(strip, most_n, problem.n, p, q, group_k))

    def run(self, product: Product, config: DirectConfig) -> None:
        x, y, epilogue, groups = product.x, product.y, product.epilogue, product.groups
        N, C, H, W = x.shape
        K, P, Q = y.shape[1:]
        weight = product.packed[-K:]  # [K, R, S, C / groups]
        strips_p = ceil_div(P, config.STRIP)
        M = N * strips_p * Q
        launch(
            conv2d_direct_forward_kernel,
            (ceil_div(M, config.BLOCK_M) * (K // config.BLOCK_N),),
            x,
            weight,
            *epilogue[:3],
            y,
            M,
            H,
            W,
            P,
            Q,
            strips_p,
            groups,
            *x.stride(),
            *pixel_strides(y, product.channels_last_y),
            C // groups,
            K // groups,
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


def config_of(strip: int, most_n: int, n: int, p: int, q: int, group_k: int) -> DirectConfig:
    """For strips of that length, and programs of 128 threads with at most `most_n` of a group's `group_k` channels."""
    block_n = max(d for d in (1, 2, 4, 8, 16) if group_k % d == 0 and d <= most_n and d * strip <= MOST_SUMS)
    block_m = power_of_2(n * ceil_div(p, strip) * q, 1, 128)
    return DirectConfig(STRIP=strip, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)


def default_config(n: int, p: int, q: int, groups: int, group_k: int, stride: int, gpu: Gpu) -> DirectConfig:
    """Strips that waste least of an image, the longest of them first; shorter where programs are few.

    With a stride of 2 strips of four rows are faster: 101 us for 121 with seven (H200, 256 channels, 8 a group).
    """
    longest = 4 if stride > 1 else min((7, 8, 6, 5, 4), key=lambda strip: ceil_div(p, strip) * strip)
    for strip in (longest, 4, 2, 1):
        config = config_of(strip, 8, n, p, q, group_k)
        blocks_m = ceil_div(n * ceil_div(p, strip) * q, config.BLOCK_M)
        if strip <= longest and blocks_m * groups * group_k // config.BLOCK_N >= 2 * gpu.multiprocessors:
            break
    return config
