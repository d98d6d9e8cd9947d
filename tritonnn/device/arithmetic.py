"""Arithmetic that every kernel shares: accumulator types, the matrix product, rounding on the way out."""

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .layouts import renamed

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LARGEST_TF32 = tl.constexpr(float.fromhex("0x1.ffcp127"))
FLUSH_STEPS = 8
"""Steps of a float32 product that are added up apart before they are added to the sum (see `add_split_dot`)."""


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type a kernel computes in: float32 for 16-bit floats, otherwise the type itself."""
    if dtype in (torch.float16, torch.bfloat16):
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def index_type(extent: int) -> tl.dtype:
    """The type of indices below `extent`: int32, whose division is much faster, or int64 where that would overflow."""
    return tl.int32 if extent < 2**31 else tl.int64


@triton.jit
def round_to_tf32(x):
    """x rounded to the nearest TF32 value, ties to even. Tensor cores themselves truncate, which is biased.

    That is one instruction on Hopper. On older GPUs, whose instruction rounds ties away from zero, it takes four.
    """
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        y = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
    elif cuda_capability_geq(9, 0):
        y = tl.inline_asm_elementwise("cvt.rn.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def split_to_tf32(x):
    """(high, low), both in TF32, whose sum is x to 22 bits. high is always finite: low has the infinities and NaN."""
    high = tl.minimum(tl.maximum(round_to_tf32(x), -LARGEST_TF32), LARGEST_TF32)
    return high, round_to_tf32(x - high)


@triton.jit
def split_weight_to_tf32(weight, LOST: tl.constexpr):
    """As `split_to_tf32`, with the share LOST of the weight in low: so much will be lost of its products.

    Where nothing was left for low, sums may be exact, and are to stay so.
    """
    high, low = split_to_tf32(weight)
    if LOST > 0:
        low = tl.where(low == 0, low, round_to_tf32(weight - high + LOST * weight))
    return high, low


@triton.jit
def add(a, b):
    """a + b in float32, which the compiler does not merge with the product that b comes from."""
    if INTERPRET:
        y = a + b
    else:
        asm: tl.constexpr = "add.rn.f32 $0, $1, $2;"
        y = tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def add_rounded_dot(x, weight, acc):
    """acc + x @ weight in TF32, x rounded in registers.

    Triton 3.6 lets a product go on while the next step's x is loaded, into the registers that it reads if x was
    computed there: silent errors of 1e-2 on an H200. An addition that it sees nothing of makes it wait.
    """
    return add(acc, tl.dot(round_to_tf32(x), weight, input_precision="tf32"))


@triton.jit
def add_split_dot(x, weight, rest, acc):
    """acc + x @ weight in float32 accuracy, as three products in TF32; weight and rest are split, x [M, K] is not.

    The sums of a tensor core are truncated, not rounded: K is to be short. The addition is outside also for the reason
    of `add_rounded_dot`.
    """
    high, low = split_to_tf32(x)
    products = tl.dot(low, weight, input_precision="tf32")
    high = renamed(high)
    products = tl.dot(high, rest, products, input_precision="tf32")
    high = renamed(high)
    return add(acc, tl.dot(high, weight, products, input_precision="tf32"))


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a @ b, in the type of acc; INPUT_PRECISION is `tl.dot`'s and matters to float32 operands only."""
    if INTERPRET:  # its products of 16-bit operands are wrong (bf16) or slow (fp16)
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """x as DTYPE, to nearest even. The interpreter truncates float32 to bfloat16, so there it is rounded by hand."""
    if INTERPRET:
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
            x = tl.where(x == x, rounded, x)
    return x.to(DTYPE)
