"""Copies an image tensor [N, C, H, W] of any strides to [N, H, W, C], contiguous, for a matrix product along C.

Weights [K, C, R, S] are packed by the same kernel. For products in TF32 the values are rounded to it on the way.
"""

import torch
import triton
import triton.language as tl

from ...device.arithmetic import index_type, round_to_tf32, split_weight_to_tf32
from ...device.layouts import load_along_first
from ...runtime import hardware
from ...runtime.blocks import ceil_div, power_of_2, transpose_blocks
from ...runtime.launch_plan import launch
from .problem import Product

TRUNCATED = 8.6e-8
"""The share of a sum of 32 products that Hopper's tensor cores lose on average, as they truncate each sum of eight.

It is always toward zero, so that it adds up from layer to layer, where roundings cancel: without it, the outputs of a
trained ResNet18 are off float64 by 7.6e-7 on average, with it by 1.9e-7, and PyTorch's by 3.8e-7 (H200, 1,000 images).
"""
TRUNCATED_ALONE = 6.5e-8
"""The same of the products of high parts alone, as kernels add them up that split the weight in registers.

1x1 filters of 256 channels lose 7.3e-8, 3x3 ones 5.6e-8 (H200, images of ReLU's outputs).
"""


@triton.jit
def channels_last_kernel(
    x_ptr,
    y_ptr,
    M,
    C,
    PIXELS,
    W,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    ROUND_TO_TF32: tl.constexpr,
    SPLIT: tl.constexpr,
    LOST: tl.constexpr,
    LOST_ALONE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS pixels x BLOCK_C channels.

    SPLIT: y is followed by what the rounding to TF32 left, with the share LOST of x, and by x with LOST_ALONE of it.
    """
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = (pid // blocks_c).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask = (offs_m < M)[:, None] & (c < C)[None, :]
    pixel = offs_m % PIXELS
    offs = (pixel // W).to(tl.int64) * stride_h + (pixel % W).to(tl.int64) * stride_w
    offs += (offs_m // PIXELS).to(tl.int64) * stride_n
    x = load_along_first(x_ptr, offs, c.to(tl.int64) * stride_c, offs_m < M, c < C)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * C + c[None, :]
    if SPLIT:
        high, rest = split_weight_to_tf32(x, LOST)
        if LOST_ALONE > 0:
            x = tl.where(rest == 0, x, x + LOST_ALONE * x)
        tl.store(y_ptrs + 2 * tl.cast(M, tl.int64) * C, x, mask=mask)
        tl.store(y_ptrs + tl.cast(M, tl.int64) * C, rest, mask=mask)
        x = high
    elif ROUND_TO_TF32:
        x = round_to_tf32(x)
    tl.store(y_ptrs, x, mask=mask)


def channels_last(x: torch.Tensor, round_to_tf32: bool = False) -> torch.Tensor:
    """x [N, C, H, W] as [N, H, W, C]: a view where x is channels_last in memory, unless it is to be rounded."""
    y = x.permute(0, 2, 3, 1)
    if y.is_contiguous() and not round_to_tf32:
        return y
    y = torch.empty_like(y, memory_format=torch.contiguous_format)
    _copy(x, y, round_to_tf32)
    return y


def pack_weight(weight: torch.Tensor, input_precision: str, groups: int = 1) -> torch.Tensor:
    """A filter [K, C, R, S] as the convolution's kernels read it for that precision: [K, R, S, C], contiguous.

    For "tf32" rounded to it. For "tf32x3" [3 * K, R, S, C]: rounded, what the rounding left, and as it was, for kernels
    that split it in registers or, of several groups, use no tensor cores; with what tensor cores will lose.
    """
    if input_precision != "tf32x3":
        return channels_last(weight, round_to_tf32=input_precision == "tf32")
    K, C, R, S = weight.shape
    packed = weight.new_empty(3 * K, R, S, C)
    lost = hardware.gpu(weight.device).is_hopper
    _copy(weight, packed, True, True, TRUNCATED if lost else 0.0, TRUNCATED_ALONE if lost and groups == 1 else 0.0)
    return packed


def lost_in_registers(product: Product) -> float:
    """The share of a product that a kernel is to give back which splits the weight: of one that was not packed."""
    raw = product.input_precision == "tf32x3" and len(product.packed) == product.y.shape[1]
    return TRUNCATED_ALONE if raw and hardware.gpu(product.x.device).is_hopper else 0.0


def pack_filters(weight: torch.Tensor, input_precision: str, groups: int) -> torch.Tensor:
    """A filter [K, C / groups, R, S] as the form that takes it by default reads it.

    As `pack_weight`; of one channel each, not rounded, with the channels as neighbours in memory, as they are in
    registers: [K, R, S, 1], a view of [R, S, K].
    """
    if groups > 1 and weight.shape[1] == 1 and input_precision != "tf32x3":
        return channels_last(weight.transpose(0, 1)).permute(3, 1, 2, 0)
    return pack_weight(weight, input_precision, groups)


@triton.jit
def block_diagonal_kernel(
    packed_ptr,
    y_ptr,
    rows,
    TAPS: tl.constexpr,
    GROUP_C: tl.constexpr,
    GROUP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK_ROWS of rows = K * TAPS rows of y."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    d = tl.arange(0, BLOCK_D)
    k = row // TAPS
    first = (k // BLOCK_N * BLOCK_N) // GROUP_K  # the first group of its block
    c = d[None, :] - ((k // GROUP_K - first) * GROUP_C)[:, None]
    mask = (row < rows)[:, None] & (d < DEPTH)[None, :]
    weight = tl.load(packed_ptr + row[:, None] * GROUP_C + c, mask=mask & (c >= 0) & (c < GROUP_C), other=0.0)
    tl.store(y_ptr + row[:, None] * DEPTH + d[None, :], weight, mask=mask)


def block_diagonal(packed: torch.Tensor, group_k: int, block_n: int, depth: int) -> torch.Tensor:
    """Filters [K, R, S, C / groups] as [K, R, S, depth]: zeros but for the channels of the row's own group.

    The channels of a row are those from the first group on of its block of `block_n` rows; a group has `group_k` rows.
    """
    K, R, S, C = packed.shape
    y = packed.new_empty(K, R, S, depth)
    rows, block_d = K * R * S, power_of_2(depth, 1, 2**20)
    block_rows = power_of_2(rows, 1, max(2048 // block_d, 1))
    launch(
        block_diagonal_kernel,
        (ceil_div(rows, block_rows),),
        packed,
        y,
        rows,
        TAPS=R * S,
        GROUP_C=C,
        GROUP_K=group_k,
        BLOCK_N=block_n,
        DEPTH=depth,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
    )
    return y


def _copy(
    x: torch.Tensor,
    y: torch.Tensor,
    round_to_tf32: bool,
    split: bool = False,
    lost: float = 0.0,
    lost_alone: float = 0.0,
) -> None:
    N, C, H, W = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if stride_h == W * stride_w:  # rows follow each other: one row of H * W pixels
        H, W = 1, H * W
    blocks = transpose_blocks(N * H * W, C)
    grid = (ceil_div(N * H * W, blocks.BLOCK_M) * ceil_div(C, blocks.BLOCK_C),)
    launch(
        channels_last_kernel,
        grid,
        x,
        y,
        N * H * W,
        C,
        H * W,
        W,
        stride_n,
        stride_c,
        stride_h,
        stride_w,
        ROUND_TO_TF32=round_to_tf32,
        SPLIT=split,
        LOST=lost,
        LOST_ALONE=lost_alone,
        INDEX=index_type(N * H * W + blocks.BLOCK_M),
        **blocks._asdict(),
    )
