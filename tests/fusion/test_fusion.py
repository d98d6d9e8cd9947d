"""tritonnn.fuse: the same numbers, the right layers fused, and the model left alone."""

import copy
import pickle
import sys

import pytest
import torch
import torchvision
import triton
from helpers.compare import DEVICE, TOLERANCE, image
from helpers.fused import Net, assert_same
from helpers.trained import Untraceable, small, trained
from torch import Tensor, nn
from torch.nn import functional as F

import tritonnn
from lit_modules.resnet import ResNet18
from tritonnn.layers.fused.conv2d import FusedConv2d, FusedSum
from tritonnn.ops.conv2d.op import takes_shortcut
from tritonnn.runtime import hardware


def in_place_then_read(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    z = F.relu(y, inplace=True)
    return net.b(z) * y  # y after the ReLU


def conv_before_its_input_is_overwritten(net: Net, x: Tensor) -> Tensor:
    y = net.b(x)
    z = net.a(y)
    y.mul_(2)
    return (z + y).relu()


def overwritten_through_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    z = y.flatten(1)
    torch.relu_(z)
    return y + z.view(y.shape)


def preactivation(net: Net, x: Tensor) -> Tensor:
    y = net.norm(x)
    z = net.relu(y)
    z = net.b(net.a(z))
    z += y  # y has become its ReLU
    return z


def input_overwritten(net: Net, x: Tensor) -> Tensor:
    x += 1
    return net.a(x).relu_()


def list_of_results(net: Net, x: Tensor) -> Tensor:
    outputs = [net.a(x)]
    outputs += [net.b(outputs[0])]
    return torch.cat(outputs, 1).relu()


CONV, NORM = "conv2d", "conv2d + batch_norm2d"
FUSED = [
    pytest.param(lambda n, x: n.relu(n.norm(n.a(x))), [f"{NORM} + relu"], id="conv norm relu"),
    pytest.param(lambda n, x: F.relu(n.a(x)), [f"{CONV} + relu"], id="F.relu"),
    pytest.param(lambda n, x: F.relu(n.a(x), inplace=True), [f"{CONV} + relu"], id="F.relu in place"),
    pytest.param(lambda n, x: torch.relu(n.a(x)), [f"{CONV} + relu"], id="torch.relu"),
    pytest.param(lambda n, x: torch.relu_(n.a(x)), [f"{CONV} + relu"], id="torch.relu_"),
    pytest.param(lambda n, x: n.a(x).relu(), [f"{CONV} + relu"], id="Tensor.relu"),
    pytest.param(lambda n, x: n.a(x).relu_(), [f"{CONV} + relu"], id="Tensor.relu_"),
    pytest.param(lambda n, x: F.relu(n.a(x) + x), [f"{CONV} + residual + relu"], id="+"),
    pytest.param(lambda n, x: n.norm(n.a(x)).add_(x).relu(), [f"{NORM} + residual + relu"], id="add_"),
    pytest.param(lambda n, x: torch.add(x, n.a(x)), [f"{CONV} + residual"], id="torch.add"),
    pytest.param(lambda n, x: torch.add(input=x, other=n.a(x)), [f"{CONV} + residual"], id="torch.add by name"),
    pytest.param(lambda n, x: torch.add(x, n.a(x), alpha=2).relu(), [CONV], id="alpha"),
    pytest.param(lambda n, x: n.a(x) + 1, [CONV], id="plus a number"),
    pytest.param(lambda n, x: (lambda y: y + y)(n.a(x)), [CONV], id="plus itself"),
    pytest.param(lambda n, x: n.a(x) + x.mean((2, 3), True), [f"{CONV} + residual"], id="broadcast residual"),
    pytest.param(lambda n, x: n.a(x).mean((2, 3), True) + n.b(x), [CONV, f"{CONV} + residual"], id="broadcast other"),
    pytest.param(lambda n, x: (lambda y: n.norm(y) + y)(n.a(x)), [CONV], id="convolution with two users: norm stays"),
    pytest.param(
        lambda n, x: (lambda y: n.b(y) + y)(n.a(x).relu_()), [f"{CONV} + relu", f"{CONV} + residual"], id="branches"
    ),
    pytest.param(lambda n, x: (n.a(x) + n.b(x)).relu(), [CONV, f"{CONV} + residual + relu"], id="sum of two"),
    pytest.param(lambda n, x: (lambda y: y.relu() * y)(n.a(x)), [CONV], id="convolution with two users: ReLU stays"),
    pytest.param(lambda n, x: n.norm(n.b(n.norm(n.a(x)))), [NORM, NORM], id="norm called twice"),
    pytest.param(lambda n, x: n.a(n.norm(n.a(x))), [NORM, CONV], id="convolution called twice"),
    pytest.param(lambda n, x: n.relu(n.b(n.relu(n.a(x)))), [f"{CONV} + relu"] * 2, id="ReLU called twice"),
    pytest.param(lambda n, x: n.norm(x).tanh(), [], id="nothing to fuse"),
    pytest.param(lambda n, x: n.norm(x).relu(), ["batch_norm2d + relu"], id="norm before ReLU"),
    pytest.param(lambda n, x: (lambda y: y.relu() + y)(n.norm(x)), [], id="norm with two users"),
    pytest.param(in_place_then_read, [f"{CONV} + relu", CONV], id="read after ReLU in place"),
    pytest.param(conv_before_its_input_is_overwritten, [CONV, CONV], id="input overwritten before the sum"),
    pytest.param(overwritten_through_a_view, [CONV], id="overwritten through a view"),
    pytest.param(preactivation, [CONV, f"{CONV} + residual"], id="residual overwritten by ReLU"),
    pytest.param(
        lambda n, x: (lambda y: F.hardtanh(y, inplace=True).reshape(y.shape[0], -1))(n.norm(n.a(x))),
        [NORM],
        id="overwritten, its shape read",
    ),
    pytest.param(input_overwritten, [f"{CONV} + relu"], id="the model overwrites its input"),
    pytest.param(list_of_results, [CONV, CONV, "concatenation"], id="list"),
    pytest.param(lambda n, x: n.a(x).view(x.shape[0], -1), [CONV], id="view of an image"),
    pytest.param(
        lambda n, x: F.adaptive_avg_pool2d(F.max_pool2d(F.avg_pool2d(n.a(x), 2, padding=1), 2, 1), 1),
        [CONV],
        id="functional pools",
    ),
]


@pytest.mark.parametrize(("code", "fused"), FUSED)
def test_fused(code, fused):
    network = assert_same(trained(Net(code)), image(2, 4, 5, 6, dtype=torch.float64))
    assert list(network.report.fused.values()) == fused, network.report


LAYERS = [
    pytest.param(nn.Conv2d(4, 6, 3, 2, 1, bias=False), None, id="stride"),
    pytest.param(nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), groups=2), None, id="dilation, groups"),
    pytest.param(nn.Conv2d(4, 8, 3, padding=1, groups=4), None, id="depthwise"),
    pytest.param(nn.Conv2d(4, 6, 3, padding="same"), None, id="same"),
    pytest.param(nn.Conv2d(4, 6, 3, padding="valid"), None, id="valid"),
    pytest.param(nn.Conv2d(4, 6, 2, padding="same"), "padding 'same' that differs between the sides", id="same, even"),
    pytest.param(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'", id="reflect"),
]


