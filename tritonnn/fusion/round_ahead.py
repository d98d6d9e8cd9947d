"""In TF32, convolutions round their results where only convolutions read them, so that these need not round them.

A result that is only added, as a residual, needs no rounding. Some convolutions use TF32 for large outputs only, and
which those are shows at each call: a convolution knows such readers of its result, and they know each other.
"""

from torch import fx, nn

from ..layers.fused.base import Filters
from ..layers.fused.concatenation import FusedConcatenation
from ..layers.fused.conv2d import FusedConv2d, FusedSum
from ..layers.fused.linear import FusedLinearOfImages
from ..layers.fused.scaled import FusedScaledConv2d
from ..swap import kind_of


def round_ahead(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Tells the fused convolutions of a graph whether they round their results, and find their inputs rounded."""
    _RoundAhead(graph, modules).run()


class _RoundAhead:
    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.graph, self.modules = graph, modules
        self.rounded: set[fx.Node] = set()
        """Convolutions whose results are rounded, and selections of such results."""

    def run(self) -> None:
        for node in reversed(self.graph.nodes):  # what reads a node is known before it
            if self.can_be_rounded(node):
                self.rounded.add(node)
        for node in self.graph.nodes:
            self.tell(node)

    def tell(self, node: fx.Node) -> None:
        """The convolutions of a node."""
        for conv, x in self.convolutions(node):
            source = self.selected_from(x)
            conv.rounded_input = source in self.rounded and bool(self.makers(source))
            conv.fellow_readers = self.undecided_readers(source)
        for conv in self.makers(node):
            conv.round_output = node in self.rounded
            conv.readers = self.undecided_readers(node)

    def can_be_rounded(self, node: fx.Node) -> bool:
        """Whether convolutions make the result and only they read it, or selections of which that holds."""
        makers_known = self.makers(node) or self.selects(node)
        readers_known = all(self.only_convolves(user, node) or user in self.rounded for user in node.users)
        return bool(makers_known) and readers_known and self.is_multiplied(node) and self.readers_see_its_size(node)

    def only_convolves(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether convolutions read a node, as their image or residual, and it is not also copied."""
        convolutions = self.convolutions(user)
        if user.op == "call_module" and isinstance(self.modules[user.target], FusedConcatenation):
            return user.args.count(node) == sum(x is node for _, x in convolutions)
        return bool(convolutions)

    def is_multiplied(self, node: fx.Node) -> bool:
        """Whether it is more than a residual: the input of a convolution or of a selection."""
        return any(
            node is user.all_input_nodes[0] or any(x is node for _, x in self.convolutions(user)) for user in node.users
        )

    def readers_see_its_size(self, node: fx.Node) -> bool:
        """Whether readers that decide by size do not have a selection of another size before them."""
        return not self.undecided_readers(node) or not any(map(self.selects, (node, *node.users)))

    def convolutions(self, node: fx.Node) -> list[tuple[FusedConv2d, fx.Node]]:
        """The convolutions that a fused node computes, each with its input."""
        match self.modules[node.target] if node.op == "call_module" else None:
            case FusedLinearOfImages():  # uses TF32 where products do
                return []
            case FusedConv2d() as conv:
                return [(conv, node.args[0])]
            case FusedSum() as both:
                return list(zip((both.last, both.other), node.args))
            case FusedConcatenation() as several:
                pairs = zip(several.layers, node.args[-len(several.layers) :])
                return [(layer, x) for layer, x in pairs if isinstance(layer, FusedConv2d)]
        return []

    def makers(self, node: fx.Node) -> list[FusedConv2d]:
        """The convolutions that make a node's whole result; the other one of a sum gives none of its own."""
        convolutions = [conv for conv, _ in self.convolutions(node)]
        match self.modules[node.target] if node.op == "call_module" else None:
            case FusedScaledConv2d() as scaled:
                return [scaled.last]
            case FusedConcatenation() as several:
                whole = len(convolutions) == len(several.layers) == len(node.args)
                return convolutions if whole else []
        return convolutions[:1]

    def selects(self, node: fx.Node) -> bool:
        """Whether its results are among its inputs, or zero."""
        return node.op == "call_module" and kind_of(self.modules[node.target]) in ("max_pool2d", "relu")

    def selected_from(self, node: fx.Node) -> fx.Node:
        """The node that made what a row of selections selects from."""
        while self.selects(node):
            node = node.all_input_nodes[0]
        return node

    def undecided_readers(self, node: fx.Node) -> tuple[Filters, ...]:
        """The convolutions that read a node directly and use TF32 for large outputs only."""
        convolutions = [conv for user in node.users for conv, x in self.convolutions(user) if x is node]
        return tuple(conv.filters for conv in convolutions if not conv.filters.always_in_tf32)
