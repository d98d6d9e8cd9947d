"""An image with its channels scaled: y[n, c, h, w] = activation(scale[n, c] * x[n, c, h, w] + shift[c]).

x: [N, C, H, W], dense in channels_last or contiguous, or some channels of a channels_last image; y: dense, in the
format of x. scale: [N, C, 1, 1], gates of squeeze-and-excitation, or [C], of a batch norm, then with shift [C]; both
dense. Computed in float32 (float64 for float64), rounded once to the type of x. For inference.
"""

import math

import torch
import triton
import triton.language as tl

from ..device.activation import activate
from ..device.arithmetic import accumulator, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime.blocks import ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import pixel_stride
from ..runtime.operator import register

BLOCK_BYTES = 8192
"""Bytes of x that a program reads: 64 for each of 128 threads."""


@triton.jit
def scaled_image_forward_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    VECTORS,
    RUN,
    STEP,
    PER_IMAGE,
    CHANNELS_LAST: tl.constexpr,
    GATES: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK vectors of LANES neighbours in memory, whose scales are neighbours or one in common.

    RUN: vectors of the channels of a pixel in channels_last, else of the pixels of a channel; STEP: from where one such
    run begins in x to the next; PER_IMAGE: vectors of an image. GATES: each image has scales of its own.
    """
    vector = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    lane = tl.arange(0, LANES)
    inside = vector < VECTORS
    mask = inside[:, None] & (lane >= 0)[None, :]  # [BLOCK, LANES]
    run, place = vector // RUN, vector % RUN
    wait_for_predecessor(DEPENDENT)
    x = tl.load(x_ptr + (run * STEP + place)[:, None] * LANES + lane[None, :], mask=mask)
    first = vector // PER_IMAGE * RUN if GATES else vector * 0
    if CHANNELS_LAST:
        channel = (first + place)[:, None] * LANES + lane[None, :]
        y = x.to(ACC) * tl.load(scale_ptr + channel, mask=mask).to(ACC)
        if HAS_SHIFT:
            y += tl.load(shift_ptr + channel, mask=mask).to(ACC)
    else:
        channel = run if GATES else run % (PER_IMAGE // RUN)
        y = x.to(ACC) * tl.load(scale_ptr + channel, mask=inside).to(ACC)[:, None]
        if HAS_SHIFT:
            y += tl.load(shift_ptr + channel, mask=inside).to(ACC)[:, None]
    start_successor(DEPENDENT)
    y = round_to(activate(y, ACTIVATION, 0.0), y_ptr.dtype.element_ty)
    tl.store(y_ptr + vector[:, None] * LANES + lane[None, :], y, mask=mask)


def _output(x, scale, shift, activation) -> torch.Tensor:
    return torch.empty_like(x)


def launch_scaled_image(x, scale, shift, activation) -> torch.Tensor:
    y = _output(x, scale, shift, activation)
    if y.numel() == 0:
        return y
    _, C, H, W = x.shape
    channels_last = not x.is_contiguous()
    run = C if channels_last else H * W
    step = pixel_stride(x) if channels_last else run
    lanes = math.gcd(run, step, 16 // x.element_size())
    block = BLOCK_BYTES // (lanes * x.element_size())
    vectors = x.numel() // lanes
    launch(
        scaled_image_forward_kernel,
        (ceil_div(vectors, block),),
        x,
        scale,
        shift,
        y,
        vectors,
        run // lanes,
        step // lanes,
        C * H * W // lanes,
        CHANNELS_LAST=channels_last,
        GATES=scale.dim() > 1,
        HAS_SHIFT=shift is not None,
        ACTIVATION=activation,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        LANES=lanes,
        BLOCK=block,
        num_warps=4,
    )
    return y


scaled_image = register(
    "scaled_image(Tensor x, Tensor scale, Tensor? shift, str activation) -> Tensor", launch_scaled_image, _output
)
