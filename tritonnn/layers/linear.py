"""torch.nn.Linear on Triton."""

import math

import torch
from torch import nn

from ..kernels.linear import linear
from ..precision import autocast, matmul_state
from .layer import TritonLayer, by_plan, parameters, reason_to_fall_back


class TritonLinear(TritonLayer, nn.Linear):
    """`torch.nn.Linear` with a Triton kernel: the same arguments, state_dict, results and errors.

    Shapes: [*, in_features] to [*, out_features]; float16, bfloat16, float32 (TF32 where `torch.backends.cuda.matmul`
    allows it) or float64. Falls back to PyTorch for other types.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
    """

    @by_plan(parameters, matmul_state)
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, weight, bias = autocast(input, self.weight, self.bias)
        reason = reason_to_fall_back(x, weight, bias)
        if reason is None and any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
            reason = "input and parameters of several types"
        if reason is None and (x.dim() == 0 or x.shape[-1] != weight.shape[1]):
            reason = "input features"
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        *leading, features = x.shape
        return linear(x.reshape(math.prod(leading), features), weight, bias).view(*leading, weight.shape[0])
