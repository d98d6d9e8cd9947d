"""A network's graph in which additions and activations overwrite nothing, so that they may be moved and merged.

An operation in place is made one that is not where nothing else can see the difference; where something might, it
stays and is a barrier: nothing is moved across it. So does code that is not known. formats.py then sees to it
that whatever can tell how a tensor lies in memory gets it as PyTorch would have it.
"""

import inspect
import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..layers.fused.activation import Activation
from ..swap import kind_of
from .activations import activation_of
from .known_functions import ELEMENTWISE, FRESH, LIBRARIES, LOOKS, POOLS, VIEWS, argument, is_elementwise, name_of
from .tracing import ends_in_place, in_place, is_changed, is_layer, is_parameter, trace

ADD = (operator.add, torch.add, "add", "add_")
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass
class PureGraph:
    """`pure` are the nodes that compute a sum or an activation beside their input.

    `stage` counts the barriers before a node.

    `opaque` names the modules that stayed whole, with the reason; `overwriting` are the operations left in place,
    `once_in_place` those that are pure now;
    `numbers` are nodes that are no tensors. `families` has for each node those that may share memory with it, and
    `shared` are nodes whose memory unknown code may have overwritten, or something through another name than theirs.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    opaque: dict[str, str]
    pure: set[fx.Node] = field(default_factory=set)
    stage: dict[fx.Node, int] = field(default_factory=dict)
    overwriting: set[fx.Node] = field(default_factory=set)
    once_in_place: set[fx.Node] = field(default_factory=set)
    numbers: set[fx.Node] = field(default_factory=set)
    families: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    shared: set[fx.Node] = field(default_factory=set)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def is_add(self, node: fx.Node) -> bool:
        if node.target is in_place:
            return node.args[2] == "iadd"
        return node.op in ("call_function", "call_method") and node.target in ADD and "out" not in node.kwargs

    def activation(self, node: fx.Node) -> Activation | None:
        """The activation of an epilogue that a node computes; None for another node."""
        return activation_of(node, self.module(node))


def pure_graph(root: nn.Module) -> PureGraph:
    """Raises whatever root's own code raises under torch.fx's symbolic tracing, TraceError where a graph would lie."""
    graph, opaque = trace(root)
    traced = PureGraph(graph, dict(root.named_modules(remove_duplicate=False)), opaque)
    _remove_identities(traced)
    _make_pure(traced)
    return traced


def _remove_identities(traced: PureGraph) -> None:
    """In eval mode they hand on the very tensor they get."""
    for node in traced.graph.nodes:
        module = traced.module(node)
        one_argument = len(node.args) == 1 and not node.kwargs
        identity = type(module) in IDENTITIES and not is_changed(module) and one_argument
        if (identity or _is_stochastic_depth(node)) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _is_stochastic_depth(node: fx.Node) -> bool:
    """torchvision's, which does nothing in eval mode."""
    if getattr(node.target, "__module__", None) != "torchvision.ops.stochastic_depth" or not node.args:
        return False
    return argument(node, 3, "training", True) is False


def _make_pure(traced: PureGraph) -> None:
    """One sweep in the order of running."""
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    family, stage = traced.families, 0
    exposed: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if _is_number(node, traced):
            traced.numbers.add(node)
        targets = [] if node in traced.numbers else _overwritten(node, traced)
        in_epilogue = (traced.is_add(node) or traced.activation(node)) and not _is_changed(node, traced)
        private = len(targets) == 1 and _is_private(targets[0], node, family[targets[0]] - {node}, order, exposed)
        if private:
            x = targets[0]
            x.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
            if in_epilogue and _may_be_fused(x, traced):
                targets = []
                traced.once_in_place.add(node)
        if targets:
            _refuse_parameters(targets, family)
            traced.overwriting.add(node)
        if not targets and in_epilogue:
            traced.pure.add(node)
        unknown = _is_unknown(node, traced)
        family[node] = {node}
        if node.op != "output" and (targets or not is_fresh(node, traced)):
            for source in node.all_input_nodes:
                family[node] |= family[source]
            for member in family[node]:
                family[member] = family[node]
        if unknown or (targets and not (private and _is_elementwise_in_place(node, traced))):
            for source in node.all_input_nodes:
                traced.shared |= family[source]
        if unknown and not _is_of_pytorch(node, traced):
            for source in node.all_input_nodes:
                exposed |= family[source]
        if unknown or targets:
            stage += 1
        traced.stage[node] = stage
    for node in list(traced.shared):
        traced.shared |= family[node]


