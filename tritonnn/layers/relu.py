"""torch.nn.ReLU on Triton."""

import torch
from torch import nn

from ..ops.relu import relu, relu_
from .layer import FLOATING_POINT, TritonLayer, by_plan, reason_to_fall_back, recorded

SUPPORTED = (*FLOATING_POINT, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TritonReLU(TritonLayer, nn.ReLU):
    """`torch.nn.ReLU` with a Triton kernel: the same arguments, results and errors; NaN stays NaN.

    Any shape; floating-point and integer types. With `inplace`, where autograd records the input, a compiler looks on,
    or its memory has gaps or repeats, the result is computed beside it and copied back.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.inplace:
            return self._beside(input)
        y = self._overwrite(input)
        if y is not None:
            return y
        if not input.is_inference():
            torch.autograd.graph.increment_version(input)
        return input

    @by_plan(lambda self: ())
    def _beside(self, input: torch.Tensor) -> torch.Tensor:
        reason = reason_to_fall_back(input, dtypes=SUPPORTED)
        return relu(input) if reason is None else self._fall_back(reason, super().forward, input)

    @by_plan(lambda self: ())
    def _overwrite(self, input: torch.Tensor) -> torch.Tensor | None:
        """Returns input where something else than the kernel overwrote it."""
        reason = reason_to_fall_back(input, dtypes=SUPPORTED)
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        if recorded(input) or torch.compiler.is_compiling() or not _is_dense(input):
            return input.copy_(relu(input))
        relu_(input)
        return None


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements of x fill one stretch of memory, each once, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True
