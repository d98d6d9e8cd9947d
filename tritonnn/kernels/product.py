"""A convolution as a matrix product: its operands, what of them decides how fast a form is, and a choice of one."""

import functools
import itertools
import math
from typing import NamedTuple

import torch

from .block_sizes import DescriptorBlocks, GemmBlocks, HaloBlocks, HeldBlocks, RowBlocks, SplitBlocks, ceil_div
from .epilogue import Epilogue
from .window import output_size

Blocks = HeldBlocks | SplitBlocks | HaloBlocks | DescriptorBlocks | RowBlocks | GemmBlocks
FORMS: dict[str, type[Blocks]] = {
    "held": HeldBlocks,
    "split": SplitBlocks,
    "halo": HaloBlocks,
    "descriptors": DescriptorBlocks,
    "rows": RowBlocks,
    "pointers": GemmBlocks,
}
"""Blocks are of as many numbers as those of no other form: tuples are compared by what they hold."""


def on_tensor_cores(x: torch.Tensor, input_precision: str) -> bool:
    """Whether products of x are those of the tensor cores."""
    return x.element_size() == 2 or input_precision != "ieee"


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

    y is dense, in channels_last or not; a residual has its strides. In TF32 x has been rounded, unless `round_x` asks
    for that on the way. Only the forms for few pixels take a shortcut.
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


class Choice(NamedTuple):
    """A form, which is that of the blocks; `copies_x`: x is first copied to channels_last and, for TF32, rounded."""

    blocks: Blocks
    copies_x: bool

    def __str__(self) -> str:
        form = next(name for name, cls in FORMS.items() if isinstance(self.blocks, cls))
        sizes = [
            size
            for name, size in self.blocks._asdict().items()
            if name.startswith(("SPLITS", "SLICES", "TILE", "BLOCK"))
        ]
        blocks, notes = self.blocks, [f"{self.blocks.num_warps} warps"]
        if isinstance(blocks, HaloBlocks):
            notes += [f"{blocks.X_SLOTS} + {blocks.W_SLOTS} slots", f"{blocks.PROGRAMS} a multiprocessor"]
            notes += ["staged in a slot" if blocks.IN_SLOT else "staged"] * blocks.STAGED
        elif not isinstance(blocks, HeldBlocks):
            notes += [f"{blocks.num_stages} stages"]
        natural = isinstance(blocks, DescriptorBlocks) and not blocks.SWAPPED
        notes += ["natural"] * natural + ["x copied"] * self.copies_x
        return f"{form} {'x'.join(map(str, sizes))}, {', '.join(notes)}"


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
    """None for what nobody tunes: float64, and images that are neither channels_last nor contiguous."""
    x, epilogue = product.x, product.epilogue
    channels_last_x = x.is_contiguous(memory_format=torch.channels_last)
    if x.dtype == torch.float64 or not (channels_last_x or x.is_contiguous()):
        return None
    scale, bias, residual, relu, round_y = epilogue
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
        _steps(scale is not None, bias is not None, residual is not None, relu, round_y),
    )


@functools.lru_cache
def _steps(*present: bool) -> tuple[str, ...]:
    return tuple(itertools.compress(Epilogue._fields, present))


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
