"""How many functions of ours a layer's call goes through on a GPU once its plans are made: the host's time follows.

Bounds are what is needed today; a new function on the way of every call is to be worth its time. CPU tensors take the
way of those on a GPU, behind which there is a driver that does nothing.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
from torch import nn

import tritonnn
from benchmarks.host import LENGTH, OURS, Chain, calls_of, posing_as
from tritonnn.layers.fused.batch_norm2d import BatchNormReLU2d

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="its launchers would be Triton's for this process"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]
MOST = {
    "conv2d": (22, 13, 15),
    "conv2d, bias": (22, 15, 15),
    "batch_norm2d": (25, 11, 12),
    "relu": (13, 9, 10),
    "max_pool2d": (14, 9, 9),
    "avg_pool2d": (12, 9, 9),
    "adaptive_avg_pool2d": (13, 9, 9),
    "linear": (17, 15, 14),
}
"""Forward in training, backward, in evaluation."""


TRITON = str(Path(triton.__file__).parent)


@pytest.fixture(autouse=True)
def on_a_gpu() -> Iterator[None]:
    with posing_as():
        yield


@pytest.mark.parametrize("kind", MOST)
def test_calls_of_a_layer(kind):
    chain = Chain(kind, swap=True)
    for _ in range(3):
        chain.observe(lambda call: call())
    ours, of_triton = (chain.observe(lambda call, folder=folder: calls_of(call, folder)) for folder in (OURS, TRITON))
    assert of_triton == (0, 0, 0)
    assert all(count <= LENGTH * most for count, most in zip(ours, MOST[kind])), ours


def test_calls_of_a_fused_block():
    """Batch norm, sum and ReLU in training, whose output has two readers."""
    layer = BatchNormReLU2d(tritonnn.TritonBatchNorm2d(8), twice=True).train()
    x, residual = (torch.zeros(2, 8, 4, 4).requires_grad_() for _ in range(2))

    def backward(ys: tuple[torch.Tensor, torch.Tensor]) -> None:
        torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])

    for _ in range(3):
        backward(layer(x, residual))
    results = []
    assert calls_of(lambda: results.append(layer(x, residual)), OURS) <= 29
    assert calls_of(lambda: backward(results[0]), OURS) <= 10


def test_layers_are_found_at_the_first_look():
    """After `fuse_for_training`, however deep they lie."""
    blocks = [nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())) for _ in range(3)]
    net = nn.Sequential(*blocks)
    tritonnn.fuse_for_training(net)
    x = torch.zeros(1, 8, 8, 8)
    looks = []
    found = nn.Module.__getattr__
    for _ in range(3):
        net(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__getattr__", lambda module, name: looks.append(name) or found(module, name))
        net(x)
    assert len(looks) == 6
