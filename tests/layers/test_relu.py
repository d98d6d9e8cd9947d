import pytest
import torch
from helpers.compare import DEVICE, DTYPES, assert_identical, assert_same_error, assert_same_layer, image
from torch import nn

import tritonnn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype):
    assert_same_layer(nn.ReLU(), image(2, 5, 7, 3, dtype=dtype))


@pytest.mark.parametrize(
    "make",
    {
        "scalar": lambda: image(),
        "empty": lambda: image(0, 3),
        "channels_last": lambda: image(2, 5, 4, 3, channels_last=True),
        "transposed": lambda: image(5, 4).t(),
        "slice": lambda: image(4, 6, 5)[:, ::2, 1:],
        "expanded": lambda: image(1, 4).expand(3, 4),
        "five dimensions": lambda: image(2, 3, 2, 3, 2),
    }.values(),
    ids=["scalar", "empty", "channels_last", "transposed", "slice", "expanded", "five dimensions"],
)
def test_any_shape_and_strides(make):
    assert_same_layer(nn.ReLU(), make())


@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_infinity_and_zeros_of_both_signs(dtype, inplace):
    info = torch.finfo(dtype)
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, info.max, info.min, info.tiny, -info.tiny]
    x = torch.tensor(values, device=DEVICE, dtype=dtype).repeat(7)
    expected = torch.relu(x)
    assert_identical(tritonnn.TritonReLU(inplace)(x), expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,  # the interpreter's bfloat16 has no denormals
)
def test_denormals(dtype):
    x = torch.tensor([1, -1, 2], device=DEVICE, dtype=dtype) * (torch.finfo(dtype).smallest_normal / 4)
    assert x.all()
    assert_identical(tritonnn.TritonReLU()(x), torch.relu(x))


@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers(dtype, inplace):
    info = torch.iinfo(dtype)
    x = torch.tensor([info.min, info.min // 2 + 1, 0, 5, info.max], device=DEVICE, dtype=dtype)
    expected = torch.relu(x)
    layer = tritonnn.TritonReLU(inplace)
    assert_identical(layer(x), expected)
    assert not layer.fallbacks


@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.complex128], ids=str)
def test_errors_are_pytorchs(dtype, inplace):
    assert_same_error(nn.ReLU(inplace), torch.ones(3, device=DEVICE).to(dtype))


@pytest.mark.parametrize("strides", ["dense", "slice"])
def test_inplace(strides):
    x = image(4, 6)
    x = x[:, ::2] if strides == "slice" else x
    expected, version, address = torch.relu(x), x._version, x.data_ptr()
    y = tritonnn.TritonReLU(inplace=True)(x)
    assert y is x and x.data_ptr() == address
    assert torch.equal(x, expected)
    assert x._version > version


def test_inplace_gradient():
    x = image(4, 6).requires_grad_()
    tritonnn.TritonReLU(inplace=True)(x * 2).sum().backward()
    assert torch.equal(x.grad, 2.0 * (x > 0))


@pytest.mark.parametrize("view", [lambda x: x[1:3], lambda x: x.view(24), lambda x: x.t()], ids=["rows", "view", "t"])
def test_inplace_gradient_of_a_view(view):
    x, gradients = image(4, 6), []
    for layer in (nn.ReLU(inplace=True), tritonnn.TritonReLU(inplace=True)):
        leaf = x.clone().requires_grad_()
        h = leaf * 2
        y = layer(view(h))
        (h.square().sum() + y.sum()).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_inplace_gradient_twice():
    """Gradients of the second order, where the input, which is the output now, is used afterwards."""
    x, gradients = image(4, 6, dtype=torch.float64), []
    for layer in (nn.ReLU(inplace=True), tritonnn.TritonReLU(inplace=True)):
        leaf = x.clone().requires_grad_()
        h = leaf**3
        y = layer(h)
        (first,) = torch.autograd.grad((y * h).sum(), leaf, create_graph=True)
        gradients.append([y, first, *torch.autograd.grad(first.square().sum(), leaf)])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)


def test_inplace_errors():
    layer = tritonnn.TritonReLU(inplace=True)
    x = image(1, 3).expand(2, 3)
    before = x.clone()
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        layer(x)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        layer(image(3).requires_grad_())
    h = image(4, 3).requires_grad_() * 1
    before = h.clone()
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        layer(h.chunk(2)[0])
    assert torch.equal(h, before)


def test_saved_tensor_is_protected_from_inplace():
    x = image(3).requires_grad_()
    squared = (x * 1) ** 2
    y = squared**2
    with torch.no_grad():
        tritonnn.TritonReLU(inplace=True)(squared)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
