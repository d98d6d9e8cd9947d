"""Compiles what the layers of a swapped network will launch, before its first call."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from .compile_ahead import compile_ahead, progress_after
from .latency import LayerCall, record_calls, twin
from .runtime.dependent_launch import launches_as_in_graphs
from .swap import restore, swap


def compile_swapped(
    model: nn.Module,
    *inputs: torch.Tensor,
    layers: str | Sequence[str] = "all",
    in_graphs: bool = False,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Compiles beside each other, on the current GPU, what `model` will launch once it is swapped; else each call would
    wait for the compiler in turn.

    The model runs once, with PyTorch's layers, which tells what each layer is given.

    Args:
        model: swapped already or not, in the mode (eval, autocast) in which it is to run; left alone.
        inputs: of one call; they decide the shapes.
        layers: the kinds that are or will be swapped, as in `swap`.
        in_graphs: also what they launch in CUDA graphs.
        advance: is told of each kernel, one of so many; by default there is a progress bar after two seconds.

    Raises:
        ValueError: an unknown kind.
    """
    calls = calls_of_swapped(model, *inputs, layers=layers)
    if in_graphs:
        calls += [partial(_as_in_graphs, call) for call in calls]
    if calls and inputs[0].is_cuda:
        with nullcontext(advance) if advance else progress_after() as told:
            compile_ahead(calls, told, every_kernel=True)


def calls_of_swapped(
    model: nn.Module, *inputs: torch.Tensor, layers: str | Sequence[str] = "all"
) -> list[Callable[[], object]]:
    """Each layer that will be a Triton layer, alone on images of the kind that it is given, each kind once.

    Not those in training mode, as their calls change them.
    """
    pytorch, calls = twin(model), {}
    restore(pytorch)
    for call in record_calls(pytorch, *inputs):
        layer = twin(pytorch.get_submodule(call.name))
        if not layer.training and swap(layer, layers).swapped:
            calls[call.shape, call.stride, call.dtype, repr(layer)] = partial(_run_on_anything, layer, call)
    return list(calls.values())


@torch.no_grad()
def _run_on_anything(layer: nn.Module, call: LayerCall) -> None:
    layer(torch.empty_strided(call.shape, call.stride, dtype=call.dtype, device=call.device))


def _as_in_graphs(call: Callable[[], object]) -> None:
    with launches_as_in_graphs():
        call()
