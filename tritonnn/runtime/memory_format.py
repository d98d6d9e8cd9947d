"""Where PyTorch puts the output: contiguous (NCHW) or channels_last (NHWC)."""

import math

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """True where PyTorch's `suggest_memory_format` answers channels_last: strides ordered N, H, W, C.

    A tensor that fits both formats (one channel, or one pixel) counts as contiguous unless its strides say otherwise.
    """
    if x.dim() != 4:
        return False
    size, stride = x.shape, x.stride()
    least = 0
    if stride[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(size[d], 1)
    return True


def is_aligned(x: torch.Tensor) -> bool:
    """Whether x [N, C, H, W] is dense in channels_last and begins at a multiple of 16 bytes."""
    return x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16 == 0


def empty_image(shape: tuple[int, int, int, int], like: torch.Tensor, channels_last: bool, dtype=None) -> torch.Tensor:
    """An uninitialised [N, C, H, W] tensor on the device and, unless `dtype` says otherwise, of the type of `like`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def pixel_strides(y: torch.Tensor, channels_last: bool) -> tuple[int, int, int]:
    """(image, channel, pixel) strides of a dense [N, C, H, W] tensor, its H*W pixels taken as one dimension.

    Or of some channels of one in channels_last.
    """
    _, C, H, W = y.shape
    if not channels_last:
        return C * H * W, H * W, 1
    step = pixel_stride(y) or C
    return step * H * W, 1, step


def pixel_stride(x: torch.Tensor) -> int | None:
    """Elements from a pixel of x [N, C, H, W] to the next where x is a channels_last image, or some of its channels.

    None otherwise.
    """
    N, C, H, W = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    steps = [(s, pixels) for size, s, pixels in ((W, stride_w, 1), (H, stride_h, W), (N, stride_n, H * W)) if size > 1]
    step = steps[0][0] // steps[0][1] if steps else C
    follow = all(s == step * pixels for s, pixels in steps)
    return step if follow and step >= C and (C == 1 or stride_c == 1) else None


def stride_unit(element_size: int, *strides: int) -> int:
    """Elements, at most 16 bytes of them, that strides are multiples of; 1 where Triton finds that out for itself.

    It asks of each argument only whether it is a multiple of 16. A kernel that gets strides in units, and multiplies
    them by a constant, loads 16 bytes of channels at a time also where there are 24 or 72 of them.
    """
    if all(stride % 16 == 0 for stride in strides):
        return 1
    return math.gcd(*strides, max(16 // element_size, 1))


def dense_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised, with the strides of x where x is dense, also where a size is 0 or 1."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=memory_format):
            return torch.empty_like(x, memory_format=memory_format)
    return torch.empty_like(x)
