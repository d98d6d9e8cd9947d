"""torch.nn.MaxPool2d on Triton."""

import math

import torch
from torch import nn

from ..ops.max_pool2d import max_pool2d
from ..ops.max_pool2d_backward import MOST_TAPS
from .layer import TritonLayer, batched, by_plan, pair, reason_to_fall_back_image, recorded, windows_fit


class TritonMaxPool2d(TritonLayer, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` with a Triton kernel: the same arguments, results, indices and errors; NaN wins.

    Shapes: [N, C, H, W] or [C, H, W] to [N, C, P, Q] or [C, P, Q]; floating-point types. Falls back to PyTorch for
    others. https://docs.pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html

    `signed_zeros` False, for inputs without -0.0, is faster.
    """

    signed_zeros: bool = True

    @by_plan(
        lambda self: (
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
            self.signed_zeros,
        )
    )
    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        kernel_size, stride = pair(self.kernel_size), pair(self.kernel_size if self.stride == () else self.stride)
        padding, dilation = pair(self.padding), pair(self.dilation)
        reason = reason_to_fall_back_image(input)
        if reason is None and not pools(input, kernel_size, stride, padding, dilation, self.ceil_mode):
            reason = "no window fits"
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        x = input if input.dim() == 4 else input.contiguous()
        wants_indices = self.return_indices or recorded(x)
        window = kernel_size, stride, padding, dilation, self.ceil_mode
        as_taps = not self.return_indices and math.prod(kernel_size) <= MOST_TAPS
        y, indices = batched(max_pool2d, x, *window, wants_indices, self.signed_zeros, as_taps)
        return (y, indices) if self.return_indices else y


def pools(
    x: torch.Tensor,
    kernel_size: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    padding: tuple[int, int] | None,
    dilation: tuple[int, int] | None,
    ceil_mode: bool,
) -> bool:
    """Whether PyTorch accepts an image [(N,) C, H, W]: C > 0, windows that fit, padding of at most half a window."""
    fit = x.shape[-3] > 0 and windows_fit(x, kernel_size, stride, padding, dilation, ceil_mode)
    return fit and all(2 * p <= k for k, p in zip(kernel_size, padding))
