"""What a convolution's kernel does with its sums before it stores them."""

from typing import NamedTuple

import torch


class Epilogue(NamedTuple):
    """y = activation(scale * sum + bias + residual), as much of it as there is; `round_y`: then rounded to TF32.

    scale and bias: [K], contiguous; residual: with the strides of y; activation: a name in `ACTIVATIONS`; slope: what
    "leaky_relu" multiplies negative numbers by.
    """

    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str = "none"
    round_y: bool = False
    slope: float = 0.01

    @property
    def flags(self) -> dict[str, object]:
        """The kernels' constexpr arguments."""
        return {
            "HAS_SCALE": self.scale is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "ACTIVATION": self.activation,
            "SLOPE": self.slope,
            "ROUND_Y": self.round_y,
        }

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the steps that are done, in order. Of an epilogue, they alone decide how fast a kernel is."""
        steps = [name for name in ("scale", "bias", "residual") if getattr(self, name) is not None]
        steps += [self.activation] * (self.activation != "none") + ["round_y"] * self.round_y
        return tuple(steps)

    @property
    def has_aligned_residual(self) -> bool:
        """Whether TMA, or loads of 16 bytes, can fetch the residual, or there is none."""
        return self.residual is None or self.residual.data_ptr() % 16 == 0