@pytest.mark.parametrize(("layer", "reason"), LAYERS)
def test_arguments_of_a_convolution(layer, reason):
    model = trained(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()))
    fused = assert_same(model, image(2, 4, 6, 5, dtype=torch.float64))
    if reason is None:
        assert fused.report.fused == {"0": "conv2d + batch_norm2d + relu"} and not fused.report.apart
    else:
        assert fused.report.apart["0"] == reason and list(fused.report.swapped) == ["0"]
        assert fused.report.fused == {"1_relu": "batch_norm2d + relu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_types_and_memory_formats(dtype, channels_last):
    model = trained(Net(lambda n, x: n.relu(n.norm(n.a(x)) + x)), dtype)
    fused = assert_same(model, image(2, 4, 5, 6, dtype=dtype, channels_last=channels_last))
    assert fused.network.a.weight.dtype == dtype and fused.network.a.bias.dtype == torch.float32
    y = fused.network.a(*[image(2, 4, 5, 6, dtype=dtype, channels_last=channels_last)] * 2)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)], ids=str)
def test_linear(shape):
    model = trained(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)))
    fused = assert_same(model, image(*shape, dtype=torch.float64))
    assert fused.report.fused == {"0": "linear + relu", "2": "linear"}


def test_linear_with_a_residual():
    class Residual(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (F.linear(x, self.weight, self.bias) + x).relu()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.layer(x) + y)

    x = image(3, 5, dtype=torch.float64)
    fused = assert_same(trained(Block()), x, image(3, 5, dtype=torch.float64))
    assert fused.report.fused == {"layer": "linear + residual + relu"} and not fused.report.fallbacks
    assert_same(trained(Block()), x, image(1, 5, dtype=torch.float64))
    subclass = assert_same(trained(nn.Sequential(Residual(5, 5))), x)
    assert not subclass.report.fused and "subclass of Linear" in subclass.report.stayed["0"]


