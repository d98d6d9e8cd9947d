"""Tensors that fit both memory formats, contiguous and channels_last: the strides of the output are PyTorch's."""

import pytest
import torch
from helpers.compare import assert_same_layer, image
from torch import nn

INPUTS = {
    "one channel": lambda: image(2, 1, 4, 6, channels_last=True),
    "one pixel": lambda: image(2, 3, 1, 1, channels_last=True),
    "one row": lambda: image(2, 3, 1, 6, channels_last=True),
    "one image stored as rows of pixels": lambda: image(4, 6, 3).permute(2, 0, 1).unsqueeze(0),
    "rows of pixels": lambda: image(2, 4, 6, 3).permute(0, 3, 1, 2),
    "every second channel": lambda: image(2, 6, 4, 4, channels_last=True)[:, ::2],
    "expanded channels": lambda: image(2, 1, 4, 4, channels_last=True).expand(2, 3, 4, 4),
}
LAYERS = {
    "conv2d": lambda channels: nn.Conv2d(channels, 4, 3, padding=1),
    "channels_last weight": lambda channels: nn.Conv2d(channels, 4, 3, padding=1).to(memory_format=torch.channels_last),
    "batch_norm2d, training": lambda channels: nn.BatchNorm2d(channels),
    "batch_norm2d, eval": lambda channels: nn.BatchNorm2d(channels).eval(),
    "relu": lambda channels: nn.ReLU(),
    "max_pool2d": lambda channels: nn.MaxPool2d(3, 1, 1),
    "avg_pool2d": lambda channels: nn.AvgPool2d(3, 1, 1),
    "adaptive_avg_pool2d": lambda channels: nn.AdaptiveAvgPool2d((1, None)),
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_strides_of_the_output(name, case):
    x = INPUTS[case]()
    assert_same_layer(LAYERS[name](x.shape[1]), x, gradients=False)
