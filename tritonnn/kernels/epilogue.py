"""What a convolution's kernel does with its sums before it stores them."""

from typing import NamedTuple

import torch


class Epilogue(NamedTuple):
    """y = relu(scale * sum + bias + residual), as much of it as there is; `round_y`: then rounded to TF32.

    scale and bias: [K], contiguous; residual: with the strides of y.
    """

    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    relu: bool = False
    round_y: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        """The kernels' constexpr arguments."""
        return {
            "HAS_SCALE": self.scale is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "RELU": self.relu,
            "ROUND_Y": self.round_y,
        }
