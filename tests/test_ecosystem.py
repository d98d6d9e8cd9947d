"""What surrounds a layer in PyTorch (checkpoints, hooks, compilers, transforms, autocast, threads) sees no difference.

Every test does the same to PyTorch's network and to the swapped one.
"""

import copy
import io
import threading

import pytest
import torch
from compare import DEVICE, assert_close, image, network
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module, distribute_tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models.feature_extraction import create_feature_extractor

import tritonnn
from lit_modules.resnet import ResNet18
from tritonnn.latency import time_alternately


def twins(training: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """PyTorch's and the swapped network; the batch norms have seen data."""
    pytorch = network().to(dtype)
    pytorch(image(4, 3, 8, 8, dtype=dtype))
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped)
    return pytorch.train(training), swapped.train(training)


def images(*batch: int) -> torch.Tensor:
    return image(*(batch or (2,)), 3, 8, 8, dtype=torch.float64)


def assert_same(actual: object, expected: object) -> None:
    """Equal up to float64's rounding, in whatever structure."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# Checkpoints and copies


def test_state_dict_both_ways():
    pytorch, swapped = twins()
    fresh_pytorch, fresh_swapped = twins()
    fresh_pytorch.load_state_dict(swapped.state_dict(), strict=True)
    fresh_swapped.load_state_dict(pytorch.state_dict(), strict=True)
    assert list(swapped.state_dict()) == list(pytorch.state_dict())
    x = images()
    for model in (swapped, fresh_pytorch, fresh_swapped):
        assert_same(model(x), pytorch(x))


@pytest.mark.parametrize("weights_only", [False, True])
def test_torch_save_of_the_model(weights_only):
    _, swapped = twins()
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    classes = [type(m) for m in swapped.modules()] + [set]
    with torch.serialization.safe_globals(classes):
        loaded = torch.load(file, weights_only=weights_only)
    x = images()
    assert type(loaded[0]) is tritonnn.TritonConv2d
    assert torch.equal(loaded(x), swapped(x))
    tritonnn.restore(loaded)
    assert type(loaded[0]) is nn.Conv2d


def test_an_old_checkpoint_without_num_batches_tracked():
    pytorch, swapped = twins()
    checkpoint = {name: 1.5 * t for name, t in pytorch.state_dict().items() if "num_batches" not in name}
    for model in (pytorch, swapped):
        model.load_state_dict(checkpoint, strict=True)
    assert_same(swapped.state_dict(), pytorch.state_dict())


# What changes a layer's parameters or its class


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_parametrize_a_swapped_layer():
    pytorch, swapped = twins()
    x = images()
    for model in (pytorch, swapped):
        parametrize.register_parametrization(model[0], "weight", Doubled())
    expected = pytorch(x)
    assert_same(swapped(x), expected)
    tritonnn.restore(swapped)
    assert type(swapped[0]).__name__ == "ParametrizedConv2d" and not isinstance(swapped[0], tritonnn.TritonConv2d)
    assert_same(swapped(x), expected)
    parametrize.remove_parametrizations(swapped[0], "weight")
    assert type(swapped[0]) is nn.Conv2d
    assert_same(swapped(x), expected)


def test_a_parametrized_layer_stays_and_the_report_says_why():
    model = network()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    report = tritonnn.swap(model)
    assert report.stayed["0"] == "ParametrizedConv2d is a subclass of Conv2d, with behaviour of its own"
    assert "1 linear" in str(report) and "conv2d," not in str(report).splitlines()[0]


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norms(norm):
    pytorch, swapped = twins()
    torch.manual_seed(0)
    norm(pytorch[7])
    torch.manual_seed(0)
    norm(swapped[7])
    x = images()
    assert_same(swapped(x), pytorch(x))
    swapped(x).sum().backward()
    pytorch(x).sum().backward()
    assert_same([p.grad for p in swapped.parameters()], [p.grad for p in pytorch.parameters()])


def test_pruning():
    pytorch, swapped = twins()
    x = images()
    for model in (pytorch, swapped):
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        prune.ln_structured(model[7], "weight", amount=0.5, n=2, dim=0)
    assert_same(swapped(x), pytorch(x))
    for model in (pytorch, swapped):
        prune.remove(model[0], "weight")
        model.train()(x).sum().backward()
    assert (swapped[0].weight == 0).sum() == swapped[0].weight.numel() // 2
    assert_same([p.grad for p in swapped.parameters()], [p.grad for p in pytorch.parameters()])


def test_fuse_conv_bn_eval():
    pytorch, swapped = twins()
    fused = nn.utils.fuse_conv_bn_eval(swapped[0], swapped[1])
    assert type(fused) is tritonnn.TritonConv2d
    x = images()
    assert_same(fused(x), pytorch[1](pytorch[0](x)))


def test_convert_sync_batchnorm_before_and_after_the_swap():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    report = tritonnn.swap(model)
    assert report.stayed["1"] == "no Triton layer for SyncBatchNorm"
    model = network()
    before = tritonnn.swap(model)
    assert before.swapped["1"] == "batch_norm2d"
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm
    tritonnn.restore(model)
    assert [type(m) for m in model[:3]] == [nn.Conv2d, nn.SyncBatchNorm, nn.ReLU]


# Hooks


def test_forward_hooks():
    pytorch, swapped = twins()
    x = images()
    seen = []
    for model in (pytorch, swapped):
        outputs = []
        for layer in model:
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.5,))
            layer.register_forward_hook(lambda _, inputs, output, outputs=outputs: outputs.append(output.clone()))
        model[3].register_forward_hook(lambda _, inputs, output: output + 1)
        outputs.append(model(x))
        seen.append(outputs)
    assert len(seen[0]) == len(pytorch) + 1
    assert_same(seen[1], seen[0])


def test_backward_hooks():
    x = images()
    seen = []
    for model in twins(training=True):
        model[2].inplace = False  # PyTorch: a full backward hook and an in-place layer exclude each other
        gradients = []
        for layer in model:
            layer.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 0.5,))
            layer.register_full_backward_hook(
                lambda _, grads_in, grads_out, g=gradients: g.append((grads_in, grads_out))
            )
        model[0].weight.register_hook(lambda grad, g=gradients: g.append(grad))
        model[1].bias.register_post_accumulate_grad_hook(lambda p, g=gradients: g.append(p.grad))
        model(x.requires_grad_()).square().sum().backward()
        seen.append(gradients)
    assert len(seen[0]) == len(model) + 2
    assert_same(seen[1], seen[0])


def test_in_place_relu_under_a_full_backward_hook_is_pytorchs_error():
    errors = []
    for model in twins(training=True):
        model[2].register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace") as error:
            model(images())
        errors.append(str(error.value))
    assert errors[0] == errors[1]


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


@pytest.mark.gpu
def test_compiled_is_no_slower_than_eager():
    model = ResNet18().eval().requires_grad_(False).to(DEVICE)
    tritonnn.swap(model, strict=True)
    torch._dynamo.reset()
    compiled_model = torch.compile(model, fullgraph=True)
    x = image(1024, 3, 32, 32)  # so that the GPU is waited for, not the launches: those of compiled code cost more
    torch.testing.assert_close(compiled_model(x), model(x), rtol=1e-4, atol=1e-4)
    eager, compiled = time_alternately([lambda: model(x), lambda: compiled_model(x)], DEVICE, budget_s=1.0)
    assert compiled.eager.median <= 1.1 * eager.eager.median
    assert compiled.device.median <= 1.1 * eager.device.median


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
    """In NCHW: PyTorch's convolution of meta tensors does not keep channels_last, as it does on a CPU and on a GPU."""
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
    assert sum(flops[0]) > 0
    assert sorted(flops[1]) == sorted(flops[0])


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
    """Also where nothing requires a gradient: the tangent must not get lost."""
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


