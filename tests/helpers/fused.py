"""Small networks of any forward, and how a fused network's outputs are compared."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import tritonnn
from helpers.compare import TOLERANCE


def assert_same(model: nn.Module, x: Tensor, *others: Tensor) -> tritonnn.FusedNetwork:
    """The fused network gives the model's output, in its layout, and leaves its input alone where the model does."""
    fused = tritonnn.fuse(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(t.double().clone() for t in (x, *others)))
        inputs = [x.clone(memory_format=torch.preserve_format), x.clone(memory_format=torch.preserve_format)]
        expected, actual = model(inputs[0], *others), fused(inputs[1], *others)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.stride() == expected.stride()
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(actual.double(), exact, rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(inputs[1], inputs[0])
    return fused


def assert_right(network: nn.Module, model: nn.Module, x: Tensor) -> None:
    """The network's output has the model's layout, and is off float64 by no more than twice what the model is."""
    with torch.no_grad():
        y, pytorch, exact = network(x.clone()), model(x.clone()), copy.deepcopy(model).double()(x.double())
    assert (y.shape, y.stride(), y.dtype) == (pytorch.shape, pytorch.stride(), pytorch.dtype)
    limit = max(2 * (pytorch - exact).abs().max(), 1e-7 * exact.abs().max())
    assert (y - exact).abs().max() <= limit


def layers(network: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in network.modules() if type(module) is kind]


class Coded(nn.Module):
    """A network that computes `code(network, x)`."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


class Net(Coded):
    """Layers a, b: 4 channels to 4; norm; and others by name."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__(code)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        for name, layer in layers.items():
            self.add_module(name, layer)
