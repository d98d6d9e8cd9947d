"""Tensor descriptors that round float32 to TF32 as they load: off, until a GPU says that they round to nearest."""

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonnn.ops.conv2d.forms.tma import config_of
from tritonnn.ops.conv2d.forms.tma_halo.config import tile
from tritonnn.ops.conv2d.problem import Choice, Problem
from tritonnn.runtime import capabilities
from tritonnn.tuning.harness import Harness


@triton.jit
def copied_by_descriptors_kernel(x_desc, y_desc):
    y_desc.store([0, 0], x_desc.load([0, 0]))


def test_it_is_off(monkeypatch):
    assert capabilities.rounding_on_load(True) == {}
    monkeypatch.setattr(capabilities, "ROUNDS_ON_LOAD", True)
    monkeypatch.setattr(capabilities, "can_round_on_load", lambda: True)
    assert capabilities.rounding_on_load(True) == {"round_f32_to_tf32": True}
    assert capabilities.rounding_on_load(False) == {}
    monkeypatch.setattr(capabilities, "can_round_on_load", lambda: False)
    assert capabilities.rounding_on_load(True) == {}


@pytest.fixture
def rounds_on_load(monkeypatch):
    if not capabilities.can_round_on_load():
        pytest.skip("descriptors round from triton 3.7 on")
    monkeypatch.setattr(capabilities, "ROUNDS_ON_LOAD", True)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper", "rounds_on_load")
class TestOnAGpu:
    def test_descriptors_round_to_nearest(self):
        """Of two neighbours of TF32 the nearer; between them, where both are as near, either."""
        bits = torch.randint(2**23, 2**31 - 2**24, (64, 64), dtype=torch.int32, device="cuda")
        bits[0] = (bits[0] & -0x2000) | 0x1000  # halfway
        x = bits.view(torch.float32) * torch.where(torch.rand(64, 64, device="cuda") < 0.5, -1, 1)
        y = torch.empty_like(x)
        x_desc = TensorDescriptor.from_tensor(x, [64, 64], **capabilities.rounding_on_load(True))
        copied_by_descriptors_kernel[1,](x_desc, TensorDescriptor.from_tensor(y, [64, 64]))
        down = (x.view(torch.int32) & -0x2000).view(torch.float32)
        up = (down.view(torch.int32) + 0x2000).view(torch.float32)
        nearest = torch.where((x - down).abs() < (up - x).abs(), down, up)
        assert torch.equal(y[1:], nearest[1:])
        assert ((y[0] == down[0]) | (y[0] == up[0])).all()

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("form", ["tma", "tma_halo"])
    def test_convolutions_are_as_near(self, form, stride):
        window = (stride, stride), (1, 1), (1, 1)
        problem = Problem(
            40, 64, 32, 32, 128, 3, 3, *window, 1, torch.float32, "tf32", True, True, True, ("bias", "relu")
        )
        config = config_of((1, 8, 16), 128, 4, True, 8, 3)
        if form == "tma_halo":
            slots = (3, 7) if stride == 2 else (3, 6)
            config = tile((1, 8, 16), 128, 4, slots=slots, store="registers", num_warps=8, programs=1)
        # 4.7e-4 where the tensor core truncates
        Harness(problem, torch.device("cuda")).check(Choice(config), limit=3.5e-4)
