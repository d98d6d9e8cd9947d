"""Before the first call of a fused network with images of a kind, its kernels are compiled beside each other."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from ..compile_ahead import compile_ahead, progress_after
from ..layers.fused.base import FusedLayer
from ..layers.layer import TritonLayer
from ..runtime.dependent_launch import launches_as_in_graphs
from ..runtime.launch_plan import is_capturing, plain_eager
from .fused_graph import FusedGraph
from .known_functions import LIBRARIES
from .tracing import ends_in_place, in_place, is_changed, is_layer

MOST_KINDS = 64
"""Kinds of inputs that are remembered."""


@runtime_checkable
class RunsGraph(Protocol):
    """A call that may run a module's own code instead of the traced graph."""

    def runs_the_graph(self, *args) -> bool: ...


class FirstCalls:
    """Compiles ahead what a call of `network` needs, once for each shape and type of its inputs.

    The call is gone through twice for that, the first time without launches. So nothing may notice: there is no code
    but that of a traced graph of layers, which overwrites nothing and draws no random numbers, and functions of the
    network's own (`torch.fx.wrap`) that have an attribute `only_reads`, which is true.
    """

    def __init__(self, network: nn.Module) -> None:
        self.can_go_through_twice = _has_no_effects(network)
        self._seen: set[tuple] = set()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_seen": set()}

    def before(self, call: Callable, network: nn.Module, args: tuple, kwargs: dict, in_graphs: bool) -> None:
        """Comes before each `call(*args, **kwargs)`, which runs the layers of `network`, in CUDA graphs or not."""
        if not self.can_go_through_twice or kwargs or not args or type(args[0]) is not torch.Tensor:
            return
        kind = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else None for x in args)
        if kind in self._seen:
            return
        if not args[0].is_cuda or None in kind or not plain_eager() or is_capturing():
            return
        if isinstance(call, RunsGraph) and not call.runs_the_graph(*args):
            return
        first_of_all = not self._seen
        if len(self._seen) < MOST_KINDS:
            self._seen.add(kind)
        fallbacks = [layer.fallbacks for layer in network.modules() if isinstance(layer, TritonLayer)]
        counted = [counts.copy() for counts in fallbacks]
        as_it_runs = launches_as_in_graphs() if in_graphs else nullcontext()
        with torch.cuda.device(args[0].device), as_it_runs, progress_after() as advance:
            compile_ahead([lambda: call(*args)], advance, every_kernel=first_of_all)
        for counts, before in zip(fallbacks, counted):
            counts.clear()
            counts.update(before)
        if first_of_all:  # nothing was packed before; what was now is nonsense
            for module in network.modules():
                if isinstance(module, FusedLayer):
                    module.forget_packed_weights()


def _has_no_effects(network: nn.Module) -> bool:
    if not isinstance(network, FusedGraph):
        return False
    modules = dict(network.named_modules())
    return all(_is_harmless(node, modules) for node in network.graph.nodes)


def _is_harmless(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op == "call_module":
        module = modules[node.target]
        known = isinstance(module, (FusedLayer, TritonLayer)) or is_layer(module)
        quiet = all(not is_changed(m) and not m.training and not getattr(m, "inplace", False) for m in module.modules())
        return known and quiet
    if getattr(node.target, "only_reads", False):
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    library = (getattr(node.target, "__module__", "") or "torch").partition(".")[0]
    if library not in (*LIBRARIES, "tritonnn"):
        return False
    overwrites = (
        node.target is in_place or ends_in_place(name) or name == "setitem" or node.kwargs.get("out") is not None
    )
    random = any(word in name for word in ("rand", "dropout", "bernoulli", "multinomial", "normal"))
    return not (overwrites or random or node.kwargs.get("inplace"))
