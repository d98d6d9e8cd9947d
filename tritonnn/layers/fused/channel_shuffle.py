"""Channel shuffles of images, such as ShuffleNet's."""

import torch
from torch import nn
from torch.nn import functional as F

from ...ops.channel_shuffle import channel_shuffle, image_strides
from ..layer import TritonLayer, reason_to_fall_back
from .base import is_recorded


class FusedChannelShuffle(TritonLayer, nn.Module):
    """torch.channel_shuffle of x [N, C, H, W]; y is in channels_last."""

    operands = 1

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.eval()

    def extra_repr(self) -> str:
        return f"groups={self.groups}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_recorded():
            return F.channel_shuffle(x, self.groups)
        reason = reason_to_fall_back(x)
        if reason is None and (x.dim() != 4 or x.numel() == 0 or image_strides(x) is None):
            reason = "images of another memory format"
        if reason is None and torch.is_grad_enabled() and x.requires_grad:
            reason = "gradients are recorded"
        if reason is None and x.shape[1] % self.groups == 0:
            return channel_shuffle(x, self.groups)
        if reason is not None:
            self.fallbacks[reason] += 1
        return F.channel_shuffle(x, self.groups)
