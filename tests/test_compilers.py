"""Compilers, tracers and torch.func's transforms see no difference between PyTorch's layers and the swapped ones."""

import copy

import pytest
import torch
from helpers.compare import DEVICE, image
from helpers.twins import assert_same, images, twins
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import tritonnn

# Compilers


def test_a_fallback_compiles_without_graph_breaks_and_is_reported():
    layer = nn.Conv2d(2, 2, 1, dtype=torch.complex64, device=DEVICE)
    x = torch.randn(1, 2, 4, 4, dtype=torch.complex64, device=DEVICE)
    expected = layer(x)
    report = tritonnn.swap(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected)
    assert report.fallbacks == {"": {"dtype torch.complex64": 1}}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_relu_compiles_without_graph_breaks(inplace, recorded):
    torch._dynamo.reset()
    layer = tritonnn.TritonReLU(inplace)
    compiled = torch.compile(lambda x: layer(x + 1), fullgraph=True, backend="aot_eager")
    x = image(2, 3, 4, 4).requires_grad_(recorded)
    assert torch.equal(compiled(x), torch.relu(x + 1))


def test_an_inplace_relu_in_compiled_code_overwrites_what_the_caller_sees():
    torch._dynamo.reset()
    layer, x = tritonnn.TritonReLU(inplace=True), image(2, 3, 4, 4)
    expected, version = torch.relu(x), x._version
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(x, expected) and torch.equal(y, expected) and x._version > version


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_inductor_compiles_without_graph_breaks(training):
    pytorch, swapped = twins(training, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(swapped, fullgraph=True)
    x = image(8, 3, 8, 8)
    for _ in range(2):
        expected, actual = pytorch(x), compiled(x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    expected.sum().backward()
    actual.sum().backward()
    for p, q in zip(swapped.parameters(), pytorch.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    for p, q in zip(swapped.buffers(), pytorch.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports_with_any_batch(strict):
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch.export reads the legacy switch, which rejects a mixture
    pytorch, swapped = twins()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(swapped, (images(2),), dynamic_shapes=({0: batch},), strict=strict)
    targets = {str(node.target).split(".")[1] for node in program.graph.nodes if "tritonnn" in str(node.target)}
    assert {"conv2d", "linear", "batch_norm2d_inference", "max_pool2d"} <= targets
    x = images(5)
    assert_same(program.module()(x), pytorch(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    pytorch, swapped = twins()
    parameters, buffers = dict(swapped.named_parameters()), dict(swapped.named_buffers())
    x = images(4)
    graph = make_fx(lambda p, b, x: functional_call(swapped, (p, b), (x,)), tracing_mode=mode)(parameters, buffers, x)
    assert sum("tritonnn" in str(node.target) for node in graph.graph.nodes) == 7
    assert_same(graph(parameters, buffers, x), pytorch(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_meta_tensors(training):
    """Images are in NCHW, as PyTorch's convolution of meta tensors, unlike others, does not keep channels_last."""
    pytorch, swapped = (model.to("meta") for model in twins(training))
    x = torch.empty(2, 3, 8, 8, device="meta", dtype=torch.float64)
    for layer, triton_layer in zip(pytorch, swapped):
        expected, actual = layer(x), triton_layer(x)
        assert (actual.shape, actual.stride(), actual.dtype) == (expected.shape, expected.stride(), expected.dtype)
        x = expected.detach()


def test_symbolic_trace_keeps_the_layers_as_nodes():
    pytorch, swapped = twins()
    graph = torch.fx.symbolic_trace(swapped)
    nodes, expected = (
        [(node.op, node.target) for node in torch.fx.symbolic_trace(model).graph.nodes] for model in (swapped, pytorch)
    )
    assert nodes == expected
    assert type(graph.get_submodule("0")) is tritonnn.TritonConv2d
    x = images()
    assert_same(graph(x), pytorch(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    pytorch, swapped = twins()
    x = images()
    traced = torch.jit.trace(swapped, (x,))
    assert_same(traced(x), pytorch(x))
    with torch.no_grad():
        assert_same(traced(x), pytorch(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_needs_pytorchs_layers():
    pytorch, swapped = twins()
    with pytest.raises(RuntimeError):
        torch.jit.script(swapped)
    tritonnn.restore(swapped)
    x = images()
    assert_same(torch.jit.script(swapped)(x), pytorch(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_flop_counter(training):
    flops = []
    for model in twins(training):
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        flops.append(counter.get_flop_counts()["Global"].values())
    assert 0 < sum(flops[0]) == sum(flops[1])  # the gradients of a linear layer are one operator twice, or two


def test_feature_extractor_of_torchvision():
    pytorch, swapped = twins()
    x = images()
    expected, actual = (create_feature_extractor(model, ["0", "3", "7"])(x) for model in (pytorch, swapped))
    assert_same(actual, expected)


# Transforms of torch.func, forward mode


def test_functional_call():
    pytorch, swapped = twins()
    other, _ = twins()
    other.load_state_dict({name: t * 1.5 for name, t in other.state_dict().items()})
    x = images()
    assert_same(functional_call(swapped, other.state_dict(), (x,)), other(x))
    assert_same(swapped(x), pytorch(x))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().sum()


TRANSFORMS = {
    "grad": lambda model, x: grad(lambda x: loss(model, x))(x),
    "grad of grad": lambda model, x: grad(lambda x: grad(lambda x: loss(model, x))(x).square().sum())(x),
    "vjp": lambda model, x: vjp(model, x)[1](torch.ones(2, 4, dtype=x.dtype, device=x.device)),
    "jacrev": lambda model, x: jacrev(model)(x),
    "vmap": lambda model, x: vmap(model)(x.unflatten(0, (-1, 1))),
    "vmap of another dimension": lambda model, x: vmap(model, in_dims=1, out_dims=1)(x.unsqueeze(0)),
    "gradients of parameters": lambda model, x: grad(
        lambda parameters: functional_call(model, parameters, (x,)).square().sum()
    )(dict(model.named_parameters())),
    "gradients of every example": lambda model, x: vmap(
        grad(lambda parameters, x: functional_call(model, parameters, (x[None],)).square().sum()), in_dims=(None, 0)
    )(dict(model.named_parameters()), x),
    "jacobian, vectorized": lambda model, x: torch.autograd.functional.jacobian(model, x, vectorize=True),
}
FORWARD_MODE = {
    "jvp": lambda model, x: jvp(model, (x,), (x.sin(),)),
    "jacfwd": lambda model, x: jacfwd(lambda t: model(x * t))(torch.ones(2, 1, 1, 1, dtype=x.dtype, device=x.device)),
    "hessian": lambda model, x: hessian(lambda t: loss(model, x * t))(
        torch.ones(3, 1, 1, dtype=x.dtype, device=x.device)
    ),
    "jvp of parameters": lambda model, x: jvp(
        lambda parameters: functional_call(model, parameters, (x,)),
        (dict(model.named_parameters()),),
        ({name: p.detach().cos() for name, p in model.named_parameters()},),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    pytorch, swapped = twins()
    report = tritonnn.swap(swapped)
    x = images()
    assert_same(TRANSFORMS[name](swapped, x), TRANSFORMS[name](pytorch, x))
    assert not report.fallbacks


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_falls_back(name):
    pytorch, swapped = twins()
    x = images()
    assert_same(FORWARD_MODE[name](swapped, x), FORWARD_MODE[name](pytorch, x))
    assert all(set(m.fallbacks) == {"forward-mode differentiation"} for m in swapped if hasattr(m, "fallbacks"))


def test_dual_numbers_fall_back():
    """They do so also where nothing requires a gradient: the tangent must not get lost."""
    pytorch, swapped = (model.requires_grad_(False) for model in twins())
    x = images()
    tangents = []
    for model in (pytorch, swapped):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.sin()))).tangent)
    assert tangents[0].abs().max() > 0
    assert_same(tangents[1], tangents[0])


def test_transforms_inside_compiled_code_fall_back():
    pytorch, swapped = twins()
    torch._dynamo.reset()
    x = images()
    compiled = torch.compile(lambda x: grad(lambda x: loss(swapped, x))(x), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), grad(lambda x: loss(pytorch, x))(x))
    assert swapped[0].fallbacks == {"torch.func inside torch.compile": 1}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_an_ensemble_under_vmap(training):
    x = images()
    results = []
    for model in twins(training):
        members = [model, copy.deepcopy(model)]
        with torch.no_grad():
            members[1][0].weight.mul_(1.5)
        parameters, buffers = stack_module_state(members)
        base = copy.deepcopy(model)
        y = vmap(lambda p, b, base=base: functional_call(base, (p, b), (x,)))(parameters, buffers)
        results.append((y, buffers))
    assert_same(results[1], results[0])


def test_running_statistics_of_a_vmapped_batch_are_pytorchs_error():
    for model in twins(training=True):
        with pytest.raises(RuntimeError, match="Batch norm got a batched tensor as input while the running_mean"):
            vmap(model)(images(2, 2))
