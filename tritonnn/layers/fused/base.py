"""What fused layers share: packed weights, what PyTorch does where no kernel can, and an operator for compilers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ...ops.conv2d.op import conv2d_fused
from ...ops.conv2d.pack import pack_filters
from ...ops.window import output_size
from ...runtime.memory_format import empty_image
from ...runtime.operator import register
from ...runtime.precision import (
    autocast_type,
    convolution_in_tf32,
    convolution_input_precision,
    matmul_input_precision,
    tf32_of_convolutions,
    tf32_of_matmuls,
)
from ..layer import TritonLayer
from .activation import NO_ACTIVATION, Activation, activate


class FusedLayer(TritonLayer, nn.Module):
    """Holds the weight, in the model's type, the bias in the type of the sums, and the scale (see `_scale_type`).

    The scale is folded into weights that are packed as float32 or float64. With 16-bit weights the kernel scales the
    sums instead: products rounded to 16 bits would lose precision, and might leave the range of float16.

    Packed weights are kept for each type of operand, precision and device, and packed anew when `weight` or `scale` has
    changed. `_recent` has the same ones by the input's type and PyTorch's TF32 switch, which a call can look up before
    it has checked its input. `sums` is None for no residual, else where PyTorch's sum was written: "beside", "into y"
    or "into residual". `activation` is applied last.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    groups: int = 1

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        sums: str | None,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", None if scale is None else scale.to(_scale_type(weight)))
        self.register_buffer("bias", None if bias is None else bias.to(_sum_type(weight)))
        self.sums, self.activation = sums, activation
        self._packed: dict[tuple, _Packed] = {}
        self._recent: dict[tuple, _Packed] = {}
        self.eval()

    def extra_repr(self) -> str:
        steps = ["residual"] * (self.sums is not None)
        steps += [str(self.activation)] * (self.activation != NO_ACTIVATION)
        return f"weight={list(self.weight.shape)}, bias={self.bias is not None}, then={steps}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": {}, "_recent": {}}

    def _apply(self, fn, recurse: bool = True) -> "FusedLayer":
        before = {"scale": (self.scale, _scale_type), "bias": (self.bias, _sum_type)}
        super()._apply(fn, recurse)
        for name, (t, type_for) in before.items():
            if t is not None and getattr(self, name).dtype != type_for(self.weight):
                setattr(self, name, t.to(self.weight.device, type_for(self.weight)))
        self.forget_packed_weights()
        return self

    def forget_packed_weights(self) -> None:
        self._packed, self._recent = {}, {}

    def _packed_weight(self, dtype: torch.dtype, input_precision: str) -> "_Packed":
        weight, scale = self.weight, self.scale
        key = (dtype, input_precision, weight.device)
        kept = self._packed.get(key)
        if kept is None or not kept.is_of(weight, scale):
            filters = weight if weight.dim() == 4 else weight[:, :, None, None]
            sources = _Source.of(weight), None if scale is None else _Source.of(scale)
            if scale is not None and dtype.itemsize > 2:
                filters, scale = _scaled(filters, scale), None
            packed = pack_filters(filters.to(dtype), input_precision, self.groups)
            kept = self._packed[key] = _Packed(packed, None if scale is None else scale.float(), *sources)
        return kept

    def _reason_to_fall_back_types(self, x: torch.Tensor) -> str | None:
        """Why the kernel does not take the type of x, which autocast has converted; None if it does."""
        if x.dtype == self.weight.dtype or x.dtype == autocast_type(self.weight):
            return None
        return "input and parameters of several types"

    def _pytorch_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias for PyTorch's operation, in the weight's type."""
        weight = self.weight if self.scale is None else _scaled(self.weight, self.scale)
        return weight, None if self.bias is None else self.bias.to(weight.dtype)

    def _finish(self, y: torch.Tensor, residual: object) -> torch.Tensor:
        """What an epilogue does, with PyTorch's operations."""
        if self.sums == "into residual":
            y = residual.clone().add_(y)
        elif self.sums is not None:
            y = y.add_(residual) if self.sums == "into y" else y + residual
        return activate(y, *self.activation)

    def _activation_in_kernel(self, apart: str | None) -> Activation:
        """The activation for the kernel: none where the residual is added apart, which the activation then follows."""
        return self.activation if apart is None else NO_ACTIVATION

    def _added_apart(self, y: torch.Tensor, residual: object, reason: str | None) -> torch.Tensor:
        """The layer's result, of y from the kernel. With a `reason` PyTorch adds the residual, and that is counted."""
        if reason is None:
            return y
        self.fallbacks[reason] += 1
        return self._finish(y, residual)

    def _reason_to_add_apart(self, x: torch.Tensor, shape: tuple[int, ...], residual: object) -> str | None:
        """Why PyTorch adds the residual to y, which has this shape; None where the kernel does, or there is none."""
        if self.sums is None:
            return None
        if not isinstance(residual, torch.Tensor):
            return "the residual is no tensor"
        if residual.shape != shape:
            return "the residual is broadcast"
        if residual.dtype != x.dtype or residual.device != x.device or residual.layout != torch.strided:
            return "the residual is of another type or device"
        return None


