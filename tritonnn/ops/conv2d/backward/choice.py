"""Which gradients of a convolution are left to PyTorch's op: where it was measured to be faster, or nobody measured.

The kernels compute all of them; the CPU of Triton's interpreter, and float64, leave none.
"""

import torch

from ....runtime import hardware
from ...window import output_size
from . import weight_tma
from .weight_dispatch import weight_halo

GATHERED_CHANNELS = 16
"""With fewer channels the gradient of the weight gathers single elements: 3 channels 72 us, cuDNN 196 (H200)."""


def reasons_for_pytorch(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[str | None, str | None]:
    """Why the gradients of the input and of the weight are, or None.

    Measured on an H200 with ResNet18, 512 images of 32x32. In TF32 the gradients of weights take cuDNN 36 to 385 us and
    the kernel 86 to 1,642: operands whose neighbours in memory are channels have to be transposed on their way to the
    tensor cores. Those of strided inputs take it 110 and 183 us, and the kernel then took 202 and 201.
    """
    if not x.is_cuda or x.dtype == torch.float64:
        return None, None
    if groups > 1:
        return "gradient of the input of groups", "gradient of the weight of groups"
    strided = tuple(stride) != (1, 1)
    if x.dtype == torch.float32:
        return "gradient of a strided input in float32" if strided else None, "gradient of the weight in float32"
    hopper = hardware.gpu(x.device).is_hopper
    of_input = "gradient of a strided input before Hopper" if strided and not hopper else None
    if x.shape[1] < GATHERED_CHANNELS:
        return of_input, None
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    shape = x.shape[0], weight.shape[0], *(output_size(*size) for size in sizes)
    arguments = shape, x.shape, weight.shape[2:], (stride, padding, dilation)
    takes = hopper and weight_tma.takes(*arguments)
    # with a halo, strided ones have not run on a GPU
    by_halo = weight_halo and not strided and hardware.gluon_is_verified(x.device)
    takes = takes or (by_halo and weight_halo.takes(*arguments))
    return of_input, None if takes else "gradient of the weight of this shape"
