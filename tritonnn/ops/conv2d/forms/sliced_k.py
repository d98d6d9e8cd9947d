"""Sliced-K and split-K, for few pixels: warps and programs share the reduction, so that small tiles fill the GPU.

    y[n, k, p, q] = activation(bias[k] + residual[n, k, p, q] + shortcut[n, k, p, q] + scale[k]
                               * sum over r, s, c of x[n, c, p*stride + r*dilation - padding, ...] * weight[k, r, s, c])

In a step each warp multiplies its own block of the reduction, SLICES of them as one batched product (sliced-K); at the
end these are added up, in the same order every time. SPLITS programs share a tile (split-K); the last one to finish
adds up their parts. A shortcut is a second convolution, of one tap.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import triton
import triton.language as tl

from ....device.arithmetic import (
    accumulator,
    add,
    dot,
    index_type,
    round_to,
    round_to_tf32,
    split_to_tf32,
    split_weight_to_tf32,
)
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....device.epilogue import finish
from ....device.layouts import load_first_operand, renamed
from ....device.pixels import MOST_PIXELS, quotient
from ....device.split_k import leave_part, parts_of, sum_of_parts
from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.dependent_launch import dependent_launch
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch, launch_semaphores
from ....runtime.memory_format import pixel_strides
from ..pack import lost_in_registers
from ..problem import Choice, Problem, Product, shortcut_flags
from .form import Config, Form, by_waves, splits_of
from .tma import can_share_tiles, shares_rows

OUTPUTS_OF_A_MULTIPROCESSOR = 1000
"""With fewer outputs a multiprocessor than this, larger tiles would leave some multiprocessors idle."""
MOST_TRIED_OUTPUTS = 2**19
"""Tuning tries this form for at most so many outputs."""
MUCH_READ = 48 * 2**20
"""Bytes that come out of L2, from which on larger tiles, which programs of the form TMA share, are faster.

