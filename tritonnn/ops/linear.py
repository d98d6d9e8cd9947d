"""Linear layer forward: y[m, k] = bias[k] + sum over c of x[m, c] * weight[k, c].

x: [M, C], any strides; weight: [K, C]; y: [M, K], contiguous. Runs the convolution's kernels: a row is an image of one
pixel, the weight a 1x1 filter.
"""

import torch

from ..runtime.operator import register
from ..runtime.precision import matmul_input_precision, tf32_of_matmuls
from .channel_sums import channel_sums
from .conv2d.dispatch import launch_unpacked
from .conv2d.epilogue import Epilogue
from .linear_backward import linear_backward_input, linear_backward_weight


def _output(x, weight, bias) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _launch(x, weight, bias) -> torch.Tensor:
    y = _output(x, weight, bias)
    if y.numel() == 0:
        return y
    epilogue = Epilogue(bias=None if bias is None else bias.contiguous())
    x, weight, rows = (t[:, :, None, None] for t in (x, weight, y))
    input_precision = matmul_input_precision(x, weight)
    launch_unpacked(x, weight, rows, True, ((1, 1), (0, 0), (1, 1)), 1, input_precision, epilogue)
    return y


def _setup_context(ctx, inputs, output) -> None:
    """Saves what `_backward` reads: x may be overwritten where the weight is frozen, and the other way round."""
    x, weight, _ = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _backward(ctx, grad_y):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        linear_backward_input(grad_y, weight) if needs_x else None,
        linear_backward_weight(grad_y, x) if needs_weight else None,
        channel_sums(grad_y[:, :, None, None]) if needs_bias else None,
    )


linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _launch,
    _output,
    _setup_context,
    _backward,
    tf32_of_matmuls,
)