def test_a_broadcast_residual_is_counted():
    fused = assert_same(
        trained(Net(lambda n, x: n.a(x) + x.mean((2, 3), True))), image(2, 4, 5, 5, dtype=torch.float64)
    )
    assert fused.report.fallbacks == {"a": {"the residual is broadcast": 1}}
    assert "fell back to PyTorch: a: the residual is broadcast (1 calls)" in str(fused.report)


def test_unbatched_and_empty_batches():
    model = trained(Net(lambda n, x: n.relu(n.a(x) + x)))
    assert_same(model, image(4, 5, 6, dtype=torch.float64))
    assert tritonnn.fuse(model)(image(0, 4, 5, 6, dtype=torch.float64)).shape == (0, 4, 5, 6)


def test_wrong_input_is_pytorchs_error():
    fused = tritonnn.fuse(trained(nn.Conv2d(4, 4, 3)))
    for wrong in (image(1, 3, 5, 5, dtype=torch.float64), image(1, 4, 5, 5), image(1, 4, 2, 2, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as actual:
            fused(wrong)
        with pytest.raises(RuntimeError) as expected:
            F.conv2d(wrong, fused.network.get_submodule("0").weight, fused.network.get_submodule("0").bias)
        assert str(actual.value) == str(expected.value)


NORMS = [
    pytest.param(nn.BatchNorm2d(4, affine=False), True, id="no affine"),
    pytest.param(nn.BatchNorm2d(4, momentum=None, eps=0.1), True, id="eps"),
    pytest.param(nn.BatchNorm2d(4, track_running_stats=False), False, id="no running statistics"),
]


@pytest.mark.parametrize(("norm", "folds"), NORMS)
def test_batch_norm(norm, folds):
    fused = assert_same(trained(Net(lambda n, x: n.norm(n.a(x)), norm=norm)), image(2, 4, 5, 5, dtype=torch.float64))
    assert fused.report.fused == {"a": NORM if folds else CONV}
    assert fused.report.apart == ({} if folds else {"norm": "it has no running statistics"})
    assert fused.report.swapped == ({} if folds else {"norm": "batch_norm2d"})


def test_weights_are_folded_in_float64():
    model = trained(Net(lambda n, x: n.norm(n.a(x))), torch.float32)
    fused = tritonnn.fuse(model)
    fused.network.a.bias.zero_()
    scale = model.norm.weight.double() / (model.norm.running_var.double() + model.norm.eps).sqrt()
    weight = (model.a.weight.double() * scale[:, None, None, None]).float()
    x = torch.zeros(4, 4, 3, 3, device=DEVICE)
    x[range(4), range(4), 1, 1] = 1  # y is the weight
    torch.testing.assert_close(fused(x), F.conv2d(x, weight, padding=1), rtol=1e-7, atol=0)


def errors_of_a_block(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[float, float, float]:
    """Errors of the exact result in this type, PyTorch's and the fused one, with autocast where the model has another.

    2-norms, relative to that of the exact result.
    """
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        fused = tritonnn.fuse(model)
        with torch.autocast(DEVICE.type, dtype, enabled=x.dtype != dtype):
            results = exact.to(dtype), model(x), fused(x)
    assert all(y.dtype == dtype for y in results)
    return tuple(float((y.double() - exact).norm() / exact.norm()) for y in results)


def test_16_bit_weights_are_not_rounded_again():
    """The batch norm scales the sums: folded into the weights it would cost as much precision as bfloat16 itself."""
    model = trained(nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32))).to(DEVICE, torch.bfloat16)
    rounding, pytorch, fused = errors_of_a_block(model, image(2, 16, 12, 12, dtype=torch.bfloat16), torch.bfloat16)
    assert fused < 1.02 * rounding  # that of the result alone
    assert fused < pytorch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("running_var, size", [(1e-12, 1e-3), (1e-4, 1), (1e4, 1), (1e8, 1), (1e10, 10)], ids=str)
@pytest.mark.parametrize("groups", [1, 4, 16], ids="{} groups".format)
def test_batch_norm_of_any_scale_under_autocast(groups, running_var, size, dtype):
    """Folded into weights of 16 bits it would leave float16's range; `size` keeps the result within it."""
    norm = nn.BatchNorm2d(32, eps=1e-12)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False, groups=groups), norm).to(DEVICE).eval()
    norm.running_var.fill_(running_var)
    _, pytorch, fused = errors_of_a_block(model, size * image(2, 16, 12, 12), dtype)
    assert fused <= 1.02 * pytorch


