"""tritonnn.fuse: concatenations of a dense block become one image that grows."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.compare import DEVICE, image
from helpers.fused import Coded, assert_right, layers
from helpers.trained import trained
from torch import Tensor, nn
from torch.nn import functional as F

import tritonnn
from tritonnn.latency import time_kernels
from tritonnn.layers.fused.concatenation import FusedAppend, FusedConcatenation
from tritonnn.layers.fused.conv2d import FusedConv2d
from tritonnn.ops.append_channels import append_channels


class Dense(Coded):
    """Convolutions a and b make 6 and 2 channels more; `read(i, x)` is a norm, a ReLU and a convolution to 5."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor], widths: tuple[int, ...] = (8, 14, 16)) -> None:
        super().__init__(code)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for C in widths)
        self.convs = nn.ModuleList(nn.Conv2d(C, 5, 1) for C in widths)
        self.a, self.b = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(5, 2, 1)

    def read(self, i: int, x: Tensor) -> Tensor:
        return self.convs[i](torch.relu(self.norms[i](x)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


def listed(n: Dense, x: Tensor) -> Tensor:
    features = [x]
    features.append(n.a(n.read(0, torch.cat(features, 1))))
    features.append(n.b(n.read(1, torch.cat(features, 1))))
    return n.read(2, torch.cat(features, 1))


def nested(n: Dense, x: Tensor) -> Tensor:
    x = torch.cat([x], dim=1)
    x = torch.cat([x, n.a(n.read(0, x))], dim=1)
    x = torch.cat((x, n.b(n.read(1, x))), 1)
    return n.read(2, x)


def read_late(n: Dense, x: Tensor) -> Tensor:
    """What was there before is read when all has grown."""
    y, z = n.a(n.convs[0](x)), n.b(n.convs[0](x))
    two, three = torch.cat([x, y], 1), torch.cat([x, y, z], 1)
    last = n.read(2, three)
    return last + n.read(1, two)


def two_go_on(n: Dense, x: Tensor) -> Tensor:
    """Only one of the two that continue the same one may write behind it."""
    y, z = n.a(n.convs[0](x)), n.b(n.convs[0](x))
    two, w = torch.cat([x, y], 1), n.b(n.convs[0](x) * 2)
    one, other = torch.cat([x, y, z], 1), torch.cat([x, y, w], 1)
    return n.read(1, two) + n.read(2, one) * n.read(2, other)


def both_go_on(n: Dense, x: Tensor) -> Tensor:
    y, z = n.a(n.convs[0](x)), n.b(n.convs[0](x))
    two = torch.cat([x, y], 1)
    w = n.b(n.convs[0](x) * 2)
    return n.read(1, two) + n.read(2, torch.cat([two, z], 1)) * n.read(2, torch.cat([two, w], 1))


def overwritten(n: Dense, x: Tensor) -> Tensor:
    y = n.a(n.read(0, torch.cat([x], 1)))
    two = n.read(1, torch.cat([x, y], 1))
    x.mul_(2)
    return two + n.read(2, torch.cat([x, y, n.b(two)], 1))


def overwritten_through_a_view(n: Dense, x: Tensor) -> Tensor:
    y = n.a(n.read(0, torch.cat([x], 1)))
    two = n.read(1, torch.cat([x, y], 1))
    x[:, :4].mul_(2)
    return two + n.read(2, torch.cat([x, y, n.b(two)], 1))


def result_overwritten(n: Dense, x: Tensor) -> Tensor:
    y, z = n.a(n.convs[0](x)), n.b(n.convs[0](x))
    two, three = torch.cat([x, y], 1), torch.cat([x, y, z], 1)
    three.mul_(2)
    return n.read(1, two) + n.read(2, three)


def read_by_others(n: Dense, x: Tensor) -> Tensor:
    y, z = n.a(n.convs[0](x)), n.b(n.convs[0](x))
    two, three = torch.cat([x, y], 1), torch.cat([x, y, z], 1)
    return n.read(1, two) + n.read(2, three) + two.mean()


def other_dimension(n: Dense, x: Tensor) -> Tensor:
    y = torch.cat([n.read(0, x)], 2)
    return torch.cat([y, n.read(0, x)], 2)


CASES = {
    "a list": (listed, 2),
    "nested": (nested, 2),
    "read late": (read_late, 1),
    "two go on from the list": (two_go_on, 1),
    "two go on from the result": (both_go_on, 0),
    "an operand is overwritten": (overwritten, 1),
    "an operand is overwritten through a view": (overwritten_through_a_view, 0),
    "a result is overwritten": (result_overwritten, 0),
    "read by others": (read_by_others, 0),
    "another dimension": (other_dimension, 0),
}
"""The code, and how many concatenations go on from another."""


def fire(n: Dense, x: Tensor) -> Tensor:
    x = n.convs[0](x)
    return torch.cat([n.a(x).relu(), n.b(x).relu()], 1)


def with_a_pool(n: Dense, x: Tensor) -> Tensor:
    y = n.convs[0](x)
    return torch.cat([n.a(y), F.max_pool2d(x, 3, 1, 1), n.b(y).sigmoid()], 1) * 2


def read_twice(n: Dense, x: Tensor) -> Tensor:
    y = n.a(n.convs[0](x))
    return torch.cat([y, y, n.b(n.convs[0](x))], 1)


def input_overwritten(n: Dense, x: Tensor) -> Tensor:
    y = n.convs[0](x)
    z = n.a(y)
    y.mul_(2)
    return torch.cat([z, n.b(y)], 1)


def residual(n: Dense, x: Tensor) -> Tensor:
    y = n.convs[0](x)
    z = n.a(y)
    return torch.cat([z, n.a(y * 2) + z], 1)


FILLED = {"two": (fire, 2), "a pool between": (with_a_pool, 2), "one twice": (read_twice, 1)}
FILLED |= {"an input is overwritten": (input_overwritten, 1), "a residual": (residual, 0)}
"""The code, and how many convolutions fill a part of the concatenation."""


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("case", FILLED)
@torch.no_grad()
def test_convolutions_fill_a_concatenation(case, channels_last):
    code, filled = FILLED[case]
    model = trained(Dense(code), torch.float64)
    network = tritonnn.fuse(model)
    for shape in ((2, 4, 5, 6), (1, 4, 3, 1), (4, 5, 6)):
        layout = {"channels_last": channels_last} if len(shape) == 4 else {}
        x = image(*shape, dtype=torch.float64, **layout)
        try:
            model(x.clone())
        except RuntimeError:
            with pytest.raises(RuntimeError):
                network(x.clone())
        else:
            assert_right(network, model, x)
    parts = [part for concatenation in layers(network, FusedConcatenation) for part in concatenation.layers]
    assert sum(isinstance(part, FusedConv2d) for part in parts) == filled


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_rows_of_concatenations(case, channels_last):
    code, appended = CASES[case]
    model = trained(Dense(code), torch.float64)
    network = tritonnn.fuse(model)
    for shape in ((2, 4, 5, 6), (1, 4, 3, 1)):
        assert_right(network, model, image(*shape, dtype=torch.float64, channels_last=channels_last))
    assert len(layers(network, FusedAppend)) == appended and not network.report.fallbacks


def read_by_convolutions(n: Dense, x: Tensor) -> Tensor:
    return torch.cat([n.a(n.convs[0](x)), n.b(n.convs[1](x))], 1)


def copied_too(n: Dense, x: Tensor) -> Tensor:
    y = n.convs[0](x)
    return torch.cat([y, n.a(y)], 1)


def test_what_is_copied_too_is_not_rounded_ahead():
    """Rounding to TF32 is for convolutions that read the result, and for nobody else."""
    for code, rounds in ((read_by_convolutions, True), (copied_too, False)):
        network = tritonnn.fuse(trained(Dense(code, (8, 8, 8)), torch.float32)).network
        assert network.get_submodule("convs.0").round_output is rounds


def test_no_room_is_no_error():
    x = image(2, 8, 3, 4, channels_last=True)
    y = FusedAppend([None])(x, x)
    assert torch.equal(y, torch.cat([x, x], 1))
    wide = FusedConcatenation([None], 8)(x)
    both = FusedAppend([None])(wide, x)
    assert torch.equal(both, y) and torch.equal(wide, x) and both.data_ptr() == wide.data_ptr()
    partly = torch.zeros(2 * 16 * 12 - 8).as_strided(
        (2, 8, 3, 4), (192, 1, 64, 16)
    )  # its memory ends with its channels
    assert torch.equal(FusedAppend([None])(partly.to(x.device), x), torch.cat([partly.to(x.device), x], 1))
    more = FusedAppend([None])
    assert torch.equal(more(both, x), torch.cat([x, x, x], 1)) and list(more.fallbacks) == ["there is no room"]


def test_each_kernel_is_timed_alone():
    network = tritonnn.fuse(trained(Dense(listed), torch.float32))
    kernels = time_kernels(network, image(2, 4, 5, 6), budget_s=0)
    names = ["FusedConcatenation", "FusedScaledConv2d", *["FusedAppend", "FusedScaledConv2d"] * 2]
    assert [type(kernel.layer).__name__ for kernel in kernels] == names and not network.report.fallbacks
    assert kernels[2].work.flop == 2 * 2 * 30 * 6 * 5 * 9  # 2 images of 5x6, 6 channels of 5 under 9 taps


def test_other_types_and_sizes_are_pytorchs():
    x, y = image(2, 8, 3, 4, channels_last=True), image(2, 8, 3, 4, dtype=torch.float64, channels_last=True)
    assert torch.equal(FusedConcatenation([None, None])(x, y), torch.cat([x, y], 1))
    assert torch.equal(FusedAppend([None])(FusedConcatenation([None], 8)(x), y), torch.cat([x, y], 1))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        FusedConcatenation([None, None])(x, x[..., :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [(8, 16, 8), (3, 5, 1), (24, 32, 0)], ids=str)
def test_append_channels(channels, dtype):
    first, C, rest = channels
    wide = image(3, first + C + rest, 7, 5, dtype=dtype, channels_last=True)
    before, x = wide.clone(), image(3, C + 2, 7, 5, dtype=dtype, channels_last=True)[:, :C]
    append_channels(wide, x, first)
    expected = torch.cat([before[:, :first], x, before[:, first + C :]], 1)
    assert torch.equal(wide, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_dense_block_in_a_graph(dtype):
    model = trained(Dense(listed), dtype).to(memory_format=torch.channels_last)
    network = tritonnn.fuse(model, cuda_graph=True)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            x = image(64, 4, 30, 28, dtype=dtype, channels_last=True).to(DEVICE)
            y, pytorch, expected = network(x), model(x), exact(x.double())
            errors = [float((t.double() - expected).norm() / expected.norm()) for t in (y, pytorch)]
            assert errors[0] <= 1.2 * errors[1] + 1e-6
    assert len(network.graphs) == 1
