"""What becomes of nodes that no fused layer has: ReLUs and pools become Triton layers, all else stays PyTorch's."""

from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ..layers.avg_pool2d import TritonAdaptiveAvgPool2d, TritonAvgPool2d
from ..layers.fused.activation import PYTORCH, Activation
from ..layers.max_pool2d import TritonMaxPool2d
from ..layers.relu import TritonReLU
from ..swap import kind_of
from .functionalize import FunctionalGraph
from .known_functions import operands, unused_name
from .tracing import in_place

POOLS = {
    F.adaptive_avg_pool2d: (TritonAdaptiveAvgPool2d, ("input", "output_size")),
    F.avg_pool2d: (
        TritonAvgPool2d,
        ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    F.max_pool2d: (
        TritonMaxPool2d,
        ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
}
"""Function to module and its arguments, in order."""


def _pool(node: fx.Node) -> nn.Module | None:
    """The module that does what a function of torch.nn.functional does in this graph."""
    if node.op != "call_function" or node.target not in POOLS:
        return None
    module, names = POOLS[node.target]
    arguments = dict(zip(names, node.args)) | node.kwargs
    arguments.pop("input", None)
    if set(arguments) - set(names) or any(isinstance(leaf, fx.Node) for leaf in tree_leaves(arguments)):
        return None
    if "stride" in arguments and not arguments["stride"]:  # None or an empty list
        del arguments["stride"]
    return module(**arguments).eval()


def rewrite_rest(traced: FunctionalGraph, modules: dict[str, nn.Module]) -> None:
    """ReLUs and pools become Triton layers; sums and other activations stay PyTorch's, and overwrite nothing."""
    relu = unused_name("functional_relu", modules)
    for node in traced.graph.nodes:
        overwrites = node.op == "call_module" and getattr(traced.modules.get(node.target), "inplace", False)
        activation = traced.activation(node) if node in traced.pure else None
        if activation == Activation("relu") and (node.op != "call_module" or overwrites):
            modules[relu] = TritonReLU().eval()
            _call(node, "call_module", relu)
        elif activation is not None and node in traced.once_in_place:
            slope = {"negative_slope": activation.slope} if activation.name == "leaky_relu" else {}
            _call(node, "call_function", PYTORCH[activation.name], **slope)
        elif node in traced.pure and node.target in (in_place, "add_"):
            node.op, node.target, node.args = "call_function", add_beside, node.args[:2]
        elif (pool := _pool(node)) is not None:
            target = unused_name(f"functional_{node.name}", modules)
            modules[target] = pool
            _call(node, "call_module", target)


def _call(node: fx.Node, kind: str, target: str | Callable, **arguments: object) -> None:
    """Has a node call something else with its first operand."""
    node.op, node.target, node.args, node.kwargs = kind, target, operands(node)[:1], arguments


def add_beside(x: object, other: object, alpha: float = 1) -> object:
    """What x += alpha * other makes of a tensor x, in its type and layout, without overwriting it."""
    if not isinstance(x, torch.Tensor):
        return x + other
    if isinstance(other, torch.Tensor) and all(
        getattr(x, name)() == getattr(other, name)() for name in ("type", "size", "stride")
    ):
        return torch.add(x, other, alpha=alpha)  # in one pass over both
    return x.clone().add_(other, alpha=alpha)


def drop_signs_of_zeros(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Max pools whose every input comes out of a ReLU see no -0.0."""

    def after_relu(node: fx.Node) -> bool:
        source = modules.get(node.all_input_nodes[0].target) if node.all_input_nodes[0].op == "call_module" else None
        return getattr(source, "activation", None) == Activation("relu") or kind_of(source) == "relu"

    pools = [n for n in graph.nodes if n.op == "call_module" and kind_of(modules[n.target]) == "max_pool2d"]
    for node in pools:
        modules[node.target].signed_zeros = not all(after_relu(n) for n in pools if n.target == node.target)