def test_float16_afterwards_of_a_batch_norm_of_a_small_scale():
    model = trained(nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32, affine=False)), torch.float32)
    model[1].running_var.mul_(1e4)
    model[0].weight.data.mul_(1e-2)
    x = 1e3 * image(2, 16, 12, 12)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        fused = tritonnn.fuse(model).half()(x.half())
        pytorch = model.half()(x.half())
    errors = [float((y.double() - exact).norm()) for y in (pytorch, fused)]
    assert errors[1] <= 1.02 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_scale_counts(dtype):
    fused = tritonnn.fuse(trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), dtype))
    layer, x = fused.network.get_submodule("0"), image(1, 4, 5, 5, dtype=dtype)
    before = fused(x)
    layer.scale.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(fused(x), 2 * before)
    layer.scale = layer.scale / 2
    layer.bias = layer.bias / 2
    torch.testing.assert_close(fused(x), before)


def test_training_mode_is_an_error():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first; training: the model, 0, 1"):
        tritonnn.fuse(model.train())
    model.eval()[1].train()
    with pytest.raises(RuntimeError, match="training: 1"):
        tritonnn.fuse(model)


def test_the_fused_network_is_for_inference():
    fused = tritonnn.fuse(trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    assert not fused.training and fused.eval() is fused
    assert not any(p.requires_grad for p in fused.parameters())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fused.train()
    with pytest.raises(ValueError, match="fused already"):
        tritonnn.fuse(fused)
    x = image(1, 4, 3, 3, dtype=torch.float64)
    assert not fused(x).requires_grad
    with pytest.raises(RuntimeError, match="no gradients"):
        fused(x.requires_grad_())
    with torch.no_grad():
        fused(x)


def test_the_model_is_left_alone():
    model = trained(ResNet18(width=2), torch.float32)
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    fused = tritonnn.fuse(model)
    for tensor in (*fused.parameters(), *fused.buffers()):
        tensor.zero_()
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in fused.state_dict().values()}


