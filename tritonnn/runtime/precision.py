"""The one place that decides how precise a product is: PyTorch's own switches, autocast included.

PyTorch has two switches for TF32, one for convolutions (on by default) and one for matrix products (off):
https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
"""

from collections.abc import Sequence

import torch

from . import hardware
from .capabilities import any_autocast
from .memory_format import is_channels_last

CONVOLUTION, MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul
TINY_REDUCTION, SHORT_REDUCTION = 48, 256
FEW_CHANNELS, FEW_FILTERS, FEW_PIXELS = 40, 15, 1 << 16
"""cuDNN computes in float32 what has no more channels or filters in a group, or output pixels, or has short sums."""
MUCH_WORK, MANY_PIXELS = 10**8, 1 << 14
"""Products of a filter of one tap, and pixels of groups, from which on cuDNN was found to use TF32."""


def _on_tensor_cores(x: torch.Tensor) -> bool:
    """Whether x is float32 on a GPU with TF32, so that there is a choice of precision."""
    return x.dtype == torch.float32 and hardware.gpu(x.device).capability >= (8, 0)


def _input_precision(x: torch.Tensor, reduction: int, filters: int, in_tf32: bool) -> str:
    """`tl.dot`'s input_precision for operands like x and sums of `reduction` products; it matters to float32 only.

    Strict float32 on NVIDIA's tensor cores is three TF32 products (of the leading and the trailing bits): on an H200
    half the time of cuDNN's float32 and mostly a third of its error. Short sums, over an image's few channels or of few
    filters, are computed in plain float32, whose error is smaller still.

    Infinities, NaN and huge operands come out as in float32; an operand below 2^-126 may count as zero.
    """
    if not _on_tensor_cores(x):
        return "ieee"
    if in_tf32:
        return "tf32"
    plain = reduction <= TINY_REDUCTION or (filters < 8 and reduction <= SHORT_REDUCTION)
    return "ieee" if plain else "tf32x3"


def convolutions_in_tf32() -> bool:
    """As `torch.backends.cudnn` says."""
    return CONVOLUTION.fp32_precision == "tf32"


def matmuls_in_tf32() -> bool:
    """As `torch.backends.cuda.matmul` says."""
    return MATMUL.fp32_precision == "tf32"


def convolution_in_tf32(
    pixels: int, weight_shape: Sequence[int], groups: int, channels_last: bool, every_pixel: bool = False
) -> bool:
    """Whether a convolution with so many pixels in its output, of all images, uses TF32 where that is allowed.

    `every_pixel`: it has one tap and as many pixels as its input.

    Its result is to be no less precise than cuDNN's, which computes many convolutions in float32 although TF32 is
    allowed. Which ones depends on all sizes, in no simple way; of 6,600 tried on an H100 all those are small, or wait
    for memory rather than for the tensor cores, so that strict float32 costs little there. Of 2,500 on an H200 all of
    two kinds were in TF32: 353 of much work under a filter of one tap over every pixel, and 24 of groups of channels
    as many as filters, on many pixels of channels_last images.
    """
    K, C, R, S = weight_shape
    filters, reduction = K // groups, C * R * S
    if every_pixel and groups == 1 and C >= 16 and filters >= 32 and C * filters * pixels >= MUCH_WORK:
        return True
    if groups > 1 and channels_last and R * S > 1 and filters == C and C % 4 == 0 and pixels >= MANY_PIXELS:
        return True
    if (
        C == 1
        or filters < 8
        or (R * S == 1 and (C <= 16 or groups > 1))
        or (groups > 1 and reduction <= SHORT_REDUCTION)
    ):
        return False
    if reduction > SHORT_REDUCTION and C > FEW_CHANNELS and filters > FEW_FILTERS:
        return True
    if channels_last and C >= 64 and C % 4 == 0 and filters >= 64:
        return True
    return pixels >= FEW_PIXELS and (channels_last or reduction > SHORT_REDUCTION)


