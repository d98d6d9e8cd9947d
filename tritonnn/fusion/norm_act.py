"""timm's batch norm with an activation of its own, as the layers that it is made of."""

import sys

from torch import nn

from .tracing import is_changed


def split_norm_acts(network: nn.Module) -> None:
    """Puts a Sequential of batch norm, dropout and activation in place of each `timm.layers.BatchNormAct2d`, in eval.

    That is a BatchNorm2d with the attributes `drop` and `act` and code of its own, which does in eval mode what these
    three do one after the other. timm is not imported for it: where nobody has, there are none.
    """
    norm_act = getattr(sys.modules.get("timm.layers"), "BatchNormAct2d", None)
    if norm_act is None:
        return
    found = {part for part in network.modules() if type(part) is norm_act and not is_changed(part)}
    split = {part: _split(part) for part in found}
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
