"""Concatenations of channels: convolutions write their part of the result, and those of a dense block share one image.

A row of concatenations, each of which has all channels of the one before and some more, is one image that grows:
nothing of it is copied again. What reads one of them takes the first channels of that image.
"""

from dataclasses import dataclass

from torch import fx, nn

from ..layers.fused.concatenation import FusedAppend, FusedConcatenation
from ..layers.fused.conv2d import FusedConv2d
from ..layers.fused.scaled import FusedNorm, FusedScaledConv2d
from .functionalize import FunctionalGraph
from .known_functions import argument, name_of, unused_name
from .report import FusionReport, join

Operands = tuple[fx.Node, ...]


@dataclass
class _Row:
    """Concatenations, and what each puts behind the one before; of the first all that it has."""

    nodes: list[fx.Node]
    added: list[Operands]

    @property
    def steps(self) -> list[tuple[fx.Node, Operands]]:
        return list(zip(self.nodes, self.added, strict=True))


def fuse_concatenations(
    traced: FunctionalGraph, modules: dict[str, nn.Module], name: str, report: FusionReport
) -> None:
    """Changes the graph and adds the modules that it calls."""
    rows = []
    for row in _rows(traced, modules):
        grows = len(row.nodes) > 1 and all(_is_read_by_norms(node, row, modules) for node in row.nodes)
        rows += [row] if grows else [_Row([node], [_operands(node)]) for node in row.nodes]
    for row in rows:
        filled = [[x if _fills(x, node, row, traced, modules) else None for x in xs] for node, xs in row.steps]
        if len(row.nodes) == 1 and not any(filled[0]):
            continue
        more = sum(_channels(x, modules) for xs in row.added[1:] for x in xs)
        before = None
        for (node, xs), convs in zip(row.steps, filled):
            target = unused_name(f"concatenated_{node.name}", modules)
            layers = [conv and modules[conv.target] for conv in convs]
            module = FusedConcatenation(layers, more) if before is None else FusedAppend(layers)
            images = tuple(x if conv is None else conv.args[0] for x, conv in zip(xs, convs))
            node.op, node.target, node.args, node.kwargs = "call_module", target, images, {}
            if before is not None:
                node.args = (before, *images)
            modules[target], before = module, node
            full_name = join(name, target)
            report.fused[full_name], report.modules[full_name] = "concatenation", module
            names = [join(name, conv.target) for conv in convs if conv is not None]
            report.stands_for[full_name] = [layer for n in names for layer in report.stands_for.pop(n)]
        for conv in (conv for convs in filled for conv in convs if conv is not None):
            traced.graph.erase_node(conv)


def _rows(traced: FunctionalGraph, modules: dict[str, nn.Module]) -> list[_Row]:
    """Nothing is overwritten while a row grows, and each concatenation is continued once at most."""
    rows: list[_Row] = []
    open_rows: dict[Operands, _Row] = {}
    for node in traced.graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        row = None
        for length in range(len(operands) - 1, 0, -1):
            before, added = open_rows.get(operands[:length]), operands[length:]
            if before is None or traced.stage[before.nodes[-1]] != traced.stage[node]:
                continue
            if all(_channels(x, modules) for x in added):
                row = before
                row.nodes.append(node)
                row.added.append(added)
                break
        if row is None:
            row = _Row([node], [operands])
            rows.append(row)
        open_rows = {key: other for key, other in open_rows.items() if other is not row}
        open_rows[operands] = open_rows[(node,)] = row
    return rows


def _operands(node: fx.Node) -> Operands | None:
    """What a node concatenates, if it is a concatenation of channels."""
    if name_of(node) not in ("cat", "concat") or "out" in node.kwargs:
        return None
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    listed = isinstance(tensors, (tuple, list)) and all(isinstance(x, fx.Node) for x in tensors)
    return tuple(tensors) if listed and tensors and dim == 1 and not node.kwargs.keys() - {"tensors", "dim"} else None


def _fills(x: fx.Node, node: fx.Node, row: _Row, traced: FunctionalGraph, modules: dict[str, nn.Module]) -> bool:
    """Whether x is a convolution's result that this row alone reads, and may be computed when the concatenation is."""
    layer = modules.get(x.target) if x.op == "call_module" else None
    if type(layer) is not FusedConv2d or layer.sums is not None or len(x.args) != 1:
        return False
    times = sum(added.count(x) for added in row.added)
    return times == 1 and x.users.keys() <= set(row.nodes) and traced.stage[x] == traced.stage[node]


def _channels(node: fx.Node, modules: dict[str, nn.Module]) -> int:
    """The number of channels of a convolution's result; 0 for other nodes."""
    layer = modules.get(node.target) if node.op == "call_module" else None
    layer = layer.last if isinstance(layer, FusedScaledConv2d) else layer
    return layer.weight.shape[0] if isinstance(layer, FusedConv2d) else 0


def _is_read_by_norms(node: fx.Node, row: _Row, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing else reads it, but the next of its row."""
    index = row.nodes.index(node)
    for reader in node.users:
        layer = modules.get(reader.target) if reader.op == "call_module" else None
        layer = layer.first if isinstance(layer, FusedScaledConv2d) else layer
        continues = reader in row.nodes[index + 1 : index + 2] and _operands(reader).count(node) == 1
        normalizes = isinstance(layer, FusedNorm) and reader.args[0] is node and node not in reader.args[1:]
        if not continues and not normalizes:
            return False
    return True
