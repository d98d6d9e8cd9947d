"""Sums over the pixels of each channel: of g and, where there is an x, of g * (x - mean).

g, x: [N, C, H, W], dense, with the same strides. With a `Mask`, g counts only where ReLU let something through. Each
lane adds up a few values in float32; what many lanes contribute to is added up in float64, always in the same order.
The sum of g is the gradient of a bias.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, index_type, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..device.pixels import block_of_channels
from ..runtime import hardware
from ..runtime.blocks import PixelBlocks, ceil_div, pixel_blocks
from ..runtime.capabilities import LANES_TAKE_LAST_DIMENSIONS
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import is_channels_last, pixel_strides
from ..runtime.operator import register_gradient

MOST_SPLITS = 1024
UNROLL = 4
"""Blocks whose loads are under way together."""
MOST_CHANNELS = 64
"""Channels of a block, at most: with 128, Triton spreads the blocks of a step over the warps."""
PROGRAMS = 4
"""Programs of a multiprocessor, at most."""
LEAST_STEPS = 4
"""Steps of a program, at least, where there is work for so many: adding up its lanes takes as long as some steps."""


@triton.jit
def affine(
    inverse_ptr, weight_ptr, bias_ptr, c, mask_c, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr
):
    """What `normalized` multiplies by and adds, [1, BLOCK_C] each, for the channels c; inverse: 1 / sqrt(var + eps)."""
    scale = tl.load(inverse_ptr + c, mask=mask_c, other=0.0).to(ACC)
    bias = tl.full(scale.shape, 0, ACC)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + c, mask=mask_c, other=0.0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=mask_c, other=0.0).to(ACC)
    return scale[None, :], bias[None, :]


@triton.jit
def normalized(x, mean, scale, bias, DTYPE: tl.constexpr):
    """What batch norm makes of x, rounded to DTYPE."""
    return round_to((x - mean) * scale + bias, DTYPE)


@triton.jit
def passed_by_relu(g, y):
    """The gradient g where ReLU let a y through, or its output is y; NaN passes."""
    return tl.where(y <= 0, tl.zeros_like(g), g)


@triton.jit
def pixels_of(step, UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, AXIS: tl.constexpr):
    """The pixels of a step of a reduction: of UNROLL blocks along AXIS, 0 or 1, of each of which every lane has one."""
    block, pixel = tl.arange(0, UNROLL), tl.arange(0, BLOCK_M)
    return step * (UNROLL * BLOCK_M) + tl.expand_dims(block, 1 - AXIS) * BLOCK_M + tl.expand_dims(pixel, AXIS)


@triton.jit
def channel_sums_partial_kernel(
    g_ptr,
    x_ptr,
    mean_ptr,
    partial_ptr,
    y_ptr,
    masked_ptr,
    inverse_ptr,
    weight_ptr,
    bias_ptr,
    second_ptr,
    M,
    C,
    PIXELS,
    stride_n,
    stride_c,
    stride_pixel,
    SPLITS,
    HAS_X: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    BY_INPUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    AXIS: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns STEPS x UNROLL blocks of pixels x BLOCK_C channels; partial is [1 or 2, C, SPLITS].

    A lane loads UNROLL of the M = N * PIXELS pixels of each tensor before it waits for any.
    BY_OUTPUT: g, with a second gradient of y added where it HAS one, is masked by ReLU's output y, and stored masked;
    BY_INPUT: by what was normalised, computed again.
    """
    pid = tl.program_id(0)
    blocks_c = (C + BLOCK_C - 1) // BLOCK_C
    split = pid // blocks_c
    c, mask_c = block_of_channels(pid % blocks_c, C, BLOCK_C)
    wait_for_predecessor(DEPENDENT)
    sums = tl.full((BLOCK_M, BLOCK_C), 0, ACC)
    products = sums
    if HAS_X:
        mean = tl.load(mean_ptr + c, mask=mask_c, other=0.0).to(ACC)[None, None, :]
    if BY_INPUT:
        scale, bias = affine(inverse_ptr, weight_ptr, bias_ptr, c, mask_c, HAS_WEIGHT, HAS_BIAS, ACC)
        scale, bias = scale[None, :, :], bias[None, :, :]
    for step in range(STEPS):
        offs_m = pixels_of(split.to(INDEX) * STEPS + step, UNROLL, BLOCK_M, AXIS)
        mask = (offs_m < M)[:, :, None] & mask_c[None, None, :]
        offs = (offs_m // PIXELS).to(tl.int64) * stride_n + (offs_m % PIXELS).to(tl.int64) * stride_pixel
        offs = offs[:, :, None] + (c * stride_c)[None, None, :]
        g = tl.load(g_ptr + offs, mask=mask, other=0.0)
        if HAS_X:
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
        if HAS_SECOND:
            g = round_to(g.to(ACC) + tl.load(second_ptr + offs, mask=mask, other=0.0).to(ACC), g.dtype)
        if BY_OUTPUT:
            g = passed_by_relu(g, tl.load(y_ptr + offs, mask=mask, other=0.0).to(ACC))
            tl.store(masked_ptr + offs, g, mask=mask)
        if BY_INPUT:
            g = passed_by_relu(g, normalized(x, mean, scale, bias, g.dtype).to(ACC))
        g = g.to(ACC)
        sums += tl.sum(g, AXIS)
        if HAS_X:
            products += tl.sum(tl.where(mask, g * (x - mean), 0), AXIS)
    start_successor(DEPENDENT)
    tl.store(partial_ptr + c * SPLITS + split, tl.sum(sums.to(tl.float64), 0), mask=mask_c)
    if HAS_X:
        tl.store(partial_ptr + (C + c) * SPLITS + split, tl.sum(products.to(tl.float64), 0), mask=mask_c)


@triton.jit
def sum_of_splits(partial_ptr, c, SPLITS, BLOCK_SPLITS: tl.constexpr):
    """The sum of partial[c], [SPLITS]."""
    split = tl.arange(0, BLOCK_SPLITS)
    return tl.sum(tl.load(partial_ptr + c * SPLITS + split, mask=split < SPLITS, other=0.0), 0)


@triton.jit
def store_sum(ptr, y):
    """Stores a float64 y in the type of the pointer."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr, y if DTYPE == tl.float64 else round_to(y.to(tl.float32), DTYPE))


@triton.jit
def channel_sums_combine_kernel(partial_ptr, y_ptr, SPLITS, DEPENDENT: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """One program owns a channel of y [C], the sums of partial [C, SPLITS]."""
    c = tl.program_id(0).to(tl.int64)
    wait_for_predecessor(DEPENDENT)
    store_sum(y_ptr + c, sum_of_splits(partial_ptr, c, SPLITS, BLOCK_SPLITS))


class Reduction(NamedTuple):
    """Each of `splits` programs of a block of channels adds up `steps` times UNROLL blocks of pixels."""

    blocks: PixelBlocks
    steps: int
    splits: int


@functools.lru_cache(1024)
def reduction_of(M: int, pixels: int, C: int, channels_last: bool, device: torch.device) -> Reduction:
    """How to add up M pixels, `pixels` an image: by about PROGRAMS programs a multiprocessor."""
    blocks = pixel_blocks(M, pixels, C, channels_last, device)
    if triton.knobs.runtime.interpret:  # a tile is large enough as it is
        blocks = PixelBlocks(max(blocks.BLOCK_M // UNROLL, 1), blocks.BLOCK_C)
        programs = MOST_SPLITS
    else:
        if blocks.BLOCK_C > MOST_CHANNELS:
            blocks = PixelBlocks(blocks.BLOCK_M * blocks.BLOCK_C // MOST_CHANNELS, MOST_CHANNELS)
        programs = PROGRAMS * hardware.gpu(device).multiprocessors
    parts = ceil_div(M, UNROLL * blocks.BLOCK_M)
    steps = triton.next_power_of_2(ceil_div(parts * ceil_div(C, blocks.BLOCK_C), programs))
    least = min(LEAST_STEPS, triton.next_power_of_2(parts))
    steps = max(steps, least, triton.next_power_of_2(ceil_div(parts, MOST_SPLITS)))
    return Reduction(blocks, steps, ceil_div(parts, steps))


class PartialSums(NamedTuple):
    """partial [1 or 2, C, splits] in float64, and the constants of a kernel of C programs that adds them up."""

    partial: torch.Tensor
    splits: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_SPLITS": triton.next_power_of_2(self.splits)}


def no_sums(C: int, device: torch.device) -> PartialSums:
    """Sums over no pixels, for a kernel that combines sums only where they are wanted."""
    return PartialSums(torch.empty(2, C, 1, dtype=torch.float64, device=device), 1)


class Mask(NamedTuple):
    """How ReLU masks the gradient g of relu(normalized(x)); without any field, g is taken as it is.

    Either by its output y, and the masked g is stored in `masked`; or by what batch norm made of x, computed again with
    `inverse` (1 / sqrt(var + eps)), weight and bias, [C] each. `second` is another gradient of y, to be added to g
    before. y, masked and second have the strides of g.
    """

    y: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    second: torch.Tensor | None = None

    @property
    def flags(self) -> dict[str, bool]:
        """The kernels' constexpr arguments."""
        return {
            "BY_INPUT": self.y is None and self.inverse is not None,
            "HAS_WEIGHT": self.weight is not None,
            "HAS_BIAS": self.bias is not None,
        }


NO_MASK = Mask()


def partial_sums(
    g: torch.Tensor,
    channels_last: bool,
    x: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    mask: Mask = NO_MASK,
) -> PartialSums:
    """Sums of a dense g [N, C, H, W], not empty, and of g * (x - mean); x has the strides of g; mean: [C]."""
    N, C, H, W = g.shape
    M = N * H * W
    blocks, steps, splits = reduction_of(M, H * W, C, channels_last, g.device)
    partial = torch.empty(1 if x is None else 2, C, splits, dtype=torch.float64, device=g.device)
    launch(
        channel_sums_partial_kernel,
        (splits * ceil_div(C, blocks.BLOCK_C),),
        g,
        x,
        mean,
        partial,
        *mask,
        M,
        C,
        H * W,
        *pixel_strides(g, channels_last),
        splits,
        HAS_X=x is not None,
        BY_OUTPUT=mask.y is not None,
        HAS_SECOND=mask.second is not None,
        **mask.flags,
        **dependent_launch(g),
        STEPS=steps,
        UNROLL=UNROLL,
        AXIS=0 if LANES_TAKE_LAST_DIMENSIONS else 1,
        ACC=accumulator(g.dtype),
        INDEX=index_type(M + steps * UNROLL * blocks.BLOCK_M),
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
    constants = dependent_launch(g) | sums.blocks
    launch(channel_sums_combine_kernel, (y.numel(),), sums.partial, y, sums.splits, **constants)
    return y


channel_sums = register_gradient("channel_sums(Tensor g) -> Tensor", _launch, _output, lambda g: g.sum((0, 2, 3)))
"""The sums [C] of g [N, C, H, W], in its type."""
