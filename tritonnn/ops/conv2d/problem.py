"""A convolution as a matrix product: its operands, what of them decides speed, and a choice of form and configuration.

As a GEMM: M = N * P * Q output pixels, N = K output channels, K = R * S * C elements of a filter.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from ...runtime.blocks import ceil_div
from ...runtime.memory_format import is_aligned, pixel_stride
from ..window import output_size
from .epilogue import Epilogue
from .prologue import Prologue

if TYPE_CHECKING:
    from .forms.form import Config


class Shortcut(NamedTuple):
    """scale * conv2d(x, weight) + bias, of one tap and no padding, to be added to another convolution.

    x: [N, C, H, W], any strides; weight: [K, 1, 1, C], contiguous, of a type with x; scale, bias: [K], contiguous.
    """

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None
    stride: tuple[int, int]
    input_precision: str
    round_x: bool


class Product(NamedTuple):
    """x [N, C, H, W], the weight as `pack_weight` gives it, y [N, K, P, Q] to be filled, and how.

    y is dense, in channels_last or not, or some channels of an image in channels_last; a residual has its strides. In
    TF32 x has been rounded, unless `round_x` asks for that on the way. Only forms that say so take a shortcut or a
    prologue.
    """

    x: torch.Tensor
    packed: torch.Tensor
    y: torch.Tensor
    channels_last_y: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_precision: str
    round_x: bool
    epilogue: Epilogue
    shortcut: Shortcut | None = None
    prologue: Prologue | None = None

    @property
    def pixels(self) -> int:
        """The number of output pixels, N * P * Q."""
        N, _, P, Q = self.y.shape
        return N * P * Q

    @property
    def fills_image(self) -> bool:
        """Whether y is dense, and not some channels of an image."""
        return not self.channels_last_y or pixel_stride(self.y) == self.y.shape[1]

    @property
    def has_aligned_y(self) -> bool:
        """Whether TMA can store y, by its address and strides, if its channels are a multiple of 16 bytes."""
        size = self.y.element_size()
        return self.fills_image or (self.y.data_ptr() % 16 == 0 and pixel_stride(self.y) * size % 16 == 0)

    @property
    def taps(self) -> int:
        """The taps of a filter: its rows times its columns."""
        return self.packed.shape[1] * self.packed.shape[2]

    @property
    def is_depthwise(self) -> bool:
        """Whether an output channel reads one input channel only, of several."""
        return self.groups > 1 and self.packed.shape[3] == 1

    @property
    def on_tensor_cores(self) -> bool:
        return on_tensor_cores(self.x, self.input_precision)

    @property
    def is_aligned(self) -> bool:
        """Whether x is dense in channels_last and begins at a multiple of 16 bytes."""
        return is_aligned(self.x)

    @property
    def gathers(self) -> bool:
        """Whether x is read once for each filter tap, and a copy of x in a better layout may pay."""
        interpret = triton.knobs.runtime.interpret
        return self.taps > 1 and not spans_taps(self.packed.shape[3], self.taps) and not interpret

    @property
    def reads_apart(self) -> bool:
        """Whether each filter tap would read pixels that lie apart, as in NCHW.

        That is worth a copy (H200, bfloat16, 512 channels: 155 us for 449).
        """
        return self.gathers and self.x.stride(1) != 1

    @property
    def rounds_often(self) -> bool:
        """Whether an element of x takes part in so many products that rounding it in a copy before them pays.

        H200, 128 channels: 295 us for 324.
        """
        many = self.y.shape[1] * self.taps >= 1152 * self.stride[0] * self.stride[1]
        return self.gathers and self.round_x and many

    @property
    def is_read_often(self) -> bool:
        """Whether under a filter of one tap so many channels of y read an image in NCHW that a copy of it pays.

        Each block of channels reads x again, rounds it and turns it round. Measured on an H200, 64 images in TF32, us,
        in brackets without a copy: 1024 to 2048 channels of 7x7 74 (97), of 14x14 with stride 2 92 (157), 512 to 1024
        of 28x28 with stride 2 129 (160), 2048 to 512 of 7x7 50 (60). With stride 2 four times the pixels are copied.
        """
        C, K, (stride_h, stride_w) = self.x.shape[1], self.y.shape[1], self.stride
        apart = self.taps == 1 and self.groups == 1 and self.x.stride(1) != 1 and not triton.knobs.runtime.interpret
        return apart and self.round_x and C >= 512 and K >= 512 and K >= 256 * stride_h * stride_w

    @property
    def has_short_taps(self) -> bool:
        """Whether a tap of float32 has one block of 32 channels at most, which pointers fill faster than TMA.

        Measured on an H200, 64 images, 3x3, us, in brackets by TMA, with a halo where it says so: TF32, channels_last,
        24 to 24 channels of 112x112 175 (halo 350), NCHW, 32 to 64 of 147x147 438 (halo 769); strict float32, NCHW, 16
        to 64 of 55x55 86 (239), 32 to 128 of 27x27 58 (122), 24 to 24 of 112x112 327 (572), 32 to 96 of 28x28 57 (56).
        """
        few = self.x.shape[1] <= 32 and self.x.element_size() == 4 and self.groups == 1
        return few and self.gathers and tuple(self.stride) == (1, 1)


def on_tensor_cores(x: torch.Tensor, input_precision: str) -> bool:
    """Whether products of x run on the tensor cores."""
    return x.element_size() == 2 or input_precision != "ieee"


def leaves_half_empty(k: int) -> bool:
    """Whether of blocks of 128 of k output channels the last would be at most half full: blocks of 64 waste less."""
    return 0 < k % 128 <= 64


def spans_taps(channels: int, taps: int) -> bool:
    """Whether a filter has too few channels to give each of its taps a block of the reduction."""
    return channels < 16 and taps > 1


class Choice(NamedTuple):
    """A configuration, and with it the form whose it is; `copies_x`: x is first copied to channels_last.

    For TF32 the copy is rounded.
    """

    config: "Config"
    copies_x: bool = False

    def __str__(self) -> str:
        return f"{self.config}{', x copied' if self.copies_x else ''}"


class Problem(NamedTuple):
    """What a choice is tuned for. Images are dense, channels_last or contiguous; `epilogue` names its steps."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: torch.dtype
    input_precision: str
    round_x: bool
    channels_last_x: bool
    channels_last_y: bool
    epilogue: tuple[str, ...]

    @property
    def output(self) -> tuple[int, int]:
        """(P, Q)."""
        sizes = zip((self.h, self.w), (self.r, self.s), self.stride, self.padding, self.dilation)
        return tuple(output_size(*size) for size in sizes)

    @property
    def pixels(self) -> int:
        return self.n * math.prod(self.output)

    @property
    def reduction(self) -> int:
        return self.c // self.groups * self.r * self.s

    def programs(self, block_m: int, block_n: int) -> int:
        """Tiles of block_m pixels x block_n channels that cover the output."""
        return ceil_div(self.pixels, block_m) * ceil_div(self.k // self.groups, block_n) * self.groups

    def __str__(self) -> str:
        precision = self.input_precision if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        layout = "" if self.channels_last_x else ", NCHW"
        stride = "" if self.stride == (1, 1) else f"/{self.stride[0]}"
        return (
            f"{self.n}x{self.c}x{self.h}x{self.w} to {self.k}, {self.r}x{self.s}{stride}, {precision}{layout}"
            f"{''.join(f' +{step}' for step in self.epilogue)}"
        )


def problem_of(product: Product) -> Problem | None:
    """The problem that a product poses; None for what is not tuned, float64 and images with other strides."""
    x = product.x
    channels_last_x = x.is_contiguous(memory_format=torch.channels_last)
    if x.dtype == torch.float64 or not (channels_last_x or x.is_contiguous()):
        return None
    return Problem(
        *x.shape,
        product.y.shape[1],
        *product.packed.shape[1:3],
        tuple(product.stride),
        tuple(product.padding),
        tuple(product.dilation),
        product.groups,
        x.dtype,
        product.input_precision,
        product.round_x,
        channels_last_x,
        product.channels_last_y,
        product.epilogue.steps,
    )


NO_SHORTCUT = {
    "HAS_SHORTCUT": False,
    "HAS_SHORTCUT_SCALE": False,
    "HAS_SHORTCUT_BIAS": False,
    "SHORTCUT_C": 0,
    "SHORTCUT_STRIDE_H": 1,
    "SHORTCUT_STRIDE_W": 1,
    "SHORTCUT_PRECISION": "ieee",
    "ROUND_SHORTCUT": False,
}


def shortcut_flags(shortcut: Shortcut | None) -> dict[str, object]:
    """The kernel's constexpr arguments."""
    if shortcut is None:
        return NO_SHORTCUT
    return {
        "HAS_SHORTCUT": True,
        "HAS_SHORTCUT_SCALE": shortcut.scale is not None,
        "HAS_SHORTCUT_BIAS": shortcut.bias is not None,
        "SHORTCUT_C": shortcut.x.shape[1],
        "SHORTCUT_STRIDE_H": shortcut.stride[0],
        "SHORTCUT_STRIDE_W": shortcut.stride[1],
        "SHORTCUT_PRECISION": shortcut.input_precision,
        "ROUND_SHORTCUT": shortcut.round_x,
    }
