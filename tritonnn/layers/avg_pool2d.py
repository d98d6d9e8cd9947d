"""torch.nn.AvgPool2d and torch.nn.AdaptiveAvgPool2d on Triton."""

from collections.abc import Callable

import torch
from torch import nn

from ..ops.avg_pool2d import adaptive_avg_pool2d, avg_pool2d
from ..runtime.operator import Operator
from .layer import TritonLayer, batched, by_plan, is_empty, pair, reason_to_fall_back_image
from .max_pool2d import pools


def _directly(pool: Operator, input: torch.Tensor, reason: str | None, arguments: tuple) -> Callable | None:
    """What a layer comes down to for batches of images like this one."""
    return pool.shortcut(1, arguments) if reason is None and input.dim() == 4 and not is_empty(input) else None


class TritonAvgPool2d(TritonLayer, nn.AvgPool2d):
    """`torch.nn.AvgPool2d` with a Triton kernel: the same arguments, results and errors; sums in float32.

    Shapes: [N, C, H, W] or [C, H, W] to [N, C, P, Q] or [C, P, Q]; floating-point types. Falls back to PyTorch for
    others. https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html
    """

    @by_plan(
        lambda self: (
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        ),
        direct=lambda self, input: _directly(avg_pool2d, input, *self._arguments(input)),
    )
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        reason, arguments = self._arguments(input)
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        return batched(avg_pool2d, input if input.dim() == 4 else input.contiguous(), *arguments)

    def _arguments(self, input: torch.Tensor) -> tuple[str | None, tuple]:
        """Why no kernel takes it, or None; the operator's arguments."""
        kernel_size, padding = pair(self.kernel_size), pair(self.padding)
        stride = pair(self.kernel_size if self.stride == () else self.stride)
        reason = reason_to_fall_back_image(input)
        if reason is None and not pools(input, kernel_size, stride, padding, (1, 1), self.ceil_mode):
            reason = "no window fits"
        if reason is None and self.divisor_override == 0:
            reason = "divisor_override 0"
        others = self.ceil_mode, self.count_include_pad, self.divisor_override
        return reason, (kernel_size, stride, padding, *others)


class TritonAdaptiveAvgPool2d(TritonLayer, nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` with a Triton kernel: the same arguments, results and errors; sums in float32.

    Shapes: [N, C, H, W] or [C, H, W] to [N, C, *output_size] or [C, *output_size]; floating-point types. Falls back to
    PyTorch for others. https://docs.pytorch.org/docs/stable/generated/torch.nn.AdaptiveAvgPool2d.html
    """

    @by_plan(
        lambda self: (self.output_size,),
        direct=lambda self, input: _directly(adaptive_avg_pool2d, input, *self._arguments(input)),
    )
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if is_empty(input):  # nothing to compute but PyTorch's strides and errors
            return super().forward(input)
        reason, arguments = self._arguments(input)
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        return batched(adaptive_avg_pool2d, input if input.dim() == 4 else input.contiguous(), *arguments)

    def _arguments(self, input: torch.Tensor) -> tuple[str | None, tuple]:
        """Why no kernel takes it, or None; the operator's arguments."""
        reason = reason_to_fall_back_image(input)
        output_size = pair(self.output_size)
        if reason is None and (output_size is None or any(size is not None and size < 0 for size in output_size)):
            reason = f"output size {self.output_size}"
        if reason is not None:
            return reason, ()
        return None, (tuple(n if size is None else size for n, size in zip(input.shape[-2:], output_size)),)
