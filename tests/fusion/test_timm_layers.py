"""timm's layers fuse as those of torch.nn that they are."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.compare import DEVICE
from helpers.trained import trained
from torch import Tensor, nn

import tritonnn


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm's: a batch norm with code of its own, then `drop` and `act`."""

    def __init__(self, channels: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Linear(nn.Linear):
    """Like timm's, with code of its own that does the same."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.layers", SimpleNamespace(BatchNormAct2d=BatchNormAct2d, Linear=Linear))


def network(*norms: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for norm in norms for layer in (nn.Conv2d(4, 4, 3, padding=1, bias=False), norm)]
    return trained(nn.Sequential(*layers), torch.float32)


@torch.no_grad()
def test_folds_and_gives_the_same(timm):
    shared = BatchNormAct2d(4, nn.ReLU(inplace=True), nn.Dropout(0.5))
    model = network(shared, BatchNormAct2d(4, nn.Identity()), shared)
    types, x = [type(part) for part in model.modules()], torch.randn(2, 4, 5, 5, device=DEVICE)
    fast = tritonnn.fuse(model)
    expected = ["conv2d + batch_norm2d + relu", "conv2d + batch_norm2d", "conv2d + batch_norm2d + relu"]
    assert list(fast.report.fused.values()) == expected and not fast.report.stayed
    torch.testing.assert_close(fast(x), model(x))
    assert [type(part) for part in model.modules()] == types


@torch.no_grad()
def test_stays_where_a_call_does_something_else(timm):
    model, x = network(BatchNormAct2d(4, nn.ReLU())), torch.randn(2, 4, 5, 5, device=DEVICE)
    model[1].register_forward_hook(lambda part, args, y: y + 1)
    fast = tritonnn.fuse(model)
    assert "batch_norm2d" not in " ".join(fast.report.fused.values())
    torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_a_linear_layer_is_one(timm):
    class Sharper(Linear):
        pass

    hooked = Linear(3, 3)
    hooked.register_forward_hook(lambda part, args, y: y + 1)
    model = trained(nn.Sequential(Linear(4, 3), nn.ReLU(), hooked, Sharper(3, 2)), torch.float32)
    fast, x = tritonnn.fuse(model), torch.randn(2, 4, device=DEVICE)
    assert fast.report.fused == {"0": "linear + relu"}
    torch.testing.assert_close(fast(x), model(x))
    assert type(model[0]) is Linear


@torch.no_grad()
def test_of_timm_itself():
    timm = pytest.importorskip("timm")
    model = trained(timm.create_model("mobilenetv3_small_050"), torch.float32)
    fast, x = tritonnn.fuse(model), torch.randn(1, 3, 32, 32, device=DEVICE)
    assert "BatchNormAct2d" not in str(fast.report) and "linear" in fast.report.fused.values()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
