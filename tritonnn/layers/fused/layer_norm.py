"""Layer norm over the last dimension, which may be that of channels in channels_last: for inference."""

import torch
from torch import nn

from ...ops.layer_norm import MOST_FEATURES, layer_norm
from ...runtime.precision import any_autocast
from ..layer import TritonLayer, reason_to_fall_back


class FusedLayerNorm(TritonLayer, nn.LayerNorm):
    """nn.LayerNorm by one kernel; PyTorch's where its `normalized_shape` has several dimensions, and under autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        reason = reason_to_fall_back(input, self.weight, self.bias) or self._reason_to_fall_back(input)
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        C = input.shape[-1]
        return layer_norm(input.reshape(-1, C).contiguous(), self.weight, self.bias, self.eps).view(input.shape)

    def _reason_to_fall_back(self, x: torch.Tensor) -> str | None:
        if len(self.normalized_shape) != 1 or tuple(x.shape[-1:]) != tuple(self.normalized_shape):
            return "normalized_shape"
        if x.shape[-1] > MOST_FEATURES:
            return f"{x.shape[-1]} features"
        if any(p is not None and p.dtype != x.dtype for p in (self.weight, self.bias)):
            return "input and parameters of several types"
        return "autocast" if any_autocast() else None
