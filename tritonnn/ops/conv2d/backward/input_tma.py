"""Gradient of the input of a convolution of stride 2 over TMA tensor descriptors: channels_last images, Hopper GPUs.

As in input.py, the pixels of x fall into four classes, by the parity of row and column. x [N, H, W, C] is seen as
[N, H/2, 2, W/2, 2*C]: there the tile of a class is a box, whose taps read boxes of g. One launch serves all classes;
those that the most taps reach come first.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ....device.arithmetic import add_rounded_dot, round_to
from ....runtime import hardware
from ....runtime.blocks import ceil_div
from ....runtime.launch_plan import launch
from ....runtime.memory_format import is_aligned
from ..forms.tma_tiles import best_box, block_k_of
from .filters import exchanged_filters


@triton.jit
def conv2d_backward_input_tma_kernel(
    g_desc,
    weight_desc,
    grad_x_desc,
    tiles,
    tiles_i,
    tiles_j,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    ROUND_G: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns TILE_N x TILE_P x TILE_Q = BLOCK_M pixels of a class x BLOCK_N channels; a class has `tiles`.

    weight_desc is [C, R * S * K]. acc [channels, pixels] = weight @ g.T, both from shared memory; to ROUND_G, float32,
    acc [pixels, channels] = g @ weight.T, g in registers.
    """
    BLOCK_M: tl.constexpr = TILE_N * TILE_P * TILE_Q
    BLOCKS_N: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = K // BLOCK_K
    pid = tl.program_id(0)
    a = (pid // tiles // 2 + 1 + PADDING_H + R) % 2  # the parity of whose rows more taps reach first
    b = (pid // tiles % 2 + 1 + PADDING_W + S) % 2
    tile = pid % tiles
    c = tile % BLOCKS_N * BLOCK_N
    box = tile // BLOCKS_N
    j = box % tiles_j * TILE_Q
    i = box // tiles_j % tiles_i * TILE_P
    n = box // tiles_j // tiles_i * TILE_N
    first_r = (a + PADDING_H) % 2
    first_s = (b + PADDING_W) % 2
    count_r = (R - first_r + 1) // 2
    count_s = (S - first_s + 1) // 2
    p = i + (a + PADDING_H - first_r) // 2
    q = j + (b + PADDING_W - first_s) // 2

    if ROUND_G:
        acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    else:
        acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    for step in range(count_r * count_s * BLOCKS_K):
        tap = step // BLOCKS_K
        k = step % BLOCKS_K * BLOCK_K
        r = tap // count_s
        s = tap % count_s
        g = tl.reshape(g_desc.load([n, p - r, q - s, k]), (BLOCK_M, BLOCK_K))
        weight = weight_desc.load([c, ((first_r + 2 * r) * S + first_s + 2 * s) * K + k])  # [BLOCK_N, BLOCK_K]
        if ROUND_G:
            acc = add_rounded_dot(g, weight.T, acc)
        else:
            acc = tl.dot(weight, g.T, acc)
    if not ROUND_G:
        acc = acc.T
    grad_x = tl.reshape(round_to(acc, grad_x_desc.dtype), (TILE_N, TILE_P, 1, TILE_Q, BLOCK_N))
    grad_x_desc.store([n, i, a, j, b * C + c], grad_x)


def fits(g: torch.Tensor, grad_x: torch.Tensor, window: tuple, groups: int, input_precision: str) -> bool:
    """Stride 2 over images of even sides, whole lines of 128 bytes of channels; 16-bit types, or float32 in TF32."""
    stride, _, dilation = window
    if triton.knobs.runtime.interpret or groups > 1 or tuple(stride) != (2, 2) or tuple(dilation) != (1, 1):
        return False
    size = g.element_size()
    if not hardware.gpu(g.device).is_hopper or not (size == 2 or (size == 4 and input_precision == "tf32")):
        return False
    if grad_x.shape[2] % 2 != 0 or grad_x.shape[3] % 2 != 0:
        return False
    lines = g.shape[1] * size % 128 == 0 and grad_x.shape[1] * size % 128 == 0
    return lines and is_aligned(g) and is_aligned(grad_x)


def run(g: torch.Tensor, weight: torch.Tensor, grad_x: torch.Tensor, padding: tuple[int, int]) -> None:
    """Fills grad_x [N, C, H, W]; weight [K, C, R, S] has any strides."""
    N, K, P, Q = g.shape
    _, C, H, W = grad_x.shape
    R, S = weight.shape[2:]
    round_g = g.element_size() == 4
    block_k = block_k_of(K, g.element_size())
    block_m, block_n, num_warps, num_stages = _tile(N * (H // 2) * (W // 2), C, round_g, hardware.gpu(g.device))
    tile_n, tile_i, tile_j = best_box(N, H // 2, W // 2, block_m)
    packed = exchanged_filters(weight, 1, flip=False, round_to_tf32=round_g)
    g_rows = g.as_strided((N, P, Q, K), (P * Q * K, Q * K, K, 1))
    classes = grad_x.as_strided((N, H // 2, 2, W // 2, 2 * C), (H * W * C, 2 * W * C, W * C, 2 * C, 1))
    tiles_i, tiles_j = ceil_div(H // 2, tile_i), ceil_div(W // 2, tile_j)
    tiles = ceil_div(N, tile_n) * tiles_i * tiles_j * (C // block_n)
    launch(
        conv2d_backward_input_tma_kernel,
        (4 * tiles,),
        TensorDescriptor.from_tensor(g_rows, [tile_n, tile_i, tile_j, block_k]),
        TensorDescriptor.from_tensor(packed.view(C, -1), [block_n, block_k]),
        TensorDescriptor.from_tensor(classes, [tile_n, tile_i, 1, tile_j, block_n]),
        tiles,
        tiles_i,
        tiles_j,
        C,
        K,
        R,
        S,
        *padding,
        ROUND_G=round_g,
        TILE_N=tile_n,
        TILE_P=tile_i,
        TILE_Q=tile_j,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _tile(pixels: int, C: int, round_g: bool, gpu: hardware.Gpu) -> tuple[int, int, int, int]:
    """BLOCK_M pixels of a class, BLOCK_N channels, a divisor of C, warps and stages."""
    block_n = 128 if C % 128 == 0 and not round_g else 64 if C % 64 == 0 else 32
    block_m = 64 if round_g else 128
    while block_m > 64 and 4 * ceil_div(pixels, block_m) * (C // block_n) < gpu.multiprocessors:
        block_m //= 2
    return block_m, block_n, 4, 3
