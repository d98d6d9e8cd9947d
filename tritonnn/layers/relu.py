"""torch.nn.ReLU on Triton."""

import torch
from torch import nn

from ..ops.relu import RecordedInPlace, relu, relu_
from ..runtime.launch_plan import plain_eager
from ..runtime.operator import PLAIN
from .layer import FLOATING_POINT, TritonLayer, by_plan, reason_to_fall_back, recorded

SUPPORTED = (*FLOATING_POINT, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TritonReLU(TritonLayer, nn.ReLU):
    """`torch.nn.ReLU` with a Triton kernel: the same arguments, results and errors; NaN stays NaN.

    Any shape; floating-point and integer types. With `inplace` the result is computed beside the input and copied back
    where the memory of the input has gaps or repeats and where a recorded input is a view or somebody watches the
    operators, such as a compiler.
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

    @by_plan(
        lambda self: (),
        direct=lambda self, input: None if reason_to_fall_back(input, dtypes=SUPPORTED) else relu.shortcut(1, ()),
    )
    def _beside(self, input: torch.Tensor) -> torch.Tensor:
        reason = reason_to_fall_back(input, dtypes=SUPPORTED)
        return relu(input) if reason is None else self._fall_back(reason, super().forward, input)

    @by_plan(lambda self: ())
    def _overwrite(self, input: torch.Tensor) -> torch.Tensor | None:
        """Overwrites input by other means than the kernel, and returns it."""
        reason = reason_to_fall_back(input, dtypes=SUPPORTED)
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        if torch.compiler.is_compiling() or not _is_dense(input):  # a compiler makes do without the copy
            return input.copy_(relu(input))
        if recorded(input):
            return RecordedInPlace.apply(input) if plain_eager() and _is_result(input) else input.copy_(relu(input))
        relu_(input)
        return None


def _is_result(x: torch.Tensor) -> bool:
    """Whether x is the result of an operation: a plain tensor, no leaf, and no view as far as PyTorch can tell."""
    is_view = getattr(x, "_is_view", None)
    return type(x) in PLAIN and not x.is_leaf and is_view is not None and not is_view()


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements of x fill one range of memory without gaps or repeats, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True
