"""Compares a Triton layer with the torch.nn layer it replaces, and both with float64."""

import copy

import pytest
import torch
from torch import nn

import tritonnn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative, and absolute for values of about one: some ten roundings."""


def image(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> torch.Tensor:
    """Normal random values on the device of the tests."""
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded to TF32, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)


def worst_image(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of an image, in the 2-norm, relative to it."""
    errors, norms = (t.flatten(1).norm(dim=1) for t in (y.double() - exact, exact))
    return float((errors / norms).max())


def network() -> nn.Sequential:
    """A layer of every kind: images [N, 3, H, W] to [N, 4]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).to(DEVICE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """NaN equals NaN; `expected` is float64."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_identical(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same type, shape and bits, signs of zeros included; NaN equals NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan], expected[~nan])
    assert torch.equal(actual[~nan].signbit(), expected[~nan].signbit())


def assert_same_nan_and_infinities(layer: nn.Module, x: torch.Tensor) -> None:
    """The layer, which stays swapped, gives both where PyTorch's does in float64 on a CPU, and numbers elsewhere."""
    expected = copy.deepcopy(layer).cpu().double()(x.cpu().double())
    tritonnn.swap(layer, strict=True)
    y = layer(x).cpu()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf()) and torch.equal(y.isneginf(), expected.isneginf())
    assert y.isfinite().any() and not y.isfinite().all()


def assert_same_error(layer: nn.Module, x: torch.Tensor) -> None:
    """The layer, which stays swapped, raises for x what PyTorch's does."""
    with pytest.raises((RuntimeError, ValueError, IndexError)) as expected:
        layer(x)
    assert tritonnn.swap(layer).swapped
    with pytest.raises(expected.type) as actual:
        layer(x)
    assert str(actual.value) == str(expected.value)


def assert_same_autocast(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> None:
    """The layer, which stays swapped, gives what PyTorch's gives under autocast to that type."""
    with torch.autocast(DEVICE.type, dtype):
        expected = layer(x)
        tritonnn.swap(layer)
        actual = layer(x)
    assert actual.dtype == expected.dtype == dtype
    assert_close(actual, expected.double(), dtype)


def assert_same_layer(layer: nn.Module, x: torch.Tensor, gradients: bool = True) -> None:
    """The Triton version of `layer` gives PyTorch's values, type and strides for x, from a kernel, and its gradients.

    Also afterwards the buffers (running statistics) are the same.
    """
    layer = layer.to(x.device)
    if any(p.is_floating_point() for p in layer.parameters()):
        layer = layer.to(x.dtype)
    exact, triton_layer = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    report = tritonnn.swap(triton_layer, strict=True)
    assert report.swapped, report

    # PyTorch's gradient of padded average pooling is wrong in channels_last on a GPU: the reference is contiguous.
    inputs = [x.double().contiguous(), x.clone(memory_format=torch.preserve_format), x.detach()]
    if gradients:
        inputs = [t.detach().requires_grad_() for t in inputs]
    reference, expected, actual = exact(inputs[0]), layer(inputs[1]), triton_layer(inputs[2])

    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    assert_close(actual, reference, x.dtype)
    for buffer, expected_buffer in zip(triton_layer.buffers(), exact.buffers()):
        assert_close(buffer, expected_buffer.double(), x.dtype)
    if gradients:
        assert actual.grad_fn is not None
        grad = torch.randn(reference.shape, dtype=torch.float64, device=x.device)
        reference.backward(grad)
        actual.backward(grad.to(actual.dtype))
        assert_same_gradient(inputs[2], inputs[0])
        for p, q in zip(triton_layer.parameters(), exact.parameters()):
            assert_same_gradient(p, q)


def assert_same_gradient(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the tolerance of `actual`'s type, relative to the largest element: gradients are sums of many terms."""
    largest = max([1.0, *expected.grad.abs().flatten().tolist()])
    tolerance = 10 * largest * TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.grad.double(), expected.grad, rtol=0, atol=tolerance)
