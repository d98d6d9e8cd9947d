"""A product of two operands that nobody has rounded or split beforehand."""

import triton
import triton.language as tl

from ....device.arithmetic import add, dot, round_to_tf32, split_to_tf32
from ....device.layouts import renamed


@triton.jit
def add_product(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b; for float32 as `runtime/precision.py` names it. The reasons are those of `add_split_dot`."""
    if INPUT_PRECISION == "tf32":
        acc = add(acc, tl.dot(round_to_tf32(a), round_to_tf32(b), input_precision="tf32"))
    elif INPUT_PRECISION == "tf32x3":
        a_high, a_low = split_to_tf32(a)
        b_high, b_low = split_to_tf32(b)
        products = tl.dot(a_low, b_high, input_precision="tf32")
        a_high = renamed(a_high)
        products = tl.dot(a_high, b_low, products, input_precision="tf32")
        a_high = renamed(a_high)
        acc = add(acc, tl.dot(a_high, b_high, products, input_precision="tf32"))
    else:
        acc = dot(a, b, acc, INPUT_PRECISION)
    return acc
