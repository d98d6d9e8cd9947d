"""Which gradients of a convolution are left to PyTorch's op, which was measured to be faster there."""

import torch


def reasons_for_pytorch(
    x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[str | None, str | None]:
    """Why those of the input and of the weight are, or None. The kernels compute all of them.

    On an H200, ResNet18, 512 images, TF32: gradient of a weight 36 to 385 us, by the kernel 86 to 1,642: operands whose
    neighbours in memory are channels have to be transposed on their way to the tensor cores.
    """
    of_input = of_weight = None
    if x.is_cuda and x.dtype == torch.float32:
        of_weight = "gradient of the weight in float32"
    return of_input, of_weight
