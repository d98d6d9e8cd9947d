"""torch.nn.Conv2d on Triton."""

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.conv2d.op import conv2d
from ..runtime.fallbacks import count_backward_in, count_recorded_backward_in
from ..runtime.precision import autocast, tf32_of_convolutions
from .layer import TritonLayer, batched, by_plan, is_empty, pair, parameters, reason_to_fall_back_image, windows_fit


def _unchecked(layer: "TritonConv2d", input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """What `_convolve` comes down to for batches of images like this one that are not copied."""
    if not isinstance(input, torch.Tensor) or is_empty(input) or is_empty(weight) or input.dim() != 4:
        return None
    reason, x, window = layer._operands(input, weight, bias)
    if reason is not None or x is not input:
        return None
    recorded = conv2d.shortcut(3, (*window, layer.groups))

    def convolve(layer: TritonConv2d, addresses: list[int], args: tuple) -> torch.Tensor:
        count_recorded_backward_in(layer)
        return recorded(layer, addresses, args)

    return convolve


class TritonConv2d(TritonLayer, nn.Conv2d):
    """`torch.nn.Conv2d` with a Triton kernel: the same arguments, state_dict, results and errors.

    Shapes: [N, C, H, W] or [C, H, W] to [N, K, P, Q] or [K, P, Q]; float16, bfloat16, float32 (TF32 where
    `torch.backends.cudnn` allows it and it saves time) or float64. Falls back to PyTorch for other types.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, *parameters(self))

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._convolve(*autocast(input, weight, bias))

    @by_plan(
        lambda self: (
            (self.stride, self.padding, self.dilation, self.groups, self.padding_mode),
            self._reversed_padding_repeated_twice,
        ),
        tf32_of_convolutions,
        _unchecked,
    )
    def _convolve(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if is_empty(input) or is_empty(weight):  # nothing to compute but PyTorch's strides and errors
            return super()._conv_forward(input, weight, bias)
        reason, x, window = self._operands(input, weight, bias)
        if reason is not None:
            return self._fall_back(reason, super()._conv_forward, input, weight, bias)
        count_backward_in(self)
        return batched(conv2d, x, weight, bias, *window, self.groups)

    def _operands(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[str | None, torch.Tensor, tuple]:
        """Why no kernel takes them, or None; the input, padded where no kernel can do it; stride, padding, dilation."""
        reason = self._reason_to_fall_back(input, weight, bias)
        if reason is not None:
            return reason, input, ()
        x, padding = self._padded(input)
        window = pair(self.stride), padding, pair(self.dilation)
        if not windows_fit(x, weight.shape[-2:], *window):
            reason = "no output, or arguments that PyTorch refuses"
        return reason, x, window

    def _padded(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """x, padded where no kernel can do it, and the (rows, columns) of zeros that the kernel adds on each side."""
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        if self.padding == "valid":
            return x, (0, 0)
        if self.padding != "same":
            return x, pair(self.padding)  # type: ignore[arg-type]
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if (top, left) == (bottom, right):
            return x, (top, left)
        return F.pad(x, self._reversed_padding_repeated_twice), (0, 0)

    def _reason_to_fall_back(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
        reason = reason_to_fall_back_image(x, weight, bias)
        if reason is None and any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
            reason = "input and parameters of several types"
        if reason is None and x.shape[-3] != weight.shape[1] * self.groups:
            reason = f"{x.shape[-3]} input channels"
        if reason is None and bias is not None and bias.shape != weight.shape[:1]:
            reason = f"bias of shape {list(bias.shape)}"
        return reason