def convolution_input_precision(x: torch.Tensor, weight: torch.Tensor, pixels: int) -> str:
    """For a convolution of x [(N,) C, H, W] with a weight [K, C / groups, R, S] and `pixels` N * P * Q."""
    groups = x.shape[-3] // weight.shape[1]
    every_pixel = weight.shape[2:] == (1, 1) and x.numel() == pixels * x.shape[-3]
    in_tf32 = convolutions_in_tf32() and convolution_in_tf32(
        pixels, weight.shape, groups, is_channels_last(x), every_pixel
    )
    return _input_precision(x, weight[0].numel(), weight.shape[0] // groups, in_tf32)


def convolution_input_gradient_precision(x: torch.Tensor, weight: torch.Tensor, pixels: int) -> str:
    """For the gradient of that x: in TF32 where the convolution itself is, and cuDNN's gradient, too."""
    in_tf32 = convolution_input_precision(x, weight, pixels) == "tf32" and _gradients_in_tf32(x, weight)
    groups = x.shape[-3] // weight.shape[1]
    return _input_precision(x, weight.numel() // x.shape[-3] * groups, weight.shape[1], in_tf32)


def convolution_weight_gradient_precision(x: torch.Tensor, weight: torch.Tensor, pixels: int) -> str:
    """For the gradient of that weight, sums over all pixels: as for the gradient of x."""
    in_tf32 = convolution_input_precision(x, weight, pixels) == "tf32" and _gradients_in_tf32(x, weight)
    return _input_precision(x, pixels, weight[0].numel(), in_tf32)


def _gradients_in_tf32(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """cuDNN computes many others in float32: errors of 2e-7 to 6e-6 where TF32 has 3e-4 (H200, TF32 allowed)."""
    return is_channels_last(x) and x.shape[-3] % 4 == 0 and weight.shape[0] % 4 == 0


def convolution_allows_tf32(x: torch.Tensor) -> bool:
    """Whether a convolution of x with large filters would use TF32."""
    return convolutions_in_tf32() and _on_tensor_cores(x)


def matmul_input_precision(x: torch.Tensor, weight: torch.Tensor) -> str:
    """For a product of x [M, C], or images [M, C, 1, 1], with the rows of a weight [K, C] or [K, C, 1, 1]."""
    reduction = weight.shape[1]
    return _input_precision(x, reduction, weight.shape[0], matmuls_in_tf32() and reduction > SHORT_REDUCTION)


def autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The operands of a convolution or linear layer as autocast converts them: floats but float64 to its type.

    Where x is no tensor, they are left as they are, for its `__torch_function__`.
    """
    if torch.compiler.is_compiling():
        return tuple([None if t is None else _as_autocast(t) for t in (x, *others)])
    if not any_autocast() or not isinstance(x, torch.Tensor):
        return x, *others
    kind = "cuda" if x.is_cuda else x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tuple([None if t is None else _as_autocast(t) for t in (x, *others)])
    dtype, device = torch.get_autocast_dtype(kind), x.device
    converted = []
    for t in (x, *others):
        if t is not None and t.dtype is not dtype:
            plain = t.dtype is torch.float32 and t.device == device
            t = t.to(dtype) if plain else _as_autocast(t)
        converted.append(t)
    return tuple(converted)


def _as_autocast(t: torch.Tensor) -> torch.Tensor:
    dtype = autocast_type(t)
    return t if dtype is t.dtype else t.to(dtype)


def autocast_type(t: torch.Tensor) -> torch.dtype:
    """The type to which `autocast` converts a tensor."""
    device, dtype = "cuda" if t.is_cuda else t.device.type, t.dtype
    keeps = not dtype.is_floating_point or dtype is torch.float64 or device == "meta"
    return dtype if keeps or not torch.is_autocast_enabled(device) else torch.get_autocast_dtype(device)


def tf32_of_convolutions(x: torch.Tensor) -> bool:
    """What convolutions of x, and their gradients, depend on besides their arguments."""
    return x.dtype == torch.float32 and convolutions_in_tf32()


def tf32_of_matmuls(x: torch.Tensor) -> bool:
    """The same for products."""
    return x.dtype == torch.float32 and matmuls_in_tf32()


def convolution_state(x: torch.Tensor) -> tuple:
    """The same for what converts them as autocast does."""
    if not any_autocast():
        return tf32_of_convolutions(x), None
    autocast = [(torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in ("cuda", "cpu")]
    return tf32_of_convolutions(x), *autocast
