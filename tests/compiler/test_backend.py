"""`torch.compile(model, backend="tritonnn")`: what becomes a kernel, and that nobody can tell but by the clock."""

import copy
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tritonnn.compiler import backend as public_backend
from tritonnn.compiler import rewrite
from tritonnn.compiler.chains import find
from tritonnn.compiler.graphs import compile_graph

pytestmark = pytest.mark.filterwarnings("error:tritonnn changes nothing")
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eagerly(graph, inputs, mode, options) -> Callable:
    """What a backend makes of the rest, without the seconds that Inductor takes."""
    from torch._dynamo import lookup_backend

    return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def kernels(monkeypatch) -> list:
    """What was put in, a list for each graph: the steps of each kernel. All chains are taken, also slower ones."""
    seen = []
    replace = rewrite.replace

    def noting(graph, chains):
        seen.append([" ".join(steps(chain)) for chain, _ in chains])
        return replace(graph, chains)

    monkeypatch.setattr("tritonnn.compiler.graphs.replace", noting)
    monkeypatch.setattr("tritonnn.compiler.graphs.faster_ones", lambda chains, packed: [True] * len(chains))
    torch._dynamo.reset()
    return seen


def steps(chain) -> list[str]:
    found = ["linear" if chain.is_linear else "conv2d"]
    found += ["permute"] * (chain.permute is not None) + ["scale"] * (chain.scale is not None)
    found += ["norm"] * (chain.norm is not None) + ["sum"] * (chain.add is not None)
    return found + [chain.act[0]] * (chain.activation is not None)


def compiled(model: Callable, **options) -> Callable:
    return torch.compile(model, backend=partial(compile_graph, rest=eagerly), **options)


def randomize(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model.to(DEVICE).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 8, 6, 6)), device=DEVICE)


def assert_as_right(actual: torch.Tensor, model: Callable, *inputs: torch.Tensor) -> None:
    """No further from float64 than PyTorch is, but for a few roundings; same shape, strides and type."""
    exact = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
    exact = exact(*[x.double() for x in inputs])
    pytorch = model(*[x.clone() for x in inputs])
    assert (actual.shape, actual.stride(), actual.dtype) == (pytorch.shape, pytorch.stride(), pytorch.dtype)
    error, limit = (actual - exact).abs().max(), (pytorch - exact).abs().max() + 1e-6 * exact.abs().max()
    assert error <= 3 * limit, f"{error} beside PyTorch's {limit}"


