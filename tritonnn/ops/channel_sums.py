"""Sums over the pixels of each channel: of g and, where there is an x, of g * (x - mean).

g, x: [N, C, H, W], dense, with the same strides. Each lane adds up a few values in float32; what many lanes contribute
to is added up in float64, always in the same order. The sum of g is the gradient of a bias.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..runtime.blocks import ceil_div, pixel_blocks
from ..runtime.launch_plan import launch
from ..runtime.memory_format import is_channels_last, pixel_strides
from ..runtime.operator import register_gradient

MOST_SPLITS = 1024


@triton.jit
def channel_sums_partial_kernel(
    g_ptr,
    x_ptr,
    mean_ptr,
    partial_ptr,
    M,
    C,
    PIXELS,
    stride_n,
    stride_c,
    stride_pixel,
    SPLITS,
    HAS_X: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns STEPS blocks of the M = N * PIXELS pixels x BLOCK_C channels; partial is [1 or 2, SPLITS, C]."""
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    split = pid // blocks_c
    c = (pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C]
    mask_c = c < C
    sums = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    products = sums
    if HAS_X:
        mean = tl.load(mean_ptr + c, mask=mask_c, other=0.0).to(ACC)[None, :]
    for step in tl.range(STEPS, loop_unroll_factor=UNROLL):  # unrolled, loads do not wait for each other
        offs_m = (split.to(INDEX) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (offs_m < M)[:, None] & mask_c[None, :]
        offs = (offs_m // PIXELS).to(tl.int64) * stride_n + (offs_m % PIXELS).to(tl.int64) * stride_pixel
        offs = offs[:, None] + (c * stride_c)[None, :]
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC)
        sums += g
        if HAS_X:
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
            products += tl.where(mask, g * (x - mean), 0)
    split = split.to(tl.int64)
    tl.store(partial_ptr + split * C + c, tl.sum(sums.to(tl.float64), 0), mask=mask_c)
    if HAS_X:
        tl.store(partial_ptr + (SPLITS + split) * C + c, tl.sum(products.to(tl.float64), 0), mask=mask_c)


@triton.jit
def sum_of_splits(partial_ptr, which, c, SPLITS, C, BLOCK_SPLITS: tl.constexpr):
    """The sums [BLOCK_C] of the channels c of partial[which], [SPLITS, C]."""
    split = tl.arange(0, BLOCK_SPLITS).to(tl.int64)[:, None]  # [BLOCK_SPLITS, 1]
    mask = (split < SPLITS) & (c < C)[None, :]
    return tl.sum(tl.load(partial_ptr + (which * SPLITS + split) * C + c[None, :], mask=mask, other=0.0), 0)


@triton.jit
def store_sums(ptrs, y, mask):
    """Stores a float64 y in the type of the pointers."""
    DTYPE: tl.constexpr = ptrs.dtype.element_ty
    if DTYPE == tl.float64:
        tl.store(ptrs, y, mask=mask)
    else:
        tl.store(ptrs, round_to(y.to(tl.float32), DTYPE), mask=mask)


@triton.jit
def channel_sums_combine_kernel(partial_ptr, y_ptr, SPLITS, C, BLOCK_SPLITS: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program owns BLOCK_C channels of y [C], the sums of partial [SPLITS, C]."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    store_sums(y_ptr + c, sum_of_splits(partial_ptr, 0, c, SPLITS, C, BLOCK_SPLITS), c < C)


class PartialSums(NamedTuple):
    """partial [1 or 2, splits, C] in float64, and the blocks of the kernel that adds them up."""

    partial: torch.Tensor
    splits: int

    @property
    def blocks(self) -> dict[str, int]:
        # 1,024 splits x 4 channels in float64 just fit the registers of 8 warps.
        block_c = 16 if triton.knobs.runtime.interpret else 4
        return {"BLOCK_SPLITS": triton.next_power_of_2(self.splits), "BLOCK_C": block_c, "num_warps": 8}

    @property
    def grid(self) -> tuple[int]:
        return (ceil_div(self.partial.shape[2], self.blocks["BLOCK_C"]),)


def no_sums(C: int, device: torch.device) -> PartialSums:
    """Of no pixels, for a kernel that combines sums only where they are wanted."""
    return PartialSums(torch.empty(2, 1, C, dtype=torch.float64, device=device), 1)


def partial_sums(
    g: torch.Tensor, channels_last: bool, x: torch.Tensor | None = None, mean: torch.Tensor | None = None
) -> PartialSums:
    """Of a dense g [N, C, H, W], not empty, and an x with its strides; mean: [C]."""
    N, C, H, W = g.shape
    M = N * H * W
    blocks = pixel_blocks(M, H * W, C, channels_last, g.device)
    blocks_m, blocks_c = ceil_div(M, blocks.BLOCK_M), ceil_div(C, blocks.BLOCK_C)
    steps = triton.next_power_of_2(ceil_div(blocks_m * blocks_c, MOST_SPLITS))  # about as many programs
    splits = ceil_div(blocks_m, steps)
    partial = torch.empty(1 if x is None else 2, splits, C, dtype=torch.float64, device=g.device)
    launch(
        channel_sums_partial_kernel,
        (splits * blocks_c,),
        g,
        x,
        mean,
        partial,
        M,
        C,
        H * W,
        *pixel_strides(g, channels_last),
        splits,
        HAS_X=x is not None,
        STEPS=steps,
        UNROLL=min(steps, 4),
        ACC=accumulator(g.dtype),
        INDEX=index_type(M + steps * blocks.BLOCK_M),
        **blocks._asdict(),
    )
    return PartialSums(partial, splits)


def _output(g) -> torch.Tensor:
    return g.new_empty(g.shape[1])


def _launch(g) -> torch.Tensor:
    y = _output(g)
    channels_last = is_channels_last(g)
    g = g.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if g.numel() == 0:
        return y.zero_()
    sums = partial_sums(g, channels_last)
    launch(channel_sums_combine_kernel, sums.grid, sums.partial, y, sums.splits, y.numel(), **sums.blocks)
    return y


channel_sums = register_gradient("channel_sums(Tensor g) -> Tensor", _launch, _output, lambda g: g.sum((0, 2, 3)))
"""The sums [C] of g [N, C, H, W], in its type."""
