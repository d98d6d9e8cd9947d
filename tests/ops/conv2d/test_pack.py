"""Packed weights: what tensor cores lose of their sums is in them."""

from types import SimpleNamespace

import pytest
import torch
from helpers.compare import image
from torch import Tensor

import tritonnn
from tritonnn.ops.conv2d import pack
from tritonnn.ops.conv2d.pack import pack_weight
from tritonnn.runtime import hardware


def share(error: Tensor, of: Tensor) -> float:
    """How much of `of` the error is, as against chance."""
    return float((error.double() * of.double()).sum() / of.double().square().sum())


@pytest.mark.parametrize("is_hopper", [True, False])
def test_a_split_weight_is_the_weight_and_on_hopper_what_will_be_lost(monkeypatch, is_hopper):
    monkeypatch.setattr(hardware, "gpu", lambda device: SimpleNamespace(is_hopper=is_hopper))
    weight = image(64, 32, 3, 3)
    high, rest, whole = pack_weight(weight, "tf32x3").double().chunk(3)
    expected = weight.permute(0, 2, 3, 1).double()
    lost = pack.TRUNCATED if is_hopper else 0.0
    assert share(high + rest - expected, expected) == pytest.approx(lost, abs=3e-9)
    # in its last digit
    assert share(whole - expected, expected) == pytest.approx(pack.TRUNCATED_ALONE if is_hopper else 0.0, rel=0.4)
    *_, whole = pack_weight(weight, "tf32x3", groups=2).double().chunk(3)
    assert torch.equal(whole, expected)  # for kernels without tensor cores, which lose nothing


def test_a_weight_in_tf32_stays_exact(monkeypatch):
    monkeypatch.setattr(hardware, "gpu", lambda device: SimpleNamespace(is_hopper=True))
    weight = torch.randint(-4, 5, (16, 8, 3, 3)).float().to(image(1, 1, 1, 1).device)
    high, rest, whole = pack_weight(weight, "tf32x3").chunk(3)
    assert torch.equal(high, weight.permute(0, 2, 3, 1)) and torch.equal(whole, high) and not rest.any()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("images", [1, 64])
@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("filter", [1, 3])
def test_layers_of_strict_float32_do_not_shrink_what_they_compute(filter, groups, images, channels_last):
    layer = tritonnn.TritonConv2d(256, 256, filter, padding=filter // 2, groups=groups, bias=False).cuda()
    x = image(images, 256, 14, 14, channels_last=channels_last).relu()
    with torch.no_grad():
        y, weight = layer(x), layer.weight.double()
        expected = torch.nn.functional.conv2d(x.double(), weight, padding=filter // 2, groups=groups)
    assert abs(share(y.double() - expected, expected)) < 4e-8
