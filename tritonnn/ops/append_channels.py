"""Channels of images, copied to where a wider image has room for them: wide[:, first : first + C] = x.

x: [N, C, H, W], a channels_last image or some channels of one; wide: [N, >= first + C, H, W], channels_last, dense, of
the same type. So a concatenation grows without copying what it has.
"""

import math

import triton
import triton.language as tl

from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime.blocks import ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import pixel_stride
from ..runtime.operator import register

BLOCK_BYTES = 8192
"""Bytes that a program copies: 64 for each of 128 threads."""


@triton.jit
def append_channels_kernel(
    x_ptr,
    y_ptr,
    VECTORS,
    RUN,
    X_STEP,
    Y_STEP,
    DEPENDENT: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK vectors of LANES channels; RUN vectors are a pixel's, STEP are from pixel to pixel."""
    vector = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    lane = tl.arange(0, LANES)
    mask = (vector < VECTORS)[:, None] & (lane >= 0)[None, :]  # [BLOCK, LANES]
    pixel, place = vector // RUN, vector % RUN
    wait_for_predecessor(DEPENDENT)
    x = tl.load(x_ptr + (pixel * X_STEP + place)[:, None] * LANES + lane[None, :], mask=mask)
    start_successor(DEPENDENT)
    tl.store(y_ptr + (pixel * Y_STEP + place)[:, None] * LANES + lane[None, :], x, mask=mask)


def _launch(wide, x, first) -> None:
    if x.numel() == 0:
        return
    C, x_step, y_step = x.shape[1], pixel_stride(x), wide.shape[1]
    lanes = math.gcd(C, x_step, y_step, first, 16 // x.element_size())
    block = BLOCK_BYTES // (lanes * x.element_size())
    vectors = x.numel() // lanes
    launch(
        append_channels_kernel,
        (ceil_div(vectors, block),),
        x,
        wide[:, first:],
        vectors,
        C // lanes,
        x_step // lanes,
        y_step // lanes,
        **dependent_launch(x),
        LANES=lanes,
        BLOCK=block,
        num_warps=4,
    )


append_channels = register(
    "append_channels(Tensor(a!) wide, Tensor x, int first) -> ()", _launch, lambda wide, x, first: None
)
