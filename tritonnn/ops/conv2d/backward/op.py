"""The operators of a convolution's gradients, registered with PyTorch."""

import torch

from ....runtime.memory_format import empty_image
from ....runtime.operator import register_gradient
from ....runtime.precision import (
    convolution_input_gradient_precision,
    convolution_weight_gradient_precision,
    tf32_of_convolutions,
)
from . import input
from .weight_dispatch import run_weight


def _input_output(g, filters, size, channels_last, *_) -> torch.Tensor:
    return empty_image(tuple(size), g, channels_last)


def _launch_input(g, filters, size, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    grad_x = _input_output(g, filters, size, channels_last)
    if grad_x.numel() > 0:
        pixels = g.numel() // g.shape[1]
        precision = convolution_input_gradient_precision(grad_x, filters, pixels)
        input.run(g, filters, grad_x, channels_last, (stride, padding, dilation), groups, precision)
    return grad_x


def _input_formula(g, filters, size, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    x = empty_image(tuple(size), g, channels_last)  # of which the shape matters
    arguments = None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    return torch.ops.aten.convolution_backward(g, x, filters, *arguments)[0]


conv2d_backward_input = register_gradient(
    "conv2d_backward_input(Tensor g, Tensor weight, SymInt[4] size, bool channels_last, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> Tensor",
    _launch_input,
    _input_output,
    _input_formula,
    tf32_of_convolutions,
)
"""grad_x of that size [N, C, H, W], channels_last or contiguous."""


def _weight_output(g, x, size, channels_last, *_) -> torch.Tensor:
    return empty_image(tuple(size), g, channels_last)


def _launch_weight(g, x, size, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    grad_weight = _weight_output(g, x, size, channels_last)
    if grad_weight.numel() > 0:
        precision = convolution_weight_gradient_precision(x, grad_weight, g.numel() // g.shape[1])
        run_weight(g, x, grad_weight, (stride, padding, dilation), groups, precision)
    return grad_weight


def _weight_formula(g, x, size, channels_last, stride, padding, dilation, groups) -> torch.Tensor:
    filters = empty_image(tuple(size), g, channels_last)
    arguments = None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    return torch.ops.aten.convolution_backward(g, x, filters, *arguments)[1]


conv2d_backward_weight = register_gradient(
    "conv2d_backward_weight(Tensor g, Tensor x, SymInt[4] size, bool channels_last, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> Tensor",
    _launch_weight,
    _weight_output,
    _weight_formula,
    tf32_of_convolutions,
)
"""grad_weight of that size [K, C / groups, R, S], channels_last or contiguous."""