def _may_be_fused(x: fx.Node, traced: PureGraph) -> bool:
    """Whether what overwrites x may become a part of the layer that computes it; it stays in place otherwise."""
    if kind_of(traced.module(x)) in ("conv2d", "linear", "batch_norm2d"):
        return not _is_changed(x, traced)
    return x in traced.pure and (
        traced.activation(x) is not None or all(isinstance(arg, fx.Node) for arg in x.args[:2])
    )


def _is_private(
    x: fx.Node, node: fx.Node, family: set[fx.Node], order: dict[fx.Node, int], exposed: set[fx.Node]
) -> bool:
    """Whether nobody but the users of x sees that `node` overwrites x."""
    if any(member.op in ("placeholder", "get_attr") or member in exposed for member in family):
        return False
    others = (member for member in family if member is not x)
    return all(order[user] <= order[node] for member in others for user in member.users)


def _refuse_parameters(targets: list[fx.Node], family: dict[fx.Node, set[fx.Node]]) -> None:
    """Fused layers hold copies of them."""
    for member in (member for target in targets for member in family[target]):
        if is_parameter(member):
            raise fx.proxy.TraceError(f"it overwrites {member.target}")


def _overwritten(node: fx.Node, traced: PureGraph) -> list[fx.Node]:
    """What an operation in place writes to: its first argument, or `out`."""
    if node.op == "call_module":
        overwrites = getattr(traced.module(node), "inplace", False) is True and _is_of_pytorch(node, traced)
    elif node.op in ("call_method", "call_function"):
        if node.kwargs.get("out") is not None:
            return _nodes_in(node.kwargs["out"])
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        overwrites = node.target is in_place or ends_in_place(name) or _named_argument(node, "inplace") is True
        overwrites = overwrites and (node.target is in_place or _is_of_pytorch(node, traced))
    else:
        return []
    return _nodes_in([*node.args, *node.kwargs.values()][:1]) if overwrites else []


def _nodes_in(x: object) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg(x, nodes.append)
    return nodes


def _named_argument(node: fx.Node, name: str) -> object:
    if node.op == "call_method":
        return node.kwargs.get(name)
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get(name)
    except (TypeError, ValueError):  # a built-in function
        return node.kwargs.get(name)


def _is_elementwise_in_place(node: fx.Node, traced: PureGraph) -> bool:
    """Whether the layout of the tensor does not matter."""
    if "out" in node.kwargs:
        return False
    if node.target is in_place or is_elementwise(node, traced.module(node)):
        return True
    name = name_of(node) or ""
    return ends_in_place(name) and (name[:-1] in ELEMENTWISE or name in ("fill_", "zero_"))


def _is_number(node: fx.Node, traced: PureGraph) -> bool:
    """Whether a value is known to be no tensor, such as a size."""
    if node.target is getattr:
        return node.args[1] in LOOKS
    name = name_of(node)
    if name in ("size", "dim", "numel"):
        return True
    inputs = node.all_input_nodes
    computed = name == "getitem" or name in ELEMENTWISE or node.target is in_place
    return computed and bool(inputs) and all(source in traced.numbers for source in inputs)


def is_fresh(node: fx.Node, traced: PureGraph) -> bool:
    """Whether a result shares no memory with the arguments."""
    if node in traced.overwriting:
        return False
    if node in traced.pure or node in traced.numbers or node.target in POOLS:
        return True
    module = traced.module(node)
    if module is not None:
        return not is_changed(module) and (kind_of(module) is not None or is_elementwise(node, module))
    name = name_of(node)
    return name in ELEMENTWISE or name in FRESH


def _is_unknown(node: fx.Node, traced: PureGraph) -> bool:
    """Code that may overwrite its arguments."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if is_fresh(node, traced) or node in traced.overwriting:
        return False
    module = traced.module(node)
    if module is not None:
        return is_changed(module) or type(module) not in (*IDENTITIES, nn.Flatten)
    return node.target is not getattr and name_of(node) not in VIEWS


def _is_changed(node: fx.Node, traced: PureGraph) -> bool:
    module = traced.module(node)
    return module is not None and is_changed(module)


def _is_of_pytorch(node: fx.Node, traced: PureGraph) -> bool:
    """Code of PyTorch, which keeps nothing that it was given for later."""
    module = traced.module(node)
    if module is not None:
        return node.target not in traced.opaque and is_layer(module) and not is_changed(module)
    module_name = getattr(node.target, "__module__", "") or "torch"
    return node.op == "call_method" or module_name.partition(".")[0] in LIBRARIES
