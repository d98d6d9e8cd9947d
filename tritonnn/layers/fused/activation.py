"""PyTorch's function for each activation that an epilogue has."""

from collections.abc import Callable
from typing import NamedTuple

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


class Activation(NamedTuple):
    """A name in `ACTIVATIONS`, and what "leaky_relu" multiplies negative numbers by."""

    name: str = "none"
    slope: float = 0.01

    def __str__(self) -> str:
        return f"{self.name}({self.slope})" if self.name == "leaky_relu" else self.name


NO_ACTIVATION = Activation()


def activate(y: torch.Tensor, activation: str, slope: float = 0.01) -> torch.Tensor:
    """The activation of that name in `ACTIVATIONS`; slope: what "leaky_relu" multiplies negative numbers by."""
    return F.leaky_relu(y, slope) if activation == "leaky_relu" else PYTORCH[activation](y)