def test_a_swapped_model():
    model = trained(ResNet18(width=2))
    tritonnn.swap(model)
    fused = assert_same(model, image(1, 3, 32, 32, dtype=torch.float64))
    assert len(fused.report.fused) == 21 and list(fused.report.swapped.values()) == ["max_pool2d"]


def test_changed_weights_count():
    fused, x = tritonnn.fuse(small()), image(1, 4, 5, 5, dtype=torch.float64)
    layer = fused.network.get_submodule("0")
    before = fused(x)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(fused(x), 2 * before - fused.network.get_submodule("3").bias[:, None, None])
    layer.weight = layer.weight / 2
    layer.bias = layer.bias / 2
    torch.testing.assert_close(fused(x), before)
    fused.load_state_dict({name: torch.zeros_like(t) for name, t in fused.state_dict().items()})
    assert not fused(x).any()


def test_another_type_afterwards():
    model, x = small(), image(2, 4, 5, 5, dtype=torch.float64)
    fused = tritonnn.fuse(model)
    expected = fused(x)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        fused = tritonnn.fuse(model).to(dtype)
        layer = fused.network.get_submodule("0")
        assert layer.weight.dtype == dtype
        assert layer.bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        actual = fused(x.to(dtype))
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_autocast():
    model = trained(Net(lambda n, x: n.a(x).relu() + n.b(x)), torch.float32)
    fused, x = tritonnn.fuse(model), image(2, 4, 5, 5)
    plain = fused(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected, actual = model(x), fused(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), plain, rtol=0.02, atol=0.05)
    torch.testing.assert_close(fused(x), plain, rtol=0, atol=0)


def test_changed_weights_count_in_another_type():
    fused, x = tritonnn.fuse(small().float()), image(1, 4, 5, 5)
    last = fused.network.get_submodule("3")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        before = fused(x)
        last.weight.mul_(2)
        last.bias.mul_(2)
        torch.testing.assert_close(fused(x), 2 * before)


@pytest.mark.parametrize("in_place", [False, True])
def test_autocast_with_a_residual_of_another_type(in_place):
    def code(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        if in_place:
            y += x
            return y
        return y + x

    model, x = trained(Net(code), torch.float32), image(2, 4, 5, 5)
    fused = tritonnn.fuse(model)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected, actual = model(x), fused(x)
    assert actual.dtype == expected.dtype == (torch.bfloat16 if in_place else torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05)


def test_inside_inference_mode():
    x = image(1, 4, 5, 5, dtype=torch.float64)
    with torch.inference_mode():
        fused = tritonnn.fuse(small())
        expected = fused(x)
    torch.testing.assert_close(fused(x), expected)
    assert not any(t.is_inference() for t in fused.state_dict().values())


def test_copies():
    fused, x = tritonnn.fuse(small(), cuda_graph=True), image(1, 4, 5, 5, dtype=torch.float64)
    expected = fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), expected)
        twin.network.get_submodule("0").weight.zero_()
    torch.testing.assert_close(fused(x), expected)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, y: 2 * y)
    return module


@pytest.mark.parametrize("name", ["a", "norm", "relu", ""])
def test_a_hook_is_called(name):
    model = trained(Net(lambda n, x: n.relu(n.norm(n.a(x)))))
    hooked(model.get_submodule(name))
    fused = assert_same(model, image(1, 4, 5, 5, dtype=torch.float64))
    reasons = fused.report.apart if name else fused.report.untraced
    assert reasons[name] == "it has hooks"