One image in bfloat16, 3x3, 512 channels of 14x14, 66 MB, 8.7 us for 12.3, 1,024 of 7x7, 76 MB, 9.9 for 11.6; but 512 of
7x7, 38 MB, 9.0 for 6.6 (H200). Not so of a single row of tiles, which reads the weight once.
"""
READ_WHILE_WAITING = 12 * 2**20
"""Bytes that come out of L2 in the 2 us for which programs of a tile wait for each other."""
TILES = [(16, 8), (16, 16), (16, 32), (32, 32)]
"""BLOCK_M, BLOCK_N that tuning tries."""
SLICES = [(4, 4, 4), (8, 8, 3), (8, 8, 5), (4, 4, 6)]
"""SLICES, warps, stages that tuning tries."""


@dataclass(frozen=True, kw_only=True)
class SlicedKConfig(Config):
    """A tile of BLOCK_M x BLOCK_N outputs, of SPLITS programs that each reduce SLICES blocks of BLOCK_K at a time.

    SLICES is a power of 2.
    """

    form: ClassVar[str] = "sliced_k"

    SPLITS: int
    SLICES: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@triton.jit
def sliced_product(
    x_ptr,
    weight_ptr,
    offs_x,
    h_first,
    w_first,
    mask_m,
    channel,
    mask_n,
    split,
    H,
    W,
    stride_h,
    stride_w,
    stride_c,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    LOST: tl.constexpr,
    ROUND_X: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums [BLOCK_M, BLOCK_N] of the products of weight [K, R, S, C] and the pixels from h_first, w_first on.

    Of the `split`-th part of SPLITS of the reduction. offs_x [1, BLOCK_M, 1] leads to those pixels; h_first and w_first
    have this shape too. Without PADDED none lies outside the image.
    """
    BLOCKS_C: tl.constexpr = C // BLOCK_K
    BLOCKS: tl.constexpr = R * S * BLOCKS_C
    PART: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    STEPS: tl.constexpr = (PART + SLICES - 1) // SLICES
    EVEN: tl.constexpr = BLOCKS % SPLITS == 0 and PART % SLICES == 0
    first = split * PART
    end = tl.minimum(first + PART, BLOCKS)
    offs_k = tl.arange(0, BLOCK_K)[None, None, :]
    weight_ptrs = weight_ptr + (channel.to(OFFSET) * (R * S * C))[None, :, None] + offs_k
    slices = tl.arange(0, SLICES)[:, None, None]
    acc = tl.full((SLICES, BLOCK_M, BLOCK_N), 0, ACC)
    small = acc
    for step in range(STEPS):
        block = first + step * SLICES + slices  # [SLICES, 1, 1]
        tap = block // BLOCKS_C
        r = tap // S * DILATION_H
        s = tap % S * DILATION_W
        c = block % BLOCKS_C * BLOCK_K + offs_k  # [SLICES, 1, BLOCK_K]
        mask_x = mask_m[None, :, None]
        mask_weight = mask_n[None, :, None]
        if PADDED:
            # As unsigned numbers, negative coordinates become huge: one comparison covers both edges.
            h = (h_first + r).to(tl.uint32, bitcast=True)  # [SLICES, BLOCK_M, 1]
            w = (w_first + s).to(tl.uint32, bitcast=True)
            mask_x = mask_x & (h < H) & (w < W)
        if not EVEN:
            mask_x = mask_x & (block < end)
            mask_weight = mask_weight & (block < end)
        shift = r.to(OFFSET) * stride_h + s.to(OFFSET) * stride_w + c.to(OFFSET) * stride_c
        x = load_first_operand(x_ptr + (offs_x + shift), mask_x)  # [SLICES, BLOCK_M, BLOCK_K]
        weight = tl.load(weight_ptrs + block * BLOCK_K, mask=mask_weight, other=0.0)  # [SLICES, BLOCK_N, BLOCK_K]
        weight = tl.permute(weight, (0, 2, 1))
        if INPUT_PRECISION == "tf32x3":
            x_high, x_low = split_to_tf32(x)
            weight_high, weight_low = split_weight_to_tf32(weight, LOST)
            # Two chains of products: the small ones may all be added up in the tensor core, whose sums are truncated.
            small = tl.dot(x_low, weight_high, small, input_precision="tf32")
            x_high = renamed(x_high)
            small = tl.dot(x_high, weight_low, small, input_precision="tf32")
            x_high, weight_high = renamed(x_high), renamed(weight_high)
            acc = add(acc, tl.dot(x_high, weight_high, input_precision="tf32"))
        else:
            if ROUND_X:
                x = round_to_tf32(x)
            if INPUT_PRECISION == "tf32":
                weight = round_to_tf32(weight)
            acc = dot(x, weight, acc, INPUT_PRECISION)
    if INPUT_PRECISION == "tf32x3":
        acc += small
    return tl.sum(acc, 0)


