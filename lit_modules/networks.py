"""Networks for a classifier, by name: ResNet18 of this repository, torchvision's, timm's, or one's own."""

import torch
from torch import Tensor, nn

from lit_modules.resnet import ResNet18, Stem
from tritonnn.command.networks import UserError, describe, make

RESNET18 = "resnet18"


def classification_network(name: str, num_classes: int, in_channels: int, stem: Stem, width: int) -> nn.Module:
    """A network of images [N, in_channels, S, S] to logits [N, num_classes], with random weights.

    Args:
        name: "resnet18" for this repository's, or as in `tritonnn.command.networks.make`.
        num_classes, in_channels: of the network; other than this repository's and timm's, it must take three channels
            or have an argument of this name.
        stem, width: see `ResNet18`; of that only.

    Raises:
        ValueError: there is no such network, or it cannot be made with so many classes or channels.
    """
    if name == RESNET18:
        return ResNet18(stem, width, num_classes, in_channels)
    channels = "in_chans" if name.startswith("timm/") else "in_channels"
    try:
        return make(name, num_classes=num_classes, **{channels: in_channels} if in_channels != 3 else {})
    except UserError as error:
        raise ValueError(str(error)) from error


def check_images(network: nn.Module, name: str, num_classes: int, in_channels: int, size: int) -> None:
    """Raises ValueError unless the network makes logits [N, num_classes] of images [N, in_channels, size, size]."""
    images = torch.zeros(2, in_channels, size, size)
    training = [module for module in network.modules() if module.training]
    try:
        with torch.no_grad():
            logits = network.eval()(images)
    except Exception as error:  # whatever the network's own code raises
        raise ValueError(f"{name} does not take images of {size}x{size}: {describe(error)}") from error
    finally:
        for module in training:
            module.training = True
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name} gives {what} for 2 images, expected logits [2, {num_classes}]")
