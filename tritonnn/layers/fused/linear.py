"""A linear layer and what comes before and after it, pooling, residual sum, activation: for inference."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ...ops.conv2d.op import conv2d_fused
from ...ops.pooled_linear import MOST_IMAGES, MOST_OUTPUTS, pooled_linear
from ...runtime.precision import (
    autocast,
    autocast_type,
    matmul_input_precision,
)
from ..layer import pair, reason_to_fall_back
from .activation import NO_ACTIVATION
from .base import FusedLayer, fused_layer, is_recorded
from .conv2d import FusedConv2d


class FusedLinear(FusedLayer):
    """y = activation(linear(x, weight) + bias + residual): a 1x1 convolution of images of one pixel.

    Shapes: x [*, C], weight [K, C], bias [K], float32 or, for a float64 weight, float64; residual and y [*, K].
    Otherwise as FusedConv2d.
    """

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (x,) = autocast(input)
        reason = reason_to_fall_back(x, self.weight) or self._reason_to_fall_back_types(x)
        if reason is None and (x.dim() == 0 or x.shape[-1] != self.weight.shape[1]):
            reason = "input features"
        if reason is not None:
            return self._fall_back(reason, self._with_pytorch, input, residual)
        *leading, C = x.shape
        K, rows = self.weight.shape[0], math.prod(leading)
        apart = self._reason_to_add_apart(x, (*leading, K), residual)
        added = None if self.sums is None or apart else residual.reshape(rows, K, 1, 1)
        activation = self._activation_in_kernel(apart)
        if is_recorded():
            parameters, window = (self.weight, self.scale, self.bias), ((1, 1), (0, 0), (1, 1), 1)
            y = fused_layer(x.reshape(rows, C, 1, 1), *parameters, added, *activation, *window)
            return self._added_apart(y.view(*leading, K), residual, apart)
        input_precision = matmul_input_precision(x, self.weight)
        kept = self._packed_weight(x.dtype, input_precision)
        y = conv2d_fused(
            x.reshape(rows, C, 1, 1),
            kept.packed,
            kept.scale,
            self.bias,
            added,
            *activation,
            (1, 1),
            (1, 1),
            (0, 0),
            (1, 1),
            1,
            input_precision,
            False,
            False,
        )
        return self._added_apart(y.view(*leading, K), residual, apart)

    def _with_pytorch(self, x: torch.Tensor, residual: object) -> torch.Tensor:
        return self._finish(F.linear(x, *self._pytorch_parameters()), residual)


class FusedLinearOfImages(FusedConv2d):
    """FusedLinear whose input is [N, C, H, W] and result [N, K, H, W], both channels_last, with a scale a channel.

    Under autocast a scaled result has the type of the scale, as PyTorch's product would: it is computed by PyTorch.
    """

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self.scale is not None and autocast_type(self.weight) != self.weight.dtype:
            return self._fall_back("autocast", self._with_pytorch, input, residual)
        return super().forward(input, residual)

    def input_precision(self, x: torch.Tensor) -> str:
        return matmul_input_precision(x, self.weight)

    def _recorded(self, x: torch.Tensor, residual: torch.Tensor | None, apart: str | None) -> torch.Tensor:
        parameters, window = (self.weight[:, :, 0, 0], self.scale, self.bias), ((1, 1), (0, 0), (1, 1), 1)
        return fused_layer(x, *parameters, residual, *self._activation_in_kernel(apart), *window)

    def _with_pytorch(self, x: torch.Tensor, residual: object) -> torch.Tensor:
        weight, scale, bias = self.weight[:, :, 0, 0], self.scale, self.bias
        if scale is None:
            y = F.linear(x.movedim(-3, -1), weight, None if bias is None else bias.to(weight.dtype))
            return self._finish(y.movedim(-1, -3), residual)
        y = F.linear(x.movedim(-3, -1), weight).movedim(-1, -3) * scale.to(weight.dtype).view(-1, 1, 1)
        return self._finish(y if bias is None else y + bias.to(weight.dtype).view(-1, 1, 1), residual)


class FusedPooledLinear(FusedLinear):
    """A FusedLinear that reads the flattened result of `pool`, an average pool: one kernel if that pools whole images.

    Shapes: x [N, C, H, W], weight [K, C]; y [N, K]. Otherwise the pool and the linear layer follow each other.
    """

    def __init__(self, pool: nn.AvgPool2d | nn.AdaptiveAvgPool2d, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (x,) = autocast(input)
        if not self._pools_whole_images(x):
            return super().forward(self.pool(input).flatten(1), residual)
        return pooled_linear(x, self.weight.to(x.dtype), self.bias)

    def _pools_whole_images(self, x: torch.Tensor) -> bool:
        """Whether one kernel does all of it for x. Never under compilers: their code would ask for each batch again."""
        if is_recorded():
            return False
        if (
            x.dim() != 4
            or self.sums is not None
            or self.activation != NO_ACTIVATION
            or self.weight.shape[0] > MOST_OUTPUTS
        ):
            return False
        if x.shape[1] != self.weight.shape[1] or not 0 < x.shape[0] <= MOST_IMAGES or x.numel() == 0:
            return False
        if reason_to_fall_back(x, self.weight) or self._reason_to_fall_back_types(x):
            return False
        if isinstance(self.pool, nn.AdaptiveAvgPool2d):
            return pair(self.pool.output_size) == (1, 1)
        fits = pair(self.pool.kernel_size) == x.shape[2:] and pair(self.pool.padding) == (0, 0)
        return fits and self.pool.divisor_override is None
