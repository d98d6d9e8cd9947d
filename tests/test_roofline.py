"""What a layer's call must compute and move, and the least time for it."""

import pytest
import torch
from torch import nn

import tritonnn
from tritonnn.latency import time_kernels
from tritonnn.roofline import Roofline, Work, arithmetic_of, measured_roofline, work_of


@pytest.mark.parametrize(
    ("layer", "shape", "flop", "numbers"),
    [
        # 2 x outputs x products of each; x, y, weight (and bias) once
        pytest.param(nn.Conv2d(3, 4, 3, padding=1), (2, 3, 8, 8), 2 * 512 * 27, 384 + 512 + 112, id="3x3"),
        pytest.param(
            nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), (2, 4, 8, 8), 2 * 512 * 18, 512 + 512 + 72, id="groups"
        ),
        pytest.param(  # a filter of one tap and stride 2 reads every other row and column
            nn.Conv2d(4, 8, 1, stride=2, bias=False),
            (2, 4, 8, 8),
            2 * 256 * 4,
            2 * 4 * 16 + 256 + 32,
            id="1x1, stride 2",
        ),
        pytest.param(nn.Linear(16, 10), (5, 16), 2 * 50 * 16, 80 + 50 + 170, id="linear"),
        pytest.param(nn.BatchNorm2d(4), (2, 4, 8, 8), 0, 512 + 512 + 16, id="batch norm"),
        pytest.param(nn.ReLU(), (2, 4, 8, 8), 0, 1024, id="relu"),
    ],
)
def test_work_of_a_layer(layer, shape, flop, numbers):
    x = torch.zeros(shape)
    assert work_of(layer, (x,), layer.eval()(x)) == Work(flop, 4 * numbers)


def test_the_bound_is_the_longer_of_arithmetic_and_memory():
    roofline = Roofline({"float32": 1e12}, 1e9, cache=1000)
    assert roofline.bound_ms(Work(10**9, 10**5), "float32") == 1.0
    assert roofline.bound_ms(Work(10**6, 10**6), "float32") == 1.0
    assert roofline.bound_ms(Work(10**6, 2000), "float32") == pytest.approx(1e-3)  # it stays in the cache
    assert roofline.bound_ms(Work(0, 2000), "float32") is None


def test_arithmetic_follows_the_switches(monkeypatch):
    monkeypatch.setattr("tritonnn.roofline.convolutions_in_tf32", lambda: True)
    monkeypatch.setattr("tritonnn.roofline.matmuls_in_tf32", lambda: False)
    assert arithmetic_of("conv2d", torch.float32) == "tf32"
    assert arithmetic_of("linear", torch.float32) == arithmetic_of("relu", torch.float32) == "float32"
    assert arithmetic_of("conv2d", torch.bfloat16) == "bfloat16"
    assert arithmetic_of("conv2d", torch.float64) == "float64"


@pytest.mark.gpu
def test_rates_are_those_of_a_gpu():
    roofline = measured_roofline(torch.device("cuda"), {"float32", "bfloat16"})
    assert set(roofline.flop_per_s) == {"float32", "bfloat16"}
    assert 1e12 < roofline.flop_per_s["float32"] < roofline.flop_per_s["bfloat16"] < 1e16
    assert 1e11 < roofline.bytes_per_s < 1e14


class Block(nn.Module):
    """A residual block whose shortcut is a convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(4, 8, 1)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.pool(self.relu(self.norm(self.conv(x)) + self.shortcut(x))).flatten(1))


def test_kernels_of_a_fused_network_and_the_layers_they_stand_for():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = Block().eval().to(device), torch.randn(2, 4, 8, 8, device=device)
    network = tritonnn.fuse(model)
    assert len(network.report.stands_for) == 2  # the sum of two convolutions is one
    layers = [layer for names in network.report.stands_for.values() for layer in names]
    assert sorted(layers) == sorted(name for name, _ in model.named_modules() if name)  # each once
    told = []
    with torch.inference_mode():
        kernels = time_kernels(network, x, budget_s=0, progress=lambda *of: told.append(of[1:]))
    assert [type(kernel.layer).__name__ for kernel in kernels] == ["FusedSum", "FusedPooledLinear"]
    assert told == [(0, 2), (1, 2)] and all(kernel.latency.eager.median > 0 for kernel in kernels)
    both, head = kernels
    assert both.work.flop == 2 * 2 * 8 * 64 * (36 + 4) and head.work.flop == 2 * 2 * 3 * 8


def test_kernels_count_once_where_the_first_call_goes_through_the_network_twice(monkeypatch):
    """On a GPU it does, to compile ahead."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, x = tritonnn.fuse(Block().eval().to(device)), torch.randn(2, 4, 8, 8, device=device)
    seen = []

    def twice(call, network, args, kwargs, in_graphs):
        if not seen:
            seen.append(call(*args))

    monkeypatch.setattr(network._first_calls, "before", twice)
    with torch.inference_mode():
        assert len(time_kernels(network, x, budget_s=0)) == 2
