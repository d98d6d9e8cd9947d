"""tritonnn.fuse: activations of modules, functions and methods in the kernels of convolutions and linear layers."""

import copy
import pickle

import pytest
import torch
import torchvision
from helpers.compare import DEVICE, TOLERANCE, image
from helpers.fused import Net, assert_same
from helpers.problems import product
from helpers.random_programs import type_on
from helpers.trained import trained
from torch import Tensor, nn
from torch.nn import functional as F

import tritonnn
from tritonnn.device.activation import ACTIVATIONS
from tritonnn.ops.conv2d import op
from tritonnn.ops.conv2d.dispatch import default_choice
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.runtime.launch_plan import forget_plans

MODULES = [
    ("relu", nn.ReLU()),
    ("relu6", nn.ReLU6()),
    ("relu6", nn.ReLU6(inplace=True)),
    ("relu6", nn.Hardtanh(0, 6)),
    ("relu6", nn.Hardtanh(0.0, 6.0, inplace=True)),
    ("leaky_relu", nn.LeakyReLU()),
    ("leaky_relu", nn.LeakyReLU(0.2, inplace=True)),
    ("leaky_relu", nn.LeakyReLU(2)),
    ("silu", nn.SiLU()),
    ("silu", nn.SiLU(inplace=True)),
    ("hardswish", nn.Hardswish()),
    ("hardswish", nn.Hardswish(inplace=True)),
    ("hardsigmoid", nn.Hardsigmoid()),
    ("hardsigmoid", nn.Hardsigmoid(inplace=True)),
    ("sigmoid", nn.Sigmoid()),
    ("gelu", nn.GELU()),
    ("gelu_tanh", nn.GELU("tanh")),
]
FUNCTIONS = [
    ("relu6", "F.relu6(y)"),
    ("relu6", "F.relu6(y, inplace=True)"),
    ("relu6", "F.relu6(y, True)"),
    ("relu6", "F.hardtanh(y, 0, 6)"),
    ("relu6", "F.hardtanh(y, max_val=6.0, min_val=0.0, inplace=True)"),
    ("relu6", "F.hardtanh_(y, 0, 6)"),
    ("relu6", "y.clamp(0, 6)"),
    ("relu6", "y.clamp_(0, 6)"),
    ("relu6", "torch.clamp(y, min=0, max=6)"),
    ("leaky_relu", "F.leaky_relu(y)"),
    ("leaky_relu", "F.leaky_relu(y, 0.2)"),
    ("leaky_relu", "F.leaky_relu(input=y, negative_slope=-0.5, inplace=True)"),
    ("leaky_relu", "F.leaky_relu_(y, 0.2)"),
    ("silu", "F.silu(y)"),
    ("silu", "F.silu(y, inplace=True)"),
    ("hardswish", "F.hardswish(y)"),
    ("hardswish", "F.hardswish(y, True)"),
    ("hardsigmoid", "F.hardsigmoid(y)"),
    ("hardsigmoid", "F.hardsigmoid(y, inplace=True)"),
    ("sigmoid", "torch.sigmoid(y)"),
    ("sigmoid", "torch.sigmoid_(y)"),
    ("sigmoid", "F.sigmoid(y)"),
    ("sigmoid", "y.sigmoid()"),
    ("sigmoid", "y.sigmoid_()"),
    ("gelu", "F.gelu(y)"),
    ("gelu", "F.gelu(y, approximate='none')"),
    ("gelu_tanh", "F.gelu(y, approximate='tanh')"),
]
OTHERS = [
    "F.hardtanh(y)",
    "F.hardtanh(y, 0, 5)",
    "y.clamp(min=0)",
    "y.clamp(-1, 6)",
    "torch.clamp(y, y.mean(), y.max())",
    "F.leaky_relu(y, x.shape[1] / 8)",
    "F.prelu(y, torch.full_like(y[0, :, 0, 0], 0.1))",
    "torch.sigmoid(y, out=torch.empty_like(y))",
    "y.tanh()",
]
OF_EVERY_KIND = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.3),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
}


def function(source: str):
    """The source as code of a network `n`, a convolution's result `y` and its input `x`."""
    return eval(f"lambda n, y, x: {source}", {"F": F, "torch": torch})


TYPE = type_on(DEVICE)
"""The type of the tests: not float64 on a GPU, where PyTorch's hardswish multiplies by 1 / 6 in float32."""


def wide(*shape: int, dtype: torch.dtype = TYPE) -> Tensor:
    """Values among which every piece of every activation is met: up to about 12 on either side."""
    return 4 * image(*shape, dtype=dtype)


def ready(model: nn.Module) -> nn.Module:
    return trained(model, TYPE)


