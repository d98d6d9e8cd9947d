"""Gradient of the weight of a 2-D convolution: a matrix product whose reduction runs over all pixels of all images.

    grad_weight[k, c, r, s] = sum over n, p, q of
        g[n, k, p, q] * x[n, group(k) + c, p*stride_h + r*dilation_h - padding_h, q*stride_w + s*dilation_w - padding_w]

As a GEMM: M = K filters of a group, N = R * S * C elements of a filter, K = N * P * Q pixels. There are few tiles and
many pixels, so SPLITS programs share a tile; their sums [SPLITS, K, R, S, C] are then added up in a fixed order.

Of up to four channels under a large filter, single elements would have to be gathered: as in forms/few_channels.py x is
copied to rows of pixels of four channels, in which a row of the filter sees a channel for each of its values.
"""

import math

import torch
import triton
import triton.language as tl

from ....device.arithmetic import accumulator, index_type, round_to
from ....runtime import hardware
from ....runtime.blocks import INTERPRETER_TILE, ceil_div, power_of_2
from ....runtime.launch_plan import launch
from ..forms import few_channels
from .arithmetic import add_product

MOST_SPLITS = 128


@triton.jit
def conv2d_backward_weight_kernel(
    g_ptr,
    x_ptr,
    partial_ptr,
    M,
    H,
    W,
    PIXELS,
    Q,
    g_stride_n,
    g_stride_k,
    g_stride_p,
    g_stride_q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
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
    GROUPS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_M filters x BLOCK_N of their elements of a group, and STEPS blocks of BLOCK_K pixels.

    C and K count the channels of a group, M = N * PIXELS the pixels of g; partial is [SPLITS, GROUPS * K, R * S * C].
    """
    BLOCKS_M: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    BLOCKS_N: tl.constexpr = (R * S * C + BLOCK_N - 1) // BLOCK_N
    ONE_TAP: tl.constexpr = C % BLOCK_N == 0
    pid = tl.program_id(0)  # programs that run together share pixels
    tile = pid % (BLOCKS_M * BLOCKS_N * GROUPS)
    split = pid // (BLOCKS_M * BLOCKS_N * GROUPS)
    group = (tile // (BLOCKS_M * BLOCKS_N)).to(tl.int64)
    pid_m = tile % BLOCKS_M
    pid_n = tile // BLOCKS_M % BLOCKS_N

    offs_k = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_k = offs_k < K
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < R * S * C
    c = offs_n % C
    if ONE_TAP:
        tap = pid_n * BLOCK_N // C
        r = tap // S * DILATION_H - PADDING_H
        s = tap % S * DILATION_W - PADDING_W
    else:
        r = (offs_n // C // S * DILATION_H - PADDING_H)[None, :]
        s = (offs_n // C % S * DILATION_W - PADDING_W)[None, :]
    g_ptrs = g_ptr + ((group * K + offs_k) * g_stride_k)[None, :]
    x_ptrs = x_ptr + ((group * C + c) * x_stride_c)[None, :]

    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for step in range(STEPS):
        offs_m = (split.to(INDEX) * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask_m = (offs_m < M)[:, None]
        n = (offs_m // PIXELS).to(tl.int64)
        p = offs_m % PIXELS // Q
        q = offs_m % PIXELS % Q
        offs_g = n * g_stride_n + p.to(tl.int64) * g_stride_p + q.to(tl.int64) * g_stride_q
        h = (p * STRIDE_H)[:, None] + r  # [BLOCK_K, 1], unless ONE_TAP [BLOCK_K, BLOCK_N]
        w = (q * STRIDE_W)[:, None] + s
        inside = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        offs_x = (n * x_stride_n)[:, None] + h.to(tl.int64) * x_stride_h + w.to(tl.int64) * x_stride_w
        g = tl.load(g_ptrs + offs_g[:, None], mask=mask_m & mask_k[None, :], other=0.0)
        x = tl.load(x_ptrs + offs_x, mask=inside & mask_n[None, :], other=0.0)
        acc = add_product(tl.trans(g), x, acc, INPUT_PRECISION)
    offs = (split.to(tl.int64) * (GROUPS * K) + group * K + offs_k)[:, None] * (R * S * C) + offs_n[None, :]
    tl.store(partial_ptr + offs, acc, mask=mask_k[:, None] & mask_n[None, :])


@triton.jit
def conv2d_backward_weight_combine_kernel(
    partial_ptr,
    y_ptr,
    SIZE,
    C,
    S,
    TAPS,
    SPLITS,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    CHANNELS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK of the SIZE = K * TAPS * C sums over partial [SPLITS, K, TAPS, C]; y is [K, C, R, S].

    BY_ROWS: a tap is a row of the filter, and C are pixels of BY_ROWS channels, of which y has CHANNELS, and S pixels.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < SIZE
    split = tl.arange(0, BLOCK_SPLITS)[:, None].to(tl.int64)  # [BLOCK_SPLITS, 1]
    partial = tl.load(partial_ptr + split * SIZE + offs[None, :], mask=(split < SPLITS) & mask[None, :], other=0.0)
    c = offs % C
    r = offs // C % TAPS
    k = (offs // C // TAPS).to(tl.int64)
    if BY_ROWS:
        s = c // BY_ROWS
        c = c % BY_ROWS
        mask &= (s < S) & (c < CHANNELS)
    else:
        s = r % S
        r = r // S
    offs_y = k * stride_k + c.to(tl.int64) * stride_c + r.to(tl.int64) * stride_r + s.to(tl.int64) * stride_s
    tl.store(y_ptr + offs_y, round_to(tl.sum(partial, 0), y_ptr.dtype.element_ty), mask=mask)


def combine(partial: torch.Tensor, grad_weight: torch.Tensor, by_rows: bool) -> None:
    """grad_weight [K, C, R, S], any strides, as the sum over partial [splits, K, R * S * C].

    by_rows: [splits, K, R * pixels * 4].
    """
    K, C, R, S = grad_weight.shape
    splits, size = partial.shape[0], partial[0].numel()
    block_splits = triton.next_power_of_2(splits)
    block = power_of_2(size, 1, (INTERPRETER_TILE if triton.knobs.runtime.interpret else 4096) // block_splits)
    launch(
        conv2d_backward_weight_combine_kernel,
        (ceil_div(size, block),),
        partial,
        grad_weight,
        size,
        size // K // R if by_rows else C,
        S,
        R if by_rows else R * S,
        splits,
        *grad_weight.stride(),
        CHANNELS=C if by_rows else None,
        BY_ROWS=few_channels.CHANNELS if by_rows else 0,
        BLOCK_SPLITS=block_splits,
        BLOCK=block,
    )


def splits_of(blocks: int, tiles: int, programs: int) -> tuple[int, int]:
    """(splits, steps): programs that share a tile, and blocks of pixels of each; no more than `programs` in all.

    Steps are constants of the kernel: where they are many, few numbers of them occur.
    """
    splits = min(max(programs // tiles, 1), blocks, MOST_SPLITS)
    steps = ceil_div(blocks, splits)
    unit = 1 << max(steps.bit_length() - 4, 0)
    steps = ceil_div(steps, unit) * unit
    return ceil_div(blocks, steps), steps


def run(
    g: torch.Tensor, x: torch.Tensor, grad_weight: torch.Tensor, window: tuple, groups: int, input_precision: str
) -> None:
    """Fills grad_weight [K, C / groups, R, S]; g [N, K, P, Q] and x [N, C, H, W] have any strides."""
    filter_shape = tuple(grad_weight.shape[1:])
    by_rows = is_by_rows(g, filter_shape, window, groups)
    if by_rows:
        x, filter_shape, window = rows_of(g, x, filter_shape, window)
    combine(partial_sums(g, x, filter_shape, window, groups, input_precision), grad_weight, by_rows)


def is_by_rows(g: torch.Tensor, filter_shape: tuple[int, int, int], window: tuple, groups: int) -> bool:
    """Whether few channels under a large filter [C, R, S] pay for a copy of x: 64 images of 224x224 take 1,480 us
    without on an H200, cuDNN 297."""
    pixels = g.numel() // g.shape[1]
    large = math.prod(filter_shape) >= few_channels.LEAST_REDUCTION and pixels >= few_channels.LEAST_PIXELS
    return large and filter_shape[0] <= few_channels.CHANNELS and groups == 1 and window[2][1] == 1


def rows_of(g: torch.Tensor, x: torch.Tensor, filter_shape: tuple[int, int, int], window: tuple) -> tuple:
    """x as windows of pixels of four channels, the shape of a filter of them, and its window."""
    (stride_h, stride_w), (padding_h, padding_w), (dilation_h, _) = window
    _, R, S = filter_shape
    windows = few_channels.windows_of(x, padding_w, stride_w, S, g.shape[3])
    stride = stride_h, few_channels.CHANNELS * stride_w
    return windows, (windows.shape[1], R, 1), (stride, (padding_h, 0), (dilation_h, 1))


def partial_sums(
    g: torch.Tensor,
    x: torch.Tensor,
    filter_shape: tuple[int, int, int],
    window: tuple,
    groups: int,
    input_precision: str,
) -> torch.Tensor:
    """[splits, K, R * S * C], of a filter [C / groups, R, S]; g and x have any strides."""
    N, K, P, Q = g.shape
    H, W = x.shape[2:]
    C, R, S = filter_shape
    K, M, size = K // groups, N * P * Q, R * S * C
    if triton.knobs.runtime.interpret:
        block_m, block_n = power_of_2(K, 1, 512), power_of_2(size, 1, 1024)
        block_k, num_warps, num_stages = power_of_2(M, 1, INTERPRETER_TILE // max(block_m, block_n)), 4, 1
    elif x.element_size() == 2:
        block_m, block_n, block_k = power_of_2(K, 16, 128), power_of_2(size, 16, 128), 64
        num_warps, num_stages = (8 if block_m * block_n > 64 * 128 else 4), 3
    elif x.element_size() == 4:
        block_m, block_n, block_k, num_warps, num_stages = power_of_2(K, 16, 64), power_of_2(size, 16, 64), 32, 4, 3
    else:
        block_m, block_n, block_k, num_warps, num_stages = power_of_2(K, 16, 32), power_of_2(size, 16, 32), 16, 4, 2
    tiles = ceil_div(K, block_m) * ceil_div(size, block_n) * groups
    splits, steps = splits_of(ceil_div(M, block_k), tiles, 4 * hardware.gpu(x.device).multiprocessors)
    acc = accumulator(x.dtype)
    dtype = torch.float64 if acc == tl.float64 else torch.float32
    partial = torch.empty(splits, groups * K, size, dtype=dtype, device=x.device)
    launch(
        conv2d_backward_weight_kernel,
        (tiles * splits,),
        g,
        x,
        partial,
        M,
        H,
        W,
        P * Q,
        Q,
        *g.stride(),
        *x.stride(),
        C,
        K,
        R,
        S,
        *(size for pair in window for size in pair),
        GROUPS=groups,
        INPUT_PRECISION=input_precision,
        STEPS=steps,
        ACC=acc,
        INDEX=index_type(M + steps * block_k),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return partial
