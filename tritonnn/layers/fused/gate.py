"""The product of an image and one number for each of its images and channels, of squeeze-and-excitation."""

import torch
from torch import nn

from ...ops.scaled_image import scaled_image
from ..layer import TritonLayer, reason_to_fall_back


class FusedGate(TritonLayer, nn.Module):
    """a * b, one of which is an image [N, C, H, W], and the other the gates [N, C, 1, 1], in either order."""

    def forward(self, a: object, b: object) -> torch.Tensor:
        reason = _reason_to_fall_back(a, b)
        if reason is not None:
            return self._fall_back(reason, lambda: a * b)
        x, gates = (b, a) if _are_gates(a, b) else (a, b)
        return scaled_image(x, gates, None, "none")


def _reason_to_fall_back(a: object, b: object) -> str | None:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return "a factor is no tensor"
    reason = reason_to_fall_back(a, b)
    if reason is None and (a.dtype != b.dtype or not (_are_gates(a, b) or _are_gates(b, a))):
        reason = "no product of an image and gates of its type"
    return reason


def _are_gates(gates: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether both are dense, x in one of the two formats, and one number is for each channel."""
    dense = x.dim() == 4 and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    shape = (*x.shape[:2], 1, 1)
    return dense and gates.shape == shape and gates.is_contiguous(memory_format=torch.channels_last)
