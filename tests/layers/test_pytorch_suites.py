"""PyTorch's own samples of modules and functions, in every type: values, types, strides and errors are PyTorch's."""

import copy
import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from helpers.compare import DEVICE, DTYPES, assert_close, assert_identical
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.testing._internal.opinfo.core import SampleInput

import tritonnn

MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls
    in (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.ReLU)
}
OPS = {info.name: info for info in op_db if not info.variant_test_name}


def call(
    layer: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple[torch.Tensor, ...] | Exception, list[torch.Tensor]]:
    """The outputs of layer(*args, **kwargs), or what it raised, and the buffers afterwards; the layer keeps its own."""
    buffers = [b.clone() for b in layer.buffers()]
    try:
        y = layer(*args, **kwargs)
        outcome = y if isinstance(y, tuple) else (y,)
    except Exception as error:
        outcome = error
    after = [b.clone() for b in layer.buffers()]
    for b, before in zip(layer.buffers(), buffers):
        b.copy_(before)
    return outcome, after


def assert_same_call(layer: nn.Module, *args, strict: bool = True, **kwargs) -> Exception | None:
    """Triton's layer(*args, **kwargs) has PyTorch's type, strides and errors, and the values of float64.

    So have the buffers (running statistics) afterwards. Float64 decides on values because PyTorch's own bfloat16 batch
    norm on a CPU is off by more than a rounding; integers and complex numbers, for which it cannot, equal PyTorch's.
    Returns the error where PyTorch raises one.
    """
    expected, expected_buffers = call(layer, args, kwargs)
    with tritonnn.swapped(layer, strict=strict):
        actual, buffers = call(layer, args, kwargs)
    if isinstance(expected, Exception):
        assert (type(actual), str(actual)) == (type(expected), str(expected))
        return expected
    assert not isinstance(actual, Exception), actual
    assert [(y.dtype, y.shape, y.stride()) for y in actual] == [(y.dtype, y.shape, y.stride()) for y in expected]
    if expected[0].is_floating_point():
        exact = copy.deepcopy(layer).double()
        for name, b in exact.named_buffers():  # on a GPU PyTorch 2.11 updates a copy of buffers with gaps, and loses it
            setattr(exact, name, b.contiguous())
        inputs = [x.double() for x in args], {name: x.double() for name, x in kwargs.items()}
        values, value_buffers = call(exact, *inputs)
        assert_close(actual[0], values[0], expected[0].dtype)
        for b, value in zip(buffers, value_buffers):
            assert_close(b, value.double(), expected[0].dtype)
    else:
        assert_identical(actual[0], expected[0])
    for y, expected_y in zip(actual[1:], expected[1:]):  # the indices of max pooling
        assert torch.equal(y, expected_y)
    return None


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name, dtype, training):
    info = MODULES[name]
    samples = info.module_inputs_func(info, DEVICE.type, dtype, requires_grad=False, training=training)
    assert samples
    for sample in samples:
        arguments = sample.constructor_input
        layer = info.module_cls(*arguments.args, **arguments.kwargs).to(DEVICE, dtype).train(training)
        triton_class = getattr(tritonnn, f"Triton{name}")
        triton_class(*arguments.args, **arguments.kwargs).load_state_dict(layer.state_dict())
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        assert_same_call(layer, *args, **kwargs)
        noncontiguous = {name: noncontiguous_like(x) for name, x in kwargs.items()}
        assert_same_call(layer, *map(noncontiguous_like, args), **noncontiguous)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name, info in MODULES.items() if info.module_error_inputs_func])
def test_module_error_inputs(name, dtype, training):
    info = MODULES[name]
    errors = info.module_error_inputs_func(info, DEVICE.type, dtype, requires_grad=False, training=training)
    assert errors
    for error in errors:
        arguments, inputs = error.module_error_input.constructor_input, error.module_error_input.forward_input
        for module_class in (info.module_cls, getattr(tritonnn, f"Triton{name}")):
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex):
                    module_class(*arguments.args, **arguments.kwargs)
                continue
            layer = module_class(*arguments.args, **arguments.kwargs).to(DEVICE, dtype).train(training)
            with pytest.raises(error.error_type, match=error.error_regex):
                layer(*inputs.args, **inputs.kwargs)


