"""What layers keep for backward: no more than PyTorch's, so that the same tensors may be overwritten before it."""

import copy
from collections.abc import Callable, Iterator
from itertools import chain, combinations

import pytest
import torch
from helpers.compare import DEVICE, image
from torch import nn

import tritonnn

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "conv2d, no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 5, 5)),
    "conv2d, reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "conv2d, unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 5)),
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear, three dimensions": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear, one dimension": (lambda: nn.Linear(4, 3), (4,)),
    "relu": (nn.ReLU, (2, 3, 5, 5)),
    "relu, inplace": (lambda: nn.ReLU(inplace=True), (2, 3, 5, 5)),
    "batch_norm2d, training": (lambda: nn.BatchNorm2d(3), (2, 3, 5, 5)),
    "batch_norm2d, training, not affine": (lambda: nn.BatchNorm2d(3, affine=False), (2, 3, 5, 5)),
    "batch_norm2d, training, not tracking": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 5, 5)),
    "batch_norm2d, eval": (lambda: nn.BatchNorm2d(3).eval(), (2, 3, 5, 5)),
    "max_pool2d": (lambda: nn.MaxPool2d(2), (2, 3, 4, 4)),
    "avg_pool2d": (lambda: nn.AvgPool2d(2), (2, 3, 4, 4)),
    "adaptive_avg_pool2d to 1": (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 4, 4)),
    "adaptive_avg_pool2d to 1, unbatched": (lambda: nn.AdaptiveAvgPool2d(1), (3, 4, 4)),
    "adaptive_avg_pool2d to 2x1": (lambda: nn.AdaptiveAvgPool2d((2, 1)), (2, 3, 4, 4)),
}


def subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """All but the empty one."""
    return chain.from_iterable(combinations(names, size) for size in range(1, len(names) + 1))


def tensors_of(layer: nn.Module, x: torch.Tensor, needed: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """By name; x, no leaf, is copied, and of leaves those in `needed` require a gradient."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in needed)
    x = x.clone().requires_grad_() * 1 if "input" in needed else x.clone()
    floating = {name: buffer for name, buffer in layer.named_buffers() if buffer.is_floating_point()}
    return {"input": x, **dict(layer.named_parameters()), **floating}


def bytes_saved(layer: nn.Module, x: torch.Tensor, needed: tuple[str, ...]) -> int:
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tensors = tensors_of(layer, x, needed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(tensors["input"])
    return sum(storage.nbytes() for storage in storages.values())


def backward_raises(layer: nn.Module, x: torch.Tensor, needed: tuple[str, ...], overwritten: str) -> bool:
    """Whether backward refuses after a tensor has been overwritten since the forward pass."""
    tensors = tensors_of(layer, x, needed)
    tensors["output"] = layer(tensors["input"])
    with torch.no_grad():
        tensors[overwritten].add_(1)
    try:
        tensors["output"].sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return True
    return False


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_may_be_overwritten_before_backward(name, channels_last):
    make, shape = LAYERS[name]
    x = image(*shape, channels_last=channels_last and len(shape) == 4)
    layer = make().to(DEVICE)
    names = list(tensors_of(layer, x, ()))
    for needed in subsets(["input", *(name for name, _ in layer.named_parameters())]):
        pytorch, swapped = copy.deepcopy(layer), copy.deepcopy(layer)
        tritonnn.swap(swapped, strict=True)
        assert bytes_saved(swapped, x, needed) <= bytes_saved(pytorch, x, needed), needed
        for overwritten in (*names, "output"):
            actual, expected = (backward_raises(m, x, needed, overwritten) for m in (swapped, pytorch))
            # In training PyTorch keeps the running statistics too, on which the gradient does not depend.
            if not (layer.training and overwritten.startswith("running_")):
                assert actual == expected, (needed, overwritten)


class SqueezeAndExcite(nn.Module):
    """Scales its input, in place, by what it pools of it."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        h *= self.pool(h).sigmoid()
        return h


class Overwriting(nn.Module):
    """A linear layer, then its input, or what the optimizer may step in between, is overwritten."""

    def __init__(self, frozen: str) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(4, 3), frozen
        self.layer.weight.requires_grad_(frozen != "weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2 if self.frozen == "weight" else x.detach() * 2
        y = self.layer(h)
        with torch.no_grad():
            (h if self.frozen == "weight" else self.layer.weight).mul_(3)
        return y


@pytest.mark.parametrize(
    "make, shape",
    {
        "pooled to one pixel, batched": (lambda: SqueezeAndExcite(1), (2, 3, 4, 4)),
        "pooled to one pixel, unbatched": (lambda: SqueezeAndExcite((1, 1)), (3, 4, 4)),
        "frozen linear": (lambda: Overwriting("weight"), (5, 4)),
        "linear of data": (lambda: Overwriting("input"), (5, 4)),
        "linear of data in three dimensions": (lambda: Overwriting("input"), (2, 5, 4)),
    }.values(),
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_gradients_where_something_was_overwritten(make, shape):
    pytorch = make().to(DEVICE, torch.float64)
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped, strict=True)
    x = image(*shape, dtype=torch.float64)
    gradients = []
    for model in (pytorch, swapped):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters())])
    assert any(grad is not None for grad in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
def test_a_block_keeps_each_activation_once(inplace):
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.Conv2d(4, 5, 1), nn.ReLU(inplace)).to(DEVICE)
    x = image(2, 3, 4, 4)
    names = tuple(name for name, _ in block.named_parameters())
    expected = bytes_saved(block, x, names)
    tritonnn.swap(block, strict=True)
    assert bytes_saved(block, x, names) == expected
