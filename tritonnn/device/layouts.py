"""How Triton lays out what it loads, where that differs from version to version."""

import re

import triton
import triton.language as tl

LANES_ALONG_LAST = tl.constexpr(tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= (3, 7))
"""Whether lanes load along the last dimension where nothing is contiguous, as from 3.7 on; before, along the first."""


@triton.constexpr_function
def are_apart(stride) -> bool:
    """Whether elements with this stride may not be neighbours in memory: a stride of 1 is a constant to a kernel."""
    return not (isinstance(stride, int) and stride == 1)


@triton.jit
def load_along_first(ptr, offs_0, offs_1, mask_0, mask_1):
    """A tile at ptr + offs_0 + offs_1, [len(offs_0), len(offs_1)]; if nothing is contiguous, lanes load along offs_0.

    It may be stored otherwise. With a dimension more than what is stored, a tile has a layout of its own.
    """
    if LANES_ALONG_LAST:
        mask = mask_0[None, None, :] & mask_1[None, :, None]
        turned = tl.load(ptr + offs_0[None, None, :] + offs_1[None, :, None], mask=mask)
        return tl.trans(tl.reshape(turned, (offs_1.shape[0], offs_0.shape[0])))
    else:
        return tl.load(ptr + offs_0[:, None] + offs_1[None, :], mask=mask_0[:, None] & mask_1[None, :])
