"""PyTorch's function for each activation that an epilogue has."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

PYTORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def activate(y: torch.Tensor, activation: str, slope: float = 0.01) -> torch.Tensor:
    """The activation of that name in `ACTIVATIONS`; slope: what "leaky_relu" multiplies negative numbers by."""
    return F.leaky_relu(y, slope) if activation == "leaky_relu" else PYTORCH[activation](y)
