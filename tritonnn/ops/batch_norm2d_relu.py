"""Batch norm in training with what follows it in a residual block: y = relu(batch_norm(x) + residual); its gradients.

x, residual: [N, C, H, W]. Normalising, adding and ReLU are one pass over memory. Backward, the mask of ReLU needs no
pass of its own: without a residual it is computed again from x; with one it is the sign of y, which the next layer
keeps anyway, and the masked gradient is that of the residual. Values and gradients are those of three operations one
after the other.
"""

from collections.abc import Callable

import torch

from ..runtime.memory_format import is_channels_last
from ..runtime.operator import Recorded, on_its_device, register, register_gradient
from .batch_norm2d import batch_norm2d_update_, launch_update, normalize
from .batch_norm2d_backward import dense, run, statistics_dtype
from .batch_norm2d_statistics import batch_statistics
from .channel_sums import Mask


def _backward_outputs(
    g, second, x, y, weight, bias, mean, var, inverse, eps
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    C, parameter = x.shape[1], mean if weight is None else weight
    grad_x = torch.empty_like(x, memory_format=_memory_format(x))
    grad_residual = torch.empty_like(grad_x) if y is not None else x.new_empty(0)
    return grad_x, parameter.new_empty(C), parameter.new_empty(C), grad_residual


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _launch_backward(g, second, x, y, weight, bias, mean, var, inverse, eps) -> tuple[torch.Tensor, ...]:
    *gradients, grad_residual = _backward_outputs(g, second, x, y, weight, bias, mean, var, inverse, eps)
    x, g, y, second = (None if t is None else dense(t, x) for t in (x, g, y, second))
    weight, bias, mean, var, inverse = (
        None if t is None else t.contiguous() for t in (weight, bias, mean, var, inverse)
    )
    mask = Mask(y, None if y is None else grad_residual, inverse, weight, bias, second)
    run(g, x, weight, mean, var, eps, True, tuple(gradients), mask)
    return *gradients, grad_residual


def _formula(g, second, x, y, weight, bias, mean, var, inverse, eps) -> tuple[torch.Tensor | None, ...]:
    g = g if second is None else g + second
    if y is None:
        shape = 1, -1, 1, 1
        scale = inverse if weight is None else inverse * weight
        y = (x.detach() - mean.view(shape)) * scale.detach().view(shape)
        y = (y if bias is None else y + bias.detach().view(shape)).to(x.dtype)
        masked = torch.ops.aten.threshold_backward(g, y, 0)
        residual = None
    else:
        masked = residual = torch.ops.aten.threshold_backward(g, y, 0)
    inverse = torch.rsqrt(var.to(statistics_dtype(x)) + eps)
    weight = None if weight is None else weight.contiguous()
    grads = torch.ops.aten.native_batch_norm_backward(
        masked, x, weight, None, None, mean, inverse, True, eps, [True, True, True]
    )
    return *grads, residual


batch_norm2d_relu_backward = register_gradient(
    "batch_norm2d_relu_backward(Tensor g, Tensor? second, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor var, Tensor inverse, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _backward_outputs,
    _formula,
)
"""grad_x, grad_weight, grad_bias and, where y says that there was a residual, grad_residual.

g and, of a residual, `second` are gradients of y whose sum counts.
"""


def _outputs(x, residual, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    C, dtype = x.shape[1], statistics_dtype(x)
    return torch.empty_like(x, memory_format=_memory_format(x)), *(x.new_empty(C, dtype=dtype) for _ in range(3))


def _launch(x, residual, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = dense(x, x)
    mean, var, inverse = batch_statistics(x, is_channels_last(x), eps)
    if residual is not None:
        residual = dense(residual, x)
    y = normalize(x, weight, bias, mean, inverse, eps, inverted=True, residual=residual, relu=True)
    return y, mean, var, inverse


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, ctx.eps = inputs
    y, mean, var, inverse = output
    ctx.mark_non_differentiable(mean, var, inverse)
    ctx.set_materialize_grads(False)  # of those: PyTorch would fill zeros for them
    ctx.save_for_backward(x, None if residual is None else y, weight, bias, mean, var, inverse)


def _backward(ctx, grad_y, *_):
    if grad_y is None:
        return None, None, None, None, None
    grads = batch_norm2d_relu_backward(grad_y, None, *ctx.saved_tensors, ctx.eps)
    needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    grad_x, grad_weight, grad_bias, grad_residual = grads
    return (
        grad_x if needs_x else None,
        grad_residual if needs_residual else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        None,
    )


batch_norm2d_relu = register(
    "batch_norm2d_relu(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _outputs,
    _setup_context,
    _backward,
)
"""(y, mean, var, 1 / sqrt(var + eps)), the last three of the batch [C]; the residual has the shape and type of x."""


def _launch_and_update(x, residual, weight, bias, running_mean, running_var, eps, momentum, *_):
    outputs = _launch(x, residual, weight, bias, eps)
    launch_update(*outputs[1:3], running_mean, running_var, momentum, x.numel() // x.shape[1])
    return outputs


def _train(x, residual, weight, bias, running_mean, running_var, eps, momentum, *_):
    outputs = batch_norm2d_relu.op(x, residual, weight, bias, eps)
    batch_norm2d_update_.op(*outputs[1:3], running_mean, running_var, momentum, x.numel() // x.shape[1])
    return outputs


def _setup_context_twice(ctx, inputs, output) -> None:
    x, _, weight, bias, ctx.eps = inputs
    y, mean, var, inverse = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, y, weight, bias, mean, var, inverse)


def _backward_twice(ctx, first, second, *_):
    if first is None:
        first, second = second, None
    grads = batch_norm2d_relu_backward(first, second, *ctx.saved_tensors, ctx.eps)
    grad_x, grad_weight, grad_bias, grad_residual = grads
    needed = zip((grad_x, grad_residual, grad_weight, grad_bias), ctx.needs_input_grad)
    return *(grad if wanted else None for grad, wanted in needed), None


_twice = Recorded(
    "batch_norm2d_relu_twice",
    _setup_context_twice,
    _backward_twice,
    hand_out=lambda outputs: (outputs[0], outputs[0].view_as(outputs[0]), *outputs[1:3]),
)


def train_directly(eps: float, twice: bool) -> Callable:
    """For `by_plan`, where autograd records: `batch_norm2d_relu` and, in the same plan, `batch_norm2d_update_`.

    Of x, residual, weight, bias, running_mean, running_var, eps and momentum. `twice`: y, again y, mean and variance;
    the backward pass gets the gradients of two readers apart, and adds them up as it reads them, where PyTorch would
    in a pass of its own.
    """
    launch = on_its_device(_launch_and_update, _train)
    if twice:
        return _twice.shortcut(4, (eps,), launch, of_all=True)
    return batch_norm2d_relu.shortcut(4, (eps,), launch)
