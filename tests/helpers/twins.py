"""A network with PyTorch's layers and the same with Triton's, for tests that do the same to both."""

import copy

import torch
from torch import nn

import tritonnn
from helpers.compare import image, network


def twins(training: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """PyTorch's and the swapped network; the batch norms have seen data."""
    pytorch = network().to(dtype)
    pytorch(image(4, 3, 8, 8, dtype=dtype))
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped)
    return pytorch.train(training), swapped.train(training)


def images(*batch: int) -> torch.Tensor:
    return image(*(batch or (2,)), 3, 8, 8, dtype=torch.float64)


def assert_same(actual: object, expected: object) -> None:
    """Equal up to float64's rounding, in whatever structure."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
