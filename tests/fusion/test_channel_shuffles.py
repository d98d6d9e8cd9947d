"""Channel shuffles written as views become one node, and images stay in channels_last around it."""

import copy

import pytest
import torch
from torch import nn

import tritonnn
from tritonnn.layers.fused.channel_shuffle import FusedChannelShuffle
from tritonnn.layers.fused.concatenation import FusedConcatenation
from tritonnn.ops.channel_shuffle import channel_shuffle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def as_torchvision(x, groups):
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def by_shape(x, groups):
    n, c, h, w = x.shape
    return x.reshape(n, groups, -1, h, w).transpose(2, 1).reshape(n, -1, h, w)


def size_by_size(x, groups):
    n, h, w = x.size(0), x.size(2), x.size(-1)
    return x.reshape(n, groups, x.size(1) // groups, h, w).swapaxes(-4, -3).reshape(n, x.size(1), h, w)


class Shuffle(nn.Module):
    def __init__(self, groups, function):
        super().__init__()
        self.groups, self.function = groups, function

    def forward(self, x):
        return self.function(x, self.groups)


class Block(nn.Module):
    """Half of the channels pass by a convolution, beside another, and both are shuffled."""

    def __init__(self, function=as_torchvision, channels=12, groups=2):
        super().__init__()
        self.conv, self.shuffle = nn.Conv2d(channels // 2, channels // 2, 1), Shuffle(groups, function)

    def forward(self, x):
        kept, changed = x.chunk(2, 1)
        return self.shuffle(torch.cat((kept, self.conv(changed).relu()), 1))


def network(*functions):
    torch.manual_seed(0)
    blocks = [Block(function) for function in functions]
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), *blocks, nn.Conv2d(12, 5, 1)).eval().to(DEVICE)


def layers(fused, kind):
    return [module for module in fused.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("function", [as_torchvision, by_shape, size_by_size])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_shuffle_is_one_node_and_the_result_lies_as_before(function, memory_format):
    model = network(function, function)[:-1].eval().to(memory_format=memory_format)
    x = torch.randn(2, 3, 5, 4, device=DEVICE).contiguous(memory_format=memory_format)
    with torch.no_grad():
        fused = tritonnn.fuse(copy.deepcopy(model))
        y, expected = fused(x), model(x)
    assert len(layers(fused, FusedChannelShuffle)) == 2
    assert len(layers(fused, FusedConcatenation)) == 1
    assert "channel_shuffle" in str(fused.report) and not fused.report.fallbacks
    assert not {"transpose", "contiguous"} & {reason.rpartition(" ")[2] for reason in fused.report.stayed.values()}
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()


@pytest.mark.parametrize(
    "shape, groups", [((2, 6, 3, 4), 2), ((1, 12, 1, 1), 3), ((3, 10, 5, 2), 5), ((2, 8, 3, 3), 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_channels_take_the_places_that_pytorch_gives_them(shape, groups, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    wide = torch.cat((x, x + 1, x), 1)
    wide = [wide, wide.contiguous(memory_format=torch.channels_last)]
    for part in (x, x.contiguous(), *(y[:, shape[1] : 2 * shape[1]] for y in wide)):
        y = channel_shuffle(part, groups)
        assert torch.equal(y, torch.channel_shuffle(part, groups))
        assert y.is_contiguous(memory_format=torch.channels_last)


def transposes_others(x, groups):
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 3).contiguous().view(n, c, h, w)


def other_sizes(x, groups):
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, w, h).transpose(1, 2).contiguous().view(n, c, h, w)


def other_parts(x, groups):
    n, c, h, w = x.size()
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, h, c, w)


def overwrites_the_copy(x, groups):
    n, c, h, w = x.size()
    copied = x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous()
    y = copied.view(n, c, h, w)
    copied[:, 0] = 1
    return y


@pytest.mark.parametrize("function", [transposes_others, other_sizes, other_parts, overwrites_the_copy])
def test_what_only_looks_like_a_shuffle_is_left(function):
    model = nn.Sequential(nn.Conv2d(3, 12, 1), Shuffle(2, function), nn.Identity()).eval().to(DEVICE)
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    with torch.no_grad():
        fused = tritonnn.fuse(copy.deepcopy(model))
        torch.testing.assert_close(fused(x), model(x))
    assert not layers(fused, FusedChannelShuffle)


def test_gradients_and_other_strides_are_pytorchs():
    layer = FusedChannelShuffle(2)
    x = torch.randn(1, 4, 2, 2, device=DEVICE)
    assert torch.equal(layer(x.mT), torch.channel_shuffle(x.mT, 2))
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and set(layer.fallbacks) == {"images of another memory format", "gradients are recorded"}
