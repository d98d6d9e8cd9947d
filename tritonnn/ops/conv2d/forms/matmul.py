"""A filter of one tap, or a linear layer, as a matrix product: persistent, by TMA and wgmma, for Hopper GPUs, in Gluon.

    y[n, m, k] = activation(bias[k] + residual[n, m, k] + scale[k] * sum over c of x[n, m, c] * weight[k, c])

With a prologue x stands for activation(scale[n, c] * x[n, m, c] + shift[c]), which is computed in registers: gates of
squeeze-and-excitation, or a batch norm before the product.
m numbers the pixels of an image; images in channels_last, and the rows of a linear layer, are one long image. x and y
are each in channels_last or not: in NCHW a tile of x is [channels, pixels] and is turned round as it enters registers.
What lies beyond the last pixel or channel TMA reads as zeros and does not write, so that no size has to divide another.
Programs are persistent: while one tile is multiplied or stored, the ring of slots fills with the next ones.
"""

import dataclasses
import functools
from collections.abc import Iterator

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ....device.arithmetic import FLUSH_STEPS, add, round_to_tf32, split_to_tf32
from ....device.dependent_launch import wait_for_predecessor
from ....device.epilogue import finish
from ....device.gluon_versions import barrier, barrier_before_expect, barrier_before_wait, load_box, store_box
from ....device.prologue import load_factors, prepare
from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.dependent_launch import dependent_launch
from ....runtime.hardware import Gpu
from ....runtime.launch_plan import launch
from ....runtime.memory_format import pixel_stride
from ..problem import Choice, Problem, Product
from ..prologue import NO_PROLOGUE
from .form import Form
from .matmul_tiles import (
    FOR_FEW_ROWS,
    LEAST_CHANNELS,
    ROUNDED,
    TURNED,
    MatmulConfig,
    kinds_of,
    ranked,
    shared_memory,
    tiles_of,
)
from .pointers import one_wave
from .tma import shares_rows
from .tma_halo.kernel import start_successor_if

OPERANDS = (torch.float32, torch.float16, torch.bfloat16)


