"""Rows of concatenations, each of which has all channels of the one before, as in a dense block.

They become one image that grows: nothing of it is copied again. What reads them takes some channels of an image.
"""

from dataclasses import dataclass, field

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
    """Concatenations, and of each but the first what it adds."""

    nodes: list[fx.Node]
    added: list[Operands] = field(default_factory=list)


def grow_concatenations(
    traced: FunctionalGraph, modules: dict[str, nn.Module], name: str, report: FusionReport
) -> None:
    """Changes the graph and adds the modules that it calls."""
    for row in _rows(traced, modules):
        if len(row.nodes) == 1 or not all(_is_read_by_norms(node, row, modules) for node in row.nodes):
            continue
        more = sum(_channels(x, modules) for added in row.added for x in added)
        before = None
        for node in row.nodes:
            xs = _operands(node) if before is None else (before, *row.added.pop(0))
            target = unused_name(f"concatenated_{node.name}", modules)
            modules[target] = FusedConcatenation(more) if before is None else FusedAppend().eval()
            node.op, node.target, node.args, node.kwargs = "call_module", target, xs, {}
            report.fused[join(name, target)] = "concatenation"
            report.modules[join(name, target)] = modules[target]
            before = node


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
            row = _Row([node])
            rows.append(row)
        open_rows = {key: other for key, other in open_rows.items() if other is not row}
        open_rows[operands] = open_rows[(node,)] = row
    return rows


def _operands(node: fx.Node) -> Operands | None:
    """Of a concatenation of channels."""
    if name_of(node) not in ("cat", "concat") or "out" in node.kwargs:
        return None
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    listed = isinstance(tensors, (tuple, list)) and all(isinstance(x, fx.Node) for x in tensors)
    return tuple(tensors) if listed and dim == 1 and not node.kwargs.keys() - {"tensors", "dim"} else None


def _channels(node: fx.Node, modules: dict[str, nn.Module]) -> int:
    """Of a convolution's result; 0 where that is not known."""
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
