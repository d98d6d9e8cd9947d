"""Gradient of a convolution's weight over TMA tensor descriptors: 16-bit channels_last images, Hopper GPUs.

As in weight.py. The reduction runs over boxes of TILE_N images x TILE_P rows x TILE_Q columns of g, [pixels, K], and
the boxes of x that lie under them, shifted by a tap, [pixels, C]. Both are read as they are, channels next to each
other; what lies outside the image TMA fills with zeros. A box of g serves the TAPS that a program computes. Its pixels
follow each other in memory, so that it is a matrix, which the tensor cores read from where TMA brought it; otherwise
Triton would take it through registers, which the next step overwrites while products are still running.
How programs share the work is in weight_shares.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.dependent_launch import dependent_launch
from ....runtime.launch_plan import launch
from ....runtime.memory_format import is_aligned
from ..forms.tma import load_box
from .weight_shares import add_up, are_alike, segment_of, shares_of

STEP_PIXELS = 64


@triton.jit
def conv2d_backward_weight_tma_kernel(
    g_desc,
    x_desc,
    partial_ptr,
    SHARE,
    FULL,
    REST,
    BOXES,
    tiles_p,
    tiles_q,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS: tl.constexpr,
    TILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns a share of tiles of BLOCK_M filters x BLOCK_N channels x TAPS (1 or 3) of a row.

    partial is [places, TAPS, BLOCK_M, BLOCK_N].
    """
    BLOCK_K: tl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_M: tl.constexpr = K // BLOCK_M
    BLOCKS_N: tl.constexpr = C // BLOCK_N
    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    pid = tl.program_id(0)
    first = (pid - FULL) * SHARE
    wait_for_predecessor(DEPENDENT)
    for segment in range(SEGMENTS):
        tile, begin, end, place, first = segment_of(pid, segment, first, SHARE, FULL, REST, BOXES, TILES, SEGMENTS)
        k = tile % BLOCKS_M * BLOCK_M
        c = tile // BLOCKS_M % BLOCKS_N * BLOCK_N
        tap = tile // (BLOCKS_M * BLOCKS_N) * TAPS
        r = tap // S * DILATION_H - PADDING_H
        s = tap % S * DILATION_W - PADDING_W

        acc0 = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
        if TAPS == 3:
            acc1 = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
            acc2 = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
        for box in range(begin, end):
            q = box % tiles_q * TILE_Q
            p = box // tiles_q % tiles_p * TILE_P
            n = box // tiles_q // tiles_p * TILE_N
            g = g_desc.load([box * BLOCK_K, k]).T
            x = tl.reshape(load_box(x_desc, n, p, q, r, s, c, C, STRIDE), (BLOCK_K, BLOCK_N))
            acc0 = tl.dot(g, x, acc0)
            if TAPS == 3:
                x1 = tl.reshape(load_box(x_desc, n, p, q, r, s + DILATION_W, c, C, STRIDE), (BLOCK_K, BLOCK_N))
                acc1 = tl.dot(g, x1, acc1)
                x2 = tl.reshape(load_box(x_desc, n, p, q, r, s + 2 * DILATION_W, c, C, STRIDE), (BLOCK_K, BLOCK_N))
                acc2 = tl.dot(g, x2, acc2)
        if begin < end:
            offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            partial_ptrs = partial_ptr + place.to(tl.int64) * (TAPS * SIZE) + offs
            tl.store(partial_ptrs, acc0)
            if TAPS == 3:
                tl.store(partial_ptrs + SIZE, acc1)
                tl.store(partial_ptrs + 2 * SIZE, acc2)
    start_successor(DEPENDENT)


class Config(NamedTuple):
    """A tile of BLOCK_M filters x BLOCK_N channels x TAPS, PROGRAMS of which share a multiprocessor."""

    TAPS: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    PROGRAMS: int
    pixels: int = STEP_PIXELS


def takes(g_shape: Sequence[int], x_shape: Sequence[int], filter_size: Sequence[int], window: tuple) -> bool:
    """Whole lines of 128 bytes of channels; stride 1, or 2 over images of even sides; boxes of whole rows of g."""
    stride = tuple(window[0])
    _, K, P, Q = g_shape
    _, C, H, W = x_shape
    if C % 64 != 0 or K % 64 != 0:
        return False
    if _is_product_of_matrices(filter_size, window):
        return True
    even = H % 2 == 0 and W % 2 == 0
    return box_of(P, Q, STEP_PIXELS) is not None and (stride == (1, 1) or (stride == (2, 2) and even))


def fits(g: torch.Tensor, x: torch.Tensor, filter_size: Sequence[int], window: tuple, groups: int) -> bool:
    """Whether the kernel runs here, for these images."""
    if triton.knobs.runtime.interpret or x.element_size() != 2 or groups > 1 or not hardware.gpu(x.device).is_hopper:
        return False
    return is_aligned(x) and is_aligned(g) and takes(g.shape, x.shape, filter_size, window)


