"""Layer norm over the last dimension: y[m, c] = (x[m, c] - mean[m]) * rstd[m] * weight[c] + bias[c], for inference.

x, y: [M, C], contiguous; weight and bias: [C], contiguous, or None. mean is that of a row, rstd is
1 / sqrt(variance + eps), the variance being the mean of the squared distances from it.
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator, round_to
from ..device.dependent_launch import start_successor, wait_for_predecessor
from ..runtime.blocks import ceil_div
from ..runtime.dependent_launch import dependent_launch
from ..runtime.launch_plan import launch
from ..runtime.operator import register

MOST_FEATURES = 8192
"""Features of a row, at most, as a program has it in registers."""
ELEMENTS = 4096
"""Elements that a program owns: 32 for each of 128 threads."""


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    C,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_M rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    mask = (rows < M)[:, None] & (c < C)[None, :]  # [BLOCK_M, BLOCK_C]
    wait_for_predecessor(DEPENDENT)
    x = tl.load(x_ptr + rows[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)
    mean = tl.sum(x, 1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    start_successor(DEPENDENT)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    tl.store(y_ptr + rows[:, None] * C + c[None, :], round_to(y, y_ptr.dtype.element_ty), mask=mask)


def _output(x, weight, bias, eps) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(x, weight, bias, eps) -> torch.Tensor:
    y = _output(x, weight, bias, eps)
    if y.numel() == 0:
        return y
    M, C = x.shape
    block_c = triton.next_power_of_2(C)
    block_m = max(ELEMENTS // block_c, 1)
    launch(
        layer_norm_forward_kernel,
        (ceil_div(M, block_m),),
        x,
        weight,
        bias,
        y,
        M,
        C,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **dependent_launch(x),
        ACC=accumulator(x.dtype),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=8 if block_c > ELEMENTS else 4,
    )
    return y


layer_norm = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _launch,
    _output,
)
