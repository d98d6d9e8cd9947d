"""A convolution or linear layer and what follows it, batch norm, residual sum, ReLU, in one kernel: for inference."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.conv2d import conv2d_fused, conv2d_with_shortcut, pack_weight, takes_shortcut
from ..kernels.launch_plan import unwatched
from ..kernels.memory_format import empty_image
from ..kernels.operator import register
from ..kernels.pooled_linear import MOST_IMAGES, MOST_OUTPUTS, pooled_linear
from ..kernels.window import output_size
from ..precision import (
    autocast,
    autocast_type,
    convolution_allows_tf32,
    convolution_input_precision,
    convolution_state,
    convolutions_in_tf32,
    matmul_input_precision,
    matmuls_in_tf32,
)
from .layer import TritonLayer, by_plan, pair, reason_to_fall_back, reason_to_fall_back_image, windows_fit


class FusedLayer(TritonLayer, nn.Module):
    """Holds the weight, in the model's type, and scale and bias, which stay in the type of the sums.

    The scale is folded into a float32 or float64 weight, and then None: rounding a product of it to 16 bits would cost
    precision that the kernel keeps by scaling the sums.

    Packed weights are kept for each type of operand, precision and device, and packed anew when `weight` has changed;
    the `_recent` ones by what a call knows that has checked nothing: the type of its input and PyTorch's switch.
    `sums` is None for no residual, else where PyTorch's sum was written: "beside", "into y" or "into residual".
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        sums: str | None,
        relu: bool,
    ) -> None:
        super().__init__()
        if scale is not None and weight.element_size() > 2:
            weight, scale = _scaled(weight, scale), None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", None if scale is None else scale.to(_sum_type(weight)))
        self.register_buffer("bias", None if bias is None else bias.to(_sum_type(weight)))
        self.sums, self.relu = sums, relu
        self._packed: dict[tuple, _Packed] = {}
        self._recent: dict[tuple, _Packed] = {}
        self.eval()

    def extra_repr(self) -> str:
        steps = [step for step, present in (("residual", self.sums), ("relu", self.relu)) if present]
        return f"weight={list(self.weight.shape)}, bias={self.bias is not None}, then={steps}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_packed": {}, "_recent": {}}

    def _apply(self, fn, recurse: bool = True) -> "FusedLayer":
        before = {"scale": self.scale, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, t in before.items():
            if t is not None and getattr(self, name).dtype != _sum_type(self.weight):
                setattr(self, name, t.to(self.weight.device, _sum_type(self.weight)))
        self.forget_packed_weights()
        return self

    def forget_packed_weights(self) -> None:
        self._packed, self._recent = {}, {}

    def _packed_weight(self, dtype: torch.dtype, input_precision: str) -> "_Packed":
        weight = self.weight
        key = (dtype, input_precision, weight.device)
        kept = self._packed.get(key)
        if kept is None or not kept.is_of(weight):
            filters = weight if weight.dim() == 4 else weight[:, :, None, None]
            packed = pack_weight(filters.to(dtype), input_precision)
            kept = self._packed[key] = _Packed(weight.detach(), _version(weight), packed)
        return kept

    def _reason_to_fall_back_types(self, x: torch.Tensor) -> str | None:
        """x as autocast has it."""
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
        return y.relu() if self.relu else y

    def _added_apart(self, y: torch.Tensor, residual: object, reason: str | None) -> torch.Tensor:
        """y, to which the kernel has added the residual unless there is a reason why not."""
        if reason is None:
            return y
        self.fallbacks[reason] += 1
        return self._finish(y, residual)

    def _reason_to_add_apart(self, x: torch.Tensor, shape: tuple[int, ...], residual: object) -> str | None:
        """Why the kernel cannot add the residual to y of this shape, if there is one to add."""
        if self.sums is None:
            return None
        if not isinstance(residual, torch.Tensor):
            return "the residual is no tensor"
        if residual.shape != shape:
            return "the residual is broadcast"
        if residual.dtype != x.dtype or residual.device != x.device or residual.layout != torch.strided:
            return "the residual is of another type or device"
        return None


def _launch_layer(x, weight, scale, bias, residual, relu, *window_and_rounding) -> torch.Tensor:
    *window, rounded_x, round_y = window_and_rounding
    if weight.dim() == 2:
        weight, input_precision = weight[:, :, None, None], matmul_input_precision(x, weight.shape[1])
    else:
        input_precision = convolution_input_precision(x, weight[0].numel())
    packed = pack_weight(weight.to(x.dtype), input_precision)
    rounding = rounded_x, round_y and convolution_allows_tf32(x)
    return conv2d_fused(x, packed, scale, bias, residual, relu, weight.shape[2:], *window, input_precision, *rounding)


def _layer_output(x, weight, scale, bias, residual, relu, stride, padding, dilation, *others) -> torch.Tensor:
    windows = zip(x.shape[2:], weight.shape[2:] or (1, 1), stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], *(output_size(*window) for window in windows))
    return empty_image(shape, x, channels_last=True)


