import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.compare import (
    DEVICE,
    DTYPES,
    assert_close,
    assert_same_error,
    assert_same_gradient,
    assert_same_layer,
    image,
)
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import tritonnn
from tritonnn.ops import batch_norm2d
from tritonnn.ops.batch_norm2d import batch_norm2d_inference, batch_norm2d_training

ARGUMENTS = {
    "default": {},
    "momentum": dict(momentum=0.3),
    "cumulative": dict(momentum=None),
    "eps": dict(eps=0.1),
    "not affine": dict(affine=False),
    "no running statistics": dict(track_running_stats=False),
}


def trained(training: bool, **arguments) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(5, **arguments).train(training)
    for t in (layer.weight, layer.bias, layer.running_mean):
        if t is not None:
            nn.init.normal_(t)
    if layer.running_var is not None:
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, training, channels_last):
    assert_same_layer(trained(training, **ARGUMENTS[case]), image(4, 5, 3, 6, channels_last=channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_types(dtype, training):
    assert_same_layer(trained(training), image(4, 5, 3, 6, dtype=dtype), gradients=dtype.itemsize > 2)


OTHER_ORDERS = {
    "rows and columns": lambda x: x.transpose(2, 3),
    "images and channels": lambda x: x.transpose(0, 1),
    "a part": lambda x: x.transpose(2, 3)[..., ::2],
    "repeated": lambda x: x[:, :1].expand(-1, 5, -1, -1),
}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("order", OTHER_ORDERS)
def test_other_orders_of_dimensions(order, training, affine):
    """On a GPU, PyTorch's own kernels keep them, and cuDNN does not."""
    assert_same_layer(trained(training, affine=affine), OTHER_ORDERS[order](image(5, 5, 3, 6)))


TYPES = {
    "float32": (torch.float32, torch.float32, True),
    "not affine": (torch.float32, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, True),
    "float16 beside float32": (torch.float16, torch.float32, True),
    "float16": (torch.float16, torch.float16, True),
}
"""The types of images and parameters, and whether there is a weight."""


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", TYPES)
def test_the_strides_that_pytorch_would_have_on_a_gpu(case, training):
    """By PyTorch's rules, without a GPU."""
    from torch._subclasses import FakeTensorMode

    dtype, of_parameters, affine = TYPES[case]
    for order in OTHER_ORDERS.values():
        with FakeTensorMode():
            x = order(torch.empty(5, 5, 3, 6, dtype=dtype, device="cuda"))
            weight, bias, mean, var = (torch.ones(5, dtype=of_parameters, device="cuda") for _ in range(4))
            if not affine:
                weight = bias = None
            expected = F.batch_norm(x, mean, var, weight, bias, training)
            if training:
                y, *_ = batch_norm2d_training(x, weight, bias, 1e-5)
            else:
                y = batch_norm2d_inference(x, weight, bias, mean, var, 1e-5)
        assert (y.stride(), y.dtype) == (expected.stride(), expected.dtype)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_over_several_batches(momentum):
    layer = nn.BatchNorm2d(5, momentum=momentum).to(DEVICE, torch.float64)
    swapped = copy.deepcopy(layer)
    tritonnn.swap(swapped, strict=True)
    for step in range(3):
        x = image(4, 5, 3, 3, dtype=torch.float64) * (step + 1) + step
        layer(x), swapped(x)
    assert swapped.num_batches_tracked == 3
    for actual, expected in zip(swapped.buffers(), layer.buffers()):
        assert_close(actual, expected.double(), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_half_input_with_float32_parameters(dtype, training):
    layer = trained(training).to(DEVICE)
    x = image(4, 5, 3, 6, dtype=dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    tritonnn.swap(layer, strict=True)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, exact, dtype)


def test_large_mean_loses_no_digits():
    x = image(16, 5, 8, 8) + 1e4
    layer = nn.BatchNorm2d(5).to(DEVICE)
    exact = copy.deepcopy(layer).double()(x.double())
    torch_error = (copy.deepcopy(layer)(x) - exact).abs().max()
    tritonnn.swap(layer, strict=True)
    assert (layer(x) - exact).abs().max() <= 1.5 * torch_error


def test_many_pixels_and_channels():
    assert_same_layer(nn.BatchNorm2d(70), image(40, 70, 12, 11))


def test_any_strides():
    assert_same_layer(nn.BatchNorm2d(4), image(3, 8, 6, 6)[:, ::2, 1:, ::2])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_parameters_and_statistics_may_be_views(training):
    # The reference has no gaps: PyTorch 2.11 updates a copy of running statistics with gaps on a GPU, and loses it.
    exact = trained(training).to(DEVICE).double()
    layer = copy.deepcopy(exact).float()
    for parameters in (layer._parameters, layer._buffers):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if name in parameters:
                gaps = torch.stack([parameters[name].detach()] * 2, 1)[:, 1]
                parameters[name] = nn.Parameter(gaps) if parameters is layer._parameters else gaps
    x = image(4, 5, 3, 6).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    expected = exact(exact_x)
    tritonnn.swap(layer, strict=True)
    y = layer(x)
    assert not layer.weight.is_contiguous() and not layer.running_mean.is_contiguous()
    assert_close(y, expected, x.dtype)
    for actual, buffer in zip(layer.buffers(), exact.buffers()):
        assert_close(actual, buffer.double(), x.dtype)
    grad = image(*y.shape)
    y.backward(grad)
    expected.backward(grad.double())
    assert_same_gradient(x, exact_x)
    assert_same_gradient(layer.weight, exact.weight)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3), (2, 5, 3, 0)], ids=str)
