"""Mean and variance of each channel of a batch, the biased variance, in one pass over x [N, C, H, W].

A lane takes those of four pixels at a time; Chan et al.'s formula combines these, then lanes, then programs, so that a
large mean costs no digits.
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..device.pixels import block_of_channels
from ..runtime.blocks import ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import pixel_strides
from .batch_norm2d_backward import statistics_dtype
from .channel_sums import UNROLL, reduction_of


@triton.jit
def combine(count, mean, m2):
    """Count, mean and sum of squared deviations of the union of the groups along axis 0; count may be [groups, 1]."""
    total = tl.sum(count, axis=0)
    divisor = tl.maximum(total, 1)
    union_mean = tl.sum(count * mean, axis=0) / divisor
    union_mean += tl.sum(count * (mean - union_mean[None, :]), axis=0) / divisor  # what the first sum rounded off
    deviation = mean - union_mean[None, :]
    return total, union_mean, tl.sum(m2 + count * deviation * deviation, axis=0)


@triton.jit
def load_pixels(x_ptr, block, c, mask_c, M, PIXELS, strides, BLOCK_M: tl.constexpr):
    """A block of x [BLOCK_M, BLOCK_C], zeros beyond the last pixel, and which of its rows are pixels, [BLOCK_M, 1]."""
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    mask_m = offs_m < M
    offs = (offs_m // PIXELS).to(tl.int64) * strides[0] + (offs_m % PIXELS).to(tl.int64) * strides[2]
    return tl.load(x_ptr + (offs + (c * strides[1])[None, :]), mask=mask_m & mask_c[None, :], other=0.0), mask_m


@triton.jit
def batch_norm2d_partial_statistics_kernel(
    x_ptr,
    partial_ptr,
    M,
    C,
    PIXELS,
    stride_n,
    stride_c,
    stride_pixel,
    SPLITS,
    STEPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns STEPS x 4 blocks of pixels x BLOCK_C channels; partial is [3, C, SPLITS]: count, mean, M2.

    A lane takes the mean and M2 of four pixels, all loaded at once, and adds them to those of its pixels before. Sums
    over many lanes are in float64.
    """
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    split = pid // blocks_c
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    count = tl.full((BLOCK_M, 1), 0, ACC)
    mean = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    m2 = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    strides = (stride_n, stride_c, stride_pixel)
    wait_for_predecessor(DEPENDENT)
    for step in range(STEPS):
        block = (split.to(INDEX) * STEPS + step) * 4
        x0, mask0 = load_pixels(x_ptr, block, c, mask_c, M, PIXELS, strides, BLOCK_M)
        x1, mask1 = load_pixels(x_ptr, block + 1, c, mask_c, M, PIXELS, strides, BLOCK_M)
        x2, mask2 = load_pixels(x_ptr, block + 2, c, mask_c, M, PIXELS, strides, BLOCK_M)
        x3, mask3 = load_pixels(x_ptr, block + 3, c, mask_c, M, PIXELS, strides, BLOCK_M)
        x0, x1, x2, x3 = x0.to(ACC), x1.to(ACC), x2.to(ACC), x3.to(ACC)
        taken = (mask0.to(ACC) + mask1.to(ACC)) + (mask2.to(ACC) + mask3.to(ACC))  # [BLOCK_M, 1]
        local = ((x0 + x1) + (x2 + x3)) * (1 / tl.maximum(taken, 1))
        d0, d1 = tl.where(mask0, x0 - local, 0), tl.where(mask1, x1 - local, 0)
        d2, d3 = tl.where(mask2, x2 - local, 0), tl.where(mask3, x3 - local, 0)
        delta = local - mean
        part = taken / tl.maximum(count + taken, 1)
        m2 += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + delta * delta * (count * part)
        mean += delta * part
        count += taken
    count, mean, m2 = combine(count.to(tl.float64), mean.to(tl.float64), m2.to(tl.float64))
    start_successor(DEPENDENT)
    partial_ptrs = partial_ptr + c * SPLITS + split
    tl.store(partial_ptrs, tl.zeros_like(mean) + count, mask=mask_c)
    tl.store(partial_ptrs + C * SPLITS, mean, mask=mask_c)
    tl.store(partial_ptrs + 2 * C * SPLITS, m2, mask=mask_c)


@triton.jit
def batch_norm2d_combine_statistics_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    inverse_ptr,
    SPLITS,
    C,
    eps: tl.float64,
    DEPENDENT: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_C channels: mean, biased variance and 1 / sqrt(var + eps) from partial [3, C, SPLITS]."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    split = tl.arange(0, BLOCK_SPLITS)[:, None]  # [BLOCK_SPLITS, 1]
    mask = (split < SPLITS) & (c < C)[None, :]
    partial_ptrs = partial_ptr + (c * SPLITS)[None, :] + split
    wait_for_predecessor(DEPENDENT)
    count = tl.load(partial_ptrs, mask=mask, other=0.0)
    mean = tl.load(partial_ptrs + C * SPLITS, mask=mask, other=0.0)
    m2 = tl.load(partial_ptrs + 2 * C * SPLITS, mask=mask, other=0.0)
    count, mean, m2 = combine(count, mean, m2)
    tl.store(mean_ptr + c, mean, mask=c < C)
    var = m2 / tl.maximum(count, 1)
    tl.store(var_ptr + c, var, mask=c < C)
    tl.store(inverse_ptr + c, 1 / tl.sqrt(var + eps), mask=c < C)


def batch_statistics(
    x: torch.Tensor, channels_last: bool, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance and 1 / sqrt(var + eps) of each channel of x [N, C, H, W], dense in that format."""
    N, C, H, W = x.shape
    M = N * H * W
    blocks, steps, splits = reduction_of(M, H * W, C, channels_last, x.device)
    acc = accumulator(x.dtype)
    dtype = statistics_dtype(x)
    partial = torch.empty(3, C, splits, dtype=torch.float64, device=x.device)
    mean, var, inverse = (torch.empty(C, dtype=dtype, device=x.device) for _ in range(3))
    launch(
        batch_norm2d_partial_statistics_kernel,
        (splits * ceil_div(C, blocks.BLOCK_C),),
        x,
        partial,
        M,
        C,
        H * W,
        *pixel_strides(x, channels_last),
        splits,
        STEPS=steps,
        **dependent_launch(x),
        ACC=acc,
        INDEX=index_type(M + steps * UNROLL * blocks.BLOCK_M),
        **blocks._asdict(),
    )
    block_splits = triton.next_power_of_2(splits)
    block_c = 16 if triton.knobs.runtime.interpret else 1
    launch(
        batch_norm2d_combine_statistics_kernel,
        (ceil_div(C, block_c),),
        partial,
        mean,
        var,
        inverse,
        splits,
        C,
        eps,
        **dependent_launch(x),
        BLOCK_SPLITS=block_splits,
        BLOCK_C=block_c,
        num_warps=min(max(block_splits // 128, 1), 8),
    )
    return mean, var, inverse
