"""Batch norms with the activation after them, and convolutions of one tap that do this, or apply gates, on reading."""

from torch import fx, nn

from ..layers.fused.conv2d import FusedConv2d
from ..layers.fused.scaled import FusedExcitation, FusedGate, FusedNorm, FusedScaledConv2d
from ..swap import kind_of
from .formats import makes_pixels
from .functionalize import FunctionalGraph
from .known_functions import unused_name
from .report import FusionReport, join
from .tracing import is_changed


def fuse_norms(traced: FunctionalGraph, modules: dict[str, nn.Module], name: str, report: FusionReport) -> None:
    """A batch norm that no convolution has taken, and the activation after it, become one node."""
    for node in list(traced.graph.nodes):
        norm = traced.modules.get(node.target) if node.op == "call_module" else None
        if kind_of(norm) != "batch_norm2d" or is_changed(norm) or norm.running_mean is None or norm.running_var is None:
            continue
        activation = only_user(node, traced)
        if activation not in traced.pure or len(node.args) != 1 or node.kwargs:
            continue
        what = traced.activation(activation)
        if what is None or what.name == "leaky_relu":
            continue
        target = unused_name(f"{node.target}_{what.name}".replace(".", "_"), modules)
        modules[target] = FusedNorm(norm, what)
        with traced.graph.inserting_before(activation):
            fused = traced.graph.call_module(target, node.args)
        traced.stage[fused] = traced.stage[node]
        activation.replace_all_uses_with(fused)
        for old in (activation, node):
            traced.graph.erase_node(old)
            report.apart.pop(join(name, old.target if old.op == "call_module" else old.name), None)
        full_name = join(name, target)
        report.fused[full_name] = f"batch_norm2d + {what}"
        report.modules[full_name] = modules[target]
        report.stands_for[full_name] = [join(name, node.target)]


def scale_as_they_read(traced: FunctionalGraph, modules: dict[str, nn.Module], name: str, report: FusionReport) -> None:
    """Gates and batch norms that one fused convolution of one tap reads, over every pixel, become a part of it."""
    for node in list(traced.graph.nodes):
        first = modules.get(node.target) if node.op == "call_module" else None
        reader = only_user(node, traced) if isinstance(first, (FusedGate, FusedNorm)) else None
        last = modules.get(reader.target) if reader is not None and reader.op == "call_module" else None
        if type(last) is not FusedConv2d or not last.is_shortcut or last.stride != (1, 1):
            continue
        if reader.args[0] is not node or node in reader.args[1:]:
            continue
        modules[reader.target] = FusedScaledConv2d(first, last)
        reader.args = (*node.args, *reader.args[1:])
        traced.graph.erase_node(node)
        before, after = join(name, node.target), join(name, reader.target)
        report.fused[after] = f"{report.fused.pop(before)} + {report.fused[after]}"
        report.stands_for[after] = report.stands_for.pop(before, []) + report.stands_for[after]


def fuse_excitations(traced: FunctionalGraph, modules: dict[str, nn.Module], name: str, report: FusionReport) -> None:
    """Two convolutions of one tap that read the mean of each channel become one node."""
    for node in list(traced.graph.nodes):
        first, reader = _of_one_tap(node, modules), only_user(node, traced)
        second = None if reader is None else _of_one_tap(reader, modules)
        if first is None or second is None or not _makes_pixels(node.args[0], modules):
            continue
        modules[reader.target] = FusedExcitation(first, second)
        reader.args = node.args
        traced.graph.erase_node(node)
        before, after = join(name, node.target), join(name, reader.target)
        report.fused[after] = f"{report.fused.pop(before)} + {report.fused[after]}"
        report.stands_for[after] = report.stands_for.pop(before) + report.stands_for[after]


def _of_one_tap(node: fx.Node, modules: dict[str, nn.Module]) -> FusedConv2d | None:
    """The convolution without residual that a node calls, if it has one tap and no stride."""
    layer = modules.get(node.target) if node.op == "call_module" else None
    plain = type(layer) is FusedConv2d and layer.is_shortcut and layer.stride == (1, 1) and layer.sums is None
    return layer if plain else None


def _makes_pixels(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it makes images of one pixel."""
    pool = modules.get(node.target) if node.op == "call_module" else None
    return makes_pixels(node, pool)


def only_user(node: fx.Node, traced: FunctionalGraph) -> fx.Node | None:
    """The one node that uses the result, if nothing is overwritten up to there."""
    users = list(node.users)
    return users[0] if len(users) == 1 and traced.stage[users[0]] == traced.stage[node] else None
