"""Layer norms, and products of images with the gates of squeeze-and-excitation, as layers of a fused network."""

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..layers.fused.base import FusedLayer
from ..layers.fused.layer_norm import FusedLayerNorm
from ..layers.fused.scaled import FusedGate
from .known_functions import argument, operands, unused_name
from .tracing import is_changed, is_parameter

PRODUCTS = (operator.mul, torch.mul, "mul")
GATES = ("sigmoid", "hardsigmoid")
"""Activations of what computes gates."""


def rewrite_norms_and_gates(root: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Changes the graph and the modules that it calls; returns the names of new modules and what they do."""
    found = {}
    for node in list(graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) is nn.LayerNorm:
            if is_one_dimensional(modules[node.target]) and not is_changed(modules[node.target]):
                modules[node.target].__class__ = FusedLayerNorm
                found[node.target] = "layer_norm"
        elif (norm := _norm_of(node, root)) is not None:
            target = unused_name(f"functional_{node.name}", modules)
            modules[target] = norm
            node.op, node.target, node.args, node.kwargs = "call_module", target, operands(node)[:1], {}
            found[target] = "layer_norm"
        elif _is_gated(node, modules):
            target = unused_name(f"gated_{node.name}", modules)
            modules[target] = FusedGate().eval()
            node.op, node.target, node.args, node.kwargs = "call_module", target, operands(node)[:2], {}
            found[target] = "gate"
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return found


def is_one_dimensional(norm: nn.LayerNorm) -> bool:
    return len(norm.normalized_shape) == 1


def _norm_of(node: fx.Node, root: nn.Module) -> FusedLayerNorm | None:
    """The module that does what a call of `F.layer_norm` with parameters of the network does."""
    if node.op != "call_function" or node.target is not F.layer_norm:
        return None
    shape, eps = argument(node, 1, "normalized_shape"), argument(node, 4, "eps", 1e-5)
    parameters = argument(node, 2, "weight"), argument(node, 3, "bias")
    known = isinstance(shape, (tuple, list)) and len(shape) == 1 and type(shape[0]) is int and type(eps) is float
    if not known or not all(p is None or is_parameter(p) for p in parameters):
        return None
    norm = FusedLayerNorm(shape[0], eps, elementwise_affine=False)
    for name, p in zip(("weight", "bias"), parameters):
        tensor = None if p is None else operator.attrgetter(p.target)(root)
        norm.register_parameter(name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
    return norm.eval()


def _is_gated(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it is a product with what a layer computes that ends in an activation for gates."""
    if node.op not in ("call_function", "call_method") or node.target not in PRODUCTS or len(node.kwargs) > 0:
        return False
    factors = operands(node)[:2]
    if not all(isinstance(x, fx.Node) for x in factors) or factors[0] is factors[1]:
        return False
    return any(_computes_gates(x, modules) for x in factors)


def _computes_gates(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    layer = modules.get(node.target) if node.op == "call_module" else None
    return isinstance(layer, FusedLayer) and layer.activation.name in GATES
