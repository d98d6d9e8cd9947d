"""torch.nn.Linear on Triton."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.linear import linear
from ..runtime.precision import autocast, tf32_of_matmuls
from .layer import TritonLayer, by_plan, parameters, reason_to_fall_back


def _reason_to_fall_back(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    reason = reason_to_fall_back(x, weight, bias)
    if reason is None and any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        reason = "input and parameters of several types"
    if reason is None and (x.dim() == 0 or x.shape[-1] != weight.shape[1]):
        reason = "input features"
    return reason


def _directly(layer: "TritonLinear", *tensors: torch.Tensor) -> Callable | None:
    """What `_product` comes down to for x [M, in_features] like this one."""
    return linear.shortcut(3, ()) if _reason_to_fall_back(*tensors) is None and tensors[0].dim() == 2 else None


class TritonLinear(TritonLayer, nn.Linear):
    """`torch.nn.Linear` with a Triton kernel: the same arguments, state_dict, results and errors.

    Shapes: [*, in_features] to [*, out_features]; float16, bfloat16, float32 (TF32 where `torch.backends.cuda.matmul`
    allows it) or float64. Falls back to PyTorch for other types.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._product(*autocast(input, *parameters(self)))

    @by_plan(lambda self: (), tf32_of_matmuls, _directly)
    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        reason = _reason_to_fall_back(x, weight, bias)
        if reason is not None:
            return self._fall_back(reason, F.linear, x, weight, bias)
        *leading, features = x.shape
        return linear(x.reshape(math.prod(leading), features), weight, bias).view(*leading, weight.shape[0])
