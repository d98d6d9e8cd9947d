import pytest
import torch
from helpers.compare import DEVICE, DTYPES, assert_close, assert_identical, assert_same_error, assert_same_layer, image
from torch import nn

import tritonnn

CASES = {
    "4": (dict(kernel_size=4), (2, 5, 4, 4)),
    "3x3/2, padding 1": (dict(kernel_size=3, stride=2, padding=1), (2, 5, 9, 8)),
    "pairs": (dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)), (2, 5, 9, 8)),
    "padding not counted": (dict(kernel_size=3, stride=2, padding=1, count_include_pad=False), (2, 5, 9, 8)),
    "ceil_mode": (dict(kernel_size=3, stride=2, padding=1, ceil_mode=True), (8, 64, 17, 16)),
    "ceil_mode, padding not counted": (
        dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        (2, 5, 8, 10),
    ),
    "ceil_mode, last window dropped": (dict(kernel_size=2, stride=3, padding=1, ceil_mode=True), (2, 5, 6, 7)),
    "divisor": (dict(kernel_size=3, divisor_override=-7), (2, 5, 8, 10)),
    "unbatched": (dict(kernel_size=2), (5, 6, 7)),
    "empty batch": (dict(kernel_size=2), (0, 5, 6, 7)),
    "window larger than the image": (dict(kernel_size=5, stride=1, padding=2), (2, 5, 3, 2)),
}
SIZES = {
    "1": (1, (2, 5, 7, 6)),
    "larger than the image": ((9, 8), (2, 5, 7, 6)),
    "uneven": ((3, 5), (2, 5, 7, 6)),
    "None keeps": ((None, 2), (2, 5, 7, 6)),
    "unbatched": (2, (5, 7, 6)),
    "empty batch": (2, (0, 5, 7, 6)),
    "no output": (0, (2, 5, 7, 6)),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_arguments(case, channels_last):
    arguments, shape = CASES[case]
    assert_same_layer(nn.AvgPool2d(**arguments), image(*shape, channels_last=channels_last and len(shape) == 4))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SIZES)
def test_adaptive(case, channels_last):
    size, shape = SIZES[case]
    x = image(*shape, channels_last=channels_last and len(shape) == 4)
    assert_same_layer(nn.AdaptiveAvgPool2d(size), x, gradients=size != 0)


@pytest.mark.parametrize("size", [5, 1, (1, 3), (None, 2)], ids=str)
@pytest.mark.parametrize("shape", [(0, 10, 10), (0, 3, 10, 10), (0, 0, 10, 10)], ids=str)
def test_adaptive_gradient_of_an_empty_image(size, shape):
    layer, gradients = nn.AdaptiveAvgPool2d(size), []
    for swap in (False, True):
        if swap:
            tritonnn.swap(layer, strict=True)
        x = image(*shape).requires_grad_()
        try:
            layer(x).sum().backward()
        except RuntimeError as error:  # PyTorch's, where it has no such gradient
            gradients.append(str(error))
        else:
            gradients.append(x.grad.shape)
    assert gradients[1] == gradients[0]
    assert shape != (0, 10, 10) or gradients[1] == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype):
    assert_same_layer(nn.AvgPool2d(3, 2, 1), image(2, 5, 9, 8, dtype=dtype))
    assert_same_layer(nn.AdaptiveAvgPool2d((3, 5)), image(2, 5, 9, 8, dtype=dtype))


def test_float16_sums_do_not_overflow():
    assert_same_layer(nn.AvgPool2d(8), torch.full((1, 1, 8, 8), 6e4, dtype=torch.float16, device=DEVICE))


def test_any_strides():
    assert_same_layer(nn.AvgPool2d(2), image(2, 8, 9, 9)[:, ::2, 1:, ::2])
    assert_same_layer(nn.AdaptiveAvgPool2d(2), image(2, 1, 6, 6).expand(2, 3, 6, 6))


def test_nan_and_infinity_stay_in_their_windows():
    x = image(1, 1, 6, 6)
    x[0, 0, 0, 0], x[0, 0, 5, 5] = float("nan"), float("inf")
    x[0, 0, 2, 2], x[0, 0, 2, 3] = float("inf"), -float("inf")  # their sum is NaN
    assert_same_layer(nn.AvgPool2d(2), x, gradients=False)
    assert_same_layer(nn.AvgPool2d(3, 1, 1), x, gradients=False)
    assert_same_layer(nn.AdaptiveAvgPool2d(4), x, gradients=False)


@pytest.mark.parametrize("layer", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)], ids=["avg pool", "adaptive"])
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["0.0", "-0.0"])
def test_sign_of_a_zero(layer, zero):
    x = torch.full((1, 2, 4, 4), zero, device=DEVICE)
    expected = layer(x)
    with tritonnn.swapped(layer, strict=True):
        assert_identical(layer(x), expected)


@pytest.mark.parametrize("size, shape", [((40000, 1), (1, 1, 65536, 1)), ((1, 40000), (1, 1, 1, 65536))], ids=str)
def test_adaptive_products_of_sizes_past_int32(size, shape):
    x = image(*shape)
    layer = nn.AdaptiveAvgPool2d(size)
    expected = layer(x.cpu().double())
    tritonnn.swap(layer, strict=True)
    assert_close(layer(x).cpu(), expected, x.dtype)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.AvgPool2d(2, padding=2), torch.zeros(1, 1, 4, 4)),
        (nn.AvgPool2d(5), torch.zeros(1, 1, 4, 4)),
        (nn.AvgPool2d(2, divisor_override=0), torch.zeros(1, 1, 4, 4)),
        (nn.AvgPool2d(2), torch.zeros(4, 4)),
        (nn.AdaptiveAvgPool2d(2), torch.zeros(4, 4)),
        (nn.AdaptiveAvgPool2d(-1), torch.zeros(1, 1, 4, 4)),
        (nn.AdaptiveAvgPool2d(2), torch.zeros(1, 1, 0, 4)),
        (nn.AvgPool2d(1), torch.zeros(2, 3, 0, 4)),
        (nn.AvgPool2d(2), torch.zeros(2, 0, 4, 4)),
        (nn.AvgPool2d(2), torch.zeros(0, 4, 4)),
    ],
    ids=[
        "padding",
        "no window",
        "divisor 0",
        "two dimensions",
        "adaptive, two dimensions",
        "negative",
        "adaptive, no rows",
        "no rows",
        "no channels",
        "no channels, unbatched",
    ],
)
def test_errors_are_pytorchs(layer, x):
    assert_same_error(layer, x.to(DEVICE))