# Autocast

AUTOCAST = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), torch.float32, torch.float32),
    "conv2d, half input": (lambda: nn.Conv2d(3, 4, 3), torch.float32, torch.bfloat16),
    "conv2d, half parameters": (lambda: nn.Conv2d(3, 4, 3), torch.bfloat16, torch.float32),
    "conv2d, float64": (lambda: nn.Conv2d(3, 4, 3), torch.float64, torch.float64),
    "linear": (lambda: nn.Linear(6, 4), torch.float32, torch.float32),
    "linear, half input": (lambda: nn.Linear(6, 4), torch.float32, torch.float16),
    "linear, float64": (lambda: nn.Linear(6, 4), torch.float64, torch.float64),
    "batch_norm2d": (lambda: nn.BatchNorm2d(3), torch.float32, torch.float32),
    "batch_norm2d, half input": (lambda: nn.BatchNorm2d(3), torch.float32, torch.bfloat16),
    "batch_norm2d, eval, half input": (lambda: nn.BatchNorm2d(3).eval(), torch.float32, torch.bfloat16),
    "max_pool2d": (lambda: nn.MaxPool2d(2), torch.float32, torch.float32),
    "max_pool2d, half": (lambda: nn.MaxPool2d(2), torch.float32, torch.float16),
    "avg_pool2d": (lambda: nn.AvgPool2d(2), torch.float32, torch.float32),
    "avg_pool2d, half": (lambda: nn.AvgPool2d(2), torch.float32, torch.float16),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(2), torch.float32, torch.bfloat16),
    "relu": (lambda: nn.ReLU(), torch.float32, torch.float32),
    "relu, half": (lambda: nn.ReLU(), torch.float32, torch.float16),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", AUTOCAST)
