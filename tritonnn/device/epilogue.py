"""What a convolution's kernel does with its sums before it stores them."""

import triton
import triton.language as tl

from .activation import activate
from .arithmetic import round_to_tf32


@triton.jit
def finish(acc, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ROUND_Y: tl.constexpr):
    """The activation of the sums, rounded to TF32 where the next layer wants it so."""
    acc = activate(acc, ACTIVATION, SLOPE)
    if ROUND_Y:
        acc = round_to_tf32(acc)
    return acc


@triton.jit
def apply_epilogue(
    acc,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    channel,
    mask_channel,
    offs_y,
    mask_y,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ROUND_Y: tl.constexpr,
):
    """activation(scale * acc + bias + residual) of acc [pixels, channels]; offs_y and mask_y have its shape."""
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + channel, mask=mask_channel, other=0.0).to(acc.dtype)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel, mask=mask_channel, other=0.0).to(acc.dtype)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0).to(acc.dtype)
    return finish(acc, ACTIVATION, SLOPE, ROUND_Y)