def test_a_model_that_cannot_be_traced():
    fused = assert_same(trained(Untraceable()), image(2, 4, 6, 7, dtype=torch.float64)[..., :6])
    report = fused.report
    assert report.untraced[""].startswith("TraceError: symbolically traced variables cannot be used as inputs")
    assert report.fused == {
        "features.0": "conv2d + batch_norm2d + relu",
        "steps.0.0": "conv2d + relu",
        "steps.1.0": "conv2d + relu",
        "looped.0": "conv2d + relu",
    }
    assert report.swapped == {"features.3": "max_pool2d", "head": "linear"}
    assert "not traced: (the model): TraceError" in str(report)
    x = image(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(copy.deepcopy(fused)(x), fused(x))
    assert len(fused.network.looped) == 2


def test_a_part_that_cannot_be_traced():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), Untraceable(), nn.Linear(3, 2), nn.ReLU()))
    fused = assert_same(model, image(2, 3, 6, 6, dtype=torch.float64))
    assert list(fused.report.untraced) == ["2"]
    assert fused.report.fused["0"] == "conv2d + relu" and fused.report.fused["3"] == "linear + relu"
    assert fused.report.fused["2.features.0"] == "conv2d + batch_norm2d + relu"


def test_autocast_in_the_model_itself():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return self.layer(x)

    model, x = trained(nn.Sequential(nn.Conv2d(4, 4, 1), Casting()), torch.float32), image(2, 4, 3, 3)
    fused = tritonnn.fuse(model)
    assert fused.report.untraced == {"1": "RuntimeError: it sets autocast itself"}
    assert fused.report.fused == {"0": "conv2d", "1.layer.0": "conv2d + relu"}
    actual = fused(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, model(x).detach(), rtol=0.02, atol=0.05)


def test_an_optional_argument():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.layer(x)
            return y if mask is None else y * mask

    fused = assert_same(trained(Optional()), image(2, 4, 3, 3, dtype=torch.float64))
    assert fused.report.fused == {"layer": "conv2d"}


def test_report_of_resnet18(monkeypatch):
    monkeypatch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
    model = trained(ResNet18(width=2))
    report = assert_same(model, image(2, 3, 32, 32, dtype=torch.float64)).report
    assert report.fused["stages.1.0.conv2"] == "conv2d + batch_norm2d"
    assert report.fused["stages.1.0.shortcut.conv"] == "conv2d + batch_norm2d + residual + relu"
    assert report.swapped == {"stem.pool": "max_pool2d"}
    assert not report.apart and not report.untraced and not report.fallbacks
    assert str(report).splitlines() == [
        "fused: 9 conv2d + batch_norm2d + relu, 8 conv2d + batch_norm2d + residual + relu, 3 conv2d + batch_norm2d, "
        "1 avg_pool2d + linear",
        "Triton layers of their own: 1 max_pool2d",
        "stayed PyTorch: check_images: no Triton layer for the function check_images",
    ]


