"""timm's layers of its own, as the layers of torch.nn that they are or are made of."""

import sys

from torch import nn

from .tracing import is_changed


def plain_timm_layers(network: nn.Module) -> None:
    """Puts layers of torch.nn in place of timm's that do the same in eval mode.

    `timm.layers.BatchNormAct2d` is a BatchNorm2d with the attributes `drop` and `act` and code of its own, which does
    what these three do one after the other: a Sequential takes its place. `timm.layers.Linear` differs from nn.Linear
    in TorchScript only. timm is not imported for it: where nobody has, there are none.
    """
    timm = sys.modules.get("timm.layers")
    norm_act, linear = (getattr(timm, name, None) for name in ("BatchNormAct2d", "Linear"))
    parts = [part for part in network.modules() if not is_changed(part)]
    for part in parts:
        if type(part) is linear:
            part.__class__ = nn.Linear
    split = {part: _split(part) for part in parts if type(part) is norm_act}
    for parent in list(network.modules()):
        for name, part in parent._modules.items():
            if part in split:
                parent._modules[name] = split[part]


def _split(part: nn.Module) -> nn.Sequential:
    norm = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    norm.__dict__.update(part.__dict__, _modules={})
    layers = nn.Sequential()
    layers.add_module("norm", norm)
    for name in ("drop", "act"):
        if type(getattr(part, name)) is not nn.Identity:
            layers.add_module(name, getattr(part, name))
    return layers.eval()
