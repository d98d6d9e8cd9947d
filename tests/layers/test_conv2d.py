import copy

import pytest
import torch
from helpers.compare import (
    DEVICE,
    DTYPES,
    assert_identical,
    assert_same_autocast,
    assert_same_error,
    assert_same_layer,
    assert_same_nan_and_infinities,
    image,
)
from torch import nn

import tritonnn

CASES = {
    "3x3": (dict(in_channels=16, out_channels=24, kernel_size=3), (2, 16, 7, 9)),
    "1x1": (dict(in_channels=17, out_channels=33, kernel_size=1), (2, 17, 5, 6)),
    "stride 2, padding 1": (dict(in_channels=32, out_channels=16, kernel_size=3, stride=2, padding=1), (2, 32, 8, 8)),
    "downsampling 1x1": (dict(in_channels=16, out_channels=32, kernel_size=1, stride=2, bias=False), (2, 16, 8, 8)),
    "no bias": (dict(in_channels=16, out_channels=16, kernel_size=3, bias=False), (1, 16, 5, 5)),
    "every number of a pair": (
        dict(in_channels=18, out_channels=5, kernel_size=(2, 5), stride=(1, 3), padding=(2, 1), dilation=(2, 1)),
        (3, 18, 9, 13),
    ),
    "3 channels, 7x7": (dict(in_channels=3, out_channels=20, kernel_size=7, stride=2, padding=3), (2, 3, 17, 16)),
    "1 channel": (dict(in_channels=1, out_channels=4, kernel_size=3, padding=1), (2, 1, 6, 6)),
    "same": (dict(in_channels=16, out_channels=8, kernel_size=3, padding="same", dilation=2), (2, 16, 7, 8)),
    "same, even kernel": (dict(in_channels=16, out_channels=8, kernel_size=(2, 4), padding="same"), (2, 16, 7, 8)),
    "valid": (dict(in_channels=16, out_channels=8, kernel_size=3, padding="valid"), (2, 16, 7, 8)),
    "reflect": (dict(in_channels=16, out_channels=8, kernel_size=3, padding=2, padding_mode="reflect"), (2, 16, 7, 8)),
    "replicate": (
        dict(in_channels=4, out_channels=8, kernel_size=3, padding=1, padding_mode="replicate"),
        (2, 4, 5, 6),
    ),
    "circular, same": (
        dict(in_channels=4, out_channels=8, kernel_size=4, padding="same", padding_mode="circular"),
        (2, 4, 7, 8),
    ),
    "circular, valid": (
        dict(in_channels=3, out_channels=2, kernel_size=2, stride=3, padding="valid", padding_mode="circular"),
        (2, 3, 4, 3),
    ),
    "groups": (dict(in_channels=32, out_channels=48, kernel_size=3, padding=1, groups=2), (2, 32, 6, 7)),
    "small groups": (dict(in_channels=12, out_channels=8, kernel_size=3, padding=1, groups=4), (2, 12, 6, 7)),
    "depthwise": (dict(in_channels=24, out_channels=24, kernel_size=3, padding=1, groups=24), (2, 24, 6, 7)),
    "depthwise, two filters a channel": (
        dict(in_channels=12, out_channels=24, kernel_size=3, stride=2, dilation=2, padding=2, groups=12),
        (2, 12, 9, 9),
    ),
    "unbatched": (dict(in_channels=16, out_channels=8, kernel_size=3), (16, 6, 7)),
    "kernel larger than the image": (dict(in_channels=16, out_channels=8, kernel_size=5, padding=2), (2, 16, 3, 2)),
    "more channels than a block": (dict(in_channels=200, out_channels=150, kernel_size=3, padding=1), (2, 200, 4, 4)),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_arguments(case, channels_last):
    arguments, shape = CASES[case]
    assert_same_layer(nn.Conv2d(**arguments), image(*shape, channels_last=channels_last and len(shape) == 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["3x3", "3 channels, 7x7", "groups", "depthwise"])
def test_types(case, dtype):
    arguments, shape = CASES[case]
    assert_same_layer(nn.Conv2d(**arguments), image(*shape, dtype=dtype))


@pytest.mark.parametrize(
    "make",
    {
        "slice": lambda: image(2, 20, 9, 9)[:, 2:18, ::2, 1:8],
        "transposed": lambda: image(2, 16, 9, 7).transpose(2, 3),
        "expanded": lambda: image(1, 16, 6, 1).expand(3, 16, 6, 6),
        "one pixel": lambda: image(2, 16, 3, 3)[:, :, 1:2, 1:2],
    }.values(),
    ids=["slice", "transposed", "expanded", "one pixel"],
)
def test_any_strides(make):
    assert_same_layer(nn.Conv2d(16, 8, 1), make())


def test_channels_last_weight_gives_channels_last_output():
    layer = nn.Conv2d(16, 8, 3).to(memory_format=torch.channels_last)
    assert_same_layer(layer, image(2, 16, 6, 6))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last weight"])
def test_empty_batch(channels_last):
    layer = nn.Conv2d(16, 8, 3)
    layer = layer.to(memory_format=torch.channels_last) if channels_last else layer
    assert_same_layer(layer, image(0, 16, 6, 6))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 15, 6, 6), torch.zeros(2, 16, 2, 2), torch.zeros(16), torch.zeros(2, 16, 0, 6)],
    ids=["wrong channels", "kernel larger than image", "one dimension", "no rows"],
)
def test_errors_are_pytorchs(x):
    layer = nn.Conv2d(16, 8, 3).to(DEVICE)
    assert_same_error(layer, x.to(DEVICE))
    assert not layer.fallbacks


