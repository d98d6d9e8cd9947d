"""What a convolution's kernel in Gluon does with x before it multiplies; see ops/conv2d/prologue.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .activation import activate


@gluon.jit
def load_factors(
    scale_ptr,
    shift_ptr,
    n,
    step,
    C,
    pred,
    X_SCALE: gl.constexpr,
    HAS_X_SHIFT: gl.constexpr,
    BLOCK_K: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The prologue's scale and shift [1, BLOCK_K] of a step's channels of image n, zeros beyond the last."""
    c = step * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    mask = (c < C) & pred
    first = n.to(gl.int64) * C if X_SCALE == "gates" else 0
    scale = gl.load(scale_ptr + first + c, mask=mask, other=0.0).to(gl.float32)
    shift = gl.load(shift_ptr + c, mask=mask, other=0.0).to(gl.float32) if HAS_X_SHIFT else scale
    return gl.expand_dims(scale, 0), gl.expand_dims(shift, 0)


@gluon.jit
def prepare(x, scale, shift, HAS_X_SHIFT: gl.constexpr, X_ACTIVATION: gl.constexpr, DTYPE: gl.constexpr):
    """activation(scale * x + shift), rounded to the type of x as if it had been stored in between."""
    y = x.to(gl.float32) * scale
    if HAS_X_SHIFT:
        y += shift
    return activate(y, X_ACTIVATION, 0.0).to(DTYPE)