@pytest.mark.parametrize(("name", "module"), MODULES, ids=[f"{module}" for _, module in MODULES])
def test_modules(name, module):
    for layer, x in ((nn.Conv2d(4, 5, 3), wide(2, 4, 5, 6)), (nn.Linear(6, 5), wide(3, 6))):
        report = assert_same(ready(nn.Sequential(layer, copy.deepcopy(module))), x).report
        kind = "linear" if isinstance(layer, nn.Linear) else "conv2d"
        assert report.fused == {"0": f"{kind} + {name}"} and not report.apart and not report.stayed


@pytest.mark.parametrize(("name", "source"), FUNCTIONS, ids=[source for _, source in FUNCTIONS])
def test_functions(name, source):
    called = function(source)
    report = assert_same(ready(Net(lambda n, x: called(n, n.norm(n.a(x)), x))), wide(2, 4, 5, 6)).report
    assert report.fused == {"a": f"conv2d + batch_norm2d + {name}"} and not report.apart and not report.stayed


@pytest.mark.parametrize("source", OTHERS)
def test_what_is_no_activation_of_an_epilogue_stays_pytorchs(source):
    called = function(source)
    report = assert_same(ready(Net(lambda n, x: called(n, n.a(x), x))), wide(2, 4, 5, 6)).report
    assert report.fused == {"a": "conv2d"} and report.stayed


def test_there_is_a_module_of_every_kind():
    assert tuple(OF_EVERY_KIND) == ACTIVATIONS


@pytest.mark.parametrize("name", OF_EVERY_KIND)
@pytest.mark.parametrize(
    ("code", "steps"),
    [
        (lambda n, x: n.act(n.norm(n.a(x)) + x), "conv2d + batch_norm2d + residual"),
        (lambda n, x: n.act(n.norm(n.a(x)).add_(x)), "conv2d + batch_norm2d + residual"),
        (lambda n, x: n.act(x + n.linear(x)), "linear + residual"),
        (lambda n, x: n.act(n.a(x) + x.mean((2, 3), True)), "conv2d + residual"),
    ],
    ids=["sum", "sum in place", "linear", "broadcast"],
)
def test_the_residual_is_added_before_the_activation(name, code, steps):
    model = ready(Net(code, act=copy.deepcopy(OF_EVERY_KIND[name]), linear=nn.Linear(4, 4)))
    report = assert_same(model, wide(2, 4, 5, 4)).report
    assert list(report.fused.values()) == [steps if name == "none" else f"{steps} + {name}"]


@pytest.mark.parametrize(
    ("code", "fused"),
    [
        pytest.param(
            lambda n, x: (lambda y: F.silu(y, inplace=True) * y)(n.a(x)),
            ["conv2d + silu"],
            id="read under its old name",
        ),
        pytest.param(lambda n, x: (lambda y: F.silu(y) * y)(n.a(x)), ["conv2d"], id="its input is read too"),
        pytest.param(
            lambda n, x: (lambda y: n.b(y) + F.silu(y, inplace=True))(n.a(x)),
            ["conv2d", "conv2d + residual"],
            id="overwritten after another has read it",
        ),
        pytest.param(
            lambda n, x: (lambda y: n.b(y) * F.hardswish(y.flatten(1), inplace=True).sum() + y)(n.a(x)),
            ["conv2d", "conv2d"],
            id="overwritten through a view",
        ),
        pytest.param(lambda n, x: n.a(F.silu(x, inplace=True)), ["conv2d"], id="the model overwrites its input"),
        pytest.param(
            lambda n, x: n.b(F.silu(n.reflect(x), inplace=True).add_(x)), ["conv2d"], id="after an unfused convolution"
        ),
        pytest.param(
            lambda n, x: F.hardsigmoid(F.hardswish(n.a(x), True), True), ["conv2d + hardswish"], id="one after another"
        ),
        pytest.param(
            lambda n, x: F.silu(n.a(x), True).add_(n.b(x)), ["conv2d + silu", "conv2d + residual"], id="then a sum"
        ),
    ],
)
def test_in_place(code, fused):
    reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert list(assert_same(ready(Net(code, reflect=reflect)), wide(2, 4, 5, 6)).report.fused.values()) == fused