def _precisions() -> tuple[bool, bool]:
    return convolutions_in_tf32(), matmuls_in_tf32()


fused_layer = register(
    "fused_layer(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool rounded_x, bool round_y) -> Tensor",
    _launch_layer,
    _layer_output,
    state=_precisions,
)
"""For compiled and exported networks: `conv2d_fused` that packs the weight [K, C / groups, R, S] or, of a linear layer,
[K, C] at every call, as precise as PyTorch's switches say then."""


class _Packed(NamedTuple):
    """A packed weight, and the weight that it was made of: its memory is not given to another, at the same address."""

    source: torch.Tensor
    version: int
    packed: torch.Tensor

    def is_of(self, weight: torch.Tensor) -> bool:
        return self.source.data_ptr() == weight.data_ptr() and self.version == _version(weight)


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class FusedConv2d(FusedLayer):
    """y = relu(scale * conv2d(x, weight) + bias + residual), residual and ReLU where they were asked for.

    Shapes: x [N, C, H, W] or [C, H, W], weight [K, C / groups, R, S], scale and bias [K], float32 or, for a float64
    weight, float64; residual and y [N, K, P, Q] or [K, P, Q], y in channels_last. A residual of another shape or type
    is added by PyTorch, and so are inputs computed that no kernel takes; `fallbacks` counts both. No gradients.

    Where convolutions use TF32, `round_output` rounds y to it, and `rounded_input` says that x has been.
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
        relu: bool = False,
    ) -> None:
        super().__init__(weight, scale, bias, sums, relu)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.rounded_input = self.round_output = False

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (input,) = autocast(input)
        kept = self._recent.get((input.dtype, convolutions_in_tf32())) if unwatched() else None
        if kept is None or not kept.is_of(self._buffers["weight"]):
            return self._compute(input, residual)
        return self._compute_again(input, residual, kept.packed)

    @by_plan(
        lambda self: (
            self._buffers["weight"].shape,
            self._buffers["weight"].dtype,
            self._buffers["scale"],
            self._buffers["bias"],
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.sums,
            self.relu,
            self.rounded_input,
            self.round_output,
        ),
        convolution_state,
    )
    def _compute_again(self, x: torch.Tensor, residual: torch.Tensor | None, packed: torch.Tensor) -> torch.Tensor:
        """With the weight packed before, which `_compute` finds for itself."""
        return self._compute(x, residual)

    def _compute(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        reason = self._reason_to_fall_back(x)
        if reason is not None:
            return self._fall_back(reason, self._with_pytorch, x, residual)
        _, channels, R, S = self.weight.shape
        apart = self._reason_to_add_apart(x, (*x.shape[:-3], *self.output_shape(x)), residual)
        if torch.compiler.is_compiling():
            y = self._compiled(_images(x), None if self.sums is None or apart else _images(residual), apart)
            return self._added_apart(y if x.dim() == 4 else y.squeeze(0), residual, apart)
        input_precision = convolution_input_precision(x, channels * R * S)
        kept = self._packed_weight(x.dtype, input_precision)
        if unwatched():
            self._recent[x.dtype, convolutions_in_tf32()] = kept
        added = None if self.sums is None or apart else residual
        y = conv2d_fused(
            _images(x),
            kept.packed,
            self.scale,
            self.bias,
            None if added is None else _images(added),
            self.relu and apart is None,
            (R, S),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            input_precision,
            self.rounded_input,
            self.round_output and apart is None and convolution_allows_tf32(x),
        )
        return self._added_apart(y if x.dim() == 4 else y.squeeze(0), residual, apart)

    @property
    def is_shortcut(self) -> bool:
        """Whether it has one tap and neither padding nor groups."""
        return self.weight.shape[2:] == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def output_shape(self, x: torch.Tensor) -> tuple[int, int, int]:
        """[K, P, Q] for x [(N,) C, H, W]."""
        windows = zip(x.shape[-2:], self.weight.shape[2:], self.stride, self.padding, self.dilation)
        return self.weight.shape[0], *(output_size(*window) for window in windows)

    def _reason_to_fall_back(self, x: torch.Tensor) -> str | None:
        reason = reason_to_fall_back_image(x, self.weight) or self._reason_to_fall_back_types(x)
        if reason is None and x.shape[-3] != self.weight.shape[1] * self.groups:
            reason = f"{x.shape[-3]} input channels"
        if reason is None and not windows_fit(x, self.weight.shape[2:], self.stride, self.padding, self.dilation):
            reason = "no output, or arguments that PyTorch refuses"
        return reason

    def _compiled(self, x: torch.Tensor, residual: torch.Tensor | None, apart: str | None) -> torch.Tensor:
        window = self.stride, self.padding, self.dilation, self.groups
        rounding = self.rounded_input, self.round_output and apart is None
        parameters = self.weight, self.scale, self.bias
        return fused_layer(x, *parameters, residual, self.relu and apart is None, *window, *rounding)

    def _with_pytorch(self, x: torch.Tensor, residual: object) -> torch.Tensor:
        y = F.conv2d(x, *self._pytorch_parameters(), self.stride, self.padding, self.dilation, self.groups)
        return self._finish(y, residual)


class FusedSum(TritonLayer, nn.Module):
    """last(x, other(z)) of two fused convolutions, one of which is a shortcut: few pixels in one kernel.

    Shapes: as for the two; `last` has been told to add a residual.
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
        precisions = [convolution_input_precision(t, layer.weight[0].numel()) for layer, t in operands]
        return conv2d_with_shortcut(
            a,
            main._packed_weight(a.dtype, precisions[0]).packed,
            main.scale,
            main.bias,
            b,
            shortcut._packed_weight(b.dtype, precisions[1]).packed,
            shortcut.scale,
            shortcut.bias,
            self.last.relu,
            tuple(main.weight.shape[2:]),
            main.stride,
            main.padding,
            main.dilation,
            shortcut.stride,
            precisions[0],
            main.rounded_input,
            precisions[1],
            shortcut.rounded_input,
            self.last.round_output and convolution_allows_tf32(a),
        )

    @staticmethod
    def _in_one_kernel(main: FusedConv2d, a: torch.Tensor, shortcut: FusedConv2d, b: torch.Tensor) -> bool:
        if torch.compiler.is_compiling():
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


