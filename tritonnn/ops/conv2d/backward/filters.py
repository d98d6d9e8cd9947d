"""Filters as the gradient of the input multiplies by them: input and output channels exchanged."""

import torch
import triton
import triton.language as tl

from ....device.arithmetic import round_to_tf32
from ....device.dependent_launch import start_successor, wait_for_predecessor
from ....runtime.blocks import ceil_div, power_of_2
from ....runtime.dependent_launch import dependent_launch
from ....runtime.launch_plan import launch


@triton.jit
def exchanged_filters_kernel(
    weight_ptr,
    y_ptr,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    FLIP: tl.constexpr,
    ROUND_TO_TF32: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_C x BLOCK_K channels of one tap.

    C and K count the channels of a group; weight is [groups * K, C, R, S], y [groups * C, R, S, K].
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    k = pid % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    c = pid // BLOCKS_K % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    tap = pid // (BLOCKS_K * BLOCKS_C) % (R * S)
    group = (pid // (BLOCKS_K * BLOCKS_C * R * S)).to(tl.int64)
    r = tap // S
    s = tap % S
    mask = (c < C)[:, None] & (k < K)[None, :]
    offs = ((group * K + k) * stride_k)[None, :] + (c.to(tl.int64) * stride_c)[:, None]
    offs += r.to(tl.int64) * stride_r + s.to(tl.int64) * stride_s
    wait_for_predecessor(DEPENDENT)
    weight = tl.load(weight_ptr + offs, mask=mask)
    start_successor(DEPENDENT)
    if ROUND_TO_TF32:
        weight = round_to_tf32(weight)
    if FLIP:
        tap = R * S - 1 - tap
    tl.store(y_ptr + (((group * C + c) * (R * S) + tap) * K)[:, None] + k[None, :], weight, mask=mask)


def exchanged_filters(weight: torch.Tensor, groups: int, flip: bool, round_to_tf32: bool = False) -> torch.Tensor:
    """A weight [K, C / groups, R, S] as [C, R, S, K / groups], contiguous, its taps reversed to `flip` them."""
    K, C, R, S = weight.shape
    K //= groups
    y = weight.new_empty(groups * C, R, S, K)
    side = 512 if triton.knobs.runtime.interpret else 32
    block_c, block_k = power_of_2(C, 1, side), power_of_2(K, 1, side)
    grid = (ceil_div(C, block_c) * ceil_div(K, block_k) * R * S * groups,)
    launch(
        exchanged_filters_kernel,
        grid,
        weight,
        y,
        *weight.stride(),
        C,
        K,
        R,
        S,
        FLIP=flip,
        ROUND_TO_TF32=round_to_tf32,
        **dependent_launch(weight),
        BLOCK_C=block_c,
        BLOCK_K=block_k,
    )
    return y
