"""Gradients of a swapped network, and its training: the loss of PyTorch's network, step by step."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.compare import DEVICE, image, network
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import tritonnn
from lit_modules.resnet import ResNet18

NEEDED = {
    "everything": lambda name: True,
    "only the input": lambda name: name == "input",
    "only weights": lambda name: name.endswith("weight"),
    "only biases": lambda name: name.endswith("bias"),
    "only the last layer": lambda name: name.startswith("7."),
    "all but the batch norm": lambda name: not name.startswith("1."),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", NEEDED)
def test_gradients_of_what_needs_one(case, training):
    """Against float64's, frozen parameters included; twice, so that gradients accumulate."""
    pytorch = network().to(DEVICE, torch.float64).train(training)
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped, strict=True)
    x = image(3, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for model in (pytorch, swapped):
        tensors = {"input": x.clone(), **dict(model.named_parameters())}
        for name, tensor in tensors.items():
            tensor.requires_grad_(NEEDED[case](name))
        for _ in range(2):
            model(tensors["input"]).square().sum().backward()
        gradients.append({name: tensor.grad for name, tensor in tensors.items()})
    assert {name for name, grad in gradients[0].items() if grad is not None} == set(filter(NEEDED[case], tensors))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-10)


def test_gradient_penalty():
    """A gradient as part of the loss: the second order through every layer, by create_graph."""
    pytorch = network().to(DEVICE, torch.float64)
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped, strict=True)
    x = image(3, 3, 8, 8, dtype=torch.float64).requires_grad_()
    gradients = []
    for model in (pytorch, swapped):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-10)


def test_checkpointed_activations():
    pytorch = network().to(DEVICE, torch.float64)
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped, strict=True)
    x = image(3, 3, 8, 8, dtype=torch.float64)
    for model in (pytorch, swapped):
        torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False).square().sum().backward()
    for p, q in zip(swapped.parameters(), pytorch.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    for p, q in zip(swapped.buffers(), pytorch.buffers()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def loss_curve(model: nn.Module, batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]], steps: int, lr: float):
    """The loss of every step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step in range(steps):
        x, labels = batch(step)
        loss = cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses).cpu()


def test_tiny_network_trains_to_the_rounding():
    pytorch = network().to(DEVICE, torch.float64)
    swapped = copy.deepcopy(pytorch)
    tritonnn.swap(swapped, strict=True)
    batches = [image(8, 3, 8, 8, dtype=torch.float64) for _ in range(4)]
    labels = torch.arange(8, device=DEVICE) % 4
    curves = [loss_curve(model, lambda step: (batches[step % 4], labels), 20, 0.1) for model in (pytorch, swapped)]
    assert curves[0][-4:].mean() < 0.9 * curves[0][:4].mean()
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-9, atol=0)
    for p, q in zip(swapped.state_dict().values(), pytorch.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits as images [1797, 1, 32, 32], normalised, and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return interpolate(images, size=32, mode="bilinear").to(DEVICE), torch.tensor(labels).to(DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_resnet18_trains_like_pytorch(precision):
    """100 steps of the full ResNet18: as far from float64's curve as PyTorch's own.

    Those are four that differ by nothing but rounding, in the memory format and the order of the images in a batch.
    Training amplifies a rounding exponentially, hence the factor of two over the largest of the four distances.
    """
    images, labels = digits()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(len(images), generator=generator)[:128].to(DEVICE) for _ in range(100)]
    start = ResNet18(in_channels=1).to(DEVICE)

    def curve(swap: bool = False, channels_last: bool = False, reverse: bool = False, dtype=torch.float32):
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = copy.deepcopy(start).to(dtype=dtype, memory_format=memory_format)
        if swap:
            tritonnn.swap(model, strict=True)

        def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = batches[step].flip(0) if reverse else batches[step]
            return images[chosen].to(dtype=dtype, memory_format=memory_format), labels[chosen]

        with torch.autocast("cuda", torch.bfloat16, enabled=precision != "float32" and dtype != torch.float64):
            return loss_curve(model, batch, len(batches), lr=0.01)

    exact = curve(dtype=torch.float64)
    layouts = [(last, reverse) for last in (False, True) for reverse in (False, True)]
    curves = [curve(channels_last=last, reverse=reverse) for last, reverse in layouts]
    noise, first_noise = (max(distance(c[:steps], exact[:steps]) for c in curves) for steps in (None, 3))
    assert exact[-10:].mean() < 0.5 * exact[:5].mean()
    assert noise > 0
    for channels_last in (False, True):
        swapped = curve(swap=True, channels_last=channels_last)
        assert distance(swapped, exact) <= 2 * noise
        assert distance(swapped[:3], exact[:3]) <= 2 * first_noise


def distance(curve: torch.Tensor, exact: torch.Tensor) -> float:
    return float((curve - exact).abs().mean())
