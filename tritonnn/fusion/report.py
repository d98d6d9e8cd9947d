"""What a fusion did and what it did not, and why."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..runtime.capabilities import notes
from ..swap import KINDS, by_reason


@dataclass
class FusionReport:
    """What a fusion did: layers, by their names in the model, and functions, by their names in its graph.

    A layer that is called again is fused again, as "<name>_call2".
    """

    modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    fused: dict[str, str] = field(default_factory=dict)
    """Convolution or linear layer to what its kernel does, such as "conv2d + batch_norm2d + residual + relu"."""
    stands_for: dict[str, list[str]] = field(default_factory=dict)
    """Fused layer to the model's layers whose work its kernel does, in their order; a layer for each of its calls."""
    swapped: dict[str, str] = field(default_factory=dict)
    """Triton layer of its own, to its kind."""
    apart: dict[str, str] = field(default_factory=dict)
    """Convolution, linear layer, batch norm, sum or activation not fused with what precedes it, to the reason."""
    stayed: dict[str, str] = field(default_factory=dict)
    """PyTorch layer or function to the reason."""
    untraced: dict[str, str] = field(default_factory=dict)
    """Module that torch.fx could not look into, to the reason; its parts were fused each for itself."""

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Name to reason to the number of calls, so far, in which PyTorch's operations did a part or all of it."""
        return {name: dict(m.fallbacks) for name, m in self.modules.items() if getattr(m, "fallbacks", None)}

    def __str__(self) -> str:
        fused = ", ".join(f"{count} {what}" for what, count in Counter(self.fused.values()).items())
        kinds = list(self.swapped.values())
        swapped = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
        lines = [f"fused: {fused or 'nothing'}", f"Triton layers of their own: {swapped or 'none'}"]
        for title, reasons in (
            ("not fused", self.apart),
            ("stayed PyTorch", self.stayed),
            ("not traced", self.untraced),
        ):
            lines += by_reason(title, reasons)
        for name, reasons in self.fallbacks.items():
            lines += [f"fell back to PyTorch: {name}: {reason} ({n} calls)" for reason, n in reasons.items()]
        return "\n".join(lines + notes())


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