OF_FEW_PIXELS = {1: True, 3: True, 512: False}
"""By the number of images of 32x32, whether the shortcuts of ResNet18 are in the kernels of their blocks."""


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "expected"), OF_FEW_PIXELS.items())
def test_which_shortcuts_hopper_takes_in_the_kernel(n, expected, dtype):
    for c, side in ((128, 16), (256, 8), (512, 4)):
        x = torch.empty(n, c, side, side, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        assert takes_shortcut(x, c, (3, 3), side, side, c // 2) is expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee"), (torch.float16, "ieee")],
    ids=str,
)
def test_a_shortcut_of_few_pixels_is_in_the_kernel_of_its_block(dtype, tf32, monkeypatch):
    torch.backends.cudnn.conv.fp32_precision = tf32
    called = []
    in_one_kernel = FusedSum._in_one_kernel

    def noted(*args) -> bool:
        called.append(in_one_kernel(*args))
        return called[-1]

    monkeypatch.setattr(FusedSum, "_in_one_kernel", staticmethod(noted))
    model = trained(ResNet18(), dtype)
    for n in [n for n, few in OF_FEW_PIXELS.items() if few]:
        x = image(n, 3, 32, 32, dtype=dtype, channels_last=True)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            apart, together = ((net(x).double() - exact).norm() / exact.norm() for net in (model, tritonnn.fuse(model)))
        assert called == [True] * 6  # the first call goes through the network twice, to compile ahead
        called.clear()
        assert together < 2 * apart + 1e-6


@pytest.mark.parametrize("one_tap_first", [True, False])
def test_a_shortcut_reads_its_input_before_that_is_overwritten(one_tap_first):
    def code(net: Net, x: Tensor) -> Tensor:
        first, last = (net.b, net.a) if one_tap_first else (net.a, net.b)
        y = F.relu(x)
        z = first(y)
        y.mul_(2)
        return (last(y) + z).relu()

    assert_same(trained(Net(code)), image(2, 4, 5, 5, dtype=torch.float64))


class Head(nn.Module):
    """An average pool and a linear layer; `code(net, x)` says what lies between them."""

    def __init__(self, pool: nn.Module, features: int = 4, outputs: int = 3, code=None) -> None:
        super().__init__()
        self.pool, self.flatten, self.linear = pool, nn.Flatten(), nn.Linear(features, outputs)
        self.code = code or (lambda net, y: net.linear(net.flatten(y)))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.pool(x.relu()))


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(lambda: Head(nn.AvgPool2d(5)), id="whole image"),
        pytest.param(lambda: Head(nn.AdaptiveAvgPool2d(1)), id="adaptive"),
        pytest.param(
            lambda: Head(nn.AdaptiveAvgPool2d((1, 1)), code=lambda n, y: n.linear(torch.flatten(y, 1))), id="f"
        ),
        pytest.param(lambda: Head(nn.AvgPool2d(5), outputs=64), id="64 outputs"),
        pytest.param(lambda: Head(nn.AvgPool2d(5), outputs=65), id="many outputs"),
        pytest.param(lambda: Head(nn.AvgPool2d(2), 16), id="parts of the image"),
        pytest.param(lambda: Head(nn.AvgPool2d(5, padding=1, stride=5)), id="padding"),
        pytest.param(lambda: Head(nn.AvgPool2d(5, divisor_override=3)), id="divisor"),
        pytest.param(lambda: Head(nn.AvgPool2d(5), code=lambda n, y: n.linear(n.flatten(y)).relu()), id="relu"),
        pytest.param(lambda: Head(nn.AdaptiveAvgPool2d((1, 2)), 8), id="two windows"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_average_pool_and_linear_layer(head, dtype):
    model = head().eval().to(DEVICE, dtype)
    for x in (image(3, 4, 5, 5, dtype=dtype), image(1, 4, 5, 5, dtype=dtype, channels_last=True)):
        report = assert_same(model, x).report
    assert report.fused["linear"].startswith("avg_pool2d + linear") and not report.swapped.keys() - {"functional_relu"}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(lambda net, y: net.linear(net.flatten(y)) + y.mean(), id="pool used twice"),
        pytest.param(lambda net, y: net.linear(net.flatten(y * 2)), id="something between"),
        pytest.param(lambda net, y: net.linear(y.flatten(1).mul_(2)), id="overwritten between"),
        pytest.param(lambda net, y: net.linear(y.flatten(0).view(-1, 4)), id="flattened otherwise"),
    ],
)
def test_average_pool_apart_from_the_linear_layer(code):
    model = Head(nn.AvgPool2d(5), code=code).eval().to(DEVICE, torch.float64)
    report = assert_same(model, image(2, 4, 5, 5, dtype=torch.float64)).report
    assert report.fused["linear"].startswith("linear") and report.swapped["pool"] == "avg_pool2d"


def test_what_only_convolutions_read_is_rounded_once_in_tf32():
    """What is read elsewhere too, or only added, is not: the last result, and the summands of the shortcuts."""
    network = tritonnn.fuse(trained(ResNet18(width=64))).network
    convolutions = {name: m for name, m in network.named_modules() if isinstance(m, FusedConv2d)}
    exact = {name for name, m in convolutions.items() if not m.round_output}
    assert exact == {"stages.3.1.conv2", *(f"stages.{i}.0.shortcut.conv.other" for i in (1, 2, 3))}
    assert [name for name, m in convolutions.items() if not m.rounded_input] == ["stem.conv"]


