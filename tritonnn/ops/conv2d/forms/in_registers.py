"""Register-resident sliced-K, for few pixels: a program holds all that it needs in registers. Hopper, in Gluon.

    y[n, p, q, k] = activation(bias[k] + residual[n, p, q, k] + shortcut[n, p, q, k] + scale[k]
                               * sum over r, s, c of x[n, p*stride + r*dilation - padding, ..., c] * weight[k, r, s, c])

The reduction is split among the warps of a program, as in sliced_k.py, but nothing is fetched ahead: a thread loads
its part of both operands at once, in the order in which the tensor cores take them, and waits once. x is read through
L1, where the windows of a program overlap. Images are channels_last.

The file is long because kernel, launcher and heuristics belong together: what a thread loads, the layouts in which it
loads it, and the number of registers that this takes decide which products fit at all.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ....device.arithmetic import add, round_to_tf32, split_to_tf32, split_weight_to_tf32
from ....device.epilogue import finish
from ....device.pixels import MOST_PIXELS, quotient
from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.dependent_launch import dependent_launch
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch
from ....runtime.memory_format import is_aligned, pixel_stride
from ..pack import lost_in_registers
from ..problem import Choice, Problem, Product, on_tensor_cores, shortcut_flags
from .form import Config, Form, by_waves
from .tma import shares_rows

OPERANDS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_M = 16
"""Pixels of a tile: the least that a tensor core takes."""
MOST_REGISTERS = 216
"""Registers of a thread for what it loads: with more, or as many warps as would halve them, some are spilled."""
OUTPUTS_OF_A_MULTIPROCESSOR = 1000
"""Up to so many outputs for each this form is the fastest; up to twice as many where the reduction is short."""
MOST_TRIED_OUTPUTS = 2**19
"""Tuning tries this form for at most so many outputs."""
TILES = [(BLOCK_M, 8), (BLOCK_M, 16), (BLOCK_M, 32)]
"""BLOCK_M, BLOCK_N that tuning tries."""
WARPS = [4, 8]
"""Numbers of warps that tuning tries."""


@dataclass(frozen=True, kw_only=True)
class InRegistersConfig(Config):
    """A tile of 16 pixels x BLOCK_N outputs, of whose reduction each warp takes a block of BLOCK_K in turn."""

    form: ClassVar[str] = "in_registers"

    BLOCK_N: int
    BLOCK_K: int
    num_warps: int

    def registers(self, reductions: Iterable[int], element_size: int) -> int:
        """Registers of a thread for its parts of x and the weight, and of a shortcut's, whose reduction is another."""
        steps = sum(ceil_div(reduction // self.BLOCK_K, self.num_warps) for reduction in reductions)
        return steps * self.BLOCK_K * (BLOCK_M + self.BLOCK_N) * element_size // (32 * 4)


# The assembler would move arithmetic of addresses behind the wait, where nothing hides it, and loads between the
# products, which would wait for one after the other; it moves neither over a branch. This one is never taken.
UNLESS = gl.constexpr("{ .reg .pred none; setp.lt.s32 none, $1, 1; @none bra PASSED; ")
PASSED = gl.constexpr("; PASSED: mov.b32 $0, 0; }")


@gluon.jit
def wait_in_place(DEPENDENT: gl.constexpr, count):
    """`wait_for_predecessor`, which the assembler moves nothing across. `count` is positive."""
    if DEPENDENT:
        asm: gl.constexpr = UNLESS + "griddepcontrol.wait" + PASSED
        gl.inline_asm_elementwise(asm, "=r,r", [count], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def start_in_place(DEPENDENT: gl.constexpr, count):
    """`start_successor`, which the assembler moves nothing across. `count` is positive."""
    if DEPENDENT:
        asm: gl.constexpr = UNLESS + "griddepcontrol.launch_dependents" + PASSED
        gl.inline_asm_elementwise(asm, "=r,r", [count], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def spread(LENGTH: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """0 .. LENGTH - 1 along one of three dimensions."""
    if DIM == 0:
        along: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
        index = gl.expand_dims(gl.expand_dims(gl.arange(0, LENGTH, along), 1), 2)
    elif DIM == 1:
        along: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
        index = gl.expand_dims(gl.expand_dims(gl.arange(0, LENGTH, along), 0), 2)
    else:
        along: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))
        index = gl.expand_dims(gl.expand_dims(gl.arange(0, LENGTH, along), 0), 1)
    return index


@gluon.jit
def pixels_of(m, PIXELS, Q, inverse_of_pixels, inverse_of_q, ONE_IMAGE: gl.constexpr):
    """(image, row, column) of the output pixels of number m."""
    n = 0 * m if ONE_IMAGE else quotient(m, inverse_of_pixels)
    pixel = m - n * PIXELS
    p = quotient(pixel, inverse_of_q)
    return n, p, pixel - p * Q


@gluon.jit
def load_weights(
    weight_ptr,
    first_channel,
    REDUCTION: gl.constexpr,
    SLICES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """For each step [SLICES, BLOCK_K, BLOCK_N] of weight [K, REDUCTION]."""
    STEPS: gl.constexpr = (REDUCTION + SLICES * BLOCK_K - 1) // (SLICES * BLOCK_K)
    offs_k = spread(SLICES, 0, LAYOUT) * BLOCK_K + spread(BLOCK_K, 1, LAYOUT)
    weight_ptrs = weight_ptr + ((first_channel + spread(BLOCK_N, 2, LAYOUT)) * REDUCTION + offs_k)
    weights = ()
    for step in gl.static_range(STEPS):
        first = step * SLICES * BLOCK_K
        if (step + 1) * SLICES * BLOCK_K <= REDUCTION:
            weight = gl.load(weight_ptrs + first)
        else:
            inside = spread(SLICES, 0, LAYOUT) * BLOCK_K < REDUCTION - first
            weight = gl.load(weight_ptrs + first, mask=inside, other=0.0)
        weights = weights + (weight,)
    return weights


@gluon.jit
def places_of_x(
    x_ptr,
    n,
    h_first,
    w_first,
    inside,
    H,
    W,
    stride_n,
    stride_h,
    stride_w,
    C: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    DILATION_H: gl.constexpr,
    DILATION_W: gl.constexpr,
    PADDED: gl.constexpr,
    SLICES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """For each step the pointers [SLICES, BLOCK_M, BLOCK_K] and masks [SLICES, BLOCK_M, 1] of its part of x.

    n, h_first, w_first, where the windows begin, and inside, whether they are to be read: [1, BLOCK_M, 1].
    """
    BLOCKS_C: gl.constexpr = C // BLOCK_K
    BLOCKS: gl.constexpr = R * S * BLOCKS_C
    STEPS: gl.constexpr = (BLOCKS + SLICES - 1) // SLICES
    offs_x = n * stride_n + h_first * stride_h + w_first * stride_w
    x_ptrs = x_ptr + (offs_x + spread(BLOCK_K, 2, LAYOUT))  # [1, BLOCK_M, BLOCK_K]
    places = ()
    for step in gl.static_range(STEPS):
        block = step * SLICES + spread(SLICES, 0, LAYOUT)
        tap = block // BLOCKS_C
        r = tap // S * DILATION_H
        s = tap % S * DILATION_W
        mask = inside & (block < BLOCKS)
        if PADDED:
            # As unsigned numbers, negative coordinates become huge: one comparison covers both edges.
            h = (h_first + r).to(gl.uint32, bitcast=True)
            w = (w_first + s).to(gl.uint32, bitcast=True)
            mask = mask & (h < H) & (w < W)
        places = places + ((x_ptrs + (r * stride_h + s * stride_w + block % BLOCKS_C * BLOCK_K), mask),)
    return places


@gluon.jit
def load_all(places):
    """Loads from all places at once; 0 where the mask is off."""
    STEPS: gl.constexpr = len(places)
    loaded = ()
    for step in gl.static_range(STEPS):
        loaded = loaded + (gl.load(places[step][0], mask=places[step][1], other=0.0),)
    return loaded


@gluon.jit
def product_in_registers(
    xs,
    weights,
    INPUT_PRECISION: gl.constexpr,
    ROUND_X: gl.constexpr,
    LOST: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """[SLICES, BLOCK_M, BLOCK_N]: the sums of each warp's products, in two chains, as each waits for itself."""
    STEPS: gl.constexpr = len(xs)
    SHAPE: gl.constexpr = (xs[0].shape[0], xs[0].shape[1], weights[0].shape[2])
    acc = gl.zeros(SHAPE, gl.float32, LAYOUT)
    other = gl.zeros(SHAPE, gl.float32, LAYOUT)
    for step in gl.static_range(STEPS):
        x, weight = xs[step], weights[step]
        if INPUT_PRECISION == "tf32x3":
            x_high, x_low = split_to_tf32(x)
            weight_high, weight_low = split_weight_to_tf32(weight, LOST)
            # The small products may all be added up in the tensor core, whose sums are truncated.
            other = mma_v2(x_low, weight_high, other, input_precision="tf32")
            other = mma_v2(x_high, weight_low, other, input_precision="tf32")
            high = mma_v2(x_high, weight_high, gl.zeros(SHAPE, gl.float32, LAYOUT), input_precision="tf32")
            acc = add(acc, high)
        else:
            if ROUND_X:
                x = round_to_tf32(x)
            if INPUT_PRECISION == "tf32":
                weight = round_to_tf32(weight)
            if step % 2 == 0:
                acc = mma_v2(x, weight, acc, input_precision=INPUT_PRECISION)
            else:
                other = mma_v2(x, weight, other, input_precision=INPUT_PRECISION)
    return acc + other


@gluon.jit
def conv2d_in_registers_forward_kernel(
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
    M,
    H,
    W,
    PIXELS,
    Q,
    inverse_of_pixels,
    inverse_of_q,
    x_stride_n,
    x_stride_h,
    x_stride_w,
    shortcut_stride_n,
    shortcut_stride_h,
    shortcut_stride_w,
    C: gl.constexpr,
    K: gl.constexpr,
    Y_STEP: gl.constexpr,
    R: gl.constexpr,
    S: gl.constexpr,
    STRIDE_H: gl.constexpr,
    STRIDE_W: gl.constexpr,
    PADDING_H: gl.constexpr,
    PADDING_W: gl.constexpr,
    DILATION_H: gl.constexpr,
    DILATION_W: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    HAS_SHORTCUT: gl.constexpr,
    HAS_SHORTCUT_SCALE: gl.constexpr,
    HAS_SHORTCUT_BIAS: gl.constexpr,
    SHORTCUT_C: gl.constexpr,
    SHORTCUT_STRIDE_H: gl.constexpr,
    SHORTCUT_STRIDE_W: gl.constexpr,
    SHORTCUT_PRECISION: gl.constexpr,
    ROUND_SHORTCUT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
    INPUT_PRECISION: gl.constexpr,
    LOST: gl.constexpr,
    ROUND_X: gl.constexpr,
    ROUND_Y: gl.constexpr,
    DEPENDENT: gl.constexpr,
    ONE_IMAGE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A program owns BLOCK_M of M = N * PIXELS output pixels x BLOCK_N output channels; PIXELS = P * Q.

    weight is [K, R, S, C], contiguous; C is a multiple of BLOCK_K, K of BLOCK_N; the residual and y [N, P, Q, K] are
    contiguous, or some channels of images whose pixels lie Y_STEP elements apart. The shortcut is a second image under
    a filter of one tap and no padding, whose products are added.
    """
    BLOCKS_N: gl.constexpr = K // BLOCK_N
    SLICES: gl.constexpr = num_warps
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    K_WIDTH: gl.constexpr = BLOCK_K // 8
    LAYOUT_X: gl.constexpr = gl.DotOperandLayout(0, MMA, K_WIDTH)
    LAYOUT_W: gl.constexpr = gl.DotOperandLayout(1, MMA, K_WIDTH)
    # Of the sums each thread adds up those of all warps at two places.
    PAIRS: gl.constexpr = BLOCK_N // 2
    TOTAL: gl.constexpr = gl.BlockedLayout([SLICES, 1, 2], [1, 32 // PAIRS, PAIRS], [1, num_warps, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, TOTAL)

    tile = gl.program_id(0)
    first_pixel = tile // BLOCKS_N * BLOCK_M
    first_channel = tile % BLOCKS_N * BLOCK_N
    offs_n = first_channel + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUT))
    offs_m = first_pixel + gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
    m = first_pixel + spread(BLOCK_M, 1, LAYOUT_X)
    inside = m < M
    n, p, q = pixels_of(m, PIXELS, Q, inverse_of_pixels, inverse_of_q, ONE_IMAGE)
    places = places_of_x(
        x_ptr,
        n,
        p * STRIDE_H - PADDING_H,
        q * STRIDE_W - PADDING_W,
        inside,
        H,
        W,
        x_stride_n,
        x_stride_h,
        x_stride_w,
        C,
        R,
        S,
        DILATION_H,
        DILATION_W,
        PADDING_H > 0 or PADDING_W > 0,
        SLICES,
        BLOCK_K,
        LAYOUT_X,
    )
    if HAS_SHORTCUT:
        shortcut_places = places_of_x(
            shortcut_ptr,
            n,
            p * SHORTCUT_STRIDE_H,
            q * SHORTCUT_STRIDE_W,
            inside,
            0,
            0,
            shortcut_stride_n,
            shortcut_stride_h,
            shortcut_stride_w,
            SHORTCUT_C,
            1,
            1,
            1,
            1,
            False,
            SLICES,
            BLOCK_K,
            LAYOUT_X,
        )
    offs_y = gl.expand_dims(offs_m * Y_STEP, 1) + gl.expand_dims(offs_n, 0)
    mask_y = gl.expand_dims(offs_m < M, 1)

    wait_in_place(DEPENDENT, M)
    xs = load_all(places)
    weights = load_weights(weight_ptr, first_channel, R * S * C, SLICES, BLOCK_N, BLOCK_K, LAYOUT_W)
    if HAS_SHORTCUT:
        shortcuts = load_all(shortcut_places)
        shortcut_weights = load_weights(
            shortcut_weight_ptr, first_channel, SHORTCUT_C, SLICES, BLOCK_N, BLOCK_K, LAYOUT_W
        )
    if HAS_SCALE:
        scale = gl.load(scale_ptr + first_channel + spread(BLOCK_N, 2, MMA))
    if HAS_SHORTCUT_SCALE:
        shortcut_scale = gl.load(shortcut_scale_ptr + first_channel + spread(BLOCK_N, 2, MMA))
    if HAS_BIAS:
        bias = gl.load(bias_ptr + offs_n)
    if HAS_SHORTCUT_BIAS:
        shortcut_bias = gl.load(shortcut_bias_ptr + offs_n)
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + offs_y, mask=mask_y, other=0.0)
    start_in_place(DEPENDENT, M)  # its programs are few and leave room for the next kernel
    acc = product_in_registers(xs, weights, INPUT_PRECISION, ROUND_X, LOST, MMA)
    if HAS_SCALE:
        acc *= scale
    if HAS_SHORTCUT:
        second = product_in_registers(shortcuts, shortcut_weights, SHORTCUT_PRECISION, ROUND_SHORTCUT, 0.0, MMA)
        if HAS_SHORTCUT_SCALE:
            second *= shortcut_scale
        acc += second
    sums = gl.allocate_shared_memory(
        gl.float32, [SLICES, BLOCK_M, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]), acc
    )
    total = gl.sum(sums.load(TOTAL), 0)
    if HAS_BIAS:
        total += gl.expand_dims(bias, 0)
    if HAS_SHORTCUT_BIAS:
        total += gl.expand_dims(shortcut_bias, 0)
    if HAS_RESIDUAL:
        total += residual.to(gl.float32)
    total = finish(total, ACTIVATION, SLOPE, ROUND_Y)
    gl.store(y_ptr + offs_y, total.to(y_ptr.dtype.element_ty), mask=mask_y)


class InRegistersForm(Form):
    """Few pixels, all images in channels_last; the weight need not have been rounded."""

    config = InRegistersConfig
    kernels = (conv2d_in_registers_forward_kernel,)
    packs_weight = False
    takes_shortcut = True
    most_candidates = None
    most_beside_others = None

    def fits(self, product: Product) -> bool:
        x, y, shortcut = product.x, product.y, product.shortcut
        if product.groups > 1 or not product.channels_last_y or x.dtype not in OPERANDS:
            return False
        images = [(x, product.input_precision)] + ([(shortcut.x, shortcut.input_precision)] if shortcut else [])
        if not all(is_aligned(image) and on_tensor_cores(image, precision) for image, precision in images):
            return False
        if not product.epilogue.has_aligned_residual:
            return False
        few = product.pixels < MOST_PIXELS and max(x.numel(), y.numel(), product.packed.numel()) < 2**31
        return few and hardware.gluon_is_verified(x.device)

    def takes(self, product: Product, choice: Choice) -> bool:
        config, size = choice.config, product.x.element_size()
        reductions = _reductions(product)
        divided = all(c % config.BLOCK_K == 0 for c in reductions) and product.y.shape[1] % config.BLOCK_N == 0
        fits = config.registers(reductions, size) <= MOST_REGISTERS
        return divided and fits and config.BLOCK_K * size in (64, 128)

    def default(self, product: Product) -> Choice | None:
        if product.groups > 1 or shares_rows(product):
            return None
        x, K = product.x, product.y.shape[1]
        gpu = hardware.gpu(x.device)
        shortcut_c = product.shortcut.x.shape[1] if product.shortcut else 0
        config = default_config(product.pixels, K, x.shape[1], product.taps, x.element_size(), gpu, shortcut_c)
        if config is None or not self.fits(product):
            return None
        choice = Choice(config)
        return choice if self.takes(product, choice) else None

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        size = problem.dtype.itemsize
        block_k = math.gcd(problem.c, 128 // size)
        if block_k * size < 64 or problem.pixels * problem.k > MOST_TRIED_OUTPUTS:
            return
        for _, block_n in by_waves(problem, TILES, gpu)[:2]:
            for num_warps in WARPS:
                config = InRegistersConfig(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps)
                fits = num_warps * BLOCK_M * block_n * 4 <= gpu.shared_memory
                fits = fits and config.registers([problem.reduction], size) <= MOST_REGISTERS
                if fits and problem.k % block_n == 0:
                    yield Choice(config)

    def run(self, product: Product, config: InRegistersConfig) -> None:
        x, y, epilogue, shortcut = product.x, product.y, product.epilogue, product.shortcut
        N, C, H, W = x.shape
        K, P, Q = y.shape[1:]
        weight = product.packed[-K:]
        M = N * P * Q
        launch(
            conv2d_in_registers_forward_kernel,
            (ceil_div(M, BLOCK_M) * (K // config.BLOCK_N),),
            x,
            weight,
            *epilogue[:3],
            *(shortcut[:4] if shortcut else [None] * 4),
            y,
            M,
            H,
            W,
            P * Q,
            Q,
            1 / (P * Q),
            1 / Q,
            *_strides(x),
            *(_strides(shortcut.x) if shortcut else [0] * 3),
            C,
            K,
            pixel_stride(y) or K,
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
            ONE_IMAGE=N == 1,
            BLOCK_M=BLOCK_M,
            **config.constants,
        )


def default_config(
    m: int, n: int, c: int, taps: int, element_size: int, gpu: Gpu, shortcut_c: int = 0
) -> InRegistersConfig | None:
    """For so few pixels that a program's whole reduction fits its registers; None where it does not.

    Measured on an H200 on ResNet18's layers of one image (`benchmarks/results`): that a thread loads 16 bytes at a time
    is worth more than that no warp is idle in the last step. Eight warps take 46.7 us over the network, four 48.2. A
    reduction of a few steps takes four, and pays for more pixels: 1x1, 64 to 128 channels, one image of 32x32 in
    bfloat16 1.3 us for 2.0 by pointers, strict float32 1.7 for 3.0, eight images 2.8 for 3.4 (H100). So does one tap of
    16-bit numbers where multiprocessors have several programs: 64 rows of a linear layer, 960 to 1,280 features 4.0 us
    for 5.1, 768 to 1,000 3.1 for 3.6, 2,048 to 1,000 6.0 for 6.4 (H200).

    A single row of tiles reads the weight once, however narrow they are, and takes the widest that fit: 4,096 to 4,096
    features of one row 9.6 us for 11.2 by slices (H200). So do several rows of the next width, if that makes no more
    than one and a half programs a multiprocessor: 49 rows of 3,072 to 768 features 7.7 us for 14.6. With the
    `shortcut_c` channels of a shortcut of one tap, all of both products is in registers: 1,024 and 1,024 to 2,048
    channels of 7x7, of which one alone fits those of four warps, took 115 us there.
    """
    block_k, short = math.gcd(c, 128 // element_size), taps * c < 256
    most = OUTPUTS_OF_A_MULTIPROCESSOR * gpu.multiprocessors * (2 if short else 1)
    if block_k * element_size < 64 or m * n > most or n % 8 != 0:
        return None
    reductions = [taps * c, shortcut_c]

    def config(block_n: int, num_warps: int) -> InRegistersConfig | None:
        found = InRegistersConfig(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps)
        return found if found.registers(reductions, element_size) <= MOST_REGISTERS else None

    rows = ceil_div(m, BLOCK_M)
    widths = [block_n for block_n in (32, 16, 8) if n % block_n == 0]
    enough = 3 * gpu.multiprocessors // 4 if taps * c <= 256 else gpu.enough_programs
    busy = [block_n for block_n in widths if rows * (n // block_n) >= enough] or widths[-1:]
    if rows > 1:
        busy = busy[:1] + [block_n for block_n in busy[1:2] if 2 * rows * (n // block_n) <= 3 * gpu.multiprocessors]
    for block_n in busy:
        several = taps == 1 and element_size == 2 and rows * (n // block_n) > gpu.multiprocessors
        found = config(block_n, 4) if short or several else None
        found = found or (None if short else config(block_n, 8))
        if found:
            return found
    return None


def _reductions(product: Product) -> list[int]:
    """Of the product, and of its shortcut."""
    shortcut = [product.shortcut.x.shape[1]] if product.shortcut else []
    return [product.taps * product.x.shape[1], *shortcut]


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """The strides of images, rows and columns of x [N, C, H, W] in channels_last, also where a size is 1."""
    _, C, H, W = x.shape
    return H * W * C, W * C, C
