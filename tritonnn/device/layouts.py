"""How Triton lays out what it loads and multiplies, where that differs from version to version."""

import re

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
LANES_ALONG_LAST = tl.constexpr(VERSION >= (3, 7))
"""Whether lanes load along the last dimension where nothing is contiguous, as from 3.7 on; before, along the first."""
LAYS_OUT_AGAIN = tl.constexpr(VERSION == (3, 8))
"""Whether an operand of a product that has its layout already, since another was computed from it, is not seen to.

It is then computed once more as it was loaded, and brought to its layout through shared memory in every step.
"""


@triton.constexpr_function
def are_apart(stride) -> bool:
    """Whether elements with this stride may not be neighbours in memory: a stride of 1 is a constant to a kernel."""
    return not (isinstance(stride, int) and stride == 1)


@triton.jit
def opaque(x):
    """x of 32 bits, of which the compiler does not see where it comes from; on NVIDIA's GPUs."""
    if INTERPRET:
        y = x
    elif cuda_capability_geq(8, 0):
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)
    else:
        y = x
    return y


@triton.jit
def renamed(x):
    """x of 32 bits, as an operand of a product, where it was one before, or another operand was computed from it."""
    return opaque(x) if LAYS_OUT_AGAIN else x


@triton.jit
def load_along_first(ptr, offs_0, offs_1, mask_0, mask_1):
    """A tile [len(offs_0), len(offs_1)] at ptr + offs_0 + offs_1, by lanes along offs_0 where nothing is contiguous.

    Loaded with a dimension more than what is stored, it has a layout of its own.
    """
    if LANES_ALONG_LAST:
        mask = mask_0[None, None, :] & mask_1[None, :, None]
        turned = tl.load(ptr + offs_0[None, None, :] + offs_1[None, :, None], mask=mask)
        return tl.trans(tl.reshape(turned, (offs_1.shape[0], offs_0.shape[0])))
    else:
        return tl.load(ptr + offs_0[:, None] + offs_1[None, :], mask=mask_0[:, None] & mask_1[None, :])


@triton.jit
def load_first_operand(ptrs, mask):
    """Blocks [B, M, K] at ptrs, the first operand of a batched product; 0 where the mask is not set.

    Shared memory has the dimensions in the order in which a thread goes through its elements. Where lanes load along M
    that would be K, B, M: rows of M, of which the tensor cores read eight at once, would all lie in the same banks. Of
    what is transposed after the load, the order is that of the product: K, M, B. On NVIDIA's GPUs: for AMD's such a
    load does not compile.
    """
    if INTERPRET:
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif cuda_capability_geq(8, 0):
        if LANES_ALONG_LAST:
            mask = tl.permute(tl.broadcast_to(mask, ptrs.shape), (0, 2, 1))
            x = tl.permute(tl.load(tl.permute(ptrs, (0, 2, 1)), mask=mask, other=0.0), (0, 2, 1))
        else:
            x = tl.load(ptrs, mask=mask, other=0.0)
    else:
        x = tl.load(ptrs, mask=mask, other=0.0)
    return x