def test_what_a_convolution_without_tf32_reads_is_not_rounded(monkeypatch):
    """b and c read what a gives: b, whose sums are short, uses TF32 for many images only, c always."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    monkeypatch.setattr("tritonnn.runtime.precision._on_tensor_cores", lambda x: True)
    layers = {"a": nn.Conv2d(64, 48, 3, padding=1), "b": nn.Conv2d(48, 64, 1), "c": nn.Conv2d(48, 64, 3, padding=1)}
    layers["pool"] = nn.MaxPool2d(2)

    def rounded(code, N: int) -> dict[str, bool]:
        """Whether a rounds its result, and whether the others take theirs for rounded."""
        network, x = tritonnn.fuse(Net(code, **layers).eval()).network, torch.empty(N, 64, 32, 32, device="meta")
        convolutions = {name: layer for name, layer in network.named_modules() if isinstance(layer, FusedConv2d)}
        return {name: m.rounds_output_for(x) if name == "a" else m.has_rounded(x) for name, m in convolutions.items()}

    def both(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y) * net.c(y)

    assert rounded(both, N=1) == {"a": False, "b": False, "c": False}
    assert rounded(both, N=1024) == {"a": True, "b": True, "c": True}
    for N in (1, 1024):  # behind a pool b sees another size than a
        assert rounded(lambda net, x: net.b(net.pool(net.a(x))), N) == {"a": False, "b": False}
        assert rounded(lambda net, x: net.c(net.pool(net.a(x))), N) == {"a": True, "c": True}


def test_a_convolution_whose_result_leaves_the_network_is_not_rounded():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return y, self.b(y)

    network = tritonnn.fuse(Both().eval()).network
    assert not network.a.round_output and not network.b.rounded_input


@pytest.mark.parametrize("relu", [True, False])
def test_signs_of_zeros_matter_to_a_pool_unless_it_follows_a_relu(relu):
    layers = [nn.Conv2d(4, 4, 1), *[nn.ReLU()] * relu, nn.MaxPool2d(2)]
    network = tritonnn.fuse(nn.Sequential(*layers).eval()).network
    (pool,) = (m for m in network.modules() if isinstance(m, nn.MaxPool2d))
    assert pool.signed_zeros is not relu


def small_resnet() -> nn.Module:
    resnet = torchvision.models.resnet
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 4, width_per_group=4)


models = torchvision.models
Inception = sys.modules["torchvision.models.googlenet"].Inception  # the name is taken by a function
NETWORKS = [
    pytest.param(small_resnet, 18, 4, id="resnet"),
    pytest.param(lambda: models.MobileNetV2(4, width_mult=0.1), 53, 11, id="mobilenet_v2"),
    pytest.param(lambda: models.ShuffleNetV2([1, 1, 1], [4, 8, 16, 32, 32], 4), 24, 0, id="shufflenet"),
    pytest.param(lambda: models.DenseNet(4, (1, 2), 8, 2, num_classes=4), 15, 0, id="densenet"),
    pytest.param(lambda: models.vgg.make_layers([4, "M", 8, "M"], batch_norm=True), 2, 0, id="vgg"),
    pytest.param(
        lambda: sys.modules["torchvision.models.googlenet"].Inception(3, 4, 4, 4, 4, 4, 4), 6, 0, id="inception"
    ),
]


@pytest.mark.parametrize(("network", "fused", "residuals"), NETWORKS)
def test_networks_of_torchvision(network, fused, residuals):
    model = trained(network())
    report = assert_same(model, image(1, 3, 32, 32, dtype=torch.float64)).report
    assert len(report.fused) == fused and not report.untraced and not report.fallbacks
    assert sum("residual" in what for what in report.fused.values()) == residuals


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
def test_fused_layers_print():
    layer = tritonnn.fuse(small()).network.get_submodule("0")
    assert isinstance(layer, FusedConv2d) and "[8, 4, 3, 3]" in repr(layer) and "relu" in repr(layer)
