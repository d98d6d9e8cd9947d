"""ResNet18 (He et al., 2016, https://arxiv.org/abs/1512.03385), every activation and pool a module of its own.

Nothing is called twice and nothing functionally, so each layer can be swapped, hooked and timed by its name.
"""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

Stem = Literal["cifar", "imagenet"]


@torch.fx.wrap
def check_images(images: Tensor, channels: int, size: int) -> None:
    """Raises ValueError unless `images` is [N, channels, size, size]. A leaf to torch.fx: the network can be traced."""
    if images.dim() != 4 or images.shape[1:] != (channels, size, size):
        raise ValueError(f"expected images of shape [N, {channels}, {size}, {size}], got {list(images.shape)}")


check_images.only_reads = True  # so that the kernels of the fused network are compiled ahead


class BasicBlock(nn.Module):
    """y = relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    x: [N, in_channels, H, W], y: [N, out_channels, H / stride, W / stride]. The shortcut is a strided 1x1 convolution
    and batch norm where the shape changes, else the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.add_module("conv", nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.add_module("norm", nn.BatchNorm2d(out_channels))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Images [N, in_channels, S, S] to logits [N, num_classes]; S is `image_size`, given by the stem.

    Args:
        stem: "imagenet" is the paper's, 7x7/2 convolution and 3x3/2 max pool, for 224x224 images; "cifar" is the same
            with both strides 1 and a 3x3 convolution, for 32x32 images.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, stem: Stem = "cifar", width: int = 64, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        self.in_channels = in_channels
        self.image_size, kernel_size, stride = (32, 3, 1) if stem == "cifar" else (224, 7, 2)
        self.stem = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, width, kernel_size, stride, padding=kernel_size // 2, bias=False),
                norm=nn.BatchNorm2d(width),
                relu=nn.ReLU(),
                pool=nn.MaxPool2d(3, stride, padding=1),
            )
        )
        self.stages = nn.Sequential(
            self._stage(width, width, stride=1),
            self._stage(width, 2 * width, stride=2),
            self._stage(2 * width, 4 * width, stride=2),
            self._stage(4 * width, 8 * width, stride=2),
        )
        self.head = nn.Sequential(
            OrderedDict(
                pool=nn.AvgPool2d(4 if stem == "cifar" else 7),
                flatten=nn.Flatten(),
                linear=nn.Linear(8 * width, num_classes),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels))

    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for images of another size or number of channels."""
        check_images(images, self.in_channels, self.image_size)
        return self.head(self.stages(self.stem(images)))