def test_autocast_has_pytorchs_type_rules(case, dtype):
    make, parameters, inputs = AUTOCAST[case]
    layer = make().to(DEVICE, parameters)
    twin = copy.deepcopy(layer)
    exact = copy.deepcopy(layer).double()
    tritonnn.swap(twin, strict=True)
    x = image(2, 3, 6, 6, dtype=inputs).requires_grad_()
    types, outputs = [], []
    for each in (layer, twin):
        with torch.autocast(DEVICE.type, dtype):
            y = each(x)
            with torch.autocast(DEVICE.type, enabled=False):
                off = each(x.to(parameters)).dtype
        (grad_x, *grads) = torch.autograd.grad(y.float().sum(), (x, *each.parameters()))
        types.append([y.dtype, off, grad_x.dtype, *(g.dtype for g in grads)])
        outputs.append(y)
    assert types[1] == types[0]
    assert_close(outputs[1], exact(x.double()), outputs[0].dtype)


def test_autocast_trains_with_a_gradient_scaler():
    pytorch, swapped = twins(training=True, dtype=torch.float32)
    x, gradients = image(4, 3, 8, 8), []
    for model in (pytorch, swapped):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
        with torch.autocast(DEVICE.type, torch.float16):
            y = model(x)
        scaler.scale(y.float().square().mean()).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters()))
        gradients.append([p.grad for p in model.parameters()])
    assert all(g.dtype == torch.float32 for g in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=5e-3)


# Tensors that are more than strided memory


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout, device=DEVICE)


SPECIAL_TENSORS = {
    "nested": (lambda: nn.ReLU(), lambda: nested(torch.strided), "nested tensor"),
    "nested, jagged": (lambda: nn.Linear(3, 2), lambda: nested(torch.jagged), "tensor of type NestedTensor"),
    "sparse": (lambda: nn.ReLU(), lambda: (-torch.eye(3, device=DEVICE)).to_sparse(), "layout torch.sparse_coo"),
    "complex, conv2d": (
        lambda: nn.Conv2d(2, 3, 1, dtype=torch.complex64),
        lambda: torch.randn(1, 2, 4, 4, dtype=torch.complex64, device=DEVICE),
        "dtype torch.complex64",
    ),
    "complex, linear": (
        lambda: nn.Linear(3, 2, dtype=torch.complex64),
        lambda: torch.randn(4, 3, dtype=torch.complex64, device=DEVICE),
        "dtype torch.complex64",
    ),
}


