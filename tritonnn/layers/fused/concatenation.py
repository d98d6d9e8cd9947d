"""Concatenations of channels that grow: each has room for those that follow, which only add their own channels."""

import torch

from ...ops.append_channels import append_channels
from ...runtime.memory_format import empty_image, pixel_stride
from ..layer import TritonLayer, reason_to_fall_back
from .base import is_recorded


class FusedConcatenation(TritonLayer, torch.nn.Module):
    """torch.cat(xs, 1) of images [N, C, H, W]: the first of a row, with room for `more` channels behind its own."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more
        self.eval()

    def extra_repr(self) -> str:
        return f"more={self.more}"

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        if is_recorded():
            return torch.cat(xs, 1)
        reason = _reason_to_fall_back(xs)
        if reason is not None:
            return self._fall_back(reason, torch.cat, xs, 1)
        N, _, H, W = xs[0].shape
        channels = sum(x.shape[1] for x in xs)
        wide = empty_image((N, channels + self.more, H, W), xs[0], channels_last=True)
        _append(wide, 0, xs)
        return wide[:, :channels]


class FusedAppend(TritonLayer, torch.nn.Module):
    """torch.cat([before, *xs], 1), where `before` is that of a FusedConcatenation or FusedAppend.

    The result shares its memory, of which `before` remains what it was.
    """

    def forward(self, before: torch.Tensor, *xs: torch.Tensor) -> torch.Tensor:
        if is_recorded():
            return torch.cat((before, *xs), 1)
        reason = _reason_to_fall_back((before, *xs))
        channels, more = before.shape[1], sum(x.shape[1] for x in xs)
        step = pixel_stride(before) if reason is None else 0
        if reason is None and before.storage_offset() % step + channels + more > step:
            reason = "there is no room"
        if reason is not None:
            return self._fall_back(reason, torch.cat, (before, *xs), 1)
        N, _, H, W = before.shape
        wide = before.as_strided((N, step, H, W), (step * H * W, 1, step * W, step))
        _append(wide, channels, xs)
        return wide[:, : channels + more]


def _reason_to_fall_back(xs: tuple[torch.Tensor, ...]) -> str | None:
    """Why no kernel takes these; None for images of one size and type in channels_last, or some channels of such."""
    reason = reason_to_fall_back(*xs)
    if reason is not None:
        return reason
    first = xs[0]
    for x in xs:
        if x.dim() != 4 or x.dtype != first.dtype or x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:]:
            return "images of several sizes or types"
        if pixel_stride(x) is None or x.numel() == 0:
            return "strides of another memory format"
    return None


def _append(wide: torch.Tensor, channels: int, xs: tuple[torch.Tensor, ...]) -> None:
    for x in xs:
        append_channels(wide, x, channels)
        channels += x.shape[1]
