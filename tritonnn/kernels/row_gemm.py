"""Convolution of up to four channels as a matrix product over rows of the filter, for the first layer of a network.

    y[n, k, p, q] = sum over r, j of rows[n, p*stride_h + r*dilation_h - padding_h, 4*stride_w*q + j] * weight[k, r, j]

One by one, each element of x would be gathered for many pixels: 147 times a pixel for a 7x7 filter of three channels.
Instead x is copied once to rows [N, H, columns, 4], the channels and the columns padded with zeros. There the window of
a row of the filter, padded to a power of two, is contiguous: j runs over 32 values for seven columns. So it is
implicit_gemm.py's convolution, with filters of R x 1 taps, of an image of 32 channels whose pixels overlap.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import index_type, round_to_tf32
from .block_sizes import ROW_CHANNELS, GemmBlocks, RowBlocks, ceil_div, padded_row_blocks, row_block_k, row_width
from .implicit_gemm import implicit_gemm
from .launch_plan import launch
from .product import Product


@triton.jit
def padded_rows_kernel(
    x_ptr,
    y_ptr,
    rows,
    H,
    W,
    columns,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    C: tl.constexpr,
    PADDING: tl.constexpr,
    ROUND_TO_TF32: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_H of rows = N * H rows x BLOCK_W columns; y is [N, H, columns, BLOCK_C], contiguous."""
    blocks_w = (columns + BLOCK_W - 1) // BLOCK_W
    pid = tl.program_id(0)
    row = (pid // blocks_w).to(INDEX) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    column = pid % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    c = tl.arange(0, BLOCK_C)
    w = column - PADDING
    mask = (row < rows)[:, None, None] & (column < columns)[None, :, None]
    mask_x = mask & ((w >= 0) & (w < W))[None, :, None] & (c < C)[None, None, :]
    offs_row = (row // H).to(tl.int64) * x_stride_n + (row % H).to(tl.int64) * x_stride_h
    offs_x = offs_row[:, None, None] + (w.to(tl.int64) * x_stride_w)[None, :, None]
    x = tl.load(x_ptr + offs_x + (c.to(tl.int64) * x_stride_c)[None, None, :], mask=mask_x, other=0.0)
    if ROUND_TO_TF32:
        x = round_to_tf32(x)
    offs_y = (row.to(tl.int64) * columns)[:, None, None] + column[None, :, None]
    tl.store(y_ptr + offs_y * BLOCK_C + c[None, None, :], x, mask=mask)


def padded_rows(x: torch.Tensor, padding: int, columns: int, round_to_tf32: bool = False) -> torch.Tensor:
    """x [N, C, H, W], any strides, as [N, H, columns, 4]: zeros in the first `padding` columns and where x has none."""
    N, C, H, W = x.shape
    y = x.new_empty(N, H, columns, ROW_CHANNELS)
    blocks = padded_row_blocks(N * H, columns)
    grid = (ceil_div(N * H, blocks.BLOCK_H) * ceil_div(columns, blocks.BLOCK_W),)
    launch(
        padded_rows_kernel,
        grid,
        x,
        y,
        N * H,
        H,
        W,
        columns,
        *x.stride(),
        C,
        padding,
        round_to_tf32,
        INDEX=index_type(N * H + blocks.BLOCK_H),
        **blocks._asdict(),
        BLOCK_C=ROW_CHANNELS,
    )
    return y


def fits_rows(channels: int, dilation: tuple[int, int], groups: int, dtype: torch.dtype) -> bool:
    """Whether this form takes such a convolution."""
    return channels <= ROW_CHANNELS and dilation[1] == 1 and groups == 1 and dtype.itemsize <= 4


def row_gemm(product: Product, blocks: RowBlocks) -> None:
    """A filter of few channels (`fits_rows`)."""
    x, weight, y, stride, padding = product.x, product.packed, product.y, product.stride, product.padding
    N, _, H, _ = x.shape
    Q, R, S = y.shape[3], *weight.shape[1:3]
    width = row_width(S)
    columns = ceil_div((Q - 1) * stride[1] + width, 4) * 4  # rows are a multiple of 16 elements: loads take 16 bytes
    rows = padded_rows(x, padding[1], columns, product.round_x)
    taps = padded_rows(weight.permute(0, 3, 1, 2), 0, width).view(-1, R, 1, ROW_CHANNELS * width)
    # Columns are elements, of which pixels are 4 * stride apart: as a stride of the tensor that would be a number of
    # which Triton knows only whether it is a multiple of 16, and loads would take 4 or 8 bytes.
    length = ROW_CHANNELS * columns
    windows = rows.as_strided(
        (N, ROW_CHANNELS * width, H, length - ROW_CHANNELS * width + 1), (H * length, 1, length, 1)
    )
    by_rows = product._replace(
        x=windows,
        packed=taps,
        stride=(stride[0], ROW_CHANNELS * stride[1]),
        padding=(padding[0], 0),
        dilation=(product.dilation[0], 1),
        round_x=False,
    )
    implicit_gemm(by_rows, GemmBlocks(BLOCK_K=row_block_k(S, x.element_size()), **blocks._asdict()))
