"""Linear layers whose results become images become convolutions of one tap, and their layer scales batch norms.

ConvNeXt has [N, H, W, C] through a linear layer, permuted to [N, K, H, W], times a parameter [K, 1, 1], plus an image.
As convolution and batch norm, rewrite.py joins them with what follows, and the permuted copies vanish.
"""

import operator

import torch
from torch import fx, nn

from ..layers.layer import FLOATING_POINT
from ..swap import kind_of
from .known_functions import name_of, operands, unused_name
from .tracing import is_changed, is_parameter

TO_IMAGES = (0, 3, 1, 2)
PRODUCTS = (operator.mul, torch.mul, "mul")


def as_convolutions(root: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Changes the graph and adds the modules that it calls."""
    for node in list(graph.nodes):
        permute = _only_user(node)
        if permute is not None and _is_plain_linear(node, modules) and _is_permuted(permute, TO_IMAGES):
            _replace_linear(graph, node, permute, modules)
    for node in list(graph.nodes):
        found = _scaled_channels(root, node, modules)
        if found is not None:
            _replace_product(graph, node, *found, modules)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_plain_linear(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    layer = modules.get(node.target) if node.op == "call_module" else None
    if kind_of(layer) != "linear" or is_changed(layer) or layer.weight.dtype not in FLOATING_POINT:
        return False
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _is_permuted(node: fx.Node, dims: tuple[int, ...]) -> bool:
    if name_of(node) != "permute" or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    given = node.args[1] if len(node.args) == 2 else node.args[1:]
    return isinstance(given, (tuple, list)) and tuple(given) == dims


def _replace_linear(graph: fx.Graph, node: fx.Node, permute: fx.Node, modules: dict[str, nn.Module]) -> None:
    target = unused_name(f"{node.target}_of_images".replace(".", "_"), modules)
    modules[target] = _convolution_of(modules[node.target])
    with graph.inserting_before(node):
        images = graph.call_method("permute", (node.args[0], *TO_IMAGES))
        convolved = graph.call_module(target, (images,))
    permute.replace_all_uses_with(convolved)
    graph.erase_node(permute)
    graph.erase_node(node)


def _convolution_of(layer: nn.Linear) -> nn.Conv2d:
    K, C = layer.weight.shape
    convolution = nn.Conv2d(C, K, 1, bias=False, device="meta").eval()
    weight = layer.weight.detach()[:, :, None, None].clone(memory_format=torch.channels_last)
    convolution.weight = nn.Parameter(weight.as_strided(weight.shape, (C, 1, C, C)), requires_grad=False)
    if layer.bias is not None:
        convolution.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    convolution.of_linear = True
    return convolution


def is_of_linear(module: nn.Module | None) -> bool:
    """Whether a convolution was a linear layer, whose precision another switch of PyTorch decides."""
    return getattr(module, "of_linear", False) is True


def _scaled_channels(root: nn.Module, node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node] | None:
    """The layer's result and the parameter that a node multiplies, if it is a product of such."""
    if node.op not in ("call_function", "call_method") or node.target not in PRODUCTS or node.kwargs:
        return None
    for y, factor in (operands(node), operands(node)[::-1]):
        if not is_parameter(factor) or not isinstance(y, fx.Node) or y.op != "call_module" or _only_user(y) is not node:
            continue
        layer, tensor = modules[y.target], operator.attrgetter(factor.target)(root)
        if is_of_linear(layer) and tensor.dtype == layer.weight.dtype:
            if tuple(tensor.shape) in ((layer.out_channels, 1, 1), (1, layer.out_channels, 1, 1)):
                return y, factor
    return None


def _replace_product(
    graph: fx.Graph, node: fx.Node, y: fx.Node, factor: fx.Node, modules: dict[str, nn.Module]
) -> None:
    target = unused_name(f"{factor.target}_as_norm".replace(".", "_"), modules)
    owner, _, name = factor.target.rpartition(".")
    tensor = getattr(modules[owner], name).detach()
    norm = nn.BatchNorm2d(tensor.numel(), eps=0.0, device=tensor.device, dtype=tensor.dtype)
    norm.weight = nn.Parameter(tensor.flatten().clone(), requires_grad=False)
    modules[target] = norm.requires_grad_(False).eval()
    node.op, node.target, node.args = "call_module", target, (y,)
    if not factor.users:
        graph.erase_node(factor)
