"""Channels of images in another order: y[:, c * groups + g] = x[:, g * C // groups + c], as torch.channel_shuffle.

x: [N, C, H, W], an image, or some channels of one, in channels_last or contiguous; y: the same, channels_last, dense.
"""

import torch
import triton
import triton.language as tl

from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime.blocks import INTERPRETER_TILE, ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.memory_format import empty_image, pixel_stride
from ..runtime.operator import register

BLOCK = 2048
"""Elements that a program moves: 16 for each of 128 threads."""


@triton.jit
def channel_shuffle_kernel(
    x_ptr,
    y_ptr,
    ELEMENTS,
    PIXELS,
    x_stride_n,
    x_stride_c,
    x_stride_pixel,
    DEPENDENT: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program owns BLOCK elements of y, of images of so many PIXELS."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = place < ELEMENTS
    pixel, channel = place // C, (place % C).to(tl.int32)
    n, before = pixel // PIXELS, channel % GROUPS * (C // GROUPS) + channel // GROUPS
    source = n * x_stride_n + before.to(tl.int64) * x_stride_c + (pixel - n * PIXELS) * x_stride_pixel
    wait_for_predecessor(DEPENDENT)
    x = tl.load(x_ptr + source, mask=mask)
    start_successor(DEPENDENT)
    tl.store(y_ptr + place, x, mask=mask)


def image_strides(x: torch.Tensor) -> tuple[int, int, int] | None:
    """Of images, channels and pixels; None where pixels do not follow each other."""
    _, C, H, W = x.shape
    step = pixel_stride(x)
    if step is not None:
        return H * W * step, 1, step
    return (x.stride(0), H * W, 1) if x[0].is_contiguous() else None


def _output(x: torch.Tensor, groups: int) -> torch.Tensor:
    return empty_image(x.shape, x, True)


def _launch(x: torch.Tensor, groups: int) -> torch.Tensor:
    y = _output(x, groups)
    if x.numel() == 0:
        return y
    block = INTERPRETER_TILE if triton.knobs.runtime.interpret else BLOCK
    launch(
        channel_shuffle_kernel,
        (ceil_div(x.numel(), block),),
        x,
        y,
        x.numel(),
        x.shape[2] * x.shape[3],
        *image_strides(x),
        **dependent_launch(x),
        C=x.shape[1],
        GROUPS=groups,
        BLOCK=block,
        num_warps=4,
    )
    return y


channel_shuffle = register("channel_shuffle(Tensor x, int groups) -> Tensor", _launch, _output)
"""x: on one GPU (or the CPU of Triton's interpreter), with `image_strides`; groups divides its channels."""