def test_a_changed_module_is_called():
    hooked, replaced = nn.SiLU(), nn.SiLU()
    hooked.register_forward_hook(lambda module, args, y: 2 * y)
    replaced.forward = lambda x: x + 1

    class Sharper(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    for act, reason in ((hooked, "it has hooks"), (replaced, "its forward was replaced"), (Sharper(), None)):
        report = assert_same(ready(Net(lambda n, x: n.act(n.a(x)), act=act)), wide(2, 4, 5, 6)).report
        assert report.fused == {"a": "conv2d"} and report.apart.get("act") == reason


def test_the_report_tells_of_activations_apart():
    def code(net: Net, x: Tensor) -> Tensor:
        y = net.a(net.act(x))
        return net.act(y) * y

    report = tritonnn.fuse(ready(Net(code, act=nn.SiLU()))).report
    assert report.apart["act"] == "what it follows is used elsewhere too"
    assert report.stayed["act"] == "no Triton layer for SiLU"


def test_layers_print_and_are_copied_with_their_activation():
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.3), nn.Conv2d(4, 4, 1), nn.SiLU()))
    fused, x = tritonnn.fuse(model), wide(2, 4, 3, 3)
    assert "then=['leaky_relu(0.3)']" in repr(fused.network) and "then=['silu']" in repr(fused.network)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), fused(x), rtol=0, atol=0)


def test_slopes_of_layers_of_one_shape_are_told_apart():
    layers = [layer for slope in (0.1, 0.5, 2.0) for layer in (nn.Conv2d(4, 4, 1), nn.LeakyReLU(slope))]
    fused = assert_same(ready(nn.Sequential(*layers)), wide(2, 4, 5, 5))
    assert list(fused.report.fused.values()) == ["conv2d + leaky_relu"] * 3
    assert_same(ready(nn.Sequential(*layers)), wide(2, 4, 5, 5))


models = torchvision.models


@pytest.mark.parametrize(
    ("network", "activations"),
    [
        pytest.param(lambda: models.MobileNetV2(4, width_mult=0.1), {"relu6": 35}, id="mobilenet_v2"),
        pytest.param(
            lambda: models.mobilenet_v3_small(num_classes=4),
            {"hardswish": 18 + 1, "relu": 5 + 9, "hardsigmoid": 9},
            id="mobilenet_v3",
        ),
        pytest.param(
            lambda: models.efficientnet_b0(num_classes=4), {"silu": 33 + 16, "sigmoid": 16}, id="efficientnet"
        ),
    ],
)
def test_networks_of_torchvision(network, activations):
    """All activations follow a convolution or linear layer, those of squeeze-and-excitation too."""
    fused = tritonnn.fuse(network().eval())
    steps = [step for what in fused.report.fused.values() for step in what.split(" + ")]
    assert {name: steps.count(name) for name in ACTIVATIONS if name in steps} == activations
    assert not any("activation" in reason for reason in fused.report.stayed.values())


def errors(
    model: nn.Module, x: Tensor, casts_to: torch.dtype | None = None, fused_layers: int = 1
) -> tuple[float, float]:
    """Errors of PyTorch's network and the fused one, in the 2-norm, relative; with autocast to a type, if any."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        fused = tritonnn.fuse(model)
        with torch.autocast(DEVICE.type, casts_to or torch.bfloat16, enabled=casts_to is not None):
            expected, actual = model(x), fused(x)
    assert not fused.report.fallbacks and len(fused.report.fused) == fused_layers, fused.report
    assert actual.dtype == expected.dtype
    return tuple(float((y.double() - exact).norm() / exact.norm()) for y in (expected, actual))


@pytest.mark.parametrize("name", OF_EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("casts", [False, True], ids=["16-bit weights", "autocast"])
def test_16_bit_results_are_rounded_once(name, dtype, casts):
    """PyTorch rounds after each step, the kernel once, at the end."""
    layers = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), copy.deepcopy(OF_EVERY_KIND[name])
    given = torch.float32 if casts else dtype
    model = trained(nn.Sequential(*layers), given)
    pytorch, fused = errors(model, 2 * image(2, 8, 9, 9, dtype=given), dtype if casts else None)
    assert fused <= 1.02 * pytorch


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_float32(name):
    model = trained(nn.Sequential(nn.Conv2d(8, 16, 3), copy.deepcopy(OF_EVERY_KIND[name])), torch.float32)
    _, fused = errors(model, 2 * image(2, 8, 9, 9))
    assert fused < TOLERANCE[torch.float32] / 10


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_nan_and_infinities(name):
    """As PyTorch's in float64: -inf * 0 is NaN in silu. (Its gelu of inf in float32 on a CPU is NaN, by mistake.)"""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), copy.deepcopy(OF_EVERY_KIND[name])).eval().to(DEVICE)
    model[0].weight.data.fill_(1)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 100, -100], device=DEVICE).view(1, 1, 1, 6)
    with torch.no_grad():
        actual, expected = tritonnn.fuse(model)(x), model.double()(x.double()).float()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