def parameter(t: torch.Tensor | None) -> nn.Parameter | None:
    return None if t is None else nn.Parameter(t, requires_grad=t.is_floating_point() or t.is_complex())


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> nn.Module | None:
    if weight.dim() != 4:
        return None
    K, C, *kernel_size = weight.shape
    layer = nn.Conv2d(C * groups, K, kernel_size, stride, padding, dilation, groups, bias is not None)
    layer.weight, layer.bias = parameter(weight), parameter(bias)
    return layer


def linear(x, weight, bias=None) -> nn.Module | None:
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None  # nn.Linear has no such parameters
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight, layer.bias = parameter(weight), parameter(bias)
    return layer


def batch_norm(
    x, mean=None, var=None, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> nn.Module | None:
    if x.dim() != 4 or (training is False and mean is None):
        return None
    layer = nn.BatchNorm2d(x.shape[1], eps, momentum, affine=False, track_running_stats=mean is not None)
    layer.weight, layer.bias = parameter(weight), parameter(bias)
    if mean is not None:
        layer.running_mean, layer.running_var = mean, var
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
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
KERNEL_DTYPES = {name: DTYPES + INTEGERS if name.endswith("relu") else DTYPES for name in LAYERS}
"""The types that a layer has a kernel for."""
OTHER_DTYPES = {
    name: sorted(OPS[name].supported_dtypes(DEVICE.type) - {*dtypes, torch.complex32}, key=str)
    for name, dtypes in KERNEL_DTYPES.items()
}
"""Types in which the layer falls back to PyTorch's op."""
PARTS = {"nn.functional.max_pool2d": 16 if DEVICE.type == "cuda" else 1}
"""Tests that share a function's samples: of the 1,440 of max_pool2d, each compiles a kernel of its own."""


@cache
def samples(name: str, dtype: torch.dtype) -> list[SampleInput]:
    """PyTorch's sample inputs, and further ones where the function has reference inputs."""
    return list(OPS[name].reference_inputs(DEVICE.type, dtype, requires_grad=False))


def layers(name: str, dtype: torch.dtype, part: int = 0, parts: int = 1) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """A layer and its input for each of PyTorch's samples of the function that a layer can express.

    Every sample comes as it is and with nothing contiguous: input, parameters, statistics.
    """
    for number, sample in enumerate(samples(name, dtype)[part::parts]):
        for view in range(2):
            # In the interpreter every 17th of max_pool2d's, in each type others.
            if DEVICE.type == "cpu" and name.endswith("max_pool2d") and (2 * number + view - dtype.itemsize) % 17:
                continue
            x = sample.noncontiguous() if view else sample
            layer = LAYERS[name](x.input, *x.args, **x.kwargs)
            if layer is not None:
                yield layer.to(DEVICE), x.input


@pytest.mark.parametrize(
    "name, dtype, part",
    [
        pytest.param(name, dtype, part, id=f"{name}-{dtype}" + (f"-part {part}" if PARTS.get(name, 1) > 1 else ""))
        for name, dtypes in KERNEL_DTYPES.items()
        for dtype in dtypes
        for part in range(PARTS.get(name, 1))
    ],
)
def test_function_samples(name, dtype, part):
    compared = 0
    for layer, x in layers(name, dtype, part, PARTS.get(name, 1)):
        assert not assert_same_call(layer, x)
        compared += 1
    assert compared


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_samples_without_cudnn(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    for layer, x in layers("nn.functional.batch_norm", dtype):
        assert not assert_same_call(layer, x)


@pytest.mark.parametrize(
    "name, dtype",
    [pytest.param(name, dtype, id=f"{name}-{dtype}") for name, dtypes in OTHER_DTYPES.items() for dtype in dtypes],
)
def test_function_samples_without_a_kernel(name, dtype):
    for layer, x in layers(name, dtype):
        assert_same_call(layer, x, strict=False)


@pytest.mark.parametrize("name", [name for name in LAYERS if OPS[name].error_inputs_func])
def test_function_error_inputs(name):
    compared = 0
    for error in OPS[name].error_inputs(DEVICE):
        sample = error.sample_input
        try:
            layer = LAYERS[name](sample.input, *sample.args, **sample.kwargs)
        except ValueError:
            continue  # the groups of a convolution: not even the layer can be built
        if layer is not None:
            raised = assert_same_call(layer.to(DEVICE), sample.input)
            assert isinstance(raised, error.error_type)
            assert re.search(error.error_regex, str(raised))
            compared += 1
    assert compared
