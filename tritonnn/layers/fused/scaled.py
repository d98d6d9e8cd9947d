"""Images whose channels are scaled, by gates or a batch norm, before a convolution reads them: for inference."""

import torch
from torch import nn
from torch.nn import functional as F

from ...ops.conv2d.op import conv2d_scaled
from ...ops.excitation import excitation, takes
from ...ops.scaled_image import scaled_image
from ...runtime.memory_format import pixel_stride
from ...runtime.precision import autocast
from ..layer import TritonLayer, reason_to_fall_back, reason_to_fall_back_image
from .activation import Activation, activate
from .base import batch_norm_as_affine, is_recorded
from .conv2d import FusedConv2d

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str]
"""The arguments of `scaled_image`."""


class FusedGate(TritonLayer, nn.Module):
    """a * b, one of which is an image [N, C, H, W], and the other the gates [N, C, 1, 1], in either order."""

    operands = 2

    def forward(self, a: object, b: object) -> torch.Tensor:
        factors = self.factors(a, b)
        return self._fall_back(factors, lambda: a * b) if isinstance(factors, str) else scaled_image(*factors)

    def factors(self, a: object, b: object) -> Factors | str:
        """The kernel's arguments; or the reason why it does not take these."""
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return "a factor is no tensor"
        reason = reason_to_fall_back(a, b)
        if reason is None and (a.dtype != b.dtype or not (_are_gates(a, b) or _are_gates(b, a))):
            reason = "no product of an image and gates of its type"
        if reason is not None:
            return reason
        return (b, a, None, "none") if _are_gates(a, b) else (a, b, None, "none")


def _are_gates(gates: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether both are dense, x in one of the two formats, and one number is for each channel."""
    dense = x.dim() == 4 and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    shape = (*x.shape[:2], 1, 1)
    return dense and gates.shape == shape and gates.is_contiguous(memory_format=torch.channels_last)


class FusedNorm(TritonLayer, nn.Module):
    """activation(norm(x)) of a batch norm with running statistics; x, y: [N, C, H, W].

    Holds the norm as a scale and a shift [C], in float32 or, for parameters in float64, float64.
    """

    operands = 1

    def __init__(self, norm: nn.BatchNorm2d, activation: Activation) -> None:
        super().__init__()
        dtype = torch.float64 if norm.running_mean.dtype == torch.float64 else torch.float32
        for name, factor in zip(("scale", "shift"), batch_norm_as_affine(None, norm)):
            self.register_buffer(name, factor.detach().to(dtype))
        self.activation = activation
        self.eval()

    def extra_repr(self) -> str:
        return f"{len(self.scale)}, then={self.activation}"

    def _apply(self, fn, recurse: bool = True) -> "FusedNorm":
        before = {"scale": self.scale, "shift": self.shift}
        super()._apply(fn, recurse)
        for name, factor in before.items():
            if getattr(self, name).dtype.itemsize < 4:
                setattr(self, name, factor.to(getattr(self, name).device))
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        factors = self.factors(input)
        if isinstance(factors, str):
            return self._fall_back(factors, self._with_pytorch, input)
        return scaled_image(*factors)

    def factors(self, x: torch.Tensor) -> Factors | str:
        """The kernel's arguments; or the reason why it does not take x."""
        reason = reason_to_fall_back_image(x, self.scale)
        if reason is None and (x.dim() != 4 or x.shape[1] != len(self.scale)):
            reason = f"an input of shape {list(x.shape)}"
        if reason is None and (x.dtype == torch.float64) != (self.scale.dtype == torch.float64):
            reason = "input and parameters of several types"
        if reason is None and not x.is_contiguous() and pixel_stride(x) is None:
            reason = "strides of neither memory format"
        return (x, self.scale, self.shift, self.activation.name) if reason is None else reason

    def _with_pytorch(self, x: torch.Tensor) -> torch.Tensor:
        nn.BatchNorm2d._check_input_dim(self, x)
        zeros = torch.zeros_like(self.scale)
        return activate(F.batch_norm(x, zeros, zeros, self.scale, self.shift, eps=1.0), *self.activation)


class FusedScaledConv2d(TritonLayer, nn.Module):
    """last(first(x), residual): a FusedConv2d of one tap that scales its image as it reads it.

    One kernel where that is known to be fast, and else two. Shapes: as for the two.
    """

    def __init__(self, first: FusedGate | FusedNorm, last: FusedConv2d) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.eval()

    def forward(self, *inputs: object) -> torch.Tensor:
        first, last, operands = self.first, self.last, inputs[: self.first.operands]
        residual = next(iter(inputs[len(operands) :]), None)
        factors = "recorded" if is_recorded() else first.factors(*operands)
        if isinstance(factors, str) or self._reason_to_go_apart(factors[0], residual) is not None:
            return last(first(*operands), residual)
        x = factors[0]
        precision = last.input_precision(x)
        kept = last._packed_weight(x.dtype, precision)
        return conv2d_scaled(
            *factors,
            kept.packed,
            kept.scale,
            last.bias,
            None if last.sums is None else residual,
            *last.activation,
            tuple(last.weight.shape[2:]),
            last.stride,
            last.padding,
            last.dilation,
            last.groups,
            precision,
            last.rounds_output_for(x),
        )

    def _reason_to_go_apart(self, x: torch.Tensor, residual: object) -> str | None:
        """Why an image that the first one's kernel takes still goes through two kernels; None if one takes it."""
        if autocast(x)[0].dtype != x.dtype:
            return "autocast"
        last = self.last
        return last._reason_to_fall_back(x) or last._reason_to_add_apart(x, (len(x), *last.output_shape(x)), residual)


class FusedExcitation(TritonLayer, nn.Module):
    """last(first(x)) of two FusedConv2d of one tap: one kernel for few images [N, C, 1, 1], and else two."""

    def __init__(self, first: FusedConv2d, last: FusedConv2d) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.eval()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if is_recorded() or not self._in_one_kernel(input):
            return self.last(self.first(input))
        first, last = self.first, self.last
        weights = first.weight.flatten(1), first.bias, last.weight.flatten(1), last.bias
        return excitation(input, *weights, *first.activation, *last.activation)

    def _in_one_kernel(self, x: torch.Tensor) -> bool:
        if reason_to_fall_back_image(x, self.first.weight) is not None or x.dim() != 4 or x.shape[2:] != (1, 1):
            return False
        layers = self.first, self.last
        types = {autocast(x)[0].dtype, x.dtype, *(layer.weight.dtype for layer in layers)}
        if len(types) > 1 or any(layer.scale is not None for layer in layers):
            return False
        if x.shape[1] != self.first.weight.shape[1] or not x.is_contiguous():
            return False
        return takes(*x.shape[:2], self.first.weight.shape[0], self.last.weight.shape[0])
