"""Networks by name, with random weights, and images for them."""

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CALIBRATION_IMAGES = 16


class UserError(Exception):
    """Something the user can put right: the message says in one line what was wrong and what to do."""


def build(name: str, **arguments: Any) -> nn.Module:
    """The network in eval mode, with seeded random weights; see `python -m tritonnn --help` for the names.

    Raises:
        UserError: there is no such network, or it cannot be made with these arguments.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(name, **arguments).eval()


def make(name: str, **arguments: Any) -> nn.Module:
    """As `build`, as it comes from its maker: in training mode, say, and with other random weights each time."""
    made_by = maker(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initialisations to come
        try:
            model = made_by(**arguments)
        except Exception as error:  # whatever the network's own code raises
            given = " and ".join(f"{key} {value}" for key, value in arguments.items())
            how = f"with {given}" if given else "without arguments"
            raise UserError(f"{name} cannot be made {how}: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} is no torch.nn.Module and makes none, but {type(model).__name__}")
    return model


def maker(name: str) -> Callable[..., object]:
    for prefix in ("torchvision:", "torchvision.models.", "torchvision.models:"):
        if name.startswith(prefix):
            return _of_torchvision(name.removeprefix(prefix))
    if name.startswith("timm/"):
        return _of_timm(name.removeprefix("timm/"))
    module_name, separator, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not (separator and module_name and attribute):
        raise UserError(f"{name!r} names no network: it may be torchvision:NAME, timm/NAME or package.module:Class")
    found: object = _imported(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{module_name} has no {attribute}{_did_you_mean(attribute, dir(found))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return partial(_ready, found)
    if not callable(found):
        raise UserError(f"{name} is no torch.nn.Module and makes none, but {type(found).__name__}")
    return found


def _ready(network: nn.Module, **arguments: Any) -> nn.Module:
    if arguments:
        raise TypeError("it is a network already")
    return network


def _of_torchvision(name: str) -> Callable[..., object]:
    models = _imported("torchvision.models")
    if name not in models.list_models():
        raise UserError(f"torchvision has no network {name!r}{_did_you_mean(name, models.list_models())}")
    if name in models.list_models(module=models.detection):
        raise UserError(f"torchvision's {name} is a detector: it takes lists of images, not a batch")
    maker = models.get_model_builder(name)
    no_weights = [p for p in inspect.signature(maker).parameters if p in ("weights", "weights_backbone")]
    return partial(maker, **dict.fromkeys(no_weights))


def _of_timm(name: str) -> Callable[..., object]:
    timm = _imported("timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no network {name!r}{_did_you_mean(name, timm.list_models())}")
    return partial(timm.create_model, name, pretrained=False)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            package = name.partition(".")[0]
            raise UserError(f"there is no module {name}: is {package} installed, or in this folder?") from error
        raise UserError(f"{name} cannot be imported: {describe(error)}") from error
    except Exception as error:  # whatever the module's own code raises
        raise UserError(f"{name} cannot be imported: {describe(error)}") from error


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names)
    return f": did you mean {' or '.join(close)}?" if close else ""


def describe(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def random_images(model: nn.Module, batch: int, size: int) -> Tensor:
    """Normally distributed values [batch, C, size, size] with as many channels as the model's first convolution has."""
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Gives batch norms random scales and shifts, and the statistics of these images, as training would have.

    Without them a deep network with random weights makes numbers that overflow or vanish.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m.running_var is not None
    ]
    momenta = [norm.momentum for norm in norms]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for norm in norms:
            if norm.affine:
                norm.weight.copy_(torch.empty(norm.num_features).uniform_(0.5, 1.5, generator=generator))
                norm.bias.copy_(torch.empty(norm.num_features).normal_(0, 0.2, generator=generator))
            norm.reset_running_stats()
            norm.momentum = None  # the running statistics become those of the images
            norm.train()
        if norms:
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
