"""PyTorch's own samples of these modules and functions: the Triton layers give PyTorch's values, types and strides."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from compare import DEVICE, DTYPES, assert_close
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import tritonnn

MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls
    in (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.ReLU)
}
OPS = {info.name: info for info in op_db if not info.variant_test_name}


def assert_same_call(layer: nn.Module, *args, **kwargs) -> None:
    """Triton's layer(*args, **kwargs) has PyTorch's type, strides and errors, and the values of float64.

    Float64 decides on values because PyTorch's own bfloat16 batch norm on a CPU is off by more than a rounding.
    """
    exact, triton_layer = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    tritonnn.swap(triton_layer, strict=True)
    try:
        expected = layer(*args, **kwargs)
    except Exception as error:
        with pytest.raises(type(error)) as caught:
            triton_layer(*args, **kwargs)
        assert str(caught.value) == str(error)
        return
    actual = triton_layer(*args, **kwargs)
    values = exact(*(x.double() for x in args), **{name: x.double() for name, x in kwargs.items()})
    if isinstance(expected, tuple):  # max pooling and its indices
        assert torch.equal(actual[1], expected[1])
        actual, expected, values = actual[0], expected[0], values[0]
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert_close(actual, values, expected.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name, dtype, training):
    info = MODULES[name]
    samples = info.module_inputs_func(info, DEVICE.type, dtype, requires_grad=False, training=training)
    count = 0
    for sample in samples:
        layer = info.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
        layer = layer.to(DEVICE, dtype).train(training)
        assert_same_call(layer, *sample.forward_input.args, **sample.forward_input.kwargs)
        count += 1
    assert count


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> nn.Module | None:
    if weight.dim() != 4:
        return None
    K, C, *kernel_size = weight.shape
    layer = nn.Conv2d(C * groups, K, kernel_size, stride, padding, dilation, groups, bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def linear(x, weight, bias=None) -> nn.Module | None:
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None  # nn.Linear has no such parameters
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def batch_norm(
    x, mean=None, var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> nn.Module | None:
    if x.dim() != 4 or (training is False and mean is None):
        return None
    layer = nn.BatchNorm2d(x.shape[1], eps, momentum, affine=False, track_running_stats=mean is not None)
    layer.weight, layer.bias = (None if p is None else nn.Parameter(p) for p in (weight, bias))
    if mean is not None:
        layer.running_mean, layer.running_var = mean.clone(), var.clone()
    return layer.train(training)


LAYERS: dict[str, Callable[..., nn.Module | None]] = {
    "nn.functional.conv2d": conv2d,
    "nn.functional.linear": linear,
    "nn.functional.batch_norm": batch_norm,
    "nn.functional.max_pool2d": lambda x, **kwargs: nn.MaxPool2d(**kwargs),
    "nn.functional.avg_pool2d": lambda x, *args, **kwargs: nn.AvgPool2d(*args, **kwargs),
    "nn.functional.adaptive_avg_pool2d": lambda x, output_size: nn.AdaptiveAvgPool2d(output_size),
    "nn.functional.relu": lambda x: nn.ReLU(),
}


def calls(name: str, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """A comparison for each of PyTorch's samples of the function that a layer can express."""
    for sample in OPS[name].sample_inputs(DEVICE.type, dtype, requires_grad=False):
        for view in (sample, sample.noncontiguous()):
            layer = LAYERS[name](view.input, *view.args, **view.kwargs)
            if layer is not None:
                yield partial(assert_same_call, layer.to(DEVICE), view.input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_function_samples(name, dtype):
    compared = 0
    for number, compare in enumerate(calls(name, dtype)):
        # 1,440 samples of max_pool2d, two views each: in the interpreter every 17th, in each type others.
        if DEVICE.type == "cpu" and name.endswith("max_pool2d") and number % 17 != DTYPES.index(dtype):
            continue
        compare()
        compared += 1
    assert compared


@pytest.mark.parametrize("name", LAYERS)
def test_error_inputs(name):
    info = OPS[name]
    if info.error_inputs_func is None:
        return
    for error in info.error_inputs(torch.device(DEVICE)):
        sample = error.sample_input
        try:
            layer = LAYERS[name](sample.input, *sample.args, **sample.kwargs)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            continue  # not even the layer can be built
        if layer is not None:
            assert_same_call(layer.to(DEVICE), sample.input)
