"""Gradient of ReLU: grad_x = grad_y where y > 0 or y is NaN, else 0. Any shape; grad_x has the strides of a dense y."""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import accumulator
from ..runtime.blocks import ceil_div, elementwise_block
from ..runtime.launch_plan import launch
from ..runtime.memory_format import dense_like
from ..runtime.operator import register_gradient


@triton.jit
def relu_backward_kernel(grad_y_ptr, y_ptr, grad_x_ptr, numel, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """One program owns BLOCK consecutive elements in memory."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    grad_y = tl.load(grad_y_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask).to(ACC)
    tl.store(grad_x_ptr + offs, tl.where(y <= 0, tl.zeros_like(grad_y), grad_y), mask=mask)


def _output(grad_y, y) -> torch.Tensor:
    return dense_like(y)


def _launch(grad_y, y) -> torch.Tensor:
    grad_x = _output(grad_y, y)
    if y.numel() == 0:
        return grad_x
    # What is saved or handed in with other strides is copied.
    grad_y, y = (t if t.stride() == grad_x.stride() else dense_like(y).copy_(t) for t in (grad_y, y))
    block = elementwise_block(y.numel(), y.element_size())
    grid = (ceil_div(y.numel(), block),)
    launch(relu_backward_kernel, grid, grad_y, y, grad_x, y.numel(), ACC=accumulator(y.dtype), BLOCK=block, num_warps=8)
    return grad_x


def _formula(grad_y, y) -> torch.Tensor:
    return torch.ops.aten.threshold_backward(grad_y, y, 0)


relu_backward = register_gradient("relu_backward(Tensor grad_y, Tensor y) -> Tensor", _launch, _output, _formula)
