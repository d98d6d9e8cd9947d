"""Copies an image tensor [N, C, H, W] of any strides to [N, H, W, C], contiguous, for a matrix product along C.

Weights [K, C, R, S] are packed by the same kernel. For a product in TF32 the values are rounded to it on the way.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import index_type, round_to_tf32
from .block_sizes import transpose_blocks


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
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS pixels x BLOCK_C channels."""
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_m = (pid // blocks_c).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask = (offs_m < M)[:, None] & (c < C)[None, :]
    pixel = offs_m % PIXELS
    offs = (pixel // W).to(tl.int64) * stride_h + (pixel % W).to(tl.int64) * stride_w
    offs += (offs_m // PIXELS).to(tl.int64) * stride_n
    x = tl.load(x_ptr + offs[:, None] + (c.to(tl.int64) * stride_c)[None, :], mask=mask)
    if ROUND_TO_TF32:
        x = round_to_tf32(x)
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * C + c[None, :], x, mask=mask)


def channels_last(x: torch.Tensor, round_to_tf32: bool = False) -> torch.Tensor:
    """x [N, C, H, W] as [N, H, W, C]: a view where x is channels_last in memory, unless it is to be rounded."""
    y = x.permute(0, 2, 3, 1)
    if y.is_contiguous() and not round_to_tf32:
        return y
    N, C, H, W = x.shape
    y = torch.empty_like(y, memory_format=torch.contiguous_format)
    stride_n, stride_c, stride_h, stride_w = x.stride()
    if stride_h == W * stride_w:  # rows follow each other: one row of H * W pixels
        H, W = 1, H * W
    blocks = transpose_blocks(N * H * W, C)
    grid = (triton.cdiv(N * H * W, blocks.BLOCK_M) * triton.cdiv(C, blocks.BLOCK_C),)
    channels_last_kernel[grid](
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
        INDEX=index_type(N * H * W + blocks.BLOCK_M),
        **blocks._asdict(),
    )
    return y