@triton.jit
def conv2d_sliced_k_forward_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    shortcut_ptr,
    shortcut_weight_ptr,
    shortcut_scale_ptr,
    shortcut_bias_ptr,
    y_ptr,
    partial_ptr,
    semaphores_ptr,
    M,
    H,
    W,
    PIXELS,
    Q,
    inverse_of_pixels,
    inverse_of_q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_k,
    y_stride_pixel,
    shortcut_stride_n,
    shortcut_stride_c,
    shortcut_stride_h,
    shortcut_stride_w,
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
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHORTCUT: tl.constexpr,
    HAS_SHORTCUT_SCALE: tl.constexpr,
    HAS_SHORTCUT_BIAS: tl.constexpr,
    SHORTCUT_C: tl.constexpr,
    SHORTCUT_STRIDE_H: tl.constexpr,
    SHORTCUT_STRIDE_W: tl.constexpr,
    SHORTCUT_PRECISION: tl.constexpr,
    ROUND_SHORTCUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    LOST: tl.constexpr,
    ROUND_X: tl.constexpr,
    ROUND_Y: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    OFFSET: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """SPLITS programs own BLOCK_M of M = N * PIXELS output pixels x BLOCK_N output channels; PIXELS = P * Q.

    weight is [K, R, S, C], contiguous; C is a multiple of BLOCK_K; the residual has the strides of y. The shortcut is a
    second image under a filter of one tap and no padding, whose products are added. With several SPLITS, partial
    [tiles, SPLITS, BLOCK_M, BLOCK_N] takes their sums, and semaphores [tiles], zero before and after, count them.
    """
    BLOCKS_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N

    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    offs_m = tile // BLOCKS_N * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = tl.full((BLOCK_M,), 0, tl.int32) if ONE_IMAGE else quotient(offs_m, inverse_of_pixels)
    pixel = offs_m - n * PIXELS
    p = quotient(pixel, inverse_of_q)
    q = pixel - p * Q
    n = n.to(OFFSET)
    h_first = (p * STRIDE_H - PADDING_H)[None, :, None]
    w_first = (q * STRIDE_W - PADDING_W)[None, :, None]
    offs_x = (n * x_stride_n)[None, :, None]
    offs_x += h_first.to(OFFSET) * x_stride_h + w_first.to(OFFSET) * x_stride_w
    channel = tile % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = channel < K
    offs_y = (n * y_stride_n + pixel.to(OFFSET) * y_stride_pixel)[:, None]
    offs_y += (channel.to(OFFSET) * y_stride_k)[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    wait_for_predecessor(DEPENDENT)
    # Loaded before the product, which takes as long, and first used after it: the compiler waits where a value is used.
    if HAS_SCALE:
        scale = tl.load(scale_ptr + channel, mask=mask_n, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=mask_n, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0)
    if HAS_SHORTCUT_SCALE:
        shortcut_scale = tl.load(shortcut_scale_ptr + channel, mask=mask_n, other=0.0)
    if HAS_SHORTCUT_BIAS:
        shortcut_bias = tl.load(shortcut_bias_ptr + channel, mask=mask_n, other=0.0)

    shortcut = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    if HAS_SHORTCUT:
        h = (p * SHORTCUT_STRIDE_H)[None, :, None]
        w = (q * SHORTCUT_STRIDE_W)[None, :, None]
        offs_shortcut = (n * shortcut_stride_n)[None, :, None]
        offs_shortcut += h.to(OFFSET) * shortcut_stride_h + w.to(OFFSET) * shortcut_stride_w
        shortcut = sliced_product(
            shortcut_ptr,
            shortcut_weight_ptr,
            offs_shortcut,
            h,
            w,
            mask_m,
            channel,
            mask_n,
            split,
            0,
            0,
            0,
            0,
            shortcut_stride_c,
            SHORTCUT_C,
            1,
            1,
            1,
            1,
            False,
            SHORTCUT_PRECISION,
            0.0,
            ROUND_SHORTCUT,
            ACC,
            OFFSET,
            SPLITS,
            SLICES,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if HAS_SHORTCUT_SCALE:
            shortcut *= shortcut_scale.to(ACC)[None, :]
    total = sliced_product(
        x_ptr,
        weight_ptr,
        offs_x,
        h_first,
        w_first,
        mask_m,
        channel,
        mask_n,
        split,
        H,
        W,
        x_stride_h,
        x_stride_w,
        x_stride_c,
        C,
        R,
        S,
        DILATION_H,
        DILATION_W,
        PADDING_H > 0 or PADDING_W > 0,
        INPUT_PRECISION,
        LOST,
        ROUND_X,
        ACC,
        OFFSET,
        SPLITS,
        SLICES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    start_successor(DEPENDENT)
    if HAS_SCALE:
        total *= scale.to(ACC)[None, :]
    total += shortcut
    last = True
    if SPLITS > 1:
        parts = parts_of(partial_ptr, tile, SPLITS, BLOCK_M, BLOCK_N)
        last = leave_part(total, parts, split, semaphores_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            total = sum_of_parts(parts, semaphores_ptr + tile, SPLITS)
        if HAS_BIAS:
            total += bias.to(ACC)[None, :]
        if HAS_SHORTCUT_BIAS:
            total += shortcut_bias.to(ACC)[None, :]
        if HAS_RESIDUAL:
            total += residual.to(ACC)
        total = finish(total, ACTIVATION, SLOPE, ROUND_Y)
        tl.store(y_ptr + offs_y, round_to(total, y_ptr.dtype.element_ty), mask=mask_y)


class SlicedKForm(Form):
    """Few pixels of any x and y; the weight need not have been rounded."""

    config = SlicedKConfig
    kernels = (conv2d_sliced_k_forward_kernel,)
    packs_weight = False
    takes_shortcut = True
    most_candidates = None
    most_beside_others = None

    def fits(self, product: Product) -> bool:
        return product.pixels < MOST_PIXELS and product.groups == 1 and product.x.element_size() <= 4

    def takes(self, product: Product, choice: Choice) -> bool:
        channels = [product.x.shape[1]] + ([product.shortcut.x.shape[1]] if product.shortcut else [])
        return all(c % choice.config.BLOCK_K == 0 for c in channels)

    def default(self, product: Product) -> Choice | None:
        if product.groups > 1 or shares_rows(product):
            return None
        x, K, C, size = product.x, product.y.shape[1], product.x.shape[1], product.x.element_size()
        gpu, strict = hardware.gpu(x.device), product.input_precision == "tf32x3"
        config = default_config(product.pixels, K, C, product.taps, size, gpu, strict)
        if config is None:
            return None
        tiles = ceil_div(product.pixels, config.BLOCK_M) * ceil_div(K, config.BLOCK_N)
        read = tiles * (config.BLOCK_M + config.BLOCK_N) * product.taps * C * size
        shares = read > MUCH_READ and product.pixels > config.BLOCK_M and can_share_tiles(product)
        return None if shares else Choice(config)

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        size = problem.dtype.itemsize
        block_k = math.gcd(problem.c, 128 // size)
        if block_k < 16 or problem.pixels * problem.k > MOST_TRIED_OUTPUTS:
            return
        for block_m, block_n in by_waves(problem, TILES, gpu)[:2]:
            for slices, num_warps, num_stages in SLICES:
                shared_memory = num_stages * slices * (block_m + block_n) * block_k * size
                if slices * block_k <= problem.reduction and shared_memory <= gpu.shared_memory:
                    tiles, blocks_k = problem.programs(block_m, block_n), problem.reduction // block_k
                    config = SlicedKConfig(
                        SPLITS=splits_of(tiles, blocks_k, slices, gpu.multiprocessors),
                        SLICES=slices,
                        BLOCK_M=block_m,
                        BLOCK_N=block_n,
                        BLOCK_K=block_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )
                    yield Choice(config)

    def run(self, product: Product, config: SlicedKConfig) -> None:
        x, y, epilogue, shortcut = product.x, product.y, product.epilogue, product.shortcut
        N, C, H, W = x.shape
        K, P, Q = y.shape[1:]
        weight = product.packed[-K:]
        M = N * P * Q
        tiles = ceil_div(M, config.BLOCK_M) * ceil_div(K, config.BLOCK_N)
        partial = counts = None
        if config.SPLITS > 1:
            sums = torch.float64 if x.dtype == torch.float64 else torch.float32
            partial = x.new_empty(tiles * config.SPLITS * config.BLOCK_M * config.BLOCK_N, dtype=sums)
            counts = launch_semaphores(x.device, tiles)
        launch(
            conv2d_sliced_k_forward_kernel,
            (tiles * config.SPLITS,),
            x,
            weight,
            *epilogue[:3],
            *(shortcut[:4] if shortcut else [None] * 4),
            y,
            partial,
            counts,
            M,
            H,
            W,
            P * Q,
            Q,
            1 / (P * Q),
            1 / Q,
            *x.stride(),
            *pixel_strides(y, product.channels_last_y),
            *(shortcut.x.stride() if shortcut else [0] * 4),
            C,
            K,
            *weight.shape[1:3],
            *product.stride,
            *product.padding,
            *product.dilation,
            **epilogue.flags,
            **shortcut_flags(shortcut),
            **dependent_launch(x),
            INPUT_PRECISION=product.input_precision,
            LOST=lost_in_registers(product),
            ROUND_X=product.round_x,
            ACC=accumulator(x.dtype),
            ONE_IMAGE=N == 1,
            OFFSET=index_type(max(_extent(t) for t in (x, y, weight, shortcut.x if shortcut else x))),
            **config.constants,
        )


def default_config(
    m: int, n: int, c: int, taps: int, element_size: int, gpu: Gpu, strict: bool = False
) -> SlicedKConfig | None:
    """None where there are so many outputs that larger tiles keep the multiprocessors busy.

    What bounds it is how fast operands come out of L2, each as often as there are tiles beside each other: of pixels
    for the weight, of channels for x. So tiles are 32 x 32 where these are enough, if need be with two programs each:
    3x3, one image, bfloat16, 512 channels of 14x14 10.0 us for 14.2 in tiles of 16 x 32, 1,024 of 7x7 11.5 for 18.1
    (H200). A single row of tiles reads the weight once; 8 warps then ask for more of it at a time: 25,088 to 4,096
    features of one row 59.8 us for 121.7 by 4 warps in tiles of 16 x 32. Neither holds of strict float32, whose
    products take longer than its loads (64 rows of 4,096 to 1,000 features 35 us for 26), nor the second one of TF32.

    Measured on an H200 in ResNet18 on one image (`benchmarks/results`): to wait for other programs costs 2 us, which is
    less than what it saves only where even the least tiles are few, on 512 channels. From 512 features to 10 classes
    two tiles of 8 take 2.0 us, one of 16 takes 2.7 (H100, bfloat16, one image; in float32 they are alike).
    """
    block_k = math.gcd(c, 128 // element_size)
    if triton.knobs.runtime.interpret or element_size == 8 or block_k < 16 or taps * c < 256:
        return None
    if m * n > OUTPUTS_OF_A_MULTIPROCESSOR * gpu.multiprocessors:
        return None
    blocks_k, splits, slices = taps * c // block_k, 1, 4

    def tiles(block_m: int, block_n: int) -> int:
        return ceil_div(m, block_m) * ceil_div(n, block_n)

    def read(block_m: int, block_n: int) -> int:
        """Bytes that come out of L2."""
        return tiles(block_m, block_n) * (block_m + block_n) * taps * c * element_size

    saved = read(16, 32) - read(32, 32)
    if taps * c <= 512:  # a step or two
        block_m, block_n, slices = 16, 8 if n <= 16 and element_size == 2 else 16, 8
    elif element_size == 2 and m <= 16 and ceil_div(n, 16) >= gpu.multiprocessors:
        block_m, block_n, slices = 16, 16, 8
    elif not strict and m > 16 and tiles(32, 32) >= gpu.enough_programs:
        block_m, block_n = 32, 32
    elif not strict and m > 16 and 2 * tiles(32, 32) >= gpu.enough_programs and saved > READ_WHILE_WAITING:
        block_m, block_n, splits = 32, 32, 2
    else:
        for block_m, block_n in ((16, 32), (16, 16), (16, 8)):
            if tiles(block_m, block_n) >= gpu.enough_programs:
                break
        else:
            block_m, block_n = 16, 16
            programs = gpu.multiprocessors * (2 if element_size == 4 else 1)
            splits = splits_of(tiles(block_m, block_n), blocks_k, slices, programs)
    line = (block_m + block_n) * block_k * element_size
    return SlicedKConfig(
        SPLITS=splits,
        SLICES=slices,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=slices,
        num_stages=_stages(slices, line, ceil_div(blocks_k, splits), gpu),
    )


def _stages(slices: int, line: int, blocks_k: int, gpu: Gpu) -> int:
    """As many loads in flight as there are steps and memory for: every byte is waited for, none is used twice.

    `line`: bytes that a slice loads in a step. Memory: the largest power of 2 that a program may have.
    """
    memory = 1 << (gpu.shared_memory.bit_length() - 1)
    return min(ceil_div(blocks_k, slices) + 1, memory // (slices * line), 6)


def _extent(t: torch.Tensor) -> int:
    """An upper bound on the offsets of elements."""
    return sum(size * stride for size, stride in zip(t.shape, t.stride()))
