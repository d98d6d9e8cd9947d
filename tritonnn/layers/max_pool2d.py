"""torch.nn.MaxPool2d on Triton."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ..ops.max_pool2d import max_pool2d
from ..ops.max_pool2d_backward import MOST_TAPS
from .layer import TritonLayer, batched, by_plan, pair, reason_to_fall_back_image, recorded, windows_fit


def _directly(layer: "TritonMaxPool2d", input: torch.Tensor) -> Callable | None:
    """What the layer comes down to for batches of images like this one."""
    reason, window = layer._window(input)
    if reason is not None or input.dim() != 4:
        return None
    pool = max_pool2d.shortcut(1, (*window, True, layer.signed_zeros, layer._as_taps(window)))
    if layer.return_indices:
        return pool
    return lambda layer, addresses, args: pool(layer, addresses, args)[0]


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
        ),
        direct=_directly,
    )
    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        reason, window = self._window(input)
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        x = input if input.dim() == 4 else input.contiguous()
        wants_indices = self.return_indices or recorded(x)
        y, indices = batched(max_pool2d, x, *window, wants_indices, self.signed_zeros, self._as_taps(window))
        return (y, indices) if self.return_indices else y

    def _window(self, input: torch.Tensor) -> tuple[str | None, tuple]:
        """Why no kernel takes it, or None; kernel size, stride, padding, dilation, ceil_mode."""
        kernel_size, stride = pair(self.kernel_size), pair(self.kernel_size if self.stride == () else self.stride)
        padding, dilation = pair(self.padding), pair(self.dilation)
        reason = reason_to_fall_back_image(input)
        if reason is None and not pools(input, kernel_size, stride, padding, dilation, self.ceil_mode):
            reason = "no window fits"
        return reason, (kernel_size, stride, padding, dilation, self.ceil_mode)

    def _as_taps(self, window: tuple) -> bool:
        """Whether the indices, of this kernel size, are for our own gradient only."""
        return not self.return_indices and math.prod(window[0]) <= MOST_TAPS


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
