"""A matrix product over TMA tensor descriptors, one filter tap after the other: channels_last images, Hopper and newer.

    y[n, p, q, k] = activation(bias[k] + residual[n, p, q, k] + scale[k]
                               * sum over r, s, c of x[n, p*stride + r*dilation - padding, ..., c] * weight[k, r, s, c])

A program owns a box of TILE_N images x TILE_P rows x TILE_Q columns of the output. For each filter tap and block of
channels TMA loads the box of x that lies under it; what lies outside the image it fills with zeros, so padding takes
neither masks nor addresses. For stride 2, x [N, H, W, C] is seen as [N, H/2, 2, W/2, 2*C]: a tap picks the parity. A
filter of one tap sees only the pixels that it reads, and any number of channels: the last block ends with zeros.

Where tiles are few and the reduction is long, SPLITS programs share a tile (split-K): each adds up a range of taps and
channels, and the last one to finish adds up their parts.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ....device.arithmetic import FLUSH_STEPS, add_rounded_dot, add_split_dot, round_to, round_to_tf32
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....device.epilogue import finish
from ....device.split_k import leave_part, parts_of, sum_of_parts
from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.capabilities import rounding_on_load, rounds_on_load
from ....runtime.dependent_launch import dependent_launch
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch, launch_semaphores
from ....runtime.memory_format import pixel_stride
from ....runtime.semaphores import PER_STREAM
from ..problem import Choice, Problem, Product, leaves_half_empty
from .form import Form, by_waves, splits_of
from .pointers import one_wave
from .tma_tiles import (
    FEW_ROWS,
    LEAST_STEPS,
    TmaConfig,
    best_box,
    block_k_of,
    config_of,
    default_config,
    shared_memory,
    tiles_of,
    with_neighbours,
)

SWAP_AB_TILES = [
    (64, 64, 4, 4),
    (128, 64, 4, 3),
    (256, 64, 4, 2),
    (64, 128, 4, 4),
    (128, 128, 4, 3),
    (128, 128, 4, 4),
    (128, 128, 8, 3),
    (256, 128, 8, 3),
    (256, 128, 8, 4),
    (128, 256, 8, 4),
]
"""BLOCK_M, BLOCK_N, warps, stages that tuning tries with swapped operands."""
ROUNDING_TILES = [(64, 64, 4, 4), (128, 128, 8, 3)]
"""As SWAP_AB_TILES, where x is rounded in shared memory."""
NATURAL_TILES = [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3)]
"""As SWAP_AB_TILES, with operands in their natural order."""
LEAST_CHANNELS = 16
"""A block of the reduction has at least so many; with fewer most of it would be zeros."""
MANY_IMAGES, LEAST_PIXELS = 32, 4
"""With boxes of fewer pixels of so many images each the form "pointers" is faster in TF32."""
LEAST_ROWS, MANY_FEATURES = 16, 4096
"""See `shares_rows`."""


@triton.jit
def load_box(x_desc, n, p, q, r, s, c, C: tl.constexpr, STRIDE: tl.constexpr):
    """The box of x for the output that starts at (n, p, q), shifted by r rows and s columns of the padded image."""
    if STRIDE == 1:
        x = x_desc.load([n, p + r, q + s, c])
    else:
        x = x_desc.load([n, p + (r >> 1), r & 1, q + (s >> 1), (s & 1) * C + c])
    return x


@triton.jit
def conv2d_tma_forward_kernel(
    x_desc,
    weight_desc,
    scale_ptr,
    bias_ptr,
    residual_desc,
    y_desc,
    partial_ptr,
    semaphores_ptr,
    N,
    P,
    Q,
    tiles_p,
    tiles_q,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ROUND_Y: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROUND_X: tl.constexpr,
    SWAP_AB: tl.constexpr,
    FLUSH: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """SPLITS programs own TILE_N x TILE_P x TILE_Q = BLOCK_M output pixels x BLOCK_N output channels.

    SWAP_AB: acc [channels, pixels] = weight @ x.T, both in shared memory; to ROUND_X, x goes through registers and
    back. Else acc [pixels, channels] = x @ weight.T, with x in registers, where it is rounded to TF32 or,
    "tf32x3", split; then weight_desc holds the weights rounded to TF32 and, K rows below, what that left of them, and
    the sums of FLUSH steps are added up apart, so that few float32 additions follow each other. y_desc is a pointer
    unless y is CHANNELS_LAST. weight_desc is [K, R * S * C] or, where BLOCK_K does not divide C, [R * S, K, C]: a tap's
    last block then ends with zeros in both operands, as zero times infinity is NaN.

    With several SPLITS, partial [tiles, SPLITS, BLOCK_M, BLOCK_N] takes their sums, and semaphores [tiles], zero before
    and after, count them. Ranges of the reduction differ by one step at most, and none is empty. First comes one
    program of each tile, then the next of each: neighbours read the same range of x or of the weight, from L2, while
    the programs of one tile have nothing in common.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCKS_C: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = R * S * BLOCKS_C
    BY_TAPS: tl.constexpr = len(weight_desc.block_shape) == 3

    if SPLITS > 1:
        tiles = tl.num_programs(0) // SPLITS
        tile = tl.program_id(0) % tiles
        split = tl.program_id(0) // tiles
        first = split * STEPS // SPLITS
        end = (split + 1) * STEPS // SPLITS
    else:
        tile = tl.program_id(0)
        first = 0
        end = STEPS
    k = tile % BLOCKS_N * BLOCK_N
    box = tile // BLOCKS_N
    q = box % tiles_q * TILE_Q
    p = box // tiles_q % tiles_p * TILE_P
    n = box // tiles_q // tiles_p * TILE_N

    wait_for_predecessor(DEPENDENT)
    if SWAP_AB:
        acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    else:
        acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    part = acc
    for step in range(first, end):
        tap = step // BLOCKS_C
        c = step % BLOCKS_C * BLOCK_K
        r = tap // S * DILATION_H - PADDING_H
        s = tap % S * DILATION_W - PADDING_W
        x = tl.reshape(load_box(x_desc, n, p, q, r, s, c, C, STRIDE), (BLOCK_M, BLOCK_K))
        if BY_TAPS:
            weight = tl.reshape(weight_desc.load([tap, k, c]), (BLOCK_N, BLOCK_K))
        else:
            weight = weight_desc.load([k, tap * C + c])
        if SWAP_AB:
            if ROUND_X:
                x = round_to_tf32(x)
            acc = tl.dot(weight, x.T, acc, input_precision=INPUT_PRECISION)
        elif INPUT_PRECISION == "tf32x3":
            if BY_TAPS:
                rest = tl.reshape(weight_desc.load([tap, K + k, c]), (BLOCK_N, BLOCK_K))
            else:
                rest = weight_desc.load([K + k, tap * C + c])
            part = add_split_dot(x, weight.T, rest.T, part)
            if (step + 1) % FLUSH == 0:
                acc += part
                part = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
        else:
            acc = add_rounded_dot(x, weight.T, acc)
    start_successor(DEPENDENT)
    if INPUT_PRECISION == "tf32x3":
        acc += part

    if SWAP_AB:
        acc = acc.T
    last = True
    if SPLITS > 1:
        parts = parts_of(partial_ptr, tile, SPLITS, BLOCK_M, BLOCK_N)
        last = leave_part(acc, parts, split, semaphores_ptr + tile, SPLITS)
    if last:
        if SPLITS > 1:
            acc = sum_of_parts(parts, semaphores_ptr + tile, SPLITS)
        offs_n = k + tl.arange(0, BLOCK_N)
        if HAS_SCALE:
            acc *= tl.load(scale_ptr + offs_n, mask=offs_n < K, other=0.0)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < K, other=0.0)[None, :]
        if HAS_RESIDUAL:
            acc += tl.reshape(residual_desc.load([n, p, q, k]), (BLOCK_M, BLOCK_N)).to(tl.float32)
        acc = finish(acc, ACTIVATION, SLOPE, ROUND_Y)
        if CHANNELS_LAST:
            y = round_to(acc, y_desc.dtype)
            y_desc.store([n, p, q, k], tl.reshape(y, (TILE_N, TILE_P, TILE_Q, BLOCK_N)))
        else:
            y = round_to(acc, y_desc.dtype.element_ty)
            offs_m = tl.arange(0, BLOCK_M)
            offs_image = n + offs_m // (TILE_P * TILE_Q)
            offs_p = p + offs_m // TILE_Q % TILE_P
            offs_q = q + offs_m % TILE_Q
            mask = ((offs_image < N) & (offs_p < P) & (offs_q < Q))[:, None] & (offs_n < K)[None, :]
            offs_pixel = offs_image.to(tl.int64) * K * P * Q + offs_p * Q + offs_q
            tl.store(y_desc + offs_pixel[:, None] + (offs_n.to(tl.int64) * P * Q)[None, :], y, mask=mask)


