"""The module that runs a fused graph, and how it is pickled."""

from dataclasses import dataclass

from torch import fx, nn


@dataclass(frozen=True)
class _Result:
    """Stands for the result of the node of that name in a pickled graph."""

    name: str


class FusedGraph(fx.GraphModule):
    """Pickled as its modules and nodes: fx.GraphModule traces its own code again, and our functions with it."""

    def __reduce__(self) -> tuple:
        nodes = [
            (node.op, node.name, node.target, *(fx.node.map_arg(a, lambda n: _Result(n.name)) for a in arguments))
            for node in self.graph.nodes
            for arguments in [(node.args, node.kwargs)]
        ]
        state = {name: value for name, value in vars(self).items() if name in vars(nn.Module())}
        return _unpickled, (state, nodes, type(self).__name__)


def _unpickled(state: dict, nodes: list[tuple], name: str) -> FusedGraph:
    graph, results = fx.Graph(), {}

    def found(x: object) -> object:
        return results[x.name] if isinstance(x, _Result) else x

    for op, node_name, target, *arguments in nodes:
        args, kwargs = (fx.node.map_aggregate(a, found) for a in arguments)
        results[node_name] = graph.create_node(op, target, args, kwargs, node_name)
    root = nn.Module()
    vars(root).update(state)
    network = FusedGraph(root, graph, name)
    return network if network.training else network.eval()