@pytest.mark.parametrize("case", SPECIAL_TENSORS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_other_tensors_fall_back(case):
    make, tensor, reason = SPECIAL_TENSORS[case]
    layer, x = make().to(DEVICE), tensor()
    expected = layer(x)
    report = tritonnn.swap(layer)
    actual = layer(x)
    assert type(actual) is type(expected) and actual.layout == expected.layout
    components = (t.unbind() if t.is_nested else (t.to_dense(),) for t in (actual, expected))
    for a, e in zip(*components, strict=True):
        torch.testing.assert_close(a, e)
    assert report.fallbacks == {"": {reason: 1}}


INTEGERS = {
    "max_pool2d": lambda: nn.MaxPool2d(2),
    "avg_pool2d": lambda: nn.AvgPool2d(2),
    "adaptive_avg_pool2d": lambda: nn.AdaptiveAvgPool2d(2),
    "batch_norm2d": lambda: nn.BatchNorm2d(2),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_integers_fall_back_or_are_pytorchs_error(case):
    """PyTorch pools integers on a CPU, not on a GPU."""
    x = torch.arange(32, device=DEVICE).view(1, 2, 4, 4)
    layer = INTEGERS[case]().to(DEVICE)
    twin = copy.deepcopy(layer)
    report = tritonnn.swap(twin)
    try:
        expected = layer(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as caught:
            twin(x)
        assert str(caught.value) == str(error)
    else:
        assert torch.equal(twin(x), expected)
        assert report.fallbacks == {"": {"dtype torch.int64": 1}}


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize("make", [Named, tv_tensors.Image], ids=["subclass", "tv_tensors.Image"])
def test_subclasses_of_tensor(make):
    pytorch, swapped = twins()
    x = images()
    x = x.as_subclass(Named) if make is Named else make(x)
    expected, actual = pytorch(x), swapped(x)
    assert type(actual) is type(expected)
    assert_same(actual.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
    assert not any(m.fallbacks for m in swapped if hasattr(m, "fallbacks"))


def test_distributed_tensors_fall_back():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = nn.Linear(3, 2)
        x = torch.randn(4, 3)
        expected = layer(x)
        report = tritonnn.swap(distribute_module(layer, mesh))
        assert_same(layer(distribute_tensor(x, mesh)).full_tensor(), expected)
        assert report.fallbacks == {"": {"tensor of type DTensor": 1}}
    finally:
        torch.distributed.destroy_process_group()


# Modes of autograd, threads, processes, devices, streams


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(mode, training):
    x = images()
    results = []
    for model in twins(training):
        with mode():
            y = model(x)
        results.append(
            (y.requires_grad, y.is_inference(), y.grad_fn is None, y.detach().clone(), list(model.buffers()))
        )
    assert results[1][:3] == results[0][:3]
    assert_same(results[1][3:], results[0][3:])


def test_a_network_made_in_inference_mode():
    with torch.inference_mode():
        pytorch, swapped = twins(training=True)
        x = images()
        assert_same(swapped(x), pytorch(x))
        assert_same(list(swapped.buffers()), list(pytorch.buffers()))


def test_two_threads_at_once():
    pytorch, swapped = twins()
    inputs = [images() for _ in range(4)]
    expected = [pytorch(x) for x in inputs]
    actual, errors = {}, []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                actual[i] = swapped(inputs[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_same([actual[i] for i in range(4)], expected)


class SwappedInTheWorker(Dataset):
    """Items that the worker computes with the network swapped, or restored where there is no interpreter."""

    def __init__(self, model: nn.Module, inputs: torch.Tensor) -> None:
        self.model, self.inputs = model, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad(), tritonnn.swapped(self.model) as report:
            assert len(report.swapped) == 7
            if DEVICE.type == "cpu":
                return self.model(self.inputs[i : i + 1])
        return self.model(self.inputs[i : i + 1]).detach()


def test_a_forked_data_loader_worker():
    pytorch, swapped = twins()
    x = images(4)
    expected = pytorch(x)
    assert_same(swapped(x), expected)  # kernels have run in the parent
    dataset = SwappedInTheWorker(copy.deepcopy(pytorch).cpu(), x.cpu())
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork")
    items = torch.cat([batch.flatten(0, 1) for batch in loader])
    assert_same(items.to(DEVICE), expected)
    assert_same(swapped(x), expected)


@pytest.mark.parametrize(
    "i",
    [0, 1, 2, 3, 4, 5, 7],
    ids=["conv2d", "batch_norm2d", "relu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "linear"],
)
def test_deterministic_algorithms_give_the_same_bits_twice(i):
    """Where PyTorch's layer refuses (on a GPU average pooling has no deterministic backward), so may Triton's."""
    pytorch, swapped = twins(training=True, dtype=torch.float32)
    x = image(16, *{0: (3, 16, 16), 7: (8,)}.get(i, (8, 16, 16))).requires_grad_()

    def run(layer: nn.Module) -> list[torch.Tensor] | None:
        try:
            y = layer(x * 1)
            return [y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))]
        except RuntimeError as error:
            assert "deterministic" in str(error)
            return None

    torch.use_deterministic_algorithms(True)
    try:
        expected, first, second = (run(layer) for layer in (pytorch[i], swapped[i], swapped[i]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first is not None or expected is None
    if first is not None:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_cuda_graph_of_a_warmed_network(training):
    pytorch, swapped = twins(training)
    static = images(4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            swapped(static), pytorch(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = swapped(static)
    for _ in range(2):
        x = images(4)
        static.copy_(x)
        graph.replay()
        with torch.no_grad():
            assert_same(y, pytorch(x))
    assert_same(list(swapped.buffers()), list(pytorch.buffers()))


@pytest.mark.gpu
def test_cuda_graph_of_a_training_step():
    pytorch, swapped = twins(training=True)
    x = images(4)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(swapped), (x.clone(),))
    for model in (pytorch, graphed):
        model(x).square().sum().backward()
    assert_same([p.grad for p in graphed.parameters()], [p.grad for p in pytorch.parameters()])


@pytest.mark.gpu
def test_side_stream():
    pytorch, swapped = twins(dtype=torch.float32)
    stream = torch.cuda.Stream()
    x = image(64, 3, 32, 32)
    with torch.no_grad():
        expected = pytorch[:7](x)
        swapped[:7](x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(500_000_000)  # some 0.3 s: kernels on another stream would run before the input is there
        y = swapped[:7](x * 1)
        assert not stream.query()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_second_gpu_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pytorch, swapped = (model.to("cuda:1") for model in twins(training=True))
    assert torch.cuda.current_device() == 0
    x = images(4).to("cuda:1")
    for model in (pytorch, swapped):
        y = model(x)
        assert y.device == torch.device("cuda", 1)
        y.square().sum().backward()
    assert_same([p.grad for p in swapped.parameters()], [p.grad for p in pytorch.parameters()])
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_data_parallel():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pytorch, swapped = twins()
    x = images(6)
    assert_same(nn.DataParallel(swapped)(x), pytorch(x))
