"""A matrix product whose left operand is gathered from the image by pointers: any convolution (no im2col matrix).

    y[n, k, p, q] = activation(bias[k] + residual[n, k, p, q] + scale[k]
                               * sum over r, s, c of x[n, c, p*stride + r*dilation - padding, ...] * weight[k, r, s, c])

Any strides of x, any filter, padding, dilation and groups. A linear layer is the same with one pixel an image and a 1x1
filter.

The size of the image is no constexpr: one compiled kernel serves all sizes, and where LLVM knew the range of a pixel's
coordinates it narrowed them to pairs of 16-bit integers, which gave wrong masks on an H200 (triton 3.6).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from ....device.arithmetic import FLUSH_STEPS, accumulator, add_rounded_dot, add_split_dot, dot, index_type, round_to
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....device.epilogue import apply_epilogue
from ....device.layouts import LANES_ALONG_LAST, are_apart, opaque
from ....runtime import hardware
from ....runtime.blocks import INTERPRETER_TILE, ceil_div, power_of_2
from ....runtime.dependent_launch import dependent_launch
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch
from ....runtime.memory_format import pixel_strides, stride_unit
from ..problem import Choice, Problem, Product, leaves_half_empty, spans_taps
from .form import Config, Form, by_waves

TILES = [
    (32, 64, 4, 4),
    (64, 32, 4, 4),
    (64, 64, 4, 3),
    (64, 128, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 4, 4),
    (128, 128, 4, 3),
    (128, 128, 8, 3),
]
"""BLOCK_M, BLOCK_N, warps, stages that tuning tries."""
ONE_WAVE = [(64, 64, 3), (64, 32, 4)]
"""BLOCK_M, BLOCK_N and stages for products of one tap, the largest first. See `one_wave`."""
ONE_WAVE_OF_GROUPS = [(64, 32, 4), (32, 32, 4), (16, 32, 3)]
"""The same for groups."""
MOST_CHANNELS_OF_ONE_WAVE = 1024
LONG_REDUCTION = 640
"""Products of a sum, from which on a tile of TF32 may have more pixels than channels."""


@dataclass(frozen=True, kw_only=True)
class PointersConfig(Config):
    """A tile of BLOCK_M x BLOCK_N outputs, reduced BLOCK_K at a time."""

    form: ClassVar[str] = "pointers"

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@triton.jit
def conv2d_pointers_forward_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    M,
    H,
    W,
    PIXELS,
    Q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_k,
    y_stride_pixel,
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
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    SPAN_TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_X: tl.constexpr,
    ROUND_Y: tl.constexpr,
    DEPENDENT: tl.constexpr,
    FLUSH: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_N output channels of one group; PIXELS = P * Q.

    C and K count the channels of a group; weight is [GROUPS * K, R, S, C], contiguous, for "tf32x3" followed by what
    its rounding to TF32 left. A block of the reduction lies within one filter tap, whose mask and address are then a
    column each; with SPAN_TAPS (few channels) it runs over the whole filter. The residual has the strides of y. In
    "tf32x3" the sums of FLUSH steps are added up apart, so that few float32 additions follow each other. A single
    filter (BLOCK_N = 1) is no matrix product: threads share its sum, whose error is smaller for it. Strides, but for
    those of channels, are in units of X_UNIT and Y_UNIT elements.
    """
    x_stride_n, x_stride_h, x_stride_w = x_stride_n * X_UNIT, x_stride_h * X_UNIT, x_stride_w * X_UNIT
    y_stride_n, y_stride_pixel = y_stride_n * Y_UNIT, y_stride_pixel * Y_UNIT
    BLOCKS_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCKS_C: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (R * S * C + BLOCK_K - 1) // BLOCK_K if SPAN_TAPS else R * S * BLOCKS_C
    EVEN_K: tl.constexpr = R * S * C % BLOCK_K == 0 if SPAN_TAPS else C % BLOCK_K == 0

    # Programs that run together share GROUP_M blocks of pixels, so that these and the weights are read from L2.
    blocks_m = (M - 1) // BLOCK_M + 1  # M + BLOCK_M may exceed int32
    pid = tl.program_id(0)
    group = pid // (blocks_m * BLOCKS_N)
    pid = pid % (blocks_m * BLOCKS_N)
    first_m = pid // (GROUP_M * BLOCKS_N) * GROUP_M
    rows = tl.minimum(blocks_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * BLOCKS_N) % rows
    pid_n = pid % (GROUP_M * BLOCKS_N) // rows

    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = tl.minimum(offs_m // PIXELS, (M - 1) // PIXELS).to(tl.int64)  # past the end: the last image again, not stored
    pixel = offs_m % PIXELS
    # Where channels are not neighbours in memory lanes take pixels, which may be, and which share their taps.
    AXIS_K: tl.constexpr = 0 if LANES_ALONG_LAST and (SPAN_TAPS or are_apart(x_stride_c)) else 1
    AXIS_M: tl.constexpr = 1 - AXIS_K
    h_first = tl.expand_dims(pixel // Q * STRIDE_H - PADDING_H, AXIS_K)  # [BLOCK_M, 1], or turned round
    w_first = tl.expand_dims(pixel % Q * STRIDE_W - PADDING_W, AXIS_K)
    group = group.to(tl.int64)
    x_ptrs = x_ptr + group * C * x_stride_c + tl.expand_dims(n * x_stride_n, AXIS_K)
    x_ptrs += h_first.to(tl.int64) * x_stride_h + w_first.to(tl.int64) * x_stride_w

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < K
    channel = group * K + offs_n
    weight_ptrs = weight_ptr + (channel * (R * S * C))[None, :]

    wait_for_predecessor(DEPENDENT)
    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    part = acc
    for step in range(STEPS):
        if SPAN_TAPS:
            offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            c = offs_k % C
            r = tl.expand_dims(offs_k // C // S * DILATION_H, AXIS_M)
            s = tl.expand_dims(offs_k // C % S * DILATION_W, AXIS_M)
            mask_k = offs_k < R * S * C
        else:
            tap = step // BLOCKS_C
            c = step % BLOCKS_C * BLOCK_K + tl.arange(0, BLOCK_K)
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            offs_k = tap * C + c
            mask_k = c < C
        mask_x = tl.expand_dims(mask_k, AXIS_M)
        mask_weight = mask_n[None, :]
        if not EVEN_K:
            mask_weight = mask_weight & mask_k[:, None]
        if PADDING_H > 0 or PADDING_W > 0:
            h = h_first + r  # [BLOCK_M, 1], with SPAN_TAPS [BLOCK_M, BLOCK_K]
            w = w_first + s
            mask_x = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            if not EVEN_K:
                mask_x = mask_x & tl.expand_dims(mask_k, AXIS_M)
        offs_x = tl.cast(r, tl.int64) * x_stride_h + tl.cast(s, tl.int64) * x_stride_w
        offs_x += tl.expand_dims(c.to(tl.int64) * x_stride_c, AXIS_M)
        x = tl.load(x_ptrs + offs_x, mask=mask_x, other=0.0)
        weight = tl.load(weight_ptrs + offs_k[:, None], mask=mask_weight, other=0.0)
        if AXIS_K == 0:  # the last before the product: what is turned stays in registers from there on
            x = tl.trans(x)
        if INPUT_PRECISION == "tf32x3":
            rest = tl.load(weight_ptrs + (GROUPS * K * R * S * C + offs_k)[:, None], mask=mask_weight, other=0.0)
            part = add_split_dot(x, weight, rest, part)
            if (step + 1) % FLUSH == 0:
                acc += part
                part = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
        elif ROUND_X:
            acc = add_rounded_dot(x, weight, acc)
        elif BLOCK_N == 1:
            acc += tl.sum(x.to(ACC) * tl.trans(weight).to(ACC), 1, keep_dims=True)
        else:
            acc = dot(x, weight, acc, INPUT_PRECISION)
    if AXIS_K == 0 and x_ptr.dtype.element_ty == tl.float32 and INPUT_PRECISION == "ieee":
        acc = opaque(acc)  # else the sum of a single step would begin with the bias, x waiting for that in registers
    start_successor(DEPENDENT)
    if INPUT_PRECISION == "tf32x3":
        acc += part

    offs_y = (n * y_stride_n + pixel.to(tl.int64) * y_stride_pixel)[:, None] + (channel * y_stride_k)[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    acc = apply_epilogue(
        acc,
        scale_ptr,
        bias_ptr,
        residual_ptr,
        channel,
        mask_n,
        offs_y,
        mask_y,
        HAS_SCALE,
        HAS_BIAS,
        HAS_RESIDUAL,
        ACTIVATION,
        SLOPE,
        ROUND_Y,
    )
    tl.store(y_ptr + offs_y, round_to(acc, y_ptr.dtype.element_ty), mask=mask_y)


class PointersForm(Form):
    """Any product."""

    config = PointersConfig
    kernels = (conv2d_pointers_forward_kernel,)
    most_beside_others = 1

    def fits(self, product: Product) -> bool:
        return True

    def default(self, product: Product) -> Choice:
        """In TF32 x is rounded in a copy where blocks of 128 channels would be half empty, and TMA does not take it.

        48 to 192 channels of 56x56 in channels_last, 3x3, 261 us for 302 (H200, 64 images).
        """
        x, K, C = product.x, product.y.shape[1] // product.groups, product.packed.shape[3]
        gpu, size, groups = hardware.gpu(x.device), x.element_size(), product.groups
        config = one_wave(product) or default_config(
            product.pixels, K, C, product.taps, size, product.input_precision, groups, gpu
        )
        rounds = gpu.has_tma and product.rounds_often and K > 64 and leaves_half_empty(K)
        return Choice(config, copies_x=product.reads_apart or product.is_read_often or rounds)

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        c, k, taps = problem.c // problem.groups, problem.k // problem.groups, problem.r * problem.s
        if c == 1 and problem.groups > 1:
            return
        size = problem.dtype.itemsize
        usual = default_config(problem.pixels, k, c, taps, size, problem.input_precision, problem.groups, gpu)
        copies_x = default.copies_x or not (problem.channels_last_x or spans_taps(c, taps) or taps == 1)
        yield Choice(usual, copies_x)
        tiles = [(*tile[:1], 1, *tile[2:]) for tile in TILES] if usual.BLOCK_N == 1 else TILES
        if problem.input_precision == "tf32x3":  # larger tiles, split into two parts, do not fit the registers
            tiles = [tile for tile in tiles if tile[0] * tile[1] <= 64 * 64]
        for block_m, block_n, num_warps, num_stages in by_waves(problem, tiles, gpu):
            if num_stages * (block_m + block_n) * usual.BLOCK_K * size <= gpu.shared_memory:
                config = PointersConfig(
                    BLOCK_M=block_m,
                    BLOCK_N=block_n,
                    BLOCK_K=usual.BLOCK_K,
                    num_warps=num_warps,
                    num_stages=num_stages,
                )
                yield Choice(config, copies_x)

    def run(self, product: Product, config: PointersConfig) -> None:
        x, weight, y, groups, epilogue = product.x, product.packed, product.y, product.groups, product.epilogue
        N, C, H, W = x.shape
        K, P, Q = y.shape[1:]
        R, S = weight.shape[1:3]
        C, K, M = C // groups, K // groups, N * P * Q
        grid = (ceil_div(M, config.BLOCK_M) * ceil_div(K, config.BLOCK_N) * groups,)
        size, (x_n, x_c, x_h, x_w) = x.element_size(), x.stride()
        y_n, y_k, y_pixel = pixel_strides(y, product.channels_last_y)
        x_unit = stride_unit(size, x_n, x_h, x_w) if x_c == 1 else 1
        y_unit = stride_unit(size, y_n, y_pixel) if y_k == 1 else 1
        launch(
            conv2d_pointers_forward_kernel,
            grid,
            x,
            weight,
            *epilogue[:3],
            y,
            M,
            H,
            W,
            P * Q,
            Q,
            x_n // x_unit,
            x_c,
            x_h // x_unit,
            x_w // x_unit,
            y_n // y_unit,
            y_k,
            y_pixel // y_unit,
            C,
            K,
            R,
            S,
            *product.stride,
            *product.padding,
            *product.dilation,
            **epilogue.flags,
            **dependent_launch(x),
            SPAN_TAPS=spans_taps(C, R * S),
            GROUPS=groups,
            INPUT_PRECISION=product.input_precision,
            ROUND_X=product.round_x,
            FLUSH=FLUSH_STEPS,
            ACC=accumulator(x.dtype),
            INDEX=index_type(M + config.BLOCK_M),
            X_UNIT=x_unit,
            Y_UNIT=y_unit,
            GROUP_M=8,
            **config.constants,
        )


def one_wave(product: Product) -> PointersConfig | None:
    """Tiles of which nearly every multiprocessor has one and none has two, if there are such; of 16-bit images.

    Then this form is faster than those that load by TMA, as its programs begin to load sooner. One image in bfloat16
    (H200): 1x1, 1,024 channels of 14x14 3.6 us for 4.4 by TMA, 512 to 256 channels of 28x28 2.6 for 3.0; 3x3 in 32
    groups, 512 channels of 14x14 2.3 for 4.1, 1,024 of 7x7 2.6 for 4.2. Not so of linear layers, 49 rows of 768 to
    3,072 features 9.3 for 4.4; nor in groups of 8 channels, half of each block of which would be empty, and groups of
    64 fill the blocks of any form.
    """
    x, k, c = product.x, product.y.shape[1] // product.groups, product.packed.shape[3]
    gpu, tiles = hardware.gpu(x.device), []
    if product.groups == 1 and product.taps == 1 and 64 <= c <= MOST_CHANNELS_OF_ONE_WAVE:
        tiles = ONE_WAVE
    elif product.groups > 1 and product.taps > 1 and 16 <= c <= 32:
        tiles = ONE_WAVE_OF_GROUPS
    image = product.y.shape[2:].numel() > 1
    if x.element_size() != 2 or x.stride(1) != 1 or product.prologue is not None or not image or not gpu.is_hopper:
        return None
    for block_m, block_n, num_stages in tiles:
        programs = ceil_div(product.pixels, block_m) * ceil_div(k, block_n) * product.groups
        if programs > gpu.multiprocessors:
            break
        if programs >= gpu.enough_programs and block_n < max(2 * k, 33):
            block_k = power_of_2(c, 16, 64)
            return PointersConfig(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, num_stages=num_stages)
    return None


def default_config(
    m: int, n: int, c: int, taps: int, element_size: int, input_precision: str, groups: int, gpu: Gpu
) -> PointersConfig:
    """For m pixels, and n output and c input channels of each of so many groups.

    In bfloat16 ResNet18's convolution of 128 channels takes 149 us with 4 warps, 158 with 8 (H200, 1,024 images). Tiles
    of float32 are small, as registers have their operands twice, as loaded and as rounded or split. Without tensor
    cores ("ieee") they hold it once: the first layer takes 235 us for 354 with 64 pixels (H100, 1,024 images). A single
    filter in float32 is summed up as precisely as by cuDNN: 16 products at a time, not by one thread each. Groups count
    among the programs: 440 channels in 55 groups at 7x7, strict float32, 29 us with 64 pixels, 72 with 16 (H200, 64
    images).

    Two kinds of TF32 have more pixels (H200, 64 images, us, in brackets tiles of 64 pixels). Long sums of channels of
    which the last block of 128 would not be full: 160 to 320 of 7x7 22 (30), 96 to 208 of 14x14 35 (41), 128 to 192 of
    28x28 123 (138), 48 to 64 of 35x35 under 5x5 99 (111); but not a single block, 96 to 96 of 35x35 116 (108). And up
    to 32 filters of an image's few channels: 3 to 24 of 224x224, stride 2, 50 (64), to 32 54 (63).
    """
    spans = spans_taps(c, taps)
    run = taps * c if spans else c  # over which a block of the reduction is contiguous
    if triton.knobs.runtime.interpret:
        block_n, block_k = power_of_2(n, 1, 1024), power_of_2(run, 1, 1024)
        block_m, num_warps, num_stages = power_of_2(m, 1, INTERPRETER_TILE // max(block_n, block_k)), 4, 1
    else:
        block_k = power_of_2(run, 16, 128 // element_size)  # 128 bytes: one line of shared memory
        if element_size == 8:
            block_m, block_n, num_warps, num_stages = power_of_2(m, 16, 64), power_of_2(n, 16, 32), 4, 2
        else:
            once = element_size == 2 or input_precision == "ieee"
            strict = element_size == 4 and input_precision != "tf32"
            block_m, block_n = power_of_2(m, 16, 128 if once else 64), power_of_2(n, 16, 64 if strict else 128)
            if n == 1 and element_size == 4 and input_precision == "ieee":
                block_n, block_k = 1, 16
            num_warps, num_stages = 4, 3

            def programs(block_m: int, block_n: int) -> int:
                return ceil_div(m, block_m) * ceil_div(n, block_n) * groups

            if element_size == 4 and input_precision == "tf32" and gpu.has_tma:
                partial = n > 32 and n % 128 != 0 and not 64 < n < 128
                long = partial and taps > 1 and taps * c >= LONG_REDUCTION
                if long and programs(128, 64) >= gpu.enough_programs:
                    block_m, block_n = 128, 64
                elif spans and n <= 32 and programs(128, block_n) >= gpu.enough_programs:
                    block_m, num_stages = 128, 4
            enough = gpu.enough_programs if block_n <= 64 else 3 * gpu.multiprocessors // 4
            while block_m > 16 and programs(block_m, block_n) < enough:
                block_m //= 2
        rows = block_m + block_n * (2 if input_precision == "tf32x3" else 1)
        while num_stages > 1 and num_stages * rows * block_k * element_size > gpu.shared_memory:
            num_stages -= 1
    return PointersConfig(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages)
