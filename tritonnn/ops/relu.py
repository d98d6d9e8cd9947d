"""ReLU: y = max(x, 0), element-wise; NaN stays NaN. Any shape; y has the strides of a dense x.

As in PyTorch -0.0 stays -0.0 on a CPU and becomes 0.0 on a GPU.
"""

import torch
import triton
import triton.language as tl

from ..device.arithmetic import INTERPRET, accumulator
from ..runtime.blocks import ceil_div, elementwise_block
from ..runtime.launch_plan import launch
from ..runtime.memory_format import dense_like
from ..runtime.operator import LIBRARY, register
from .relu_backward import relu_backward


@triton.jit
def relu_forward_kernel(x_ptr, y_ptr, numel, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """One program owns BLOCK consecutive elements in memory."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask)
    if INTERPRET:  # which compares the bits of a bfloat16
        y = tl.where(x.to(ACC) < 0, tl.zeros_like(x), x)
    else:
        y = tl.maximum(x, tl.zeros_like(x), propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + offs, y, mask=mask)


def _run(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.numel() > 0:
        block = elementwise_block(x.numel(), x.element_size())
        grid = (ceil_div(x.numel(), block),)
        # 256 threads load 16 bytes each, 4 KB in all.
        launch(relu_forward_kernel, grid, x, y, x.numel(), ACC=accumulator(x.dtype), BLOCK=block, num_warps=8)


def _launch(x) -> torch.Tensor:
    y = dense_like(x)
    if y.stride() != x.stride():  # x has gaps or repeats: a dense copy, then in place
        x = y.copy_(x)
    _run(x, y)
    return y


def _launch_in_place(x) -> None:
    _run(x, x)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output)


def _backward(ctx, grad_y):
    (y,) = ctx.saved_tensors
    return relu_backward(grad_y, y)


relu = register("relu(Tensor x) -> Tensor", _launch, dense_like, _setup_context, _backward)
relu_ = register("relu_(Tensor(a!) x) -> ()", _launch_in_place, lambda x: None)


class RecordedInPlace(torch.autograd.Function):
    """relu_ of a dense x that autograd records, which keeps nothing but the result, for eager mode."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        relu_(x)
        torch.autograd.graph.increment_version(x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    backward = staticmethod(_backward)


@torch.library.register_vmap("tritonnn::relu_", lib=LIBRARY)
def _relu_in_place_batched(info, in_dims, x) -> tuple[None, None]:
    x.copy_(torch.ops.tritonnn.relu(x))  # the batch may have gaps or repeats that an example does not show
    return None, None
