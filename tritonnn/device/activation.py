"""Activations that a kernel applies to its sums before it stores them; every epilogue has all of them.

To add one: a function here, a line in `activate`, its name in `ACTIVATIONS`, and PyTorch's function of that name in
`tritonnn/layers/fused/activation.py`.
"""

import triton
import triton.language as tl

ACTIVATIONS = (
    "none",
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "gelu",
    "gelu_tanh",
)


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x between LOW and HIGH; NaN stays NaN."""
    x = tl.maximum(x, LOW, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def gelu(x):
    """x * Phi(x), by the error function."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """PyTorch's approximate="tanh": 0.5 * x * (1 + tanh(u)) is x * sigmoid(2 * u)."""
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The activation of that name; SLOPE is that of negative numbers in "leaky_relu"."""
    if ACTIVATION == "none":
        y = x
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = clamp(x, 0, 6)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(x > 0, x, x * SLOPE)
    elif ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "hardswish":
        y = x * clamp(x + 3, 0, 6) / 6
    elif ACTIVATION == "hardsigmoid":
        y = clamp(x + 3, 0, 6) / 6
    elif ACTIVATION == "sigmoid":
        y = sigmoid(x)
    elif ACTIVATION == "gelu":
        y = gelu(x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "an activation of no name in ACTIVATIONS")
        y = gelu_tanh(x)
    return y
