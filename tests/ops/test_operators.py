"""The registered operators: what autograd, FakeTensor, torch.compile, torch.export and vmap ask of them."""

import copy

import pytest
import torch
from helpers.compare import DEVICE, image, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritonnn

OPERATORS = {
    "conv2d": lambda x, c: (
        x,
        image(3, 4, 3, 3).requires_grad_(),
        image(3).requires_grad_(),
        (1, 1),
        (1, 1),
        (1, 1),
        1,
    ),
    "conv2d_fused": lambda x, c: (
        x.detach(),
        image(3, 3, 3, 4),
        image(3),
        image(3),
        image(2, 3, 6, 6, channels_last=True),
        "leaky_relu",
        0.1,
        (3, 3),
        (1, 1),
        (1, 1),
        (1, 1),
        1,
        "ieee",
        False,
        False,
    ),
    "fused_layer": lambda x, c: (
        *(x.detach(), image(3, 4, 3, 3), image(3), image(3), image(2, 3, 6, 6, channels_last=True), "leaky_relu", 0.1),
        *((1, 1), (1, 1), (1, 1), 1),
    ),
    "pooled_linear": lambda x, c: (x.detach(), image(3, 4), image(3)),
    "linear": lambda x, c: (image(5, 4).requires_grad_(), image(3, 4).requires_grad_(), image(3).requires_grad_()),
    "relu": lambda x, c: (x,),
    "relu_": lambda x, c: (x.detach(),),
    "max_pool2d": lambda x, c: (x, (2, 2), (2, 2), (0, 0), (1, 1), False, True),
    "avg_pool2d": lambda x, c: (x, (2, 2), (2, 2), (0, 0), False, True, None),
    "adaptive_avg_pool2d": lambda x, c: (x, (2, 3)),
    "batch_norm2d_inference": lambda x, c: (
        x,
        image(4).requires_grad_(),
        image(4).requires_grad_(),
        c,
        c.abs() + 1,
        1e-5,
    ),
    "batch_norm2d_training": lambda x, c: (x, image(4).requires_grad_(), image(4).requires_grad_(), 1e-5),
    "batch_norm2d_update_": lambda x, c: (c, c.abs() + 1, image(4), image(4), 0.1, 72),
}
LAYERS = {
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (1, 2, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2), (1, 2, 4, 4)),
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "relu": (nn.ReLU, (5,)),
    "max_pool2d": (lambda: nn.MaxPool2d(2), (1, 2, 4, 4)),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 2, 5, 5)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(2), (1, 2, 5, 5)),
    "batch_norm2d, training": (lambda: nn.BatchNorm2d(2), (2, 2, 3, 3)),
    "batch_norm2d, eval": (lambda: nn.BatchNorm2d(2).eval(), (2, 2, 3, 3)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    arguments = OPERATORS[name](image(2, 4, 6, 6).requires_grad_(), image(4))
    torch.library.opcheck(getattr(torch.ops.tritonnn, name), arguments)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_to_the_second_order(name):
    """Along random directions, which takes a launch each and not one for each element of x."""
    make, shape = LAYERS[name]
    layer = make().to(DEVICE, torch.float64)
    tritonnn.swap(layer, strict=True)
    x = image(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True, atol=1e-7, rtol=1e-6)


def networks(training: bool) -> tuple[nn.Module, nn.Module]:
    """PyTorch's and the swapped network."""
    pytorch = network()
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped, strict=True)
    return pytorch.train(training), swapped.train(training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_without_graph_breaks(training):
    pytorch, swapped = networks(training)
    torch._dynamo.reset()
    compiled = torch.compile(swapped, fullgraph=True, backend="aot_eager")
    x = image(2, 3, 8, 8)
    expected, actual = pytorch(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    for p, q in zip(swapped.parameters(), pytorch.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_exports():
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch.export reads the legacy switch, which rejects a mixture
    pytorch, swapped = networks(training=False)
    x = image(2, 3, 8, 8)
    torch.testing.assert_close(torch.export.export(swapped, (x,)).module()(x), pytorch(x))


def test_vmap():
    pytorch, swapped = networks(training=False)
    x = image(3, 2, 3, 8, 8)
    torch.testing.assert_close(torch.vmap(swapped)(x), torch.vmap(pytorch)(x))


def test_who_watches_sees_the_operators():
    """In plain eager calls the kernels run without PyTorch's dispatcher."""
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **kwargs or {})

    pytorch, swapped = networks(training=False)
    x = image(2, 3, 8, 8)
    with torch.no_grad():
        expected, plain = pytorch(x), swapped(x)
        with Log():
            watched = swapped(x)
    assert torch.equal(watched, plain)
    torch.testing.assert_close(plain, expected)
    assert {"tritonnn.conv2d.default", "tritonnn.linear.default", "tritonnn.max_pool2d.default"} <= set(seen)
    assert swapped(x).grad_fn is not None


def test_a_plain_eager_step_of_training_does_not_ask_the_dispatcher():
    _, swapped = networks(training=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        swapped(image(2, 3, 8, 8)).sum().backward()
    assert not {event.key for event in profile.key_averages() if event.key.startswith("tritonnn::")}


@pytest.mark.parametrize("name", ["swapped", "fused"])
def test_plain_eager_calls_do_not_ask_the_dispatcher(name):
    """A list where a tuple should be would send a layer the long way round."""
    pytorch, swapped = networks(training=False)
    model, x = swapped if name == "swapped" else tritonnn.fuse(pytorch), image(2, 3, 8, 8)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    asked = {event.key for event in profile.key_averages() if event.key.startswith("tritonnn::")}
    assert asked <= {"tritonnn::relu_"}  # which overwrites its input
