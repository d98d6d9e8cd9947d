"""Gradients of a linear layer y = x @ weight.T + bias: g @ weight of x and g.T @ x of the weight.

g: [M, K], x: [M, C], any strides; weight: [K, C]. Runs the convolution's kernels: a row is an image of one pixel.
"""

import torch

from ..runtime.operator import register_gradient
from ..runtime.precision import matmul_input_precision, tf32_of_matmuls
from .conv2d.backward.weight_dispatch import run_weight
from .conv2d.dispatch import launch_unpacked
from .conv2d.epilogue import Epilogue

WINDOW = (1, 1), (0, 0), (1, 1)


def _image(t: torch.Tensor) -> torch.Tensor:
    return t[:, :, None, None]


def _input_output(g, weight) -> torch.Tensor:
    return g.new_empty(g.shape[0], weight.shape[1])


def _launch_input(g, weight) -> torch.Tensor:
    grad_x = _input_output(g, weight)
    if g.numel() == 0:
        return grad_x.zero_()
    if grad_x.numel() > 0:
        filters = _image(weight.T)
        precision = matmul_input_precision(g, filters)
        launch_unpacked(_image(g), filters, _image(grad_x), True, WINDOW, 1, precision, Epilogue())
    return grad_x


linear_backward_input = register_gradient(
    "linear_backward_input(Tensor g, Tensor weight) -> Tensor",
    _launch_input,
    _input_output,
    lambda g, weight: g @ weight,
    tf32_of_matmuls,
)


def _weight_output(g, x) -> torch.Tensor:
    return g.new_empty(g.shape[1], x.shape[1])


def _launch_weight(g, x) -> torch.Tensor:
    grad_weight = _weight_output(g, x)
    if g.shape[0] == 0:
        return grad_weight.zero_()
    if grad_weight.numel() > 0:
        precision = matmul_input_precision(g, x.T)
        run_weight(_image(g), _image(x), _image(grad_weight), WINDOW, 1, precision)
    return grad_weight


linear_backward_weight = register_gradient(
    "linear_backward_weight(Tensor g, Tensor x) -> Tensor",
    _launch_weight,
    _weight_output,
    lambda g, x: g.T @ x,
    tf32_of_matmuls,
)
