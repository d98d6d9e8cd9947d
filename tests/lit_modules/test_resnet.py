"""ResNet18 against torchvision's, and what the swap relies on: every layer a module of its own."""

from collections import Counter

import pytest
import torch
import torchvision
from torch import nn

from lit_modules.resnet import ResNet18


def test_imagenet_stem_computes_what_torchvisions_resnet18_does():
    theirs = torchvision.models.resnet18().eval()
    ours = ResNet18("imagenet", num_classes=1000).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


def test_cifar_stem_has_the_known_number_of_parameters():
    assert sum(p.numel() for p in ResNet18("cifar").parameters()) == 11_173_962


@pytest.mark.parametrize("stem, size, pooled", [("cifar", 32, 4), ("imagenet", 224, 7)])
def test_every_layer_runs_once_and_all_kinds_are_there(stem, size, pooled):
    network = ResNet18(stem, width=4, num_classes=7).eval()
    calls, shapes = Counter(), {}
    for name, module in network.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Sequential):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: calls.update([name]) or shapes.update({name: inputs[0].shape})
            )
    logits = network(torch.randn(2, 3, size, size))
    leaves = {n: type(m) for n, m in network.named_modules() if not list(m.children()) and type(m) is not nn.Sequential}
    assert logits.shape == (2, 7)
    assert calls == dict.fromkeys(leaves, 1)
    assert shapes["head.pool"] == (2, 32, pooled, pooled)
    assert Counter(leaves.values()) == {
        nn.Conv2d: 20,
        nn.BatchNorm2d: 20,
        nn.ReLU: 17,
        nn.MaxPool2d: 1,
        nn.AvgPool2d: 1,
        nn.Flatten: 1,
        nn.Linear: 1,
    }


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32), (3, 32, 32)], ids=["size", "channels", "unbatched"])
def test_images_of_another_shape_are_an_error_that_names_both(shape):
    with pytest.raises(ValueError, match=r"expected images of shape \[N, 3, 32, 32\], got \[.*\]"):
        ResNet18(width=4)(torch.randn(shape))


def test_unknown_stem_is_an_error():
    with pytest.raises(ValueError, match="'cifar' or 'imagenet', got 'mnist'"):
        ResNet18("mnist")


def test_torch_fx_can_trace_it():
    network = ResNet18(width=4).eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(images), network(images))