class TmaForm(Form):
    """x in channels_last, on the tensor cores. A residual is in channels_last, and then so is y."""

    config = TmaConfig
    loads_by_descriptor = True
    kernels = (conv2d_tma_forward_kernel,)

    def fits(self, product: Product) -> bool:
        """A pixel's channels are a multiple of 16 bytes; with a stride, under a filter of several taps, of 128.

        Then the image has even sides. Verified on Hopper; for newer GPUs it compiles.
        """
        x, stride = product.x, product.stride
        if triton.knobs.runtime.interpret or x.dtype == torch.float64 or product.groups > 1:
            return False
        if not (product.on_tensor_cores and product.epilogue.has_aligned_residual):
            return False
        if not hardware.gpu(x.device).has_tma:
            return False
        C, size = x.shape[1], x.element_size()
        if product.y.shape[1] * size % 16 != 0 or not product.has_aligned_y:
            return False
        if _has_one_tap(product) or tuple(stride) == (1, 1):
            return C * size % 16 == 0 and C >= LEAST_CHANNELS
        return _fits_by_parity(product)

    def takes(self, product: Product, choice: Choice) -> bool:
        orders = {"tf32x3": [False], "tf32": [False, True]}.get(product.input_precision, [True])
        config, C = choice.config, product.x.shape[1]
        # Blocks that end with zeros were verified with four warps.
        blocks = C % config.BLOCK_K == 0 or config.num_warps == 4
        fits = config.SWAP_AB in orders and blocks and _can_split(product, config)
        return fits and (choice.copies_x or product.is_aligned)

    def default(self, product: Product) -> Choice | None:
        """None also where pointers are faster.

        An image of NCHW under a filter of one tap is copied for twice as many channels as y has: TF32, 2048 to 1024 of
        7x7 69 us, by pointers 84, to 512 44 for 49 (H200, 64 images); 1024 to 2048 83 for 74.
        """
        shrinks = product.is_read_often and tuple(product.stride) == (1, 1)
        shrinks = shrinks and product.x.shape[1] >= 2 * product.y.shape[1]
        if not self.fits(product) or not (product.x.stride(1) == 1 or product.taps > 1 or shrinks):
            return None
        rounds = product.round_x and not rounds_on_load()
        copies_x = product.reads_apart or shrinks or (rounds and product.rounds_often)
        if not (copies_x or product.is_aligned) or _is_narrow(product) or one_wave(product) or _pads_channels(product):
            return None
        split = product.input_precision == "tf32x3"
        swap_ab = not split and (copies_x or not rounds)
        N, K, P, Q = product.y.shape
        reduction, gpu = product.packed[0].numel(), hardware.gpu(product.x.device)
        C, size = product.x.shape[1], product.x.element_size()
        config = default_config(N, P, Q, C, K, reduction // C, size, swap_ab, split, gpu)
        plain = product.input_precision == "tf32" and product.taps > 1 and tuple(product.stride) == (1, 1)
        if config is not None and plain:
            config = with_neighbours(config, N, P, Q, K, size, gpu)
        if config is None or _is_better_gathered(product, config, gpu):
            return None
        return Choice(config, copies_x)

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        """Both orders of the operands; TF32's x is rounded as it is loaded, on the way to the product, or by a copy."""
        size, block_k = problem.dtype.itemsize, block_k_of(problem.c, problem.dtype.itemsize)
        swap_ab = problem.input_precision != "tf32x3"
        rounds = problem.round_x and not rounds_on_load()
        orders = [(SWAP_AB_TILES, True, rounds)] if swap_ab else [(NATURAL_TILES, False, False)]
        if swap_ab and rounds and problem.channels_last_x:
            orders = [(NATURAL_TILES[:3], False, False), (ROUNDING_TILES, True, False), (SWAP_AB_TILES, True, True)]
        for tiles, swap_ab, copies_x in orders:
            for block_m, block_n, num_warps, num_stages in by_waves(problem, tiles, gpu):
                split = problem.input_precision == "tf32x3"
                if shared_memory(block_m, block_n, block_k, num_stages, size, split) <= gpu.shared_memory:
                    box = best_box(problem.n, *problem.output, block_m)
                    config = config_of(box, block_n, block_k, swap_ab, num_warps, num_stages)
                    for splits in _splits_to_try(config, problem, gpu):
                        yield Choice(replace(config, SPLITS=splits), copies_x or not problem.channels_last_x)

    def run(self, product: Product, config: TmaConfig) -> None:
        x, weight, y, epilogue = product.x, product.packed, product.y, product.epilogue
        N, C, H, W = x.shape
        K, P, Q = y.shape[1:]
        R, S = weight.shape[1:3]
        tile_n, tile_p, tile_q, block_n, block_k = (
            config.TILE_N,
            config.TILE_P,
            config.TILE_Q,
            config.BLOCK_N,
            config.BLOCK_K,
        )
        rounding = rounding_on_load(product.round_x)
        by_parity = product.stride[0] > 1 and _fits_by_parity(product)
        if by_parity:
            x = _pixels(x).view(N, H // 2, 2, W // 2, 2 * C)
            x_desc = TensorDescriptor.from_tensor(x, [tile_n, tile_p, 1, tile_q, block_k], **rounding)
        else:  # of one tap, or of stride 1
            x = _pixels(x)[:, :: product.stride[0], :: product.stride[1]]
            x_desc = TensorDescriptor.from_tensor(x, [tile_n, tile_p, tile_q, block_k], **rounding)
        if R * S > 1 and C % block_k != 0:
            taps = weight.view(-1, R * S, C).transpose(0, 1)
            weight_desc = TensorDescriptor.from_tensor(taps, [1, block_n, block_k])
        else:
            weight_desc = TensorDescriptor.from_tensor(weight.view(-1, R * S * C), [block_n, block_k])
        y_box = [tile_n, tile_p, tile_q, block_n]
        y_desc = TensorDescriptor.from_tensor(_pixels(y), y_box) if product.channels_last_y else y
        residual_desc = y_desc
        if epilogue.residual is not None:
            residual_desc = TensorDescriptor.from_tensor(_pixels(epilogue.residual), y_box)
        tiles_p, tiles_q = ceil_div(P, tile_p), ceil_div(Q, tile_q)
        tiles = tiles_of(config, N, P, Q, K)
        partial = counts = None
        if config.SPLITS > 1:
            partial = x.new_empty(tiles * config.SPLITS * config.pixels * block_n, dtype=torch.float32)
            counts = launch_semaphores(x.device, tiles)
        launch(
            conv2d_tma_forward_kernel,
            (tiles * config.SPLITS,),
            x_desc,
            weight_desc,
            epilogue.scale,
            epilogue.bias,
            residual_desc,
            y_desc,
            partial,
            counts,
            N,
            P,
            Q,
            tiles_p,
            tiles_q,
            C,
            K,
            R,
            S,
            2 if by_parity else 1,
            *product.padding,
            *product.dilation,
            **epilogue.flags,
            **dependent_launch(x),
            INPUT_PRECISION=product.input_precision,
            CHANNELS_LAST=product.channels_last_y,
            ROUND_X=product.round_x and not rounding,
            FLUSH=FLUSH_STEPS,
            **config.constants,
        )


def _has_one_tap(product: Product) -> bool:
    """Whether a pixel of y sees one pixel of x."""
    return product.taps == 1 and tuple(product.padding) == (0, 0)


def _pads_channels(product: Product) -> bool:
    """Whether under each of several taps at least a fourth of the blocks of channels is zeros, of 16-bit numbers.

    Pointers then are faster: 3x3, 96 channels of 35x35 52 us for 61, 24 to 64 of 14x14 6.5 for 9.4, 5x5, 48 to 64 of
    35x35 47 for 58; but not with full blocks of filters: 96 to 128 of 28x28 37 for 32 (64 images, H200).
    """
    C, size = product.x.shape[1], product.x.element_size()
    blocks = ceil_div(C, block_k_of(C, size)) * block_k_of(C, size)
    return size == 2 and product.taps > 1 and 4 * (blocks - C) >= blocks and product.y.shape[1] % 128 != 0


def _can_split(product: Product, config: TmaConfig) -> bool:
    """Whether each part has a step, and there are semaphores for all tiles, and 32 bits for offsets of parts."""
    N, K, P, Q = product.y.shape
    steps, tiles = product.taps * ceil_div(product.x.shape[1], config.BLOCK_K), tiles_of(config, N, P, Q, K)
    has_memory = tiles <= PER_STREAM and tiles * config.SPLITS * config.pixels * config.BLOCK_N < 2**31
    return config.SPLITS == 1 or (config.SPLITS <= steps and has_memory)


def _splits_to_try(config: TmaConfig, problem: Problem, gpu: Gpu) -> list[int]:
    """Where tiles are few, what makes a program a multiprocessor or two; and none.

    Of more than 64 sums a thread, two parts would not fit the registers.
    """
    fits = config.pixels * config.BLOCK_N <= 64 * 32 * config.num_warps
    tiles = tiles_of(config, problem.n, *problem.output, problem.k)
    steps, programs = problem.r * problem.s * ceil_div(problem.c, config.BLOCK_K), gpu.multiprocessors
    tried = [splits_of(tiles, steps, LEAST_STEPS // 4, n * programs) for n in (1, 2) if fits and tiles < programs]
    return list(dict.fromkeys([*tried, 1]))


def _is_narrow(product: Product) -> bool:
    """Whether blocks of 64 output channels would be mostly empty, and the form "pointers" loads 16 bytes at a time too.

    On an H100, 64 images: 48 to 48 channels of 56x56 13.4 us by pointers, 17.8 by TMA; 32 to 16 of 112x112 27 and 34;
    144 to 32 of 28x28 5.9 and 7.1. On an H200, 3x3, 32 to 32 of 149x149, 138 and 168. And where pixels of x have so few
    bytes that TMA, which brings one after the other, takes longer than they do.
    """
    C, K, size = product.x.shape[1], product.y.shape[1], product.x.element_size()
    lines = C * size % 128 == 0
    if C * size <= 32 and K * size <= 128 and _has_one_tap(product):
        return True
    return not lines and (K < 64 if _has_one_tap(product) else K <= 32 and size == 2)


def _is_better_gathered(product: Product, config: TmaConfig, gpu: Gpu) -> bool:
    """Whether the form "pointers", whose tile is a run of pixels, is faster with float32.

    Measured on an H200, 64 images, us, in brackets by TMA; both copy x to channels_last. Short taps: see
    `Product.has_short_taps`. In TF32 and stride 1, where a box has a pixel or two of each of many images: 1x7, 128 to
    128 channels of 17x17 36 (49), but 32 (24) where x need not be copied; or a few, and not all blocks of 128 channels
    are full: 3x3, 64 to 96 of 35x35 78 (95), 96 to 208 of 14x14 35 (42), but 47 (30) where x need not be copied. And
    where half of the last one would be empty: 1x7, 192 to 192 of 17x17 63 (90), 3x3, 128 to 192 of 28x28 123 (140), 80
    to 192 of 73x73 596 (773). In strict float32 also where few rows have so few tiles that most multiprocessors have
    none, and smaller ones help: 120 to 480 features 3.4 (4.7), 240 to 960 5.1 (6.9).
    """
    (N, K, P, Q), precision = product.y.shape, product.input_precision
    if product.has_short_taps:
        return True
    if product.x.element_size() != 4:
        return False
    if product.taps == 1:
        few = N * P * Q <= FEW_ROWS and 4 * ceil_div(K, config.BLOCK_N) < gpu.multiprocessors
        return precision == "tf32x3" and few
    if precision != "tf32" or tuple(product.stride) != (1, 1):
        return False
    few_pixels = config.TILE_P * config.TILE_Q < LEAST_PIXELS or K % 128 != 0
    apart = product.x.stride(1) != 1
    return (apart and config.TILE_N >= MANY_IMAGES and few_pixels) or (config.BLOCK_N == 128 and leaves_half_empty(K))


def _fits_by_parity(product: Product) -> bool:
    """Whether a stride of 2 can be seen as the choice of a parity: of even sides and whole lines of 128 bytes."""
    _, C, H, W = product.x.shape
    even = H % 2 == 0 and W % 2 == 0
    return tuple(product.stride) == (2, 2) and even and C * product.x.element_size() % 128 == 0


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W], channels_last, as [N, H, W, C] with the strides of these sizes, even where one is 1."""
    (N, C, H, W), step = x.shape, pixel_stride(x) or x.shape[1]
    return x.as_strided((N, H, W, C), (H * W * step, W * step, step, 1))


def can_share_tiles(product: Product) -> bool:
    """Whether this form takes a product of 16-bit numbers as it is, so that programs may share its tiles."""
    return product.x.element_size() == 2 and product.shortcut is None and product.is_aligned and TmaForm().fits(product)


def shares_rows(product: Product) -> bool:
    """Whether so few rows of a linear layer with so many features are fastest where programs share tiles.

    64 rows in bfloat16, 4,096 to 1,000 features 6.7 us, in registers 14.1, to 4,096 11.8, by the matrix product 14.7,
    25,088 to 4,096 64 and 81 (H200).
    """
    linear = product.taps == 1 and product.y.shape[2:].numel() == 1
    rows = LEAST_ROWS < product.pixels <= FEW_ROWS
    return linear and rows and product.x.shape[1] >= MANY_FEATURES and can_share_tiles(product)
