"""What every Triton layer has in common: which inputs its kernel takes, and PyTorch's own op for the others."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ..ops.window import output_size
from ..runtime.capabilities import current_level, transforms_are_active
from ..runtime.hardware import reason_against
from ..runtime.launch_plan import MOST_PLANS, UNSEEN, Plans, launch_key, plain_eager
from ..runtime.operator import PLAIN

FLOATING_POINT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

T = TypeVar("T")


class TritonLayer:
    """Mixed into a torch.nn class. `strict`: an error where the layer would fall back to PyTorch's op.

    `fallbacks` counts the calls that did, by reason; those in compiled code once.
    """

    strict: bool = False

    @property
    def fallbacks(self) -> Counter[str]:
        if "_fallbacks" not in self.__dict__:
            fallbacks: Counter[str] = Counter()
            self._fallbacks = fallbacks
        return self._fallbacks

    def _fall_back(self, reason: str, op: Callable[..., T], *args) -> T:
        """op(*args), PyTorch's own, which also raises PyTorch's own error where the input is at fault."""
        y = op(*args)
        if self.strict:
            raise RuntimeError(f"{type(self).__name__}(strict=True) has no kernel for this call: {reason}")
        if torch.compiler.is_compiling():  # a number that changes with every call would be compiled anew every time
            self.fallbacks.setdefault(reason, 1)
        else:
            self.fallbacks[reason] += 1
        return y


def by_plan(
    attributes: Callable[[Any], tuple],
    state: Callable[[torch.Tensor], object] | None = None,
    direct: Callable[..., Callable | None] | None = None,
) -> Callable:
    """Decorates a layer's method of tensors that hands out what kernels compute, by plan (see launch_plan.py).

    `attributes(layer)` are the constants and tensors of the layer that it depends on, `state(x)`, of the first tensor,
    all the rest. In subclasses, which may depend on more, only the operators have plans. So it is where autograd
    records the method, unless there is a `direct`: `direct(layer, *tensors)` is asked once for each kind of tensors for
    an `Operator.shortcut` that does the same without the method's checks, or None.
    """

    def decorate(method: Callable) -> Callable:
        name = method.__name__
        plans: Any = Plans(state)
        shortcuts: dict[tuple, Any] = {}

        @functools.wraps(method)
        def planned(self: TritonLayer, *tensors: torch.Tensor, **named: torch.Tensor) -> Any:
            if named:
                return method(self, *tensors, **named)
            if plain_eager() and type(self).__dict__.get(name) is planned:
                args = *tensors, *attributes(self)
                key = launch_key(args)
                if key is not None:
                    kind, addresses, requires_grad = key
                    if not (requires_grad and torch.is_grad_enabled()):
                        return plans.run(key, args, method, self, *tensors)
                    if direct is not None:
                        try:
                            shortcut = shortcuts.get(kind, UNSEEN)
                        except TypeError:  # a tuple of what has no hash
                            shortcut = None
                        if shortcut is UNSEEN:
                            shortcut = find_shortcut(self, kind, tensors)
                        if shortcut is not None:
                            return shortcut(self, addresses, args)
            return method(self, *tensors)

        def find_shortcut(self: TritonLayer, kind: tuple, tensors: tuple) -> Any:
            if len(shortcuts) >= MOST_PLANS:
                shortcuts.clear()
            shortcut = shortcuts[kind] = direct(self, *tensors)
            return shortcut

        return planned

    return decorate


def parameters(layer: nn.BatchNorm2d | nn.Conv2d | nn.Linear) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias, read from the dictionary: `module.weight` costs the host more time."""
    try:
        return layer._parameters["weight"], layer._parameters["bias"]
    except KeyError:
        return layer.weight, layer.bias


def is_empty(x: object) -> bool:
    """Whether x is a tensor without elements."""
    return isinstance(x, torch.Tensor) and x.numel() == 0


def reason_to_fall_back(
    x: torch.Tensor, *parameters: torch.Tensor | None, dtypes: Sequence[torch.dtype] = FLOATING_POINT
) -> str | None:
    """Why no kernel takes these tensors now, or None: strided tensors of one device, x of a type in `dtypes`."""
    if current_level() >= 0:
        return "forward-mode differentiation"
    if transforms_are_active() and torch.compiler.is_compiling():
        return "torch.func inside torch.compile"
    if not isinstance(x, torch.Tensor):  # PyTorch asks its __torch_function__, if it has one
        return f"input of type {type(x).__name__}"
    for t in (x, *parameters):
        if t is None:
            continue
        if type(t) not in PLAIN and hasattr(t, "__tensor_flatten__"):  # such as DTensor: made of other tensors
            return f"tensor of type {type(t).__name__}"
        if t.is_nested:
            return "nested tensor"
        if t.layout != torch.strided:
            return f"layout {t.layout}"
    if x.dtype not in dtypes:
        return f"dtype {x.dtype}"
    if any(p is not None and p.device != x.device for p in parameters):
        return "tensors on several devices"
    return reason_against(x.device)


def reason_to_fall_back_image(x: torch.Tensor, *parameters: torch.Tensor | None) -> str | None:
    """The same for an image, batched [N, C, H, W] or not [C, H, W]."""
    if isinstance(x, torch.Tensor) and x.dim() not in (3, 4):
        return f"{x.dim()} dimensions"
    return reason_to_fall_back(x, *parameters)


def recorded(x: torch.Tensor) -> bool:
    """Whether autograd records what is computed from x. Under `torch.jit.trace` always: one trace serves both cases."""
    return (torch.is_grad_enabled() and x.requires_grad) or torch.jit.is_tracing()


def pair(sizes: int | Sequence[int]) -> tuple[int, int] | None:
    """(rows, columns) of an argument given as one number, one in a tuple, or two; None for other lengths."""
    if type(sizes) is tuple and len(sizes) == 2:  # as torch.nn keeps them
        return sizes
    if not isinstance(sizes, Sequence):
        return sizes, sizes
    if len(sizes) == 1:
        return sizes[0], sizes[0]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def windows_fit(
    x: torch.Tensor,
    kernel_size: Sequence[int] | None,
    stride: tuple[int, int] | None,
    padding: tuple[int, int] | None,
    dilation: tuple[int, int] | None,
    ceil_mode: bool = False,
) -> bool:
    """Whether PyTorch accepts the windows for an image [(N,) C, H, W]: all sizes are at least 1, the output's too."""
    return None not in (kernel_size, stride, padding, dilation) and all(
        min(size, k, s, d) > 0 and p >= 0 and output_size(size, k, s, p, d, ceil_mode) > 0
        for size, k, s, p, d in zip(x.shape[-2:], kernel_size, stride, padding, dilation)
    )


def batched(op: Callable, x: torch.Tensor, *args) -> Any:
    """op on [N, C, H, W], for x of that shape or [C, H, W]; op gives a tensor or a tuple of them."""
    if x.dim() == 4:
        return op(x, *args)
    y = op(x.unsqueeze(0), *args)
    return y.squeeze(0) if isinstance(y, torch.Tensor) else tuple(t.squeeze(0) for t in y)
