"""What a convolution's kernel does with x before it multiplies."""

from typing import NamedTuple

import torch


class Prologue(NamedTuple):
    """x stands for activation(scale * x + shift), computed in float32 and rounded to the type of x.

    scale: [C], or [N, C] for gates, that differ between images; shift: [C] or None; both contiguous. activation: a name
    in `ACTIVATIONS`, except "leaky_relu".
    """

    scale: torch.Tensor
    shift: torch.Tensor | None = None
    activation: str = "none"

    @property
    def has_gates(self) -> bool:
        return self.scale.dim() == 2

    @property
    def flags(self) -> dict[str, object]:
        """The kernel's constexpr arguments."""
        kind = "gates" if self.has_gates else "channels"
        return {"X_SCALE": kind, "HAS_X_SHIFT": self.shift is not None, "X_ACTIVATION": self.activation}


NO_PROLOGUE = {"X_SCALE": "none", "HAS_X_SHIFT": False, "X_ACTIVATION": "none"}
