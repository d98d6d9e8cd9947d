"""A convolution and what follows it, batch norm, residual sum, activation, in one kernel: for inference."""

import torch
from torch import nn
from torch.nn import functional as F

from ...ops.conv2d.op import conv2d_fused, conv2d_into, conv2d_with_shortcut, takes_shortcut
from ...runtime.launch_plan import plain_eager
from ...runtime.precision import (
    autocast,
    convolution_allows_tf32,
    convolution_input_precision,
    convolution_state,
    convolutions_in_tf32,
)
from ..layer import TritonLayer, by_plan, reason_to_fall_back_image, windows_fit
from .activation import NO_ACTIVATION, Activation
from .base import Filters, FusedLayer, fused_layer, images, is_recorded


class FusedConv2d(FusedLayer):
    """y = activation(scale * conv2d(x, weight) + bias + residual), residual and activation where they were asked for.

    Shapes: x [N, C, H, W] or [C, H, W], weight [K, C / groups, R, S], scale and bias [K]; residual and y [N, K, P, Q]
    or [K, P, Q], y in channels_last. PyTorch adds a residual of another shape or type, and computes what no kernel
    takes; `fallbacks` counts both. No gradients.

    For TF32: with `round_output` y is rounded to it, provided that all `readers`, the convolutions that read y and may
    not use TF32, do so for a y of its size. With `rounded_input` x has been rounded in this way, provided that all
    `fellow_readers`, which read x as well, use TF32.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        sums: str | None = None,
        activation: Activation = NO_ACTIVATION,
    ) -> None:
        super().__init__(weight, scale, bias, sums, activation)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.rounded_input = self.round_output = False
        self.readers: tuple[Filters, ...] = ()
        self.fellow_readers: tuple[Filters, ...] = ()

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (input,) = autocast(input)
        kept = None
        if plain_eager():
            dtype = getattr(input, "dtype", None)  # what is no tensor is PyTorch's to refuse
            kept = self._recent.get((dtype, dtype is torch.float32 and convolutions_in_tf32()))
        if kept is None or not kept.is_of(self._buffers["weight"], self._buffers["scale"]):
            return self._compute(input, residual)
        return self._compute_again(input, residual, kept.packed, kept.scale)

    @by_plan(
        lambda self: (
            self._buffers["weight"].shape,
            self._buffers["weight"].dtype,
            self._buffers["bias"],
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.sums,
            *self.activation,
            self.rounded_input,
            self.round_output,
            self.readers,
            self.fellow_readers,
        ),
        convolution_state,
    )
    def _compute_again(
        self, x: torch.Tensor, residual: torch.Tensor | None, packed: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """As `_compute`, which finds for itself the packed weight and the scale that make the launch key complete."""
        return self._compute(x, residual)

    def _compute(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        reason = self._reason_to_fall_back(x)
        if reason is not None:
            return self._fall_back(reason, self._with_pytorch, x, residual)
        if x.dim() == 3 and self.scale is not None:  # as a batch norm says it
            raise ValueError("expected 4D input (got 3D input)")
        apart = self._reason_to_add_apart(x, (*x.shape[:-3], *self.output_shape(x)), residual)
        if is_recorded():
            y = self._recorded(images(x), None if self.sums is None or apart else images(residual), apart)
            return self._added_apart(y if x.dim() == 4 else y.squeeze(0), residual, apart)
        input_precision = self.input_precision(x)
        kept = self._packed_weight(x.dtype, input_precision)
        if plain_eager():
            self._recent[x.dtype, x.dtype is torch.float32 and convolutions_in_tf32()] = kept
        added = None if self.sums is None or apart else residual
        y = conv2d_fused(
            images(x),
            kept.packed,
            kept.scale,
            self.bias,
            None if added is None else images(added),
            *self._activation_in_kernel(apart),
            *self._geometry(x, input_precision),
            apart is None and self.rounds_output_for(x),
        )
        return self._added_apart(y if x.dim() == 4 else y.squeeze(0), residual, apart)

    def reason_not_to_fill(self, x: torch.Tensor) -> str | None:
        """Why `fill` does not take x, whatever it is to fill; None if it does."""
        (converted,) = autocast(x)
        if x.dim() != 4 or x.numel() == 0 or converted.dtype != x.dtype:
            return "no images, or autocast"
        return self._reason_to_fall_back(x)

    def fill(self, wide: torch.Tensor, first: int, x: torch.Tensor) -> None:
        """wide[:, first : first + K] = y, without a residual, of an image in channels_last that is dense."""
        input_precision = self.input_precision(x)
        kept = self._packed_weight(x.dtype, input_precision)
        conv2d_into(
            wide,
            first,
            x,
            kept.packed,
            kept.scale,
            self.bias,
            *self.activation,
            *self._geometry(x, input_precision),
            self.rounds_output_for(x),
        )

    @property
    def _window(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    def _geometry(self, x: torch.Tensor, input_precision: str) -> tuple:
        """What operators take after the activation: the filter's size and window, and in which precision x comes."""
        return tuple(self.weight.shape[2:]), *self._window, input_precision, self.has_rounded(x)

    @property
    def filters(self) -> "Filters":
        return Filters(self.weight.shape, *self._window)

    def input_precision(self, x: torch.Tensor) -> str:
        return convolution_input_precision(x, self.weight, self.filters.pixels(x.shape))

    def has_rounded(self, x: torch.Tensor) -> bool:
        """Whether x [(N,) C, H, W] has been rounded to TF32; asked of a convolution that uses TF32 for it."""
        return self.rounded_input and all(reader.in_tf32(x.shape) for reader in self.fellow_readers)

    def rounds_output_for(self, x: torch.Tensor) -> bool:
        """Whether y is to be rounded to TF32 for its readers."""
        if not self.round_output or not convolution_allows_tf32(x):
            return False
        y_shape = *x.shape[:-3], *self.output_shape(x)
        return all(reader.in_tf32(y_shape) for reader in self.readers)

    @property
    def is_shortcut(self) -> bool:
        """Whether it has one tap and neither padding nor groups."""
        return self.weight.shape[2:] == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def output_shape(self, x: torch.Tensor) -> tuple[int, int, int]:
        """[K, P, Q] for x [(N,) C, H, W]."""
        return self.filters.output_shape(x.shape)

    def _reason_to_fall_back(self, x: torch.Tensor) -> str | None:
        reason = reason_to_fall_back_image(x, self.weight) or self._reason_to_fall_back_types(x)
        if reason is None and x.shape[-3] != self.weight.shape[1] * self.groups:
            reason = f"{x.shape[-3]} input channels"
        if reason is None and not windows_fit(x, self.weight.shape[2:], self.stride, self.padding, self.dilation):
            reason = "no output, or arguments that PyTorch refuses"
        return reason

    def _recorded(self, x: torch.Tensor, residual: torch.Tensor | None, apart: str | None) -> torch.Tensor:
        activation = self._activation_in_kernel(apart)
        return fused_layer(x, self.weight, self.scale, self.bias, residual, *activation, *self._window)

    def _with_pytorch(self, x: torch.Tensor, residual: object) -> torch.Tensor:
        y = F.conv2d(x, *self._pytorch_parameters(), *self._window)
        return self._finish(y, residual)


