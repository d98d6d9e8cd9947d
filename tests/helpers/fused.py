"""Small networks of any forward, and how a fused network's outputs are compared."""

import copy

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


class Net(nn.Module):
    """Layers a, b: 4 channels to 4; norm; called as `code(net, x)` says."""

    def __init__(self, code, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)
