"""A convolution or linear layer and what follows it, batch norm, residual sum, ReLU, in one kernel: for inference."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..ops.conv2d.op import conv2d_fused, conv2d_with_shortcut, takes_shortcut
from ..ops.conv2d.pack import pack_weight
from ..ops.pooled_linear import MOST_IMAGES, MOST_OUTPUTS, pooled_linear
from ..ops.window import output_size
from ..runtime.launch_plan import plain_eager
from ..runtime.precision import (
    autocast,
    autocast_type,
    convolution_allows_tf32,
    convolution_in_tf32,
    convolution_input_precision,
    convolution_state,
    convolutions_in_tf32,
    matmul_input_precision,
)
from .layer import TritonLayer, by_plan, pair, reason_to_fall_back, reason_to_fall_back_image, windows_fit


class _Fused(TritonLayer, nn.Module):
    """Holds the weight, in the model's type, the bias in the type of the sums, and the scale (see `_scale_type`).

    The scale is folded into weights that are packed as float32 or float64. Rounding a product of it to 16 bits would
    cost precision, and may leave the range of float16: there the kernel scales the sums.

    Packed weights are kept for each type of operand, precision and device, and packed anew when `weight` or `scale` has
    changed; the `_recent` ones by what a call knows that has checked nothing: its input's type and PyTorch's switch.
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
        self.register_buffer("weight", weight)
        self.register_buffer("scale", None if scale is None else scale.to(_scale_type(weight)))
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

    def _apply(self, fn, recurse: bool = True) -> "_Fused":
        before = {"scale": (self.scale, _scale_type), "bias": (self.bias, _sum_type)}
        super()._apply(fn, recurse)
        for name, (t, type_for) in before.items():
            if t is not None and getattr(self, name).dtype != type_for(self.weight):
                setattr(self, name, t.to(self.weight.device, type_for(self.weight)))
        self._packed, self._recent = {}, {}
        return self

    def _packed_weight(self, dtype: torch.dtype, input_precision: str) -> "_Packed":
        weight, scale = self.weight, self.scale
        key = (dtype, input_precision, weight.device)
        kept = self._packed.get(key)
        if kept is None or not kept.is_of(weight, scale):
            filters = weight if weight.dim() == 4 else weight[:, :, None, None]
            sources = _Source.of(weight), None if scale is None else _Source.of(scale)
            if scale is not None and dtype.itemsize > 2:
                filters, scale = _scaled(filters, scale), None
            packed = pack_weight(filters.to(dtype), input_precision)
            kept = self._packed[key] = _Packed(packed, None if scale is None else scale.float(), *sources)
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


class _Source(NamedTuple):
    """A tensor that something was made of: its memory is not given to another, at the same address."""

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
        """In the outputs of all images."""
        return math.prod(image_shape[:-3]) * math.prod(self.output_shape(image_shape)[1:])

    @property
    def always_in_tf32(self) -> bool:
        """Whether it uses TF32 for images of any size, where that is allowed."""
        return convolution_in_tf32(0, self.weight_shape, self.groups, channels_last=True)

    def in_tf32(self, image_shape: Sequence[int]) -> bool:
        """The same for channels_last images [(N,) C, H, W]."""
        return convolution_in_tf32(self.pixels(image_shape), self.weight_shape, self.groups, channels_last=True)


class FusedConv2d(_Fused):
    """y = relu(scale * conv2d(x, weight) + bias + residual), residual and ReLU where they were asked for.

    Shapes: x [N, C, H, W] or [C, H, W], weight [K, C / groups, R, S], scale and bias [K]; residual and y
    [N, K, P, Q] or [K, P, Q], y in channels_last. A residual of another shape or type is added by PyTorch, and so are
    inputs computed that no kernel takes; `fallbacks` counts both. No gradients.

    Where convolutions use TF32, `round_output` rounds y to it, if all `readers` of y will use it for its size;
    `rounded_input` says that x has been rounded so, if all of `fellow_readers`, which read x too, use TF32.
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
        self.readers: tuple[Filters, ...] = ()
        self.fellow_readers: tuple[Filters, ...] = ()

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        (input,) = autocast(input)
        kept = self._recent.get((input.dtype, convolutions_in_tf32())) if plain_eager() else None
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
            self.relu,
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
        """With the weight packed before, and its scale, which `_compute` finds for itself."""
        return self._compute(x, residual)

    def _compute(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        reason = self._reason_to_fall_back(x)
        if reason is not None:
            return self._fall_back(reason, self._with_pytorch, x, residual)
        R, S = self.weight.shape[2:]
        apart = self._reason_to_add_apart(x, (*x.shape[:-3], *self.output_shape(x)), residual)
        input_precision = self.input_precision(x)
        kept = self._packed_weight(x.dtype, input_precision)
        if plain_eager():
            self._recent[x.dtype, convolutions_in_tf32()] = kept
        added = None if self.sums is None or apart else residual
        y = conv2d_fused(
            _images(x),
            kept.packed,
            kept.scale,
            self.bias,
            None if added is None else _images(added),
            "relu" if self.relu and apart is None else "none",
            0.01,
            (R, S),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            input_precision,
            self.has_rounded(x),
            apart is None and self.rounds_output_for(x),
        )
        return self._added_apart(y if x.dim() == 4 else y.squeeze(0), residual, apart)

    @property
    def filters(self) -> "Filters":
        return Filters(self.weight.shape, self.stride, self.padding, self.dilation, self.groups)

    def input_precision(self, x: torch.Tensor) -> str:
        return convolution_input_precision(x, self.weight, self.filters.pixels(x.shape))

    def has_rounded(self, x: torch.Tensor) -> bool:
        """Whether x [(N,) C, H, W] has been rounded to TF32, if this convolution of it is one in TF32."""
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
            "relu" if self.last.relu else "none",
            0.01,
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


class FusedLinear(_Fused):
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
        K, rows = self.weight.shape[0], torch.Size(leading).numel()
        apart = self._reason_to_add_apart(x, (*leading, K), residual)
        input_precision = matmul_input_precision(x, self.weight)
        kept = self._packed_weight(x.dtype, input_precision)
        y = conv2d_fused(
            x.reshape(rows, C, 1, 1),
            kept.packed,
            kept.scale,
            self.bias,
            None if self.sums is None or apart else residual.reshape(rows, K, 1, 1),
            "relu" if self.relu and apart is None else "none",
            0.01,
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
        """Whether the kernel takes x and does all that there is to do."""
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


def _scale_type(weight: torch.Tensor) -> torch.dtype:
    """That of the sums where the kernel scales them, else what folds without a rounding of its own."""
    return torch.float32 if weight.element_size() <= 2 else torch.float64


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