ON_A_GPU = {
    "tma_halo": (lambda: nn.Conv2d(64, 64, 3, padding=1), (256, 64, 32, 32)),
    "tma_halo, stride 2": (lambda: nn.Conv2d(64, 128, 3, 2, 1), (512, 64, 32, 32)),
    "matmul": (lambda: nn.Conv2d(128, 256, 1), (64, 128, 16, 16)),
    "tma": (lambda: nn.Conv2d(128, 256, 1, 2), (64, 128, 32, 32)),
    "few_channels": (lambda: nn.Conv2d(3, 64, 7, 2, 3), (16, 3, 112, 112)),
    "depthwise": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), (16, 64, 28, 28)),
    "in_registers": (lambda: nn.Conv2d(128, 128, 3, padding=1), (1, 128, 8, 8)),
    "pointers": (lambda: nn.Conv2d(18, 40, 3, dilation=2), (16, 18, 20, 20)),
    "matmul, linear": (lambda: nn.Linear(512, 1000), (4096, 512)),
    "in_registers, linear": (lambda: nn.Linear(512, 1000), (8, 512)),
}
"""Layers that take a form of convolution on a Hopper GPU, whose name begins the key: a layer, and the shape of x."""
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "TF32": torch.float32, "float32": torch.float32}
TF32_ROUNDING = 2**-11
CASES_ON_A_GPU = [
    *((layer, precision, "silu") for layer in ON_A_GPU for precision in PRECISIONS),
    *((layer, "bfloat16", name) for layer in ("tma_halo", "matmul, linear") for name in ACTIVATIONS[1:]),
    *(("tma_halo", "TF32", name) for name in ACTIVATIONS[1:]),
]
"""Every form in every precision, and every activation in some: of each form alone there are tests beside it."""


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "float32"])
@pytest.mark.parametrize("layer", ON_A_GPU)
def test_forms_that_hopper_takes(layer, precision):
    """What the test below finds on a GPU, asked of dispatch."""
    make, (n, c, *sides) = ON_A_GPU[layer]
    module, dtype = make(), PRECISIONS[precision]
    sizes = dict(n=n, c=c, side=1, k=1000, taps=1)
    if isinstance(module, nn.Conv2d):
        window = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        sizes |= window | dict(side=sides[0], k=module.out_channels, taps=module.kernel_size[0])
    precise = dict(input_precision="tf32", round_x=True) if precision == "TF32" else {}
    operands = product(**sizes, **precise, dtype=dtype)
    bias = torch.empty(sizes["k"], device="meta")
    choice = default_choice(operands._replace(epilogue=Epilogue(None, bias, None, "silu")))
    assert choice.config.form == layer.partition(",")[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("layer", "precision", "name"), dict.fromkeys(CASES_ON_A_GPU))
def test_forms_on_a_gpu(layer, precision, name, hopper, monkeypatch):
    """Errors are no larger than those of PyTorch's operations one by one.

    Of matrices with few rows PyTorch may not use TF32 where it is allowed to; then they are TF32's rounding.
    """
    forms = []
    forget_plans()  # of a kind of call that another test has made: they launch without choosing a form
    run = op.run
    monkeypatch.setattr(op, "run", lambda product, choice: (forms.append(choice.config.form), run(product, choice)))
    if precision == "TF32":
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    make, shape = ON_A_GPU[layer]
    dtype = PRECISIONS[precision]
    model = trained(nn.Sequential(make(), copy.deepcopy(OF_EVERY_KIND[name])), dtype)
    x = 2 * image(*shape, dtype=dtype, channels_last=len(shape) == 4)
    pytorch, fused = errors(model, x)
    print(f"{layer}, {precision}, {name}: {forms[-1]} {fused:.3g}, PyTorch {pytorch:.3g}")
    match precision:
        case "TF32":
            assert fused <= max(1.02 * pytorch, TF32_ROUNDING)
        case "float32":
            assert fused <= 1.1 * pytorch + 1e-7
        case _:
            assert fused <= 1.02 * pytorch
    if precision != "float32":
        assert forms[-1] == layer.partition(",")[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["silu", "hardswish", "gelu"])
def test_chains_on_a_gpu(name, precision, hopper):
    """A result that is rounded to TF32 after its activation, a residual, and a shortcut in the kernel of its block."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shortcut = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)
            self.act = copy.deepcopy(OF_EVERY_KIND[name])

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.b(self.act(self.a(x))) + self.shortcut(x))
            return self.act(self.a(y) + x)

    if precision == "TF32":
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    dtype = PRECISIONS[precision]
    model = trained(Block(), dtype)
    for n, side in ((1, 8), (256, 32)):
        pytorch, fused = errors(model, image(n, 64, side, side, dtype=dtype, channels_last=True), fused_layers=4)
        print(f"chain, {n} images, {precision}, {name}: {fused:.3g}, PyTorch {pytorch:.3g}")
        assert fused <= 1.02 * pytorch if dtype.itemsize == 2 else fused <= 1.1 * pytorch
