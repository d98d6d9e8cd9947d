"""The forms of the convolution on a GPU: whole outputs, each image by itself, against float64."""

import pytest
import torch
from compare import image
from torch import nn

import tritonnn

pytestmark = pytest.mark.gpu

SHAPES = {
    "64 channels": (dict(in_channels=64, out_channels=64, kernel_size=3, padding=1), (200, 64, 32, 32)),
    "64 channels, stride 2": (
        dict(in_channels=64, out_channels=128, kernel_size=3, stride=2, padding=1),
        (200, 64, 32, 32),
    ),
    "128 channels": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1), (200, 128, 16, 16)),
    "256 channels": (dict(in_channels=256, out_channels=256, kernel_size=3, padding=1), (515, 256, 8, 8)),
    "512 channels": (dict(in_channels=512, out_channels=512, kernel_size=3, padding=1), (515, 512, 4, 4)),
    "512 channels, stride 2": (
        dict(in_channels=256, out_channels=512, kernel_size=3, stride=2, padding=1),
        (515, 256, 8, 8),
    ),
    "1x1": (dict(in_channels=256, out_channels=64, kernel_size=1), (64, 256, 56, 56)),
    "1x1, stride 2": (dict(in_channels=256, out_channels=512, kernel_size=1, stride=2), (128, 256, 8, 8)),
    "56x56": (dict(in_channels=64, out_channels=64, kernel_size=3, padding=1), (16, 64, 56, 56)),
    "14x14": (dict(in_channels=256, out_channels=256, kernel_size=3, padding=1), (70, 256, 14, 14)),
    "7x7": (dict(in_channels=512, out_channels=512, kernel_size=3, padding=1), (70, 512, 7, 7)),
    "odd sides, stride 2": (dict(in_channels=64, out_channels=64, kernel_size=3, stride=2), (33, 64, 31, 27)),
    "no padding": (dict(in_channels=64, out_channels=72, kernel_size=3), (33, 64, 19, 45)),
    "5x5, dilation 2": (
        dict(in_channels=64, out_channels=96, kernel_size=5, padding=4, dilation=2),
        (33, 64, 20, 24),
    ),
    "rectangular": (
        dict(in_channels=64, out_channels=200, kernel_size=(1, 3), padding=(0, 1)),
        (33, 64, 18, 33),
    ),
    "one image, 64 channels": (dict(in_channels=64, out_channels=64, kernel_size=3, padding=1), (1, 64, 32, 32)),
    "one image, 128 channels": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1), (1, 128, 16, 16)),
    "one image, 512 channels": (dict(in_channels=512, out_channels=512, kernel_size=3, padding=1), (1, 512, 4, 4)),
    "one image, stride 2": (
        dict(in_channels=256, out_channels=512, kernel_size=3, stride=2, padding=1),
        (1, 256, 8, 8),
    ),
    "eight images": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1), (8, 128, 16, 16)),
    "channels that are no power of 2": (
        dict(in_channels=48, out_channels=80, kernel_size=3, padding=1),
        (40, 48, 24, 24),
    ),
    "groups": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1, groups=2), (40, 128, 16, 16)),
    "3 channels": (dict(in_channels=3, out_channels=64, kernel_size=3, padding=1), (200, 3, 32, 32)),
}
PRECISIONS = {
    "float32": (torch.float32, "ieee"),
    "TF32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
}
LIMIT = {"float32": 2**-22, "TF32": 2**-11, "float16": 2**-11, "bfloat16": 2**-8}
"""The largest relative error of one rounding; in float32, where rounding the sums shows too, of four."""


def worst_image(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of an image, in the 2-norm, relative to it."""
    errors, norms = (t.flatten(1).norm(dim=1) for t in (y.double() - exact, exact))
    return float((errors / norms).max())


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_image(shape, precision, channels_last):
    arguments, size = SHAPES[shape]
    dtype, fp32_precision = PRECISIONS[precision]
    torch.backends.cudnn.conv.fp32_precision = fp32_precision
    x = image(*size, dtype=dtype, channels_last=channels_last)
    layer = nn.Conv2d(**arguments).to("cuda", dtype)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(
        x.double(),
        layer.weight.double(),
        layer.bias.double(),
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    tritonnn.swap(layer, strict=True)
    with torch.no_grad():
        first = layer(x)
        assert worst_image(first, exact) < LIMIT[precision]
        for _ in range(3):  # the same bits every time: no race
            assert torch.equal(layer(x), first)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", ["64 channels", "512 channels", "one image, 128 channels", "3 channels", "groups"])
def test_epilogue(shape, precision):
    arguments, size = SHAPES[shape]
    dtype, fp32_precision = PRECISIONS[precision]
    torch.backends.cudnn.conv.fp32_precision = fp32_precision

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(**arguments, bias=False)
            self.norm = nn.BatchNorm2d(self.conv.out_channels)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.conv(x)) + residual)

    block = Block().to("cuda", dtype).eval()
    x = image(*size, dtype=dtype, channels_last=True)
    with torch.no_grad():
        residual = torch.randn_like(block.conv(x))
        exact = Block().double().cuda().eval()
        exact.load_state_dict(block.state_dict())
        exact = exact(x.double(), residual.double())
        y = tritonnn.fuse(block)(x, residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert worst_image(y, exact) < LIMIT[precision]