class Block(nn.Module):
    """Convolutions with all that may follow them, in place where torchvision does so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.conv2, self.norm3 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self.norm1(self.conv1(x)), inplace=True)
        y = F.silu(self.norm2(self.depthwise(y)), inplace=True)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = self.norm3(self.conv2(gate * y))
        y += x
        y = F.hardswish(y)
        return F.gelu(self.head(y.view(y.shape[0], -1)), approximate="tanh")


BLOCK = [
    "conv2d norm relu6",
    "conv2d norm silu",
    "conv2d relu",
    "conv2d sigmoid",
    "conv2d norm sum hardswish",
    "linear gelu_tanh",
]


def test_chains_of_a_network_become_kernels(kernels):
    """`view`, which PyTorch refuses for a channels_last image, also finds the image as PyTorch would have put it."""
    model, x = randomize(Block()), images()
    with torch.no_grad():
        assert_as_right(compiled(model)(x), model, x)
    assert kernels == [BLOCK]


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)
        self.layer_scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y)))
        y = self.layer_scale * torch.permute(y, (0, 3, 1, 2))
        y += x
        return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer_whose_result_becomes_images(kernels, dtype):
    model = randomize(ConvNeXtBlock()).to(dtype, memory_format=torch.channels_last)
    x = images().to(dtype, memory_format=torch.channels_last)
    fast = compiled(model)
    with torch.no_grad():
        assert_as_right(fast(x), model, x)
        model.layer_scale.add_(1)
        assert_as_right(fast(x), model, x)
    assert kernels == [["conv2d", "linear gelu", "linear permute scale sum"]]


def test_weights_that_change_count_from_the_next_call(kernels):
    model, x = randomize(Block()), images()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model.conv1.weight.mul_(1.5)
        assert_as_right(fast(x), model, x)
        model.norm2.running_var.mul_(2)
        assert_as_right(fast(x), model, x)
        model.conv2 = copy.deepcopy(model.conv2)
        model.conv2.bias.add_(1)
        assert_as_right(fast(x), model, x)
        model.head.weight = nn.Parameter(model.head.weight * 2)
        assert_as_right(fast(x), model, x)
    assert len(kernels) == 1, "it was compiled again"


WEIGHT = torch.randn(8, 8, 1, 1, device=DEVICE)


def overwrites_what_is_read_again(x, weight):
    y = F.conv2d(x, weight)
    z = y.relu_()
    return y + z


def overwrites_the_input_in_between(x, weight):
    x = x * 1
    y = F.conv2d(x, weight)
    x.mul_(2)
    return torch.relu(y) + x


def overwrites_a_view_of_the_input_in_between(x, weight):
    x = x * 1
    y = F.conv2d(x, weight)
    x[:, :2].zero_()
    return torch.relu(y)


def overwrites_the_weight(x, weight):
    weight.mul_(2)
    return torch.relu(F.conv2d(x, weight))


def overwrites_a_part_of_the_weight_by_dropout(x, weight):
    F.dropout(weight[:4], 1.0, True, True)
    return F.conv2d(x, weight)


def overwrites_the_input_by_an_operator(x, weight):
    x = x * 1
    y = F.conv2d(x, weight)
    torch.ops.aten.mul_.Scalar(x, 2)
    return torch.relu(y)


def uses_the_result_twice(x, weight):
    y = F.conv2d(x, weight)
    return torch.relu(y) + y


def adds_into_the_input(x, weight):
    x = x * 1
    z = x * 2
    x += F.conv2d(z, weight)
    return x.relu_()


def adds_a_broadcast(x, weight):
    return torch.relu(F.conv2d(x, weight) + x[:1])


def adds_scaled(x, weight):
    return torch.relu(torch.add(F.conv2d(x, weight), x, alpha=2))


def adds_itself(x, weight):
    y = F.conv2d(x, weight)
    return y + y


def has_a_computed_weight(x, weight):
    return F.conv2d(x, weight * 2)


def clamps(x, weight):
    return torch.clamp(F.conv2d(x, weight), 0, 6) + F.hardtanh(F.conv2d(x, weight), -1, 2)


def pads_as_the_string_says(x, weight):
    return F.conv2d(x, weight, padding="same") + F.conv2d(x, weight, padding="valid")


def has_a_slope(x, weight):
    return F.leaky_relu(F.conv2d(x, weight), 0.2, True)


def computes_three_dimensions(x, weight):
    return F.conv2d(x[0], weight)


def normalizes_by_the_batch(x, weight):
    return F.batch_norm(F.conv2d(x, weight), None, None, training=True)


PROGRAMS = {
    overwrites_what_is_read_again: ["conv2d"],
    overwrites_the_input_in_between: ["conv2d"],
    overwrites_a_view_of_the_input_in_between: ["conv2d"],
    overwrites_the_weight: None,
    overwrites_a_part_of_the_weight_by_dropout: None,
    overwrites_the_input_by_an_operator: ["conv2d"],
    uses_the_result_twice: ["conv2d"],
    adds_into_the_input: ["conv2d"],
    adds_a_broadcast: ["conv2d"],
    adds_scaled: ["conv2d"],
    adds_itself: ["conv2d"],
    has_a_computed_weight: None,
    clamps: ["conv2d relu6", "conv2d"],
    pads_as_the_string_says: ["conv2d sum"],
    has_a_slope: ["conv2d leaky_relu"],
    computes_three_dimensions: None,
    normalizes_by_the_batch: ["conv2d"],
}
"""Program to the kernels that it gets."""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_only_what_nobody_can_tell_is_joined(kernels, program):
    x = images()
    with torch.no_grad():
        assert_as_right(compiled(program)(x, WEIGHT.clone()), program, x, WEIGHT)
    assert (kernels or [None])[0] == PROGRAMS[program]


def test_graphs_with_gradients_are_inductors_alone(kernels):
    model, x = randomize(Block()).train(), images()
    expected = copy.deepcopy(model)
    compiled(model)(x).sum().backward()
    expected(x).sum().backward()
    assert not kernels
    torch.testing.assert_close(model.conv1.weight.grad, expected.conv1.weight.grad)


def test_autocast(kernels):
    model, x = randomize(Block()), images()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y, expected = compiled(model)(x), model(x)
    assert kernels == [[*BLOCK[:4], "conv2d norm", BLOCK[5]]], "the sum with a float32 image is rounded as PyTorch does"
    assert y.dtype == expected.dtype == torch.bfloat16
    exact = copy.deepcopy(model).double()(x.double())
    assert (y - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_an_open_number_of_images(kernels):
    model = randomize(Block()).bfloat16()
    fast = compiled(model)
    with torch.no_grad():
        for n in (2, 3, 5):
            x = images(n, 8, 6, 6).bfloat16()
            torch.testing.assert_close(fast(x), model(x), atol=2e-2, rtol=2e-2)
    assert kernels == [BLOCK, BLOCK], "compiled once for two images and once for any number"


def test_images_of_open_sizes(kernels):
    model = randomize(nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.ReLU())).bfloat16()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for size in (6, 9, 12):
            x = images(2, 8, size, size + 1).bfloat16()
            torch.testing.assert_close(fast(x), model(x), atol=2e-2, rtol=2e-2)
    assert kernels == [["conv2d relu"]]


def test_inference_mode_and_then_none(kernels):
    model, x = randomize(Block()), images()
    fast = compiled(model)
    with torch.inference_mode():
        y = fast(x)
    with torch.no_grad():
        model.conv1.weight.mul_(2)
        assert_as_right(fast(x), model, x)
    assert not torch.equal(y, fast(x.clone()).detach())


def test_tf32_switched_after_the_first_call(kernels):
    model, x = randomize(Block()), images()
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        with pytest.warns(UserWarning, match="TF32 switches were changed"):
            fast(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(x)  # says it once
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            assert_as_right(fast(x), model, x)


def test_what_is_unknown_of_a_graph_leaves_it_to_inductor(kernels):
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(8, 8, 1)).to(DEVICE))
    with torch.no_grad(), pytest.warns(UserWarning, match="changes nothing"):
        fast = compile_graph(graph, [images()], rest=lambda graph, inputs, mode, options: graph.forward)
    assert not kernels
    assert fast(images()).shape == (2, 8, 6, 6)


def test_an_error_of_the_pass_leaves_the_graph_to_inductor(kernels, monkeypatch):
    monkeypatch.setattr("tritonnn.compiler.graphs.find", lambda graph: 1 / 0)
    model, x = randomize(Block()), images()
    with torch.no_grad(), pytest.warns(UserWarning, match="changes nothing.*ZeroDivisionError: division by zero"):
        assert_as_right(compiled(model)(x), model, x)
    assert not kernels


def test_chains_are_found_without_a_result_that_others_see():
    """A chain ends where a result has two users; the sum of two convolutions goes to the last one."""
    captured = []

    def program(x, weight):
        a = F.conv2d(x, weight)
        b = F.conv2d(x, weight)
        return torch.relu(a + b)

    torch._dynamo.reset()
    torch.compile(program, backend=lambda graph, inputs: captured.append(graph) or graph.forward)(images(), WEIGHT)
    assert [steps(chain) for chain in find(captured[0].graph)] == [["conv2d"], ["conv2d", "sum", "relu"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the measurement decides")
def test_with_inductor_on_a_channels_last_network():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = randomize(model).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(model, backend=public_backend)
        assert_as_right(fast(x), model, x)
        model[0].weight.mul_(2)
        assert_as_right(fast(x), model, x)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_with_inductor_on_a_gpu(kernels, mode):
    """The next call sees weights that were overwritten or replaced, and another batch, also in a CUDA graph."""
    model = randomize(Block()).to(torch.bfloat16)
    fast = torch.compile(model, backend=public_backend, mode=mode)
    with torch.no_grad():
        for n in (2, 5):
            x = images(n, 8, 6, 6).to(torch.bfloat16)
            for _ in range(3):
                assert_near(fast(x), model, x)
            model.conv1.weight.mul_(-1.5)
            assert_near(fast(x), model, x)
            model.norm3.running_mean.add_(1)
            assert_near(fast(x), model, x)
            model.head.weight = nn.Parameter(model.head.weight * 2)
            for _ in range(3):
                assert_near(fast(x), model, x)
    assert kernels == [BLOCK, BLOCK]


def assert_near(actual: torch.Tensor, model: nn.Module, x: torch.Tensor) -> None:
    exact, pytorch = copy.deepcopy(model).double()(x.double()), model(x)
    assert (actual - exact).norm() <= 2 * (pytorch - exact).norm()


@pytest.mark.gpu
def test_what_is_slower_is_left_to_inductor():
    """By a measurement: of these some are chosen, and all are right."""
    model = randomize(Block()).to(torch.bfloat16)
    x = images(64, 8, 6, 6).to(torch.bfloat16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_near(torch.compile(model, backend=public_backend)(x), model, x)


def test_the_string_is_enough(tmp_path):
    """The entry point in pyproject.toml, which an installed package's metadata has, is found by its name."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["torch_dynamo_backends"]
    metadata = tmp_path / "tritonnn_of_a_test-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tritonnn-of-a-test\nVersion: 1\n")
    lines = [f"{name} = {target}" for name, target in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines, ""]))
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import torch
print(torch.compile(lambda x: x.relu(), backend="tritonnn", mode="default")(torch.tensor([-1.0, 2.0])).tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert result.stdout.strip() == "[0.0, 2.0]", result.stderr


def test_the_backend_keeps_its_name_after_it_was_used():
    """No module of the package is called as it is, which would take its place once it is imported."""
    import tritonnn.compiler

    assert tritonnn.compiler.backend is public_backend
    assert importlib.util.find_spec("tritonnn.compiler.backend") is None
