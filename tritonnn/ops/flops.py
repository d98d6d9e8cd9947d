"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators that multiply: importing registers it."""

import torch
from torch.utils.flop_counter import conv_flop_count, mm_flop, register_flop_formula

from . import linear, linear_backward  # noqa: F401
from .conv2d import op  # noqa: F401


@register_flop_formula(torch.ops.tritonnn.conv2d)
def _conv2d(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return conv_flop_count(x_shape, weight_shape, out_shape)


@register_flop_formula(torch.ops.tritonnn.linear)
def _linear(x_shape, weight_shape, *_, **__) -> int:
    return mm_flop(x_shape, weight_shape[::-1])


@register_flop_formula(torch.ops.tritonnn.conv2d_backward_input)
def _conv2d_backward_input(g_shape, weight_shape, size, *_, **__) -> int:
    return conv_flop_count(list(size), weight_shape, g_shape)


@register_flop_formula(torch.ops.tritonnn.conv2d_backward_weight)
def _conv2d_backward_weight(g_shape, x_shape, size, *_, **__) -> int:
    return conv_flop_count(x_shape, list(size), g_shape)


@register_flop_formula(torch.ops.tritonnn.linear_backward_input)
def _linear_backward_input(g_shape, weight_shape, *_, **__) -> int:
    return mm_flop(g_shape, weight_shape)


@register_flop_formula(torch.ops.tritonnn.linear_backward_weight)
def _linear_backward_weight(g_shape, x_shape, *_, **__) -> int:
    return mm_flop(g_shape[::-1], x_shape)
