"""Convolution of up to four channels as a matrix product over rows of the filter, for the first layer of a network.

    y[n, k, p, q] = sum over r, j of rows[n, p*stride_h + r*dilation_h - padding_h, 4*stride_w*q + j] * weight[k, r, j]

Gathered element by element, a 7x7 filter of three channels would need 147 loads for each pixel. Instead x is copied
once to rows [N, H, columns, 4], the channels and the columns padded with zeros. There the window of a row of the
filter, padded to a power of two, is contiguous: j runs over 32 values for seven columns. So it is the convolution of
pointers.py, with filters of R x 1 taps, of an image of 32 channels whose pixels overlap.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

from ....device.arithmetic import index_type, round_to_tf32
from ....runtime.blocks import INTERPRETER_TILE, ceil_div, power_of_2
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch
from ..problem import Choice, Problem, Product
from .form import Config, Form
from .pointers import PointersConfig, PointersForm, conv2d_pointers_forward_kernel

CHANNELS = 4
"""Channels of an image whose rows are padded: a pixel is one load of 16 bytes, or in 16-bit types of 8."""
LEAST_REDUCTION, LEAST_PIXELS = 65, 2**14
"""Longer reductions with more pixels should pay for the copy of x: this bound is reasoned, not measured."""
TILES = [
    (128, 64, 4, 3),
    (128, 64, 4, 2),
    (128, 64, 4, 1),
    (64, 64, 4, 1),
    (64, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 1),
    (64, 64, 4, 2),
]
"""BLOCK_M, BLOCK_N, warps, stages that tuning tries.

With one stage loads go through the L1 cache, where windows overlap; with more they come from L2, ahead of time.
"""


@dataclass(frozen=True, kw_only=True)
class FewChannelsConfig(Config):
    """A tile of BLOCK_M x BLOCK_N outputs, reduced a row of the filter, or a line of shared memory of it, at a time."""

    form: ClassVar[str] = "few_channels"

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


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
    y = x.new_empty(N, H, columns, CHANNELS)
    pixels = (INTERPRETER_TILE if triton.knobs.runtime.interpret else 4096) // CHANNELS
    block_w = power_of_2(columns, 1, min(pixels, 256))
    block_h = power_of_2(N * H, 1, pixels // block_w)
    grid = (ceil_div(N * H, block_h) * ceil_div(columns, block_w),)
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
        INDEX=index_type(N * H + block_h),
        BLOCK_H=block_h,
        BLOCK_W=block_w,
        BLOCK_C=CHANNELS,
    )
    return y


class FewChannelsForm(Form):
    """Up to four channels of any x, under a large filter that is not dilated along rows."""

    config = FewChannelsConfig
    kernels = (conv2d_pointers_forward_kernel,)

    def fits(self, product: Product) -> bool:
        C, size = product.x.shape[1], product.x.element_size()
        return C <= CHANNELS and product.dilation[1] == 1 and product.groups == 1 and size <= 4

    def default(self, product: Product) -> Choice | None:
        """None where gathering x element by element costs little.

        Measured on an H200 on ResNet18's first layer, 128 images of 224x224: TF32 386 us for 1,344 by single elements,
        strict float32 725 for 1,660, bfloat16, whose loads go through L1, where windows overlap, 237 for 474.
        """
        if triton.knobs.runtime.interpret or not self.fits(product):
            return None
        if product.packed[0].numel() < LEAST_REDUCTION or product.pixels < LEAST_PIXELS:
            return None
        block_m, num_warps, num_stages = 64, 4, 3
        if product.x.element_size() == 2:
            block_m, num_warps, num_stages = 128, 4, 1
        elif product.input_precision == "tf32":
            block_m, num_warps, num_stages = 128, 8, 3
        block_n = power_of_2(product.y.shape[1], 16, 64)
        config = FewChannelsConfig(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)
        return Choice(config)

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        if problem.reduction < LEAST_REDUCTION:
            return
        size, split = problem.dtype.itemsize, problem.input_precision == "tf32x3"
        for block_m, block_n, num_warps, num_stages in TILES:
            if split and block_m > 16 * num_warps:  # takes all 255 registers
                continue
            rows = block_m + (2 if split else 1) * block_n
            if num_stages * rows * row_block_k(problem.s, size) * size <= gpu.shared_memory:
                config = FewChannelsConfig(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)
                yield Choice(config)

    def run(self, product: Product, config: FewChannelsConfig) -> None:
        x, weight, y, stride, padding = product.x, product.packed, product.y, product.stride, product.padding
        R, S = weight.shape[1:3]
        width = row_width(S)
        windows = windows_of(x, padding[1], stride[1], S, y.shape[3], product.round_x)
        taps = padded_rows(weight.permute(0, 3, 1, 2), 0, width).view(-1, R, 1, CHANNELS * width)
        by_rows = product._replace(
            x=windows,
            packed=taps,
            stride=(stride[0], CHANNELS * stride[1]),
            padding=(padding[0], 0),
            dilation=(product.dilation[0], 1),
            round_x=False,
        )
        block_k = row_block_k(S, x.element_size())
        PointersForm().run(by_rows, PointersConfig(BLOCK_K=block_k, **config.constants))


def windows_of(x: torch.Tensor, padding: int, stride: int, s: int, q: int, round_to_tf32: bool = False) -> torch.Tensor:
    """A copy of x [N, C, H, W] as [N, 4 * row_width(s), H, columns]: for each of q outputs what a filter's row sees.

    Columns are elements, and pixels lie 4 * stride of them apart: as a stride of the tensor that would be one of which
    Triton knows only whether it is a multiple of 16, and loads would take 4 or 8 bytes.
    """
    N, _, H, _ = x.shape
    width = row_width(s)
    # Rows are a multiple of 16 elements, so that loads take 16 bytes.
    columns = ceil_div((q - 1) * stride + width, 4) * 4
    rows = padded_rows(x, padding, columns, round_to_tf32)
    length = CHANNELS * columns
    return rows.as_strided((N, CHANNELS * width, H, length - CHANNELS * width + 1), (H * length, 1, length, 1))


def row_width(s: int) -> int:
    """The columns that a row of a filter of s columns is padded to: at least one block of 16 elements."""
    return max(triton.next_power_of_2(s), 4)


def row_block_k(s: int, element_size: int) -> int:
    """Elements of a row of a filter of s columns, or of one line of shared memory."""
    return min(CHANNELS * row_width(s), 128 // element_size)
