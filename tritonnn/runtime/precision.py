"""The one place that decides how precise a product is: PyTorch's own switches, autocast included.

PyTorch has two switches for TF32, one for convolutions (on by default) and one for matrix products (off):
https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
"""

import torch

from .capabilities import any_autocast
from .memory_format import is_channels_last

CONVOLUTION, MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul
TINY_REDUCTION, SHORT_REDUCTION = 32, 256


def _input_precision(x: torch.Tensor, reduction: int, allow_tf32: bool, always: bool = False) -> str:
    """`tl.dot`'s input_precision for operands like x and sums of `reduction` products; it matters to float32 only.

    `always` uses TF32 wherever it is allowed, else short sums do not.

    Strict float32 on NVIDIA's tensor cores is three TF32 products (of the leading and the trailing bits): on an H200
    half the time of cuDNN's float32 and mostly a third of its error. Short sums wait for memory rather than for the
    tensor cores, and cuDNN often computes them in float32 although TF32 is allowed, unless the image is channels_last.
    Tiny ones, over an image's three channels, are computed in plain float32, whose error is smaller still.

    Infinities, NaN and huge operands come out as in float32; an operand below 2^-126 may count as zero.
    """
    if x.dtype != torch.float32 or x.device.type != "cuda" or torch.version.hip:
        return "ieee"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    if allow_tf32 and (always or reduction > SHORT_REDUCTION):
        return "tf32"
    return "ieee" if reduction <= TINY_REDUCTION else "tf32x3"


def convolutions_in_tf32() -> bool:
    """As `torch.backends.cudnn` says."""
    return CONVOLUTION.fp32_precision == "tf32"


def matmuls_in_tf32() -> bool:
    """As `torch.backends.cuda.matmul` says."""
    return MATMUL.fp32_precision == "tf32"


def convolution_input_precision(x: torch.Tensor, reduction: int) -> str:
    """For a convolution of x with filters of `reduction` weights."""
    allow_tf32 = convolutions_in_tf32()
    return _input_precision(x, reduction, allow_tf32, always=allow_tf32 and is_channels_last(x))


def convolution_allows_tf32(x: torch.Tensor) -> bool:
    """Whether a convolution of x with large filters would use TF32."""
    return convolution_input_precision(x, SHORT_REDUCTION + 1) == "tf32"


def matmul_input_precision(x: torch.Tensor, reduction: int) -> str:
    """For a matrix product of x along `reduction` elements."""
    return _input_precision(x, reduction, matmuls_in_tf32())


def autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The operands of a convolution or linear layer as autocast has them: in its type, but for float64 and integers."""
    if not (torch.compiler.is_compiling() or any_autocast()):
        return x, *others
    return tuple(t if t is None else t.to(autocast_type(t)) for t in (x, *others))


def autocast_type(t: torch.Tensor) -> torch.dtype:
    """The type in which `autocast` has a tensor."""
    if t.device.type == "meta" or not torch.is_autocast_enabled(t.device.type):
        return t.dtype
    keeps = not t.is_floating_point() or t.dtype == torch.float64
    return t.dtype if keeps else torch.get_autocast_dtype(t.device.type)


def convolution_state() -> tuple:
    """What the functions above depend on besides their arguments, where it concerns convolutions."""
    if not any_autocast():
        return convolutions_in_tf32(), None
    autocast = [(torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in ("cuda", "cpu")]
    return convolutions_in_tf32(), *autocast