@gluon.jit
def place_of(tile, blocks_n, blocks_of_image, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """(image, pixel, output channel) at which a tile begins."""
    block_m = tile // blocks_n
    return block_m // blocks_of_image, block_m % blocks_of_image * BLOCK_M, tile % blocks_n * BLOCK_N


@gluon.jit
def fetch_weight(weights, first, bar, k, c, K, SPLIT: gl.constexpr, BLOCK_N: gl.constexpr, REST_N: gl.constexpr, pred):
    """Starts to load a tile of the weight and, SPLIT, of what its rounding to TF32 left, K rows below.

    weights: (weight_desc, w_ring, rest_desc, rest_ring), the last two those of the REST_N channels, if there are.
    """
    weight_desc, w_ring, rest_desc, rest_ring = weights
    load_box(weight_desc, [k, c], bar, w_ring.index(first), pred=pred)
    if SPLIT:
        load_box(weight_desc, [K + k, c], bar, w_ring.index(first + 1), pred=pred)
    if REST_N:
        load_box(rest_desc, [k + BLOCK_N, c], bar, rest_ring.index(first), pred=pred)


@gluon.jit
def fetch(
    x_desc,
    weights,
    x_ring,
    x_bars,
    w_bars,
    slot,
    step,
    tile,
    n,
    m,
    k,
    K,
    tiles,
    steps,
    programs,
    blocks_n,
    blocks_of_image,
    CHANNELS_LAST_X: gl.constexpr,
    SPLIT: gl.constexpr,
    RESIDENT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    REST_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """Starts to load x, and the weight unless it is RESIDENT, for a step of the tile at (n, m, k).

    Returns the step after it, and its tile and place; divisions are for each tile only.
    """
    PARTS: gl.constexpr = 2 if SPLIT else 1
    WEIGHT_BYTES: gl.constexpr = PARTS * weights[0].block_type.nbytes + (weights[2].block_type.nbytes if REST_N else 0)
    c, pred = step * BLOCK_K, tile < tiles
    # Together, as the compiler has all warps wait between the two operations on one kind of barrier.
    mbarrier.expect(x_bars.index(slot), x_desc.block_type.nbytes, pred=pred)
    if not RESIDENT:
        mbarrier.expect(w_bars.index(slot), WEIGHT_BYTES, pred=pred)
    if CHANNELS_LAST_X:
        load_box(x_desc, [n, m, c], x_bars.index(slot), x_ring.index(slot), pred=pred)
    else:
        load_box(x_desc, [n, c, m], x_bars.index(slot), x_ring.index(slot), pred=pred)
    if not RESIDENT:
        fetch_weight(weights, slot * PARTS, w_bars.index(slot), k, c, K, SPLIT, BLOCK_N, REST_N, pred)
    step += 1
    if step == steps:
        step = 0
        tile += programs
        n, m, k = place_of(tile, blocks_n, blocks_of_image, BLOCK_M, BLOCK_N + REST_N)
    return step, tile, n, m, k


@gluon.jit
def load_pixels(
    x_ring, slot, CHANNELS_LAST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, LAYOUT: gl.constexpr
):
    """[BLOCK_M, BLOCK_K] of a slot in registers."""
    if CHANNELS_LAST:
        x = x_ring.index(slot).reshape([BLOCK_M, BLOCK_K]).load(LAYOUT)
    else:
        x = x_ring.index(slot).reshape([BLOCK_K, BLOCK_M]).permute([1, 0]).load(LAYOUT)
    return x


@gluon.jit
def lines_of(y_stage, CHANNELS_LAST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """y's place in shared memory as [BLOCK_M, BLOCK_N]."""
    if CHANNELS_LAST:
        lines = y_stage.reshape([BLOCK_M, BLOCK_N])
    else:
        lines = y_stage.reshape([BLOCK_N, BLOCK_M]).permute([1, 0])
    return lines


@gluon.jit
def scaled(acc, scale_ptr, bias_ptr, k, K, HAS_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, ACC: gl.constexpr):
    """The sums of channels from k on, times the scale and plus the bias of each."""
    offs_n = k + gl.arange(0, acc.shape[1], gl.SliceLayout(0, ACC))
    if HAS_SCALE:
        acc *= gl.expand_dims(gl.load(scale_ptr + offs_n, mask=offs_n < K, other=0.0), 0)
    if HAS_BIAS:
        acc += gl.expand_dims(gl.load(bias_ptr + offs_n, mask=offs_n < K, other=0.0), 0)
    return acc


@gluon.jit(do_not_specialize=["tiles", "blocks_n", "blocks_of_image", "steps", "K", "C"])
def conv2d_matmul_forward_kernel(
    x_desc,
    weight_desc,
    scale_ptr,
    bias_ptr,
    residual_desc,
    y_desc,
    tiles,
    blocks_n,
    blocks_of_image,
    steps,
    K,
    C,
    x_scale_ptr,
    x_shift_ptr,
    rest_desc,
    rest_residual_desc,
    rest_y_desc,
    X_SCALE: gl.constexpr,
    HAS_X_SHIFT: gl.constexpr,
    X_ACTIVATION: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
    ROUND_Y: gl.constexpr,
    DEPENDENT: gl.constexpr,
    INPUT_PRECISION: gl.constexpr,
    ROUND_X: gl.constexpr,
    CHANNELS_LAST_X: gl.constexpr,
    CHANNELS_LAST_Y: gl.constexpr,
    FLUSH: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    REST_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    X_SLOTS: gl.constexpr,
    RESIDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A program owns every num_programs-th tile of BLOCK_M pixels x BLOCK_N + REST_N channels.

    Those of the rest have descriptors and sums of their own, where both operands are read from shared memory.

    acc [pixels, channels] = x @ weight.T. Both are read from shared memory or, where x has a prologue or is to be
    rounded to TF32, split for float32 ("tf32x3") or turned round, x from registers. In "tf32x3" weight_desc has K rows
    below what the rounding of the weight left, and the sums of FLUSH steps, where there are more (else 0), are added up
    apart, so that few float32 additions follow each other. RESIDENT, the number of steps or 0: the weight is loaded
    once; the programs are a multiple of the blocks of channels, so that each keeps to one. Descriptors are [images,
    pixels, channels] in channels_last, else [images, channels, pixels]. The prologue's factors are by channels or, if
    X_SCALE is "gates", by images and channels.
    """
    SPLIT: gl.constexpr = INPUT_PRECISION == "tf32x3"
    IN_REGISTERS: gl.constexpr = SPLIT or ROUND_X or not CHANNELS_LAST_X or X_SCALE != "none"
    PARTS: gl.constexpr = 2 if SPLIT else 1
    DTYPE: gl.constexpr = x_desc.dtype
    BITS: gl.constexpr = DTYPE.primitive_bitwidth
    W_SLOTS: gl.constexpr = PARTS * (RESIDENT if RESIDENT else X_SLOTS)
    # A step's slot is free once x is in registers, and else when the next step's products have begun.
    AHEAD: gl.constexpr = X_SLOTS if IN_REGISTERS else X_SLOTS - 1
    WARPS_M: gl.constexpr = num_warps if BLOCK_M >= 16 * num_warps else BLOCK_M // 16
    WARPS_N: gl.constexpr = num_warps // WARPS_M
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS_M, WARPS_N], instr_shape=[16, BLOCK_N // WARPS_N, 256 // BITS]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 32 // BITS)
    REST_ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[WARPS_M, WARPS_N],
        instr_shape=[16, (REST_N if REST_N else BLOCK_N) // WARPS_N, 256 // BITS],
    )

    x_ring = gl.allocate_shared_memory(DTYPE, [X_SLOTS] + x_desc.block_type.shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(DTYPE, [W_SLOTS] + weight_desc.block_type.shape, weight_desc.layout)
    y_stage = gl.allocate_shared_memory(DTYPE, y_desc.block_type.shape, y_desc.layout)
    rest_ring = w_ring
    if REST_N:
        rest_ring = gl.allocate_shared_memory(DTYPE, [W_SLOTS] + rest_desc.block_type.shape, rest_desc.layout)
        rest_stage = gl.allocate_shared_memory(DTYPE, rest_y_desc.block_type.shape, rest_y_desc.layout)
    x_bars = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    w_bars = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    residual_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(X_SLOTS):
        mbarrier.init(x_bars.index(i), count=1)
        mbarrier.init(w_bars.index(i), count=1)
    mbarrier.init(residual_bar, count=1)
    fence_async_shared()
    barrier()

    weights = (weight_desc, w_ring, rest_desc, rest_ring)
    TILE_N: gl.constexpr = BLOCK_N + REST_N
    wait_for_predecessor(DEPENDENT)
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    if RESIDENT:
        bar, k = w_bars.index(0), first % blocks_n * TILE_N
        REST_BYTES: gl.constexpr = rest_desc.block_type.nbytes if REST_N else 0
        mbarrier.expect(bar, W_SLOTS * (weight_desc.block_type.nbytes + REST_BYTES))
        for i in gl.static_range(RESIDENT):
            fetch_weight(weights, i * PARTS, bar, k, i * BLOCK_K, K, SPLIT, BLOCK_N, REST_N, True)
    ahead_step, ahead_tile = first * 0, first  # what is fetched next
    ahead_n, ahead_m, ahead_k = place_of(first, blocks_n, blocks_of_image, BLOCK_M, TILE_N)
    for i in gl.static_range(AHEAD):
        ahead_step, ahead_tile, ahead_n, ahead_m, ahead_k = fetch(
            x_desc,
            weights,
            x_ring,
            x_bars,
            w_bars,
            i,
            ahead_step,
            ahead_tile,
            ahead_n,
            ahead_m,
            ahead_k,
            K,
            tiles,
            steps,
            programs,
            blocks_n,
            blocks_of_image,
            CHANNELS_LAST_X,
            SPLIT,
            RESIDENT,
            BLOCK_M,
            BLOCK_N,
            REST_N,
            BLOCK_K,
        )
    if RESIDENT:
        mbarrier.wait(w_bars.index(0), 0)
    if IN_REGISTERS:
        mbarrier.wait(x_bars.index(0), 0)
        x = load_pixels(x_ring, 0, CHANNELS_LAST_X, BLOCK_M, BLOCK_K, OPERAND)
        if X_SCALE != "none":
            n, m, k = place_of(first, blocks_n, blocks_of_image, BLOCK_M, TILE_N)
            factor, shift = load_factors(
                x_scale_ptr, x_shift_ptr, n, 0, C, True, X_SCALE, HAS_X_SHIFT, BLOCK_K, OPERAND
            )
            x = prepare(x, factor, shift, HAS_X_SHIFT, X_ACTIVATION, DTYPE)

    count = first * 0  # steps that this program has begun
    stored = first * 0
    for tile in range(first, tiles, programs):
        n, m, k = place_of(tile, blocks_n, blocks_of_image, BLOCK_M, TILE_N)
        if HAS_RESIDUAL:
            tma.store_wait(0)
            barrier_before_expect()
            mbarrier.expect(residual_bar, y_desc.block_type.nbytes + (rest_y_desc.block_type.nbytes if REST_N else 0))
            if CHANNELS_LAST_Y:
                load_box(residual_desc, [n, m, k], residual_bar, y_stage)
                if REST_N:
                    load_box(rest_residual_desc, [n, m, k + BLOCK_N], residual_bar, rest_stage)
            else:
                load_box(residual_desc, [n, k, m], residual_bar, y_stage)
                if REST_N:
                    load_box(rest_residual_desc, [n, k + BLOCK_N, m], residual_bar, rest_stage)

        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACC)
        part = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACC)
        if REST_N:
            rest_acc = gl.zeros([BLOCK_M, REST_N], gl.float32, REST_ACC)
        for step in range(steps):
            slot = count % X_SLOTS
            phase = count // X_SLOTS & 1
            if not (IN_REGISTERS and RESIDENT):
                barrier_before_wait()
            if not IN_REGISTERS:
                mbarrier.wait(x_bars.index(slot), phase)
            if RESIDENT:
                w_slot = step * PARTS
            else:
                w_slot = slot * PARTS
                mbarrier.wait(w_bars.index(slot), phase)
            weight = w_ring.index(w_slot).permute([1, 0])
            if not IN_REGISTERS:
                x_lines = x_ring.index(slot).reshape([BLOCK_M, BLOCK_K])
                acc = warpgroup_mma(x_lines, weight, acc, use_acc=step > 0, is_async=True)
                if REST_N:
                    rest_weight = rest_ring.index(w_slot).permute([1, 0])
                    rest_acc = warpgroup_mma(x_lines, rest_weight, rest_acc, use_acc=step > 0, is_async=True)
                    acc, rest_acc = warpgroup_mma_wait(2, deps=[acc, rest_acc])  # all but this step's products are done
                else:
                    acc = warpgroup_mma_wait(1, deps=[acc])
            else:
                if SPLIT:
                    rest = w_ring.index(w_slot + 1).permute([1, 0])
                    high, low = split_to_tf32(x)
                    products = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACC)
                    products = warpgroup_mma(low, weight, products, use_acc=False, is_async=True)
                    products = warpgroup_mma(high, rest, products, is_async=True)
                    products = warpgroup_mma(high, weight, products, is_async=True)
                else:
                    rounded = round_to_tf32(x) if ROUND_X else x
                    acc = warpgroup_mma(rounded, weight, acc, use_acc=step > 0, is_async=True)
                # Meanwhile the next step's x comes into registers; this step's are kept until its products are done.
                has_next = (step + 1 < steps) | (tile + programs < tiles)
                slot_next = (count + 1) % X_SLOTS
                if X_SCALE != "none":
                    step_next, n_next = step + 1, n
                    if step_next == steps:
                        step_next = 0
                        n_next = (tile + programs) // blocks_n // blocks_of_image
                    factor, shift = load_factors(
                        x_scale_ptr,
                        x_shift_ptr,
                        n_next,
                        step_next,
                        C,
                        has_next,
                        X_SCALE,
                        HAS_X_SHIFT,
                        BLOCK_K,
                        OPERAND,
                    )
                mbarrier.wait(x_bars.index(slot_next), (count + 1) // X_SLOTS & 1, pred=has_next)
                x = load_pixels(x_ring, slot_next, CHANNELS_LAST_X, BLOCK_M, BLOCK_K, OPERAND)
                if X_SCALE != "none":
                    x = prepare(x, factor, shift, HAS_X_SHIFT, X_ACTIVATION, DTYPE)
                if SPLIT:
                    products, high, low = warpgroup_mma_wait(0, deps=[products, high, low])
                    part = add(part, products)
                    if FLUSH:
                        if (step + 1) % FLUSH == 0:
                            acc += part
                            part = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACC)
                else:
                    acc, rounded = warpgroup_mma_wait(0, deps=[acc, rounded])
            barrier_before_expect()  # for all warps
            ahead_step, ahead_tile, ahead_n, ahead_m, ahead_k = fetch(
                x_desc,
                weights,
                x_ring,
                x_bars,
                w_bars,
                (count + AHEAD) % X_SLOTS,
                ahead_step,
                ahead_tile,
                ahead_n,
                ahead_m,
                ahead_k,
                K,
                tiles,
                steps,
                programs,
                blocks_n,
                blocks_of_image,
                CHANNELS_LAST_X,
                SPLIT,
                RESIDENT,
                BLOCK_M,
                BLOCK_N,
                REST_N,
                BLOCK_K,
            )
            count += 1
        if DEPENDENT:
            start_successor_if(tile + programs >= tiles)
        if REST_N:
            acc, rest_acc = warpgroup_mma_wait(0, deps=[acc, rest_acc])
        elif not IN_REGISTERS:
            acc = warpgroup_mma_wait(0, deps=[acc])
        if SPLIT:
            acc = acc + part if FLUSH else part

        acc = scaled(acc, scale_ptr, bias_ptr, k, K, HAS_SCALE, HAS_BIAS, ACC)
        y_lines = lines_of(y_stage, CHANNELS_LAST_Y, BLOCK_M, BLOCK_N)
        if REST_N:
            rest_acc = scaled(rest_acc, scale_ptr, bias_ptr, k + BLOCK_N, K, HAS_SCALE, HAS_BIAS, REST_ACC)
            rest_lines = lines_of(rest_stage, CHANNELS_LAST_Y, BLOCK_M, REST_N)
        if HAS_RESIDUAL:
            mbarrier.wait(residual_bar, stored & 1)
            acc += y_lines.load(ACC).to(gl.float32)
            if REST_N:
                rest_acc += rest_lines.load(REST_ACC).to(gl.float32)
        else:
            tma.store_wait(0)
        acc = finish(acc, ACTIVATION, SLOPE, ROUND_Y)
        barrier()
        y_lines.store(acc.to(DTYPE))
        if REST_N:
            rest_lines.store(finish(rest_acc, ACTIVATION, SLOPE, ROUND_Y).to(DTYPE))
        fence_async_shared()
        barrier()
        if CHANNELS_LAST_Y:
            store_box(y_desc, [n, m, k], y_stage)
            if REST_N:
                store_box(rest_y_desc, [n, m, k + BLOCK_N], rest_stage)
        else:
            store_box(y_desc, [n, k, m], y_stage)
            if REST_N:
                store_box(rest_y_desc, [n, k + BLOCK_N, m], rest_stage)
        stored += 1
    tma.store_wait(0)


class MatmulForm(Form):
    """A filter of one tap over every pixel, also a linear layer; x and y of whole multiples of 16 bytes."""

    config = MatmulConfig
    kernels = (conv2d_matmul_forward_kernel,)
    takes_prologue = True
    most_candidates = 9
    most_beside_others = 9

    def fits(self, product: Product) -> bool:
        """Rows of channels, or in NCHW of an image's pixels, are multiples of 16 bytes. Verified on Hopper."""
        x, y, size = product.x, product.y, product.x.element_size()
        window = product.taps, *product.stride, *product.padding, product.groups
        if window != (1, 1, 1, 0, 0, 1) or x.dtype not in OPERANDS or not product.on_tensor_cores:
            return False
        (C, H, W), K = x.shape[1:], y.shape[1]
        if x.data_ptr() % 16 != 0 or not product.epilogue.has_aligned_residual:
            return False
        if not product.has_aligned_y:
            return False
        if pixel_stride(x) is None and (not x.is_contiguous() or product.prologue is not None):
            return False
        rows_x = pixel_stride(x) or H * W
        rows_y = K if product.channels_last_y else H * W
        return (
            C >= LEAST_CHANNELS
            and C * size % 16 == rows_x * size % 16 == rows_y * size % 16 == 0
            and hardware.gluon_is_verified(x.device)
        )

    def takes(self, product: Product, choice: Choice) -> bool:
        config, split = choice.config, product.input_precision == "tf32x3"
        size, C = product.x.element_size(), product.x.shape[1]
        lines = config.BLOCK_K * size in (32, 64, 128)
        if config.REST_N and (config.REST_N < 16 or product.round_x or split or pixel_stride(product.x) is None):
            return False
        if config.REST_N and product.prologue is not None:
            return False
        tile = config.BLOCK_M % 64 == 0 and config.BLOCK_N >= 16 and config.X_SLOTS >= 2 and config.num_warps >= 4
        memory = shared_memory(config, size, ceil_div(C, config.BLOCK_K), split)
        return lines and tile and not choice.copies_x and memory <= hardware.gpu(product.x.device).shared_memory

    def default(self, product: Product) -> Choice | None:
        """None where tiles are few: the forms TMA and pointers, which are not persistent, then start earlier.

        In strict float32 of few rows that has half as many tiles: 440 to 1,000 features, 32 tiles, 7.1 us for 10.4.

        And where pixels have few bytes, in and out, of which TMA brings one pixel after the other: 32 to 16 channels of
        112x112 in bfloat16 21.6 us by pointers, here 38, 16 to 64 40 and 57 (H200).
        """
        if not self.fits(product) or is_narrow(product) or one_wave(product) or shares_rows(product):
            return None
        x, (N, K, P, Q) = product.x, product.y.shape
        last_x, split = pixel_stride(x) is not None, product.input_precision == "tf32x3"
        in_registers = product.round_x or not last_x or product.prologue is not None
        kinds = kinds_of(x.element_size(), in_registers, split, not last_x, product.pixels)
        images, pixels = (1, N * P * Q) if is_flat(product) else (N, P * Q)
        gpu = hardware.gpu(x.device)
        found = ranked(kinds, images, pixels, x.shape[1], K, x.element_size(), split, gpu)
        if not found:
            return None
        few_rows, tile = kinds is FOR_FEW_ROWS, found[0]
        if kinds in (ROUNDED, TURNED):  # whose kinds range from 64 x 32 to 128 x 128
            tile = dataclasses.replace(tile, BLOCK_M=64, BLOCK_N=64)
        if (5 if few_rows else 2) * tiles_of(tile, images, pixels, K) < gpu.multiprocessors:
            return None
        return Choice(found[0])

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        split, size = problem.input_precision == "tf32x3", problem.dtype.itemsize
        turned = not problem.channels_last_x
        kinds = kinds_of(size, problem.round_x or turned, split, turned, problem.pixels)
        flat, (p, q) = problem.channels_last_x and problem.channels_last_y, problem.output
        images, pixels = (1, problem.pixels) if flat else (problem.n, p * q)
        yield from map(Choice, ranked(kinds, images, pixels, problem.c, problem.k, size, split, gpu))

    def run(self, product: Product, config: MatmulConfig) -> None:
        x, weight, y, epilogue = product.x, product.packed, product.y, product.epilogue
        C, K = x.shape[1], y.shape[1]
        split = product.input_precision == "tf32x3"
        last_x, last_y, flat = pixel_stride(x) is not None, product.channels_last_y, is_flat(product)
        block_m, block_n, block_k = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
        x_rows, x_box = _image(x, last_x, flat), [1, block_m, block_k] if last_x else [1, block_k, block_m]
        y_rows, y_box = _image(y, last_y, flat), [1, block_m, block_n] if last_y else [1, block_n, block_m]
        y_desc = _descriptor(y_rows, y_box)
        residual_desc = y_desc
        if epilogue.residual is not None:
            residual_desc = _descriptor(_image(epilogue.residual, last_y, flat), y_box)
        rest_desc = rest_y_desc = rest_residual_desc = None
        if config.REST_N:
            rest_box = [1, block_m, config.REST_N] if last_y else [1, config.REST_N, block_m]
            rest_desc = _descriptor(weight.view(-1, C), [config.REST_N, block_k])
            rest_y_desc = rest_residual_desc = _descriptor(y_rows, rest_box)
            if epilogue.residual is not None:
                rest_residual_desc = _descriptor(_image(epilogue.residual, last_y, flat), rest_box)
        pixels = y.shape[2] * y.shape[3] * (y.shape[0] if flat else 1)
        blocks_of_image, blocks_n, steps = ceil_div(pixels, block_m), ceil_div(K, config.channels), ceil_div(C, block_k)
        tiles = blocks_n * blocks_of_image * (1 if flat else y.shape[0])
        options = config.constants
        programs = min(tiles, options.pop("PROGRAMS") * hardware.gpu(x.device).multiprocessors)
        if options.pop("RESIDENT"):
            programs = max(programs - programs % blocks_n, blocks_n)
        launch(
            conv2d_matmul_forward_kernel,
            (programs,),
            _descriptor(x_rows, x_box),
            _descriptor(weight.view(-1, C), [block_n, block_k]),
            epilogue.scale,
            epilogue.bias,
            residual_desc,
            y_desc,
            tiles,
            blocks_n,
            blocks_of_image,
            steps,
            K,
            C,
            None if product.prologue is None else product.prologue.scale,
            None if product.prologue is None else product.prologue.shift,
            rest_desc,
            rest_residual_desc,
            rest_y_desc,
            **(NO_PROLOGUE if product.prologue is None else product.prologue.flags),
            **epilogue.flags,
            **dependent_launch(x),
            INPUT_PRECISION=product.input_precision,
            ROUND_X=product.round_x,
            CHANNELS_LAST_X=last_x,
            CHANNELS_LAST_Y=last_y,
            FLUSH=FLUSH_STEPS if split and steps > FLUSH_STEPS else 0,
            RESIDENT=steps if config.RESIDENT else 0,
            **options,
        )


def is_narrow(product: Product) -> bool:
    """Whether pixels of x and y have few bytes, in channels_last: both at most 64, or x 32 and y 128."""
    x, y = (image.shape[1] * image.element_size() for image in (product.x, product.y))
    last = product.channels_last_y and pixel_stride(product.x) is not None
    return (max(x, y) <= 64 or (x <= 32 and y <= 128)) and last and product.prologue is None


def is_flat(product: Product) -> bool:
    """Whether all images are one long one: their pixels follow each other, and none has factors of its own."""
    gates = product.prologue is not None and product.prologue.has_gates
    return pixel_stride(product.x) is not None and product.channels_last_y and not gates


def _image(x: torch.Tensor, channels_last: bool, flat: bool) -> torch.Tensor:
    """x [N, C, H, W] as [images, pixels, channels] or [images, channels, pixels], flat: as one image."""
    N, C, H, W = x.shape
    if not channels_last:
        return x.as_strided((N, C, H * W), (C * H * W, H * W, 1))
    step = pixel_stride(x)
    if flat:
        return x.as_strided((1, N * H * W, C), (N * H * W * step, step, 1))
    return x.as_strided((N, H * W, C), (H * W * step, step, 1))


@functools.lru_cache
def _layout(line: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(min(line, 128), bits, rank)


def _descriptor(x: torch.Tensor, box: list[int]) -> TensorDescriptor:
    layout = _layout(box[-1] * x.element_size(), 8 * x.element_size(), len(box))
    return TensorDescriptor.from_tensor(x, box, layout)