def test_type_without_a_kernel_falls_back_and_is_counted():
    layer = nn.Conv2d(4, 4, 1, dtype=torch.complex64, device=DEVICE)
    x = torch.randn(1, 4, 2, 2, dtype=torch.complex64, device=DEVICE)
    expected = layer(x)
    tritonnn.swap(layer)
    torch.testing.assert_close(layer(x), expected)
    assert layer.fallbacks == {"dtype torch.complex64": 1}
    layer.strict = True
    with pytest.raises(RuntimeError, match="TritonConv2d.*no kernel.*complex64"):
        layer(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "channels, groups",
    [(16, 1), (3, 1), (16, 2), (16, 16)],
    ids=["16 channels", "3 channels", "two groups", "depthwise"],
)
def test_padding_meets_infinite_weight(channels, groups, dtype):
    layer = nn.Conv2d(channels, 16, 3, padding=1, groups=groups, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        layer.weight[3, 0, 0, 0] = torch.inf
    x = image(1, channels, 4, 4, dtype=dtype)
    expected = copy.deepcopy(layer).cpu().double()(x.cpu().double())
    tritonnn.swap(layer, strict=True)
    y = layer(x).cpu()
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert y[0, 3, 0].isnan().all() and y[0, 3, 1:, 1:].isinf().all() and y[0, 2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 16], ids=["one group", "two groups", "depthwise"])
def test_nan_and_infinity_reach_what_their_filter_covers(groups, dtype):
    layer = nn.Conv2d(16, 16, 3, padding=1, groups=groups, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        layer.weight[:, 0, 1, 1] = 0  # times infinity is NaN
    x = image(2, 16, 5, 5, dtype=dtype)
    x[0, 5, 0, 1], x[1, 0, 4, 4], x[1, 5, 1, 1] = float("nan"), float("inf"), -float("inf")
    assert_same_nan_and_infinities(layer, x)


def test_sign_of_a_zero():
    layer = nn.Conv2d(16, 8, 1, bias=False, device=DEVICE)
    x = torch.full((1, 16, 2, 2), -0.0, device=DEVICE)
    expected = layer(x)
    tritonnn.swap(layer, strict=True)
    assert_identical(layer(x), expected)


@pytest.mark.parametrize(
    "channels, x",
    [((0, 4), (2, 0, 5, 5)), ((0, 4), (0, 5, 5)), ((3, 0), (2, 3, 5, 5))],
    ids=["no input channels", "no input channels, unbatched", "no output channels"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_channels(channels, x):
    layer, x = nn.Conv2d(*channels, 3, device=DEVICE), image(*x)
    try:
        expected = layer(x)
    except RuntimeError as error:
        tritonnn.swap(layer)
        with pytest.raises(RuntimeError) as caught:
            layer(x)
        assert str(caught.value) == str(error)
        return
    tritonnn.swap(layer)
    y = layer(x)
    assert (y.shape, y.stride()) == (expected.shape, expected.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer = nn.Conv2d(16, 8, 3).to(DEVICE)
    x = image(2, 16, 5, 5)
    assert_same_autocast(layer, x, dtype)
    with torch.autocast(DEVICE.type, dtype):
        assert layer.double()(x.double()).dtype == torch.float64
