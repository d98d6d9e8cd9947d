"""One small member of every family of torchvision's classification networks, with random weights."""

import torch
import torchvision
from torch import nn

NAMES = (
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
)
ARGUMENTS = {
    "googlenet": dict(aux_logits=False, init_weights=False),
    "inception_v3": dict(aux_logits=False, init_weights=False),
}


def torchvision_network(name: str, **arguments) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, **ARGUMENTS.get(name, {}), **arguments)


def without_chance(network: nn.Module) -> nn.Module:
    """The network with its dropout and stochastic depth switched off."""
    for module in network.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return network


def meta_network(name: str) -> nn.Module:
    """Shapes only: no memory, no time."""
    if name.startswith("regnet"):  # computes its widths with tensors
        return torchvision_network(name).to("meta")
    with torch.device("meta"):
        return torchvision_network(name)