def _launch_layer(x, weight, scale, bias, residual, activation, slope, *window) -> torch.Tensor:
    if weight.dim() == 2:
        weight, input_precision = weight[:, :, None, None], matmul_input_precision(x, weight)
    else:
        pixels = Filters(weight.shape, *window).pixels(x.shape)
        input_precision = convolution_input_precision(x, weight, pixels)
    if scale is not None:
        weight, scale = (_scaled(weight, scale), None) if x.element_size() > 2 else (weight, scale.float())
    packed = pack_filters(weight.to(x.dtype), input_precision, window[-1])
    epilogue = scale, bias, residual, activation, slope
    return conv2d_fused(x, packed, *epilogue, weight.shape[2:], *window, input_precision, False, False)


def _layer_output(
    x, weight, scale, bias, residual, activation, slope, stride, padding, dilation, *others
) -> torch.Tensor:
    windows = zip(x.shape[2:], weight.shape[2:] or (1, 1), stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], *(output_size(*window) for window in windows))
    return empty_image(shape, x, channels_last=True)


def _precisions(x: torch.Tensor) -> tuple[bool, bool]:
    return tf32_of_convolutions(x), tf32_of_matmuls(x)


fused_layer = register(
    "fused_layer(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, str activation, float slope, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    _launch_layer,
    _layer_output,
    state=_precisions,
)
"""For networks that are compiled, exported or traced: `conv2d_fused` that packs the weight [K, C / groups, R, S] or, of
a linear layer, [K, C] at every call, as precise as PyTorch's switches say then."""


def is_recorded() -> bool:
    """Whether a compiler or tracer records this call. What it finds out would then hold for all later calls too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class _Source(NamedTuple):
    """A tensor that something was made of. It is kept, so that no other tensor can get the same address."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Source":
        return cls(tensor.detach(), _version(tensor))

    def is_still(self, tensor: torch.Tensor) -> bool:
        return self.tensor.data_ptr() == tensor.data_ptr() and self.version == _version(tensor)


class _Packed(NamedTuple):
    """A packed weight, the scale [K] that is not in it, and what they were made of."""

    packed: torch.Tensor
    scale: torch.Tensor | None
    weight_source: _Source
    scale_source: _Source | None

    def is_of(self, weight: torch.Tensor, scale: torch.Tensor | None) -> bool:
        if not self.weight_source.is_still(weight) or (self.scale_source is None) != (scale is None):
            return False
        return scale is None or self.scale_source.is_still(scale)


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class Filters(NamedTuple):
    """What the size of a convolution's output depends on besides the image, and whether it uses TF32."""

    weight_shape: torch.Size
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def output_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """[K, P, Q] for an image [(N,) C, H, W]."""
        windows = zip(image_shape[-2:], self.weight_shape[2:], self.stride, self.padding, self.dilation)
        return self.weight_shape[0], *(output_size(*window) for window in windows)

    def pixels(self, image_shape: Sequence[int]) -> int:
        """The number of output pixels, N * P * Q."""
        return math.prod(image_shape[:-3]) * math.prod(self.output_shape(image_shape)[1:])

    @property
    def always_in_tf32(self) -> bool:
        """Whether it uses TF32 for images of any size, where that is allowed."""
        return convolution_in_tf32(0, self.weight_shape, self.groups, channels_last=True)

    def in_tf32(self, image_shape: Sequence[int]) -> bool:
        """Whether it uses TF32 for channels_last images [(N,) C, H, W], where that is allowed."""
        return convolution_in_tf32(self.pixels(image_shape), self.weight_shape, self.groups, channels_last=True)


def images(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] for x of that shape or [C, H, W]."""
    return x if x.dim() == 4 else x.unsqueeze(0)


def _sum_type(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _scale_type(weight: torch.Tensor) -> torch.dtype:
    """float32 where the kernel scales the sums; float64 where the scale is folded into the weight."""
    return torch.float32 if weight.element_size() <= 2 else torch.float64


def _scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale [K] times weight [K, ...], computed in float64, in the type of weight."""
    return (weight.double() * scale.double().view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def batch_norm_as_affine(bias: torch.Tensor | None, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift [K] in float64: a batch norm in eval mode after a convolution, whose bias goes into the shift."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift
