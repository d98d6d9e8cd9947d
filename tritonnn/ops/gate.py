"""An image times one number for each of its images and channels: y[n, c, h, w] = x[n, c, h, w] * gate[n, c].

x: [N, C, H, W], dense in channels_last or contiguous, and y alike; gate: [N, C, 1, 1], of the same type, dense. For
squeeze-and-excitation, in inference.
"""

import math

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime.blocks import ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.operator import register

BLOCK_BYTES = 8192
"""That a program reads of x: 64 for each of 128 threads."""


@triton.jit
def gate_forward_kernel(
    x_ptr,
    gate_ptr,
    y_ptr,
    VECTORS,
    RUN,
    PER_IMAGE,
    CHANNELS_LAST: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK vectors of LANES neighbours in memory, that have gates of neighbours or one in common.

    RUN: vectors of the channels of a pixel in channels_last, else of the pixels of a channel; PER_IMAGE: of an image.
    """
    vector = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    lane = tl.arange(0, LANES)
    mask = (vector < VECTORS)[:, None] & (lane >= 0)[None, :]  # [BLOCK, LANES]
    offs = vector[:, None] * LANES + lane[None, :]
    wait_for_predecessor(DEPENDENT)
    x = tl.load(x_ptr + offs, mask=mask)
    if CHANNELS_LAST:
        gates = vector // PER_IMAGE * RUN + vector % RUN
        gate = tl.load(gate_ptr + gates[:, None] * LANES + lane[None, :], mask=mask)
    else:
        gate = tl.load(gate_ptr + vector // RUN, mask=vector < VECTORS)[:, None]
    start_successor(DEPENDENT)
    y = x.to(ACC) * gate.to(ACC)
    tl.store(y_ptr + offs, round_to(y, y_ptr.dtype.element_ty), mask=mask)


def _output(x, gate) -> torch.Tensor:
    return torch.empty_like(x)


def _launch(x, gate) -> torch.Tensor:
    y = _output(x, gate)
    if y.numel() == 0:
        return y
    _, C, H, W = x.shape
    channels_last = not x.is_contiguous()
    run = C if channels_last else H * W
    lanes = math.gcd(run, 16 // x.element_size())
    block = BLOCK_BYTES // (lanes * x.element_size())
    vectors = x.numel() // lanes
    launch(
        gate_forward_kernel,
        (ceil_div(vectors, block),),
        x,
        gate,
        y,
        vectors,
        run // lanes,
        C * H * W // lanes,
        CHANNELS_LAST=channels_last,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        LANES=lanes,
        BLOCK=block,
        num_warps=4,
    )
    return y


gate = register("gate(Tensor x, Tensor gate) -> Tensor", _launch, _output)