def test_nothing_to_normalize(shape, training):
    layer, x = trained(training).to(DEVICE), image(*shape)
    expected = copy.deepcopy(layer)
    tritonnn.swap(layer)
    try:
        expected_y = expected(x)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            layer(x)
        assert str(caught.value) == str(error)
        return
    y = layer(x)
    assert (y.shape, y.stride()) == (expected_y.shape, expected_y.stride())
    for actual, buffer in zip(layer.buffers(), expected.buffers()):
        assert_close(actual, buffer.double(), x.dtype)


def test_empty_batch():
    assert_same_layer(trained(False), image(0, 5, 3, 3))
    layer = tritonnn.TritonBatchNorm2d(5).to(DEVICE)
    assert layer(image(0, 5, 3, 3)).shape == (0, 5, 3, 3)


def test_nan_stays_in_its_channel():
    x = image(2, 5, 3, 3)
    x[0, 1, 0, 0] = float("nan")
    layer = tritonnn.TritonBatchNorm2d(5).to(DEVICE)
    assert layer(x).isnan().any(dim=(0, 2, 3)).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")], ids=str)
def test_infinity_stays_in_its_channel(value, training):
    x = image(2, 5, 3, 3)
    x[0, 1, 0, 0] = value
    layer = trained(training).to(DEVICE)
    expected = copy.deepcopy(layer)
    tritonnn.swap(layer, strict=True)
    expected_y, y = expected(x), layer(x)
    assert torch.equal(y.isnan(), expected_y.isnan())
    assert torch.equal(y.isfinite(), expected_y.isfinite())
    for actual, buffer in zip(layer.buffers(), expected.buffers()):
        assert torch.equal(actual.isfinite(), buffer.isfinite())


def test_running_variance_of_zero_below_it_infinite_and_nan():
    layer = trained(False)
    layer.running_var.copy_(torch.tensor([0.0, -1.0, float("inf"), float("nan"), 1e-40]))
    assert_same_layer(layer, image(2, 5, 3, 3), gradients=False)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_that_backward_has_kept_may_be_updated(momentum):
    """To PyTorch an update is no operation in place: backward of eval mode takes them as it finds them."""
    x, grads = image(2, 5, 3, 3), []
    for layer in (nn.BatchNorm2d(5, momentum=momentum), tritonnn.TritonBatchNorm2d(5, momentum=momentum)):
        y = layer.to(DEVICE).eval()(x)
        layer.train()(x)
        grads.append(torch.autograd.grad(y.square().sum(), tuple(layer.parameters())))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    "shape", [(1, 5, 1, 1), (2, 4, 3, 3), (2, 5, 3)], ids=["one value", "channels", "3 dimensions"]
)
def test_errors_are_pytorchs(shape):
    layer = nn.BatchNorm2d(5).to(DEVICE)
    assert_same_error(layer, image(*shape))
    assert layer.num_batches_tracked == (0 if len(shape) == 3 else 2)


def test_open_sizes_are_not_restricted():
    """torch.export would refuse a batch of any size."""
    images = ShapeEnv().create_unbacked_symint()
    x = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.float32, shape=(images, 8, 4, 4), numel=lambda: images * 128
    )
    weight = torch.ones(8)
    assert not batch_norm2d._keeps_strides(x, weight, weight, training=False)
