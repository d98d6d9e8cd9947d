"""Which layer's count of fallbacks an operator's backward adds to: the layer says so, right before it calls it."""

import threading
from collections import Counter
from typing import Protocol

import torch


class _Local(threading.local):
    counter: "Counter[str] | None" = None


_LOCAL = _Local()


class _Counting(Protocol):
    @property
    def fallbacks(self) -> "Counter[str]": ...


def count_backward_in(layer: _Counting) -> None:
    """The next operator that autograd records in this thread tells the layer what its backward leaves to PyTorch."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        count_recorded_backward_in(layer)


def count_recorded_backward_in(layer: _Counting) -> None:
    """The same where it is known that autograd records it."""
    _LOCAL.counter = layer.fallbacks


def counter_of_backward() -> "Counter[str] | None":
    """The counter that the operator's backward adds to; None where nobody counts."""
    counter, _LOCAL.counter = _LOCAL.counter, None
    return counter