class FusedLinear(FusedLayer):
    """y = relu(linear(x, weight) + bias + residual): a 1x1 convolution of images of one pixel.

    Shapes: x [*, C], weight [K, C], bias [K], float32 or, for a float64 weight, float64; residual and y [*, K].
    Otherwise as FusedConv2d.
    """

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (x,) = autocast(input)
        reason = reason_to_fall_back(x, self.weight) or self._reason_to_fall_back_types(x)
        if reason is None and (x.dim() == 0 or x.shape[-1] != self.weight.shape[1]):
            reason = "input features"
        if reason is not None:
            return self._fall_back(reason, self._with_pytorch, input, residual)
        *leading, C = x.shape
        K, rows = self.weight.shape[0], math.prod(leading)
        apart = self._reason_to_add_apart(x, (*leading, K), residual)
        added = None if self.sums is None or apart else residual.reshape(rows, K, 1, 1)
        relu = self.relu and apart is None
        if torch.compiler.is_compiling():
            parameters, window = (self.weight, self.scale, self.bias), ((1, 1), (0, 0), (1, 1), 1)
            y = fused_layer(x.reshape(rows, C, 1, 1), *parameters, added, relu, *window, False, False)
            return self._added_apart(y.view(*leading, K), residual, apart)
        input_precision = matmul_input_precision(x, C)
        y = conv2d_fused(
            x.reshape(rows, C, 1, 1),
            self._packed_weight(x.dtype, input_precision).packed,
            self.scale,
            self.bias,
            added,
            relu,
            (1, 1),
            (1, 1),
            (0, 0),
            (1, 1),
            1,
            input_precision,
            False,
            False,
        )
        return self._added_apart(y.view(*leading, K), residual, apart)

    def _with_pytorch(self, x: torch.Tensor, residual: object) -> torch.Tensor:
        return self._finish(F.linear(x, *self._pytorch_parameters()), residual)


class FusedPooledLinear(FusedLinear):
    """FusedLinear of the flattened result of `pool`, an average pool: one kernel where it pools whole images.

    Shapes: x [N, C, H, W], weight [K, C]; y [N, K]. Otherwise the pool and the linear layer follow each other.
    """

    def __init__(self, pool: nn.AvgPool2d | nn.AdaptiveAvgPool2d, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (x,) = autocast(input)
        if not self._pools_whole_images(x):
            return super().forward(self.pool(input).flatten(1), residual)
        return pooled_linear(x, self.weight.to(x.dtype), self.bias)

    def _pools_whole_images(self, x: torch.Tensor) -> bool:
        """Whether the kernel takes x and does all that there is to do; compiled code would ask that of each batch."""
        if torch.compiler.is_compiling():
            return False
        if x.dim() != 4 or self.sums is not None or self.relu or self.weight.shape[0] > MOST_OUTPUTS:
            return False
        if x.shape[1] != self.weight.shape[1] or not 0 < x.shape[0] <= MOST_IMAGES or x.numel() == 0:
            return False
        if reason_to_fall_back(x, self.weight) or self._reason_to_fall_back_types(x):
            return False
        if isinstance(self.pool, nn.AdaptiveAvgPool2d):
            return pair(self.pool.output_size) == (1, 1)
        fits = pair(self.pool.kernel_size) == x.shape[2:] and pair(self.pool.padding) == (0, 0)
        return fits and self.pool.divisor_override is None


def _images(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] for x of that shape or [C, H, W]."""
    return x if x.dim() == 4 else x.unsqueeze(0)


def _sum_type(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale [K] times weight [K, ...], computed in float64, in the type of weight."""
    return (weight.double() * scale.double().view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def batch_norm_as_affine(bias: torch.Tensor | None, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift [K], float64, that are a batch norm in eval mode after a convolution without its bias."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift
