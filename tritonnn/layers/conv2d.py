"""torch.nn.Conv2d on Triton."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from ..kernels.conv2d import conv2d, output_size
from ..precision import autocast
from .layer import TritonLayer, batched, reason_to_fall_back_image


class TritonConv2d(TritonLayer, nn.Conv2d):
    """`torch.nn.Conv2d` with a Triton kernel: the same arguments, state_dict, results and errors.

    Shapes: [N, C, H, W] or [C, H, W] to [N, K, P, Q] or [K, P, Q]; float16, bfloat16, float32 (TF32 where
    `torch.backends.cudnn` allows it) or float64. Falls back to PyTorch for other types.
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x, w, b = autocast(input, weight, bias)
        padding = self._symmetric_padding()
        reason = self._reason_to_fall_back(x, w, b)
        if reason is not None:
            return self._fall_back(reason, super()._conv_forward, input, weight, bias)
        if padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        if any(size < 1 for size in self._output_size(x, padding)):
            return self._fall_back("empty output", super()._conv_forward, input, weight, bias)
        return batched(conv2d, x, w, b, self.stride, padding, self.dilation, self.groups)

    def _symmetric_padding(self) -> tuple[int, int] | None:
        """(rows, columns) of zeros for the kernel to add on either side; None where the image is padded beforehand."""
        if self.padding == "valid":
            return (0, 0)
        if self.padding_mode != "zeros":
            return None
        if self.padding != "same":
            return _pair(self.padding)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return (top, left) if (top, left) == (bottom, right) else None

    def _reason_to_fall_back(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
        reason = reason_to_fall_back_image(x, weight, bias)
        if reason is None and any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
            reason = "input and parameters of several types"
        if reason is None and x.shape[-3] != weight.shape[1] * self.groups:
            reason = f"{x.shape[-3]} input channels"
        return reason

    def _output_size(self, x: torch.Tensor, padding: tuple[int, int]) -> list[int]:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, padding, self.dilation)
        return [output_size(*size) if size[0] > 0 else 0 for size in sizes]
