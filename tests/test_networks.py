"""torchvision's classification networks with all layers swapped: PyTorch's values within its own error, no traces."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from helpers.compare import DEVICE
from helpers.torchvision_networks import NAMES, torchvision_network, without_chance
from torch import nn

import tritonnn

SIZES = {"inception_v3": 128, "maxvit_t": 224}  # of the images, where 64 is too small
ARGUMENTS = {"vit_b_16": dict(image_size=64)}
# Strict float32 against float64. Both errors are some roundings that the depth of the network amplifies at random.
FACTOR, FLOOR = 3.0, 1e-6


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square, relative."""
    exact = exact.double()
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def traces(model: nn.Module) -> list[tuple]:
    """What a swap could leave behind: classes, attributes, hooks, parameters."""
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), [id(t) for t in module.parameters()])
        for name, module in model.named_modules()
    ]


def assert_swaps(name: str, training: bool, batch: int, size: int) -> None:
    torch.manual_seed(0)
    pytorch = without_chance(torchvision_network(name, **ARGUMENTS.get(name, {}))).to(DEVICE).train(training)
    exact, swapped = copy.deepcopy(pytorch).double(), copy.deepcopy(pytorch)
    before, keys = traces(swapped), list(swapped.state_dict())
    x = torch.randn(batch, 3, size, size).to(DEVICE)
    with torch.no_grad(), tritonnn.swapped(swapped, strict=True) as report:
        reference, expected, actual = exact(x.double()), pytorch(x), swapped(x)
        assert list(swapped.state_dict()) == keys
    assert report.swapped and not report.fallbacks
    triton = {n for n, m in pytorch.named_modules() if tritonnn.kind_of(m)}
    assert set(report.swapped) == triton and not triton & set(report.stayed)
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert error(actual, reference) <= FACTOR * error(expected, reference) + FLOOR
    buffers = [list(zip(model.buffers(), exact.buffers())) for model in (pytorch, swapped)]
    errors = [sum(error(*pair) for pair in pairs) / max(len(pairs), 1) for pairs in buffers]
    assert errors[1] <= FACTOR * errors[0] + FLOOR
    assert traces(swapped) == before
    swapped.load_state_dict(pytorch.state_dict(), strict=True)
    with torch.no_grad():
        assert error(swapped.eval()(x), pytorch.eval()(x)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", NAMES)
def test_torchvision_network(name, training):
    assert_swaps(name, training, batch=4, size=SIZES.get(name, 64))


@pytest.mark.parametrize(
    "name, training, size",
    [("squeezenet1_1", False, 32), ("shufflenet_v2_x0_5", True, 32), ("mobilenet_v3_small", False, 32)],
)
def test_torchvision_network_in_small(name, training, size):
    assert_swaps(name, training, batch=2, size=size)


def test_coverage_page_is_what_its_command_writes():
    docs = Path(__file__).parent.parent / "docs"
    assert (docs / "coverage.md").read_text() == runpy.run_path(str(docs / "network_coverage.py"))["page"]()