def _is_product_of_matrices(filter_size: Sequence[int], window: tuple) -> bool:
    """Whether each pixel of y sees one of x, the same: then all pixels are one row."""
    stride, padding, _ = map(tuple, window)
    return tuple(filter_size) == (1, 1) and stride == (1, 1) and padding == (0, 0)


def default_config(K: int, C: int, filter_size: Sequence[int]) -> Config:
    """Measured over ResNet18's convolutions, 512 images of 32x32, on an H200.

    64 channels 88 us, tap by tap 107; 128 channels 62 us, with eight warps 64, with three taps of 64 channels 83.
    """
    S = filter_size[1]
    if K % 128 != 0:
        taps, block_n = (3, 64) if S == 3 else (1, 128 if C % 128 == 0 else 64)
        return Config(taps, 64, block_n, 4, 3 if S == 3 else 4, 2)
    return Config(1, 128, 128, 4, 3, 2) if C % 128 == 0 else Config(1, 128, 64, 4, 4, 2)


def is_whole(g_shape: Sequence[int], C: int, filter_size: Sequence[int], multiprocessors: int) -> bool:
    """Whether the tiles are the largest, and divide the programs: then tap by tap is as fast as with a halo.

    128 channels, 512 images of 16x16, on an H200: 61.8 us for 66.8.
    """
    K, config = g_shape[1], default_config(g_shape[1], C, filter_size)
    if (config.BLOCK_M, config.BLOCK_N) != (128, 128):
        return False
    return are_alike(K // 128 * (C // 128) * math.prod(filter_size), config.PROGRAMS * multiprocessors)


def box_of(P: int, Q: int, pixels: int) -> tuple[int, int, int] | None:
    """(images, rows, columns) of whole rows or images of P x Q that follow each other in memory, or a part of a row.

    None where no powers of 2 divide the sides so.
    """
    tile_q = min(Q & -Q, pixels)
    tile_p = min(P & -P, pixels // tile_q)
    tile_n = pixels // tile_q // tile_p
    follow = (tile_q == Q and (tile_p == P or tile_n == 1)) or (tile_p == 1 and tile_n == 1)
    return (tile_n, tile_p, tile_q) if follow else None


def run(g: torch.Tensor, x: torch.Tensor, grad_weight: torch.Tensor, window: tuple, config: Config) -> None:
    """Fills grad_weight [K, C, R, S], any strides; g [N, K, P, Q] and x [N, C, H, W] are channels_last."""
    (stride, _), padding, dilation = window
    R, S = grad_weight.shape[2:]
    N, K, P, Q = g.shape
    _, C, H, W = x.shape
    g_desc = TensorDescriptor.from_tensor(g.as_strided((N * P * Q, K), (K, 1)), [config.pixels, config.BLOCK_M])
    if _is_product_of_matrices((R, S), window):
        N, P, Q, H, W = 1, 1, N * P * Q, 1, N * P * Q
        box = 1, 1, config.pixels
    else:
        box = box_of(P, Q, config.pixels)
    tile_n, tile_p, tile_q = box
    if stride == 1:
        x_rows, x_box = x.as_strided((N, H, W, C), (H * W * C, W * C, C, 1)), [*box, config.BLOCK_N]
    else:  # by parity
        strides = H * W * C, 2 * W * C, W * C, 2 * C, 1
        x_rows = x.as_strided((N, H // 2, 2, W // 2, 2 * C), strides)
        x_box = [tile_n, tile_p, 1, tile_q, config.BLOCK_N]
    x_desc = TensorDescriptor.from_tensor(x_rows, x_box)
    tiles_p, tiles_q = ceil_div(P, tile_p), ceil_div(Q, tile_q)
    tiles = K // config.BLOCK_M * (C // config.BLOCK_N) * (R * S // config.TAPS)
    boxes = ceil_div(N, tile_n) * tiles_p * tiles_q
    shares = shares_of(boxes, tiles, config.PROGRAMS * hardware.gpu(x.device).multiprocessors)
    tile = config.TAPS, config.BLOCK_M, config.BLOCK_N
    partial = shares.partial_sums(tile, x.device)
    launch(
        conv2d_backward_weight_tma_kernel,
        (shares.programs,),
        g_desc,
        x_desc,
        partial,
        *shares.work,
        tiles_p,
        tiles_q,
        C,
        K,
        S,
        stride,
        *padding,
        *dilation,
        TAPS=config.TAPS,
        TILES=tiles,
        SEGMENTS=shares.SEGMENTS,
        **dependent_launch(x),
        TILE_N=tile_n,
        TILE_P=tile_p,
        TILE_Q=tile_q,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    add_up(partial, grad_weight, shares, tile, (config.TAPS, 1))
