import pytest
import torch
from helpers.compare import DEVICE, DTYPES, assert_identical, assert_same_error, assert_same_layer, image
from torch import nn

import tritonnn

CASES = {
    "2": (dict(kernel_size=2), (2, 5, 6, 7)),
    "3x3/1, padding 1": (dict(kernel_size=3, stride=1, padding=1), (2, 5, 6, 7)),
    "3x3/2, padding 1": (dict(kernel_size=3, stride=2, padding=1), (2, 5, 9, 8)),
    "every number of a pair": (dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3)), (2, 5, 9, 8)),
    "dilation": (dict(kernel_size=3, stride=1, padding=1, dilation=2), (2, 5, 9, 8)),
    "ceil_mode": (dict(kernel_size=3, stride=2, ceil_mode=True), (2, 5, 8, 10)),
    "ceil_mode, last window dropped": (dict(kernel_size=2, stride=3, padding=1, ceil_mode=True), (2, 5, 6, 7)),
    "unbatched": (dict(kernel_size=2), (5, 6, 7)),
    "empty batch": (dict(kernel_size=2), (0, 5, 6, 7)),
    "window larger than the image": (dict(kernel_size=5, stride=1, padding=2), (2, 5, 3, 2)),
    "many channels": (dict(kernel_size=2), (1, 300, 4, 4)),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_arguments_and_indices(case, channels_last):
    arguments, shape = CASES[case]
    x = image(*shape, channels_last=channels_last and len(shape) == 4)
    assert_same_layer(nn.MaxPool2d(**arguments), x)
    layer = nn.MaxPool2d(**arguments, return_indices=True)
    expected = layer(x)
    tritonnn.swap(layer, strict=True)
    actual = layer(x)
    for a, e in zip(actual, expected):
        assert torch.equal(a, e)
        assert (a.dtype, a.stride()) == (e.dtype, e.stride())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype):
    assert_same_layer(nn.MaxPool2d(3, 2, 1), image(2, 5, 9, 8, dtype=dtype))


def test_any_strides():
    assert_same_layer(nn.MaxPool2d(2), image(2, 8, 9, 9)[:, ::2, 1:, ::2])
    assert_same_layer(nn.MaxPool2d(2), image(2, 1, 6, 6).expand(2, 3, 6, 6))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "values",
    {
        "ties": [1.0, 1.0, 1.0, 1.0],
        "NaN": [1.0, float("nan"), 2.0, float("nan")],
        "-inf": [-float("inf")] * 4,
        "inf and NaN": [float("inf"), 3.0, float("nan"), float("inf")],
        "zeros of both signs": [-0.0, 0.0, -0.0, 0.0],
    }.values(),
    ids=["ties", "NaN", "-inf", "inf and NaN", "zeros of both signs"],
)
def test_which_of_a_window_wins(values, dtype, channels_last):
    x = torch.tensor(values, device=DEVICE, dtype=dtype).view(1, 1, 2, 2).repeat(2, 3, 2, 2)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    for arguments in (dict(kernel_size=2), dict(kernel_size=3, stride=1, padding=1)):
        layer = nn.MaxPool2d(**arguments, return_indices=True)
        expected = layer(x)
        tritonnn.swap(layer, strict=True)
        actual = layer(x)
        gradients = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (actual[0], expected[0])]
        assert torch.equal(*gradients)
        assert_identical(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    "arguments, x",
    [
        (dict(kernel_size=2, padding=2), torch.zeros(1, 1, 4, 4)),
        (dict(kernel_size=3, padding=2, dilation=2), torch.zeros(1, 1, 8, 8)),
        (dict(kernel_size=5), torch.zeros(1, 1, 4, 4)),
        (dict(kernel_size=2), torch.zeros(4, 4)),
        (dict(kernel_size=2, dilation=0), torch.zeros(1, 1, 4, 4)),
        (dict(kernel_size=2), torch.zeros(2, 0, 4, 4)),
        (dict(kernel_size=2), torch.zeros(0, 4, 4)),
        (dict(kernel_size=1), torch.zeros(2, 3, 0, 4)),
        (dict(kernel_size=1), torch.zeros(2, 3, 4, 0)),
    ],
    ids=[
        "padding over half a window",
        "padding over half a window without dilation",
        "no window",
        "two dimensions",
        "no dilation",
        "no channels",
        "no channels, unbatched",
        "no rows",
        "no columns",
    ],
)
def test_errors_are_pytorchs(arguments, x):
    assert_same_error(nn.MaxPool2d(**arguments), x.to(DEVICE))


def test_backward_without_saved_indices():
    x = image(2, 3, 6, 6).requires_grad_()
    y, _ = torch.ops.tritonnn.max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False, False)
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(nn.functional.max_pool2d(x, 2), x, grad)
    assert torch.equal(actual, expected)
