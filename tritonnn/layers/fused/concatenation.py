"""Concatenations of channels to which convolutions write directly, and which may grow without being copied."""

from collections.abc import Sequence

import torch
from torch import nn

from ...ops.append_channels import append_channels
from ...runtime.memory_format import empty_image, pixel_stride
from ..layer import TritonLayer, reason_to_fall_back
from .base import is_recorded
from .conv2d import FusedConv2d


class FusedConcatenation(TritonLayer, nn.Module):
    """torch.cat of images' channels: of x or, where there is a convolution for it, of that of x.

    With room for `more` channels behind its own. `layers`: for each image a convolution without residual, or None.
    """

    def __init__(self, layers: Sequence[FusedConv2d | None], more: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() if layer is None else layer for layer in layers)
        self.more = more
        self.eval()

    def extra_repr(self) -> str:
        return f"more={self.more}"

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        shapes = None if is_recorded() else self._shapes(xs)
        if shapes is None:
            return self._one_by_one(xs)
        N, _, H, W = shapes[0]
        channels = sum(shape[1] for shape in shapes)
        wide = empty_image((N, channels + self.more, H, W), xs[0], channels_last=True)
        self._fill(wide, 0, xs)
        return wide[:, :channels]

    def _one_by_one(self, xs: tuple[torch.Tensor, ...], *before: torch.Tensor) -> torch.Tensor:
        return torch.cat((*before, *(layer(x) for layer, x in zip(self.layers, xs, strict=True))), 1)

    def _shapes(self, xs: tuple[torch.Tensor, ...], *before: torch.Tensor) -> list[tuple[int, ...]] | None:
        """[N, C, H, W] of what is put together; None, and the reason is counted, where no kernel can do that."""
        layers = [nn.Identity()] * len(before) + list(self.layers)
        reason, shapes = reason_to_fall_back(*before, *xs), []
        for layer, x in zip(layers, (*before, *xs), strict=True):
            if reason is not None:
                break
            if isinstance(layer, FusedConv2d):
                reason = layer.reason_not_to_fill(x)
                shapes += [] if reason else [(len(x), *layer.output_shape(x))]
            elif x.dim() != 4 or pixel_stride(x) is None or x.numel() == 0:
                reason = "images of another memory format"
            else:
                shapes.append(tuple(x.shape))
        sizes = {(n, h, w) for n, _, h, w in shapes}
        if reason is None and (len(sizes) > 1 or any(x.dtype != xs[0].dtype for x in before + xs)):
            reason = "images of several sizes or types"
        if reason is not None:
            self.fallbacks[reason] += 1
            return None
        return shapes

    def _fill(self, wide: torch.Tensor, channels: int, xs: tuple[torch.Tensor, ...]) -> None:
        for layer, x in zip(self.layers, xs, strict=True):
            if isinstance(layer, FusedConv2d):
                layer.fill(wide, channels, x)
                channels += layer.weight.shape[0]
            else:
                append_channels(wide, x, channels)
                channels += x.shape[1]


class FusedAppend(FusedConcatenation):
    """The concatenation of `before`, which a FusedConcatenation or FusedAppend made, and of xs as that would put them.

    The result shares its memory, of which `before` remains what it was.
    """

    def forward(self, before: torch.Tensor, *xs: torch.Tensor) -> torch.Tensor:
        shapes = None if is_recorded() else self._shapes(xs, before)
        if shapes is None:
            return self._one_by_one(xs, before)
        channels, *added = (shape[1] for shape in shapes)
        wide = _wide(before)
        if wide is None or channels + sum(added) > wide.shape[1]:
            self.fallbacks["there is no room"] += 1
            return self._one_by_one(xs, before)
        self._fill(wide, channels, xs)
        return wide[:, : channels + sum(added)]


def _wide(x: torch.Tensor) -> torch.Tensor | None:
    """The image of whose channels x is the first ones; None where its memory ends before."""
    (N, _, H, W), step = x.shape, pixel_stride(x)
    memory = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    if x.storage_offset() % step != 0 or memory < N * H * W * step:
        return None
    return x.as_strided((N, step, H, W), (step * H * W, 1, step * W, step))
