"""Gradient of the input of a 2-D convolution.

    grad_x[n, c, h, w] = sum over k, r, s of weight[k, c, r, s] * g[n, k, p, q]
        where p*stride_h + r*dilation_h - padding_h = h and q*stride_w + s*dilation_w - padding_w = w

With stride 1 that is a convolution of g with the filters flipped, the channels exchanged, and any form of the forward
pass computes it. With other strides the pixels of x fall into stride_h * stride_w classes, each of which some taps of
the filter reach: for each class the sum over those taps is a convolution of stride 1, and no zeros are multiplied.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....device.arithmetic import accumulator, index_type, round_to
from ....runtime import hardware
from ....runtime.blocks import INTERPRETER_TILE, ceil_div, power_of_2
from ....runtime.launch_plan import launch
from ..dispatch import launch_unpacked
from ..epilogue import Epilogue
from ..pack import channels_last
from . import input_tma
from .arithmetic import add_product
from .filters import exchanged_filters


class Taps(NamedTuple):
    """Along rows or columns: the taps FIRST, FIRST + STEP, ... that reach a class of pixels, COUNT in number.

    Its pixel i is reached from the output's row i + OFFSET by the first one, SHIFT rows before by each further one.
    """

    FIRST: int
    STEP: int
    COUNT: int
    OFFSET: int
    SHIFT: int

    @classmethod
    def of(cls, residue: int, size: int, stride: int, padding: int, dilation: int) -> "Taps":
        """The taps among a filter's `size` rows that reach the pixels i * stride + residue."""
        step = stride // math.gcd(stride, dilation)
        first = next((r for r in range(min(step, size)) if (residue + padding - r * dilation) % stride == 0), None)
        if first is None:
            return cls(0, 1, 0, 0, 0)
        offset = (residue + padding - first * dilation) // stride
        return cls(first, step, ceil_div(size - first, step), offset, step * dilation // stride)


@triton.jit
def conv2d_backward_input_kernel(
    g_ptr,
    weight_ptr,
    grad_x_ptr,
    M,
    PIXELS,
    COLUMNS,
    P,
    Q,
    g_stride_n,
    g_stride_k,
    g_stride_p,
    g_stride_q,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    FIRST_R: tl.constexpr,
    STEP_R: tl.constexpr,
    COUNT_R: tl.constexpr,
    OFFSET_P: tl.constexpr,
    SHIFT_P: tl.constexpr,
    FIRST_S: tl.constexpr,
    STEP_S: tl.constexpr,
    COUNT_S: tl.constexpr,
    OFFSET_Q: tl.constexpr,
    SHIFT_Q: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_M of M = N * PIXELS pixels of a class x BLOCK_N channels of a group; PIXELS is its image.

    C and K count the channels of a group; weight is [GROUPS * C, R, S, K]. See `Taps` for the class.
    """
    BLOCKS_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    blocks_m = (M - 1) // BLOCK_M + 1
    group = (pid // (blocks_m * BLOCKS_N)).to(tl.int64)
    pid = pid % (blocks_m * BLOCKS_N)
    offs_m = (pid // BLOCKS_N).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < M
    n = tl.minimum(offs_m // PIXELS, (M - 1) // PIXELS).to(tl.int64)
    i = offs_m % PIXELS // COLUMNS
    j = offs_m % PIXELS % COLUMNS
    offs_n = pid % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_n = offs_n < C
    channel = group * C + offs_n
    g_ptrs = g_ptr + group * K * g_stride_k + (n * g_stride_n)[:, None]
    weight_ptrs = weight_ptr + (channel * (R * S * K))[None, :]

    acc = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for step in range(COUNT_R * COUNT_S * BLOCKS_K):
        tap = step // BLOCKS_K
        k = step % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        mask_k = k < K
        p = i + OFFSET_P - tap // COUNT_S * SHIFT_P
        q = j + OFFSET_Q - tap % COUNT_S * SHIFT_Q
        r = FIRST_R + tap // COUNT_S * STEP_R
        s = FIRST_S + tap % COUNT_S * STEP_S
        inside = (mask_m & (p >= 0) & (p < P) & (q >= 0) & (q < Q))[:, None] & mask_k[None, :]
        offs_g = (p.to(tl.int64) * g_stride_p + q.to(tl.int64) * g_stride_q)[:, None]
        g = tl.load(g_ptrs + (offs_g + (k.to(tl.int64) * g_stride_k)[None, :]), mask=inside, other=0.0)
        offs_k = (r * S + s) * K + k
        weight = tl.load(weight_ptrs + offs_k[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = add_product(g, weight, acc, INPUT_PRECISION)
    offs_x = n * x_stride_n + i.to(tl.int64) * x_stride_h + j.to(tl.int64) * x_stride_w
    offs_x = offs_x[:, None] + (channel * x_stride_c)[None, :]
    tl.store(grad_x_ptr + offs_x, round_to(acc, grad_x_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def run(
    g: torch.Tensor,
    weight: torch.Tensor,
    grad_x: torch.Tensor,
    channels_last_x: bool,
    window: tuple,
    groups: int,
    input_precision: str,
) -> None:
    """Fills grad_x [N, C, H, W], dense; g [N, K, P, Q] and weight [K, C / groups, R, S] have any strides."""
    stride, padding, dilation = window
    if tuple(stride) == (1, 1):
        margins = [d * (size - 1) - p for d, size, p in zip(dilation, weight.shape[2:], padding)]
        for dim, margin in zip((2, 3), margins):  # padding wider than a filter: pixels that saw nothing of x
            if margin < 0:
                g = g.narrow(dim, -margin, g.shape[dim] + 2 * margin)
        margins = tuple(max(margin, 0) for margin in margins)
        flipped = exchanged_filters(weight, groups, flip=True).permute(0, 3, 1, 2)
        window = (1, 1), margins, tuple(dilation)
        launch_unpacked(g, flipped, grad_x, channels_last_x, window, groups, input_precision, Epilogue())
    else:
        _run_by_classes(g, weight, grad_x, window, groups, input_precision)


def _run_by_classes(g, weight, grad_x, window, groups, input_precision) -> None:
    K, C, R, S = weight.shape
    K //= groups
    N, P, Q = g.shape[0], *g.shape[2:]
    if not triton.knobs.runtime.interpret and g.stride(1) != 1 and g.shape[1] >= 16:
        g = channels_last(g).permute(0, 3, 1, 2)
    if input_tma.fits(g, grad_x, window, groups, input_precision):
        input_tma.run(g, weight, grad_x, window[1])
        return
    packed = exchanged_filters(weight, groups, flip=False)
    for residues, taps in _classes(window, (R, S), grad_x.shape[2:]):
        part = grad_x[:, :, residues[0] :: window[0][0], residues[1] :: window[0][1]]
        rows, columns = part.shape[2:]
        M = N * rows * columns
        blocks = _blocks(M, C, K, g, hardware.gpu(g.device))
        launch(
            conv2d_backward_input_kernel,
            (ceil_div(M, blocks["BLOCK_M"]) * ceil_div(C, blocks["BLOCK_N"]) * groups,),
            g,
            packed,
            part,
            M,
            rows * columns,
            columns,
            P,
            Q,
            *g.stride(),
            *part.stride(),
            C,
            K,
            R,
            S,
            *taps[0],
            *taps[1],
            INPUT_PRECISION=input_precision,
            ACC=accumulator(g.dtype),
            INDEX=index_type(M + blocks["BLOCK_M"]),
            **blocks,
        )


def _classes(window, sizes, image) -> Iterator[tuple[tuple[int, int], tuple[Taps, Taps]]]:
    """The residues (row, column) of each class of pixels that an image has, and its taps along rows and columns."""
    rows, columns = (
        [(residue, Taps.of(residue, size, *along)) for residue in range(min(along[0], extent))]
        for size, extent, along in zip(sizes, image, zip(*window))
    )
    for row, row_taps in rows:
        for column, column_taps in columns:
            yield (row, column), (row_taps, column_taps)


def _blocks(M: int, C: int, K: int, g: torch.Tensor, gpu: hardware.Gpu) -> dict[str, int]:
    if triton.knobs.runtime.interpret:
        block_n, block_k = power_of_2(C, 1, 512), power_of_2(K, 1, 512)
        block_m, num_warps, num_stages = power_of_2(M, 1, INTERPRETER_TILE // max(block_n, block_k)), 4, 1
    else:
        size = g.element_size()
        block_k = power_of_2(K, 16, 128 // size)
        block_m, block_n = {2: (128, 128), 4: (64, 64), 8: (64, 32)}[size]
        block_m, block_n = power_of_2(M, 16, block_m), power_of_2(C, 16, block_n)
        num_warps, num_stages = 4, 3 if size < 8 else 2
        while block_m > 16 and ceil_div(M, block_m) * ceil_div(C, block_n) < gpu.enough_programs:
            block_m //= 2
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages)
