"""Gradient of a convolution's weight over TMA tensor descriptors: 16-bit channels_last images, Hopper GPUs.

As in weight.py. The reduction runs over boxes of TILE_N images x TILE_P rows x TILE_Q columns of g, [pixels, K], and
the boxes of x that lie under them, shifted by a tap, [pixels, C]. Both are read as they are, channels next to each
other; what lies outside the image TMA fills with zeros. A box of g serves the TAPS that a program computes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.launch_plan import launch
from ....runtime.memory_format import is_aligned
from ..forms.tma import load_box
from .weight import combine, splits_of

STEP_PIXELS = 64


@triton.jit
def conv2d_backward_weight_tma_kernel(
    g_desc,
    x_desc,
    partial_ptr,
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
    STEPS: tl.constexpr,
    TAPS: tl.constexpr,
    FLAT: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M filters x BLOCK_N channels x TAPS (1 or 3) of a row of the filter, and STEPS boxes.

    partial is [SPLITS, K, R * S, C]. Boxes beyond the last lie beyond the last image: zeros. FLAT: a box is BLOCK_K
    pixels of g that follow each other in memory, a matrix, which the tensor cores read from where TMA brought it.
    """
    BLOCK_K: tl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_M: tl.constexpr = K // BLOCK_M
    BLOCKS_N: tl.constexpr = C // BLOCK_N
    TILES: tl.constexpr = BLOCKS_M * BLOCKS_N * (R * S // TAPS)
    pid = tl.program_id(0)  # programs that run together share boxes
    split = pid // TILES
    tile = pid % TILES
    k = tile % BLOCKS_M * BLOCK_M
    c = tile // BLOCKS_M % BLOCKS_N * BLOCK_N
    tap = tile // (BLOCKS_M * BLOCKS_N) * TAPS
    r = tap // S * DILATION_H - PADDING_H
    s = tap % S * DILATION_W - PADDING_W

    acc0 = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    if TAPS == 3:
        acc1 = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
        acc2 = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    for step in range(STEPS):
        box = split * STEPS + step
        q = box % tiles_q * TILE_Q
        p = box // tiles_q % tiles_p * TILE_P
        n = box // tiles_q // tiles_p * TILE_N
        if FLAT:
            g = g_desc.load([box * BLOCK_K, k]).T
        else:
            g = tl.reshape(g_desc.load([n, p, q, k]), (BLOCK_K, BLOCK_M)).T
        x = tl.reshape(load_box(x_desc, n, p, q, r, s, c, C, STRIDE), (BLOCK_K, BLOCK_N))
        acc0 = tl.dot(g, x, acc0)
        if TAPS == 3:
            x1 = tl.reshape(load_box(x_desc, n, p, q, r, s + DILATION_W, c, C, STRIDE), (BLOCK_K, BLOCK_N))
            acc1 = tl.dot(g, x1, acc1)
            x2 = tl.reshape(load_box(x_desc, n, p, q, r, s + 2 * DILATION_W, c, C, STRIDE), (BLOCK_K, BLOCK_N))
            acc2 = tl.dot(g, x2, acc2)
    offs_k = k + tl.arange(0, BLOCK_M)
    partial_ptrs = partial_ptr + ((split.to(tl.int64) * K + offs_k) * (R * S * C))[:, None]
    partial_ptrs += (tap * C + c + tl.arange(0, BLOCK_N))[None, :]
    tl.store(partial_ptrs, acc0)
    if TAPS == 3:
        tl.store(partial_ptrs + C, acc1)
        tl.store(partial_ptrs + 2 * C, acc2)


class Config(NamedTuple):
    """A tile of BLOCK_M filters x BLOCK_N channels x TAPS; `waves`: programs of a multiprocessor, one after another."""

    TAPS: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    waves: int = 2
    pixels: int = STEP_PIXELS


def fits(g: torch.Tensor, x: torch.Tensor, size: torch.Size, window: tuple, groups: int) -> bool:
    """Whole lines of 128 bytes of channels; stride 1, or 2 of images of even sides, or one tap without padding."""
    stride = tuple(window[0])
    K, C = g.shape[1], x.shape[1]
    if triton.knobs.runtime.interpret or x.element_size() != 2 or groups > 1 or not hardware.gpu(x.device).is_hopper:
        return False
    if C % 64 != 0 or K % 64 != 0 or not (is_aligned(x) and is_aligned(g)):
        return False
    even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    return stride == (1, 1) or (stride == (2, 2) and even)


def default_config(K: int, C: int, S: int) -> Config:
    if S == 3 and K % 128 != 0:
        return Config(3, 64, 64, 4, 3)
    if S == 3:
        return Config(3, 128, 64, 8, 4)
    return Config(1, 128 if K % 128 == 0 else 64, 128 if C % 128 == 0 else 64, 4, 3)


def box_of(P: int, Q: int, pixels: int) -> tuple[int, int, int]:
    """(images, rows, columns), powers of 2: as many columns, then rows, as divide those of an image."""
    tile_q = min(Q & -Q, pixels)
    tile_p = min(P & -P, pixels // tile_q)
    return pixels // tile_q // tile_p, tile_p, tile_q


def run(g: torch.Tensor, x: torch.Tensor, grad_weight: torch.Tensor, window: tuple, config: Config) -> None:
    """Fills grad_weight [K, C, R, S]; g [N, K, P, Q] and x [N, C, H, W] are channels_last."""
    (stride, _), padding, dilation = window
    N, K, P, Q = g.shape
    _, C, H, W = x.shape
    R, S = grad_weight.shape[2:]
    tile_n, tile_p, tile_q = box_of(P, Q, config.pixels)
    flat = tile_q == Q and (tile_p == P or tile_n == 1)
    if flat:
        g_desc = TensorDescriptor.from_tensor(g.as_strided((N * P * Q, K), (K, 1)), [config.pixels, config.BLOCK_M])
    else:
        g_rows = g.as_strided((N, P, Q, K), (P * Q * K, Q * K, K, 1))
        g_desc = TensorDescriptor.from_tensor(g_rows, [tile_n, tile_p, tile_q, config.BLOCK_M])
    if stride == 1:
        x_rows, x_box = x.as_strided((N, H, W, C), (H * W * C, W * C, C, 1)), [tile_n, tile_p, tile_q, config.BLOCK_N]
    else:  # by parity
        strides = H * W * C, 2 * W * C, W * C, 2 * C, 1
        x_rows = x.as_strided((N, H // 2, 2, W // 2, 2 * C), strides)
        x_box = [tile_n, tile_p, 1, tile_q, config.BLOCK_N]
    x_desc = TensorDescriptor.from_tensor(x_rows, x_box)
    tiles_p, tiles_q = P // tile_p, Q // tile_q
    tiles = K // config.BLOCK_M * (C // config.BLOCK_N) * (R * S // config.TAPS)
    programs = config.waves * hardware.gpu(x.device).multiprocessors
    splits, steps = splits_of(ceil_div(N, tile_n) * tiles_p * tiles_q, tiles, programs)
    partial = torch.empty(splits, K, R * S * C, dtype=torch.float32, device=x.device)
    launch(
        conv2d_backward_weight_tma_kernel,
        (tiles * splits,),
        g_desc,
        x_desc,
        partial,
        tiles_p,
        tiles_q,
        C,
        K,
        R,
        S,
        stride,
        *padding,
        *dilation,
        STEPS=steps,
        TAPS=config.TAPS,
        FLAT=flat,
        TILE_N=tile_n,
        TILE_P=tile_p,
        TILE_Q=tile_q,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    combine(partial, grad_weight)
