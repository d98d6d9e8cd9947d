"""The head of a classifier: the mean of each channel over the whole image, then a linear layer of few outputs.

    y[n, k] = bias[k] + sum over c of weight[k, c] * (mean over h, w of x[n, c, h, w])

x: [N, C, H, W], any strides; weight: [K, C], K at most `MOST_OUTPUTS`; bias: [K] or none; y: [N, K]. Sums
and means in float32 (float64 for float64), not rounded in between.
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime import hardware
from ..runtime.blocks import ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.operator import register

MOST_OUTPUTS = 64
"""With more outputs a matrix product is faster: here every image's program reads all weights."""
MOST_IMAGES = 128
"""With more images too (1,024 of 512 channels: 9 us, by this kernel 27; H200)."""


@triton.jit
def pooled_linear_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    PIXELS,
    W,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    C: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_K outputs of an image, BLOCK_M of whose PIXELS are added up at a time.

    With a single output all products go into one sum, without the mean of each channel before: that waits less.
    """
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    n = (tl.program_id(0) // BLOCKS_K).to(tl.int64)
    k = tl.program_id(0) % BLOCKS_K * BLOCK_K
    if BLOCK_K > 1:
        k += tl.arange(0, BLOCK_K)
    wait_for_predecessor(DEPENDENT)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + k, mask=k < K, other=0.0)
    y = tl.full((BLOCK_K,), 0, ACC)
    products = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    for first_c in tl.static_range(0, C, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        total = tl.full((BLOCK_C,), 0, ACC)
        for first in range(0, PIXELS, BLOCK_M):
            pixel = first + tl.arange(0, BLOCK_M)
            offs = (pixel // W).to(tl.int64) * x_stride_h + (pixel % W).to(tl.int64) * x_stride_w
            mask_x = (pixel < PIXELS)[:, None] & (c < C)[None, :]
            x_ptrs = x_ptr + n * x_stride_n + offs[:, None] + (c.to(tl.int64) * x_stride_c)[None, :]
            x = tl.load(x_ptrs, mask=mask_x, other=0.0).to(ACC)
            if BLOCK_K == 1:  # the weight once for each row of x, so that a thread has what it multiplies
                weight = tl.load(weight_ptr + k * C + (0 * pixel[:, None] + c[None, :]), mask=mask_x, other=0.0)
                products += x * weight.to(ACC)
            else:
                total += tl.sum(x, 0)
        if BLOCK_K > 1:
            mask_weight = (k < K)[:, None] & (c < C)[None, :]
            weight = tl.load(weight_ptr + k[:, None] * C + c[None, :], mask=mask_weight, other=0.0)
            y += tl.sum(weight.to(ACC) * (total / PIXELS)[None, :], 1)
    start_successor(DEPENDENT)
    if BLOCK_K == 1:
        y = tl.sum(tl.reshape(products, (BLOCK_M * BLOCK_C,))) / PIXELS
    if HAS_BIAS:
        y += bias.to(ACC)
    tl.store(y_ptr + n * K + k, round_to(y, y_ptr.dtype.element_ty), mask=k < K)


def _output(x, weight, bias) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _launch(x, weight, bias) -> torch.Tensor:
    y = _output(x, weight, bias)
    if y.numel() == 0:
        return y
    N, C, H, W = x.shape
    K = weight.shape[0]
    weight = weight.contiguous()
    # A program an output where there are few: it has less to wait for.
    block_k = 1 if N * K <= hardware.gpu(x.device).multiprocessors else triton.next_power_of_2(max(K, 16))
    launch(
        pooled_linear_forward_kernel,
        (N * ceil_div(K, block_k),),
        x,
        weight,
        bias,
        y,
        H * W,
        W,
        *x.stride(),
        C,
        K,
        HAS_BIAS=bias is not None,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        BLOCK_M=16,
        BLOCK_C=min(triton.next_power_of_2(C), 512 if K <= 16 else 128),
        BLOCK_K=block_k,
        num_warps=8,
    )
    return y


pooled_linear = register("pooled_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _launch, _output)
