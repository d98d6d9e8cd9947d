"""Which torch.nn layers become which Triton layers: swap, restore and the report.

A swap changes the class of a module, nothing else: the module keeps its identity, parameters, buffers and hooks, so
that checkpoints, optimizers and other references to it do not notice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .layers.avg_pool2d import TritonAdaptiveAvgPool2d, TritonAvgPool2d
from .layers.batch_norm2d import TritonBatchNorm2d
from .layers.conv2d import TritonConv2d
from .layers.layer import TritonLayer
from .layers.linear import TritonLinear
from .layers.max_pool2d import TritonMaxPool2d
from .layers.relu import TritonReLU
from .runtime.capabilities import notes

LAYERS: dict[str, dict[type[nn.Module], type[TritonLayer]]] = {
    "avg_pool2d": {nn.AvgPool2d: TritonAvgPool2d, nn.AdaptiveAvgPool2d: TritonAdaptiveAvgPool2d},
    "batch_norm2d": {nn.BatchNorm2d: TritonBatchNorm2d},
    "conv2d": {nn.Conv2d: TritonConv2d},
    "linear": {nn.Linear: TritonLinear},
    "max_pool2d": {nn.MaxPool2d: TritonMaxPool2d},
    "relu": {nn.ReLU: TritonReLU},
}
KINDS: tuple[str, ...] = tuple(LAYERS)

_TRITON = {torch_class: triton_class for pairs in LAYERS.values() for torch_class, triton_class in pairs.items()}
_TORCH = {triton_class: torch_class for torch_class, triton_class in _TRITON.items()}
_KIND = {cls: kind for kind, pairs in LAYERS.items() for pair in pairs.items() for cls in pair}


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer that has a Triton version, or is one; None for any other module, subclasses included."""
    return _KIND.get(type(module))


@dataclass
class SwapReport:
    """What a swap did: layers by their names in the model, in its order."""

    modules: dict[str, nn.Module] = field(repr=False)
    swapped: dict[str, str]
    """Name to kind."""
    stayed: dict[str, str]
    """Name of a layer that stayed PyTorch to the reason; what does nothing in eval mode is no layer."""

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Name to reason to the number of calls, so far, in which a swapped layer ran PyTorch's own op."""
        return {name: dict(counts) for name, m in self.modules.items() if (counts := getattr(m, "fallbacks", None))}

    def __str__(self) -> str:
        kinds = list(self.swapped.values())
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
        lines = [f"swapped to Triton: {counts or 'nothing'}", *by_reason("stayed PyTorch", self.stayed)]
        calls = {name: f"{why} ({n} calls)" for name, whys in self.fallbacks.items() for why, n in whys.items()}
        return "\n".join([*lines, *by_reason("fell back to PyTorch", calls), *notes()])


def by_reason(title: str, reasons: dict[str, str]) -> list[str]:
    """A line for each reason, with the names that it holds for, the first few of many."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name or "(the model)")
    return [f"{title}: {few(same)}: {reason}" for reason, same in names.items()]


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _requested_kinds(layers: str | Sequence[str]) -> set[str]:
    requested = [layers] if isinstance(layers, str) else list(layers)
    for kind in requested:
        if kind not in (*KINDS, "all"):
            raise ValueError(f"unknown layer kind {kind!r}: choose from {', '.join(KINDS)}, all")
    return set(KINDS) if "all" in requested else set(requested)


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) in _DROPOUTS and not module.training)


def _reason_to_stay(module: nn.Module) -> str:
    kind = kind_of(module)
    if kind is not None:
        return f"{kind} was not asked for"
    base = next((cls for cls in _TRITON if isinstance(module, cls)), None)
    if base is not None:
        name = type(module).__name__
        name = f"{type(module).__module__}.{name}" if name == base.__name__ else name
        return f"{name} is a subclass of {base.__name__}, with behaviour of its own"
    return f"no Triton layer for {type(module).__name__}"


def swap(model: nn.Module, layers: str | Sequence[str] = "all", strict: bool = False) -> SwapReport:
    """Turns the PyTorch layers of `model`, itself included, into Triton layers, in place.

    Args:
        layers: a kind (one of `KINDS`), several, or "all".
        strict: makes it an error, at the call, where a layer would fall back to PyTorch's own op. That also holds for
            layers of these kinds that an earlier swap has turned; those built as Triton layers keep their own `strict`.

    Raises:
        TypeError: the model is no module.
        ValueError: an unknown kind.
    """
    check_is_module(model)
    requested = _requested_kinds(layers)
    report = SwapReport({}, {}, {})
    for module in _swapped_before(model, requested):
        module.strict = strict
    for name, module in model.named_modules():
        if type(module) in _TRITON and kind_of(module) in requested:
            module.__class__ = _TRITON[type(module)]
            # Modules of "torch.nn" are nodes of the graphs of torch.fx, which cannot see through ours.
            module.__dict__.update(_swapped=True, strict=strict, __module__="torch.nn")
            report.modules[name] = module
            report.swapped[name] = _KIND[type(module)]
        elif (
            not isinstance(module, (TritonLayer, nn.Sequential))
            and not _does_nothing(module)
            and (not any(module.children()) or isinstance(module, tuple(_TRITON)))
        ):
            report.stayed[name] = _reason_to_stay(module)
    return report


def check_is_module(model: object) -> None:
    """Raises TypeError where it is none."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"expected a torch.nn.Module, got {what}")


def _swapped_before(model: nn.Module, requested: set[str]) -> list[Any]:
    """The layers of these kinds that a swap has turned, also where their class has since been derived from."""
    swapped = [module for module in model.modules() if "_swapped" in module.__dict__]
    return [module for module in swapped if any(_KIND.get(cls) in requested for cls in type(module).__mro__)]


def _restore(module: nn.Module) -> None:
    if module.__dict__.pop("_fused_for_training", False):
        del module.__dict__["forward"]
    if module.__dict__.pop("_swapped", False):
        module.__class__ = _torch_class(type(module))
        for attribute in ("strict", "_fallbacks", "__module__"):
            module.__dict__.pop(attribute, None)


def _torch_class(cls: type) -> type[nn.Module]:
    if cls in _TORCH:
        return _TORCH[cls]
    # Something like torch.nn.utils.parametrize has since derived a class for the module: derive it from PyTorch's.
    bases = tuple(_torch_class(base) if issubclass(base, TritonLayer) else base for base in cls.__bases__)
    attributes = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("Triton", ""), bases, attributes)


def restore(model: nn.Module) -> None:
    """Undoes every `swap` and `fuse_for_training` of `model`. Layers that were built as Triton layers stay."""
    for module in model.modules():
        _restore(module)


@contextmanager
def swapped(model: nn.Module, layers: str | Sequence[str] = "all", strict: bool = False) -> Iterator[SwapReport]:
    """`swap` for the length of a `with` block; what it changed is restored on exit and on error."""
    before = [(module, module.strict) for module in _swapped_before(model, _requested_kinds(layers))]
    report = swap(model, layers, strict)
    try:
        yield report
    finally:
        for module in report.modules.values():
            _restore(module)
        for module, was_strict in before:
            if "_swapped" in module.__dict__:  # not restored meanwhile
                module.strict = was_strict
