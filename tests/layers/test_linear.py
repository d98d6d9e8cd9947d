import pytest
import torch
from helpers.compare import (
    DEVICE,
    DTYPES,
    assert_same_autocast,
    assert_same_error,
    assert_same_layer,
    assert_same_nan_and_infinities,
    image,
)
from torch import nn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_types(dtype, bias):
    assert_same_layer(nn.Linear(40, 10, bias=bias), image(6, 40, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [(40,), (1, 40), (2, 3, 40), (2, 3, 2, 2, 40), (0, 40), (2, 0, 40)], ids=lambda s: "x".join(map(str, s))
)
def test_leading_dimensions(shape):
    assert_same_layer(nn.Linear(40, 10), image(*shape))


@pytest.mark.parametrize("sizes", [(1, 1), (1500, 7), (7, 1500), (0, 3)], ids=str)
def test_sizes(sizes):
    assert_same_layer(nn.Linear(*sizes), image(5, sizes[0]), gradients=min(sizes) > 0)


def test_any_strides():
    assert_same_layer(nn.Linear(20, 10), image(40, 6).t()[:, ::2])
    assert_same_layer(nn.Linear(20, 10), image(1, 20).expand(4, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype):
    layer = nn.Linear(40, 10, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        layer.weight[3, 7] = 0  # times infinity is NaN
    x = image(6, 40, dtype=dtype)
    x[1, 7], x[2, 7], x[4, 9] = float("nan"), float("inf"), -float("inf")
    assert_same_nan_and_infinities(layer, x)


@pytest.mark.parametrize("shape", [(2, 9), (0, 9), ()], ids=["features", "features, no rows", "no dimensions"])
def test_error_is_pytorchs(shape):
    assert_same_error(nn.Linear(8, 4).to(DEVICE), image(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    layer = nn.Linear(40, 10).to(DEVICE)
    x = image(4, 40)
    assert_same_autocast(layer, x, dtype)