class FusedSum(TritonLayer, nn.Module):
    """last(x, other(z)) of two fused convolutions, one of which is a shortcut. With few pixels that is one kernel.

    Shapes: as for the two. `last` adds a residual.
    """

    def __init__(self, last: FusedConv2d, other: FusedConv2d) -> None:
        super().__init__()
        self.last, self.other = last, other
        self.eval()

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        operands = [(self.last, *autocast(x)), (self.other, *autocast(z))]
        if self.last.is_shortcut:
            operands.reverse()
        (main, a), (shortcut, b) = operands
        if not self._in_one_kernel(main, a, shortcut, b):
            return self.last(x, self.other(z))
        precisions = [layer.input_precision(t) for layer, t in operands]
        kept, shortcut_kept = (layer._packed_weight(t.dtype, p) for (layer, t), p in zip(operands, precisions))
        return conv2d_with_shortcut(
            a,
            kept.packed,
            kept.scale,
            main.bias,
            b,
            shortcut_kept.packed,
            shortcut_kept.scale,
            shortcut.bias,
            *self.last.activation,
            tuple(main.weight.shape[2:]),
            main.stride,
            main.padding,
            main.dilation,
            shortcut.stride,
            precisions[0],
            main.has_rounded(a),
            precisions[1],
            shortcut.has_rounded(b),
            self.last.rounds_output_for(a if self.last is main else b),
        )

    @staticmethod
    def _in_one_kernel(main: FusedConv2d, a: torch.Tensor, shortcut: FusedConv2d, b: torch.Tensor) -> bool:
        if is_recorded():
            return False
        if (
            a.dim() != 4
            or b.dim() != 4
            or main.groups > 1
            or not a.is_cuda
            or (a.dtype, a.device) != (b.dtype, b.device)
        ):
            return False
        if main._reason_to_fall_back(a) or shortcut._reason_to_fall_back(b) or 0 in (a.numel(), b.numel()):
            return False
        shapes = [(t.shape[0], *layer.output_shape(t)) for layer, t in ((main, a), (shortcut, b))]
        return shapes[0] == shapes[1] and takes_shortcut(
            a, shapes[0][1], main.weight.shape[2:], *shapes[0][2:], b.shape[1]
        )
