"""A network's graph in which additions and activations overwrite nothing, so that they may be moved and merged.

An operation in place becomes an ordinary one where nothing else can see the difference. Where something might, it
stays and is a barrier, as code that is not known is: nothing is moved across it. formats.py then sees to it that
whatever can tell how a tensor lies in memory gets it as PyTorch would have put it.
"""

import inspect
import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..layers.fused.activation import Activation
from ..swap import kind_of
from .activations import activation_of
from .as_convolutions import as_convolutions
from .known_functions import ELEMENTWISE, FRESH, LIBRARIES, LOOKS, POOLS, VIEWS, argument, is_elementwise, name_of
from .tracing import ends_in_place, in_place, is_changed, is_layer, is_parameter, trace

ADD = (operator.add, torch.add, "add", "add_")
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass
class FunctionalGraph:
    """A graph whose sums and activations overwrite nothing where that can be, and what is known of its nodes."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    opaque: dict[str, str]
    """Modules that stayed whole, to the reason."""
    pure: set[fx.Node] = field(default_factory=set)
    """Sums and activations that are computed beside their input: they may be moved and merged."""
    once_in_place: set[fx.Node] = field(default_factory=set)
    """The nodes of `pure` that overwrote their input in the network's own code."""
    overwriting: set[fx.Node] = field(default_factory=set)
    """Operations that are left in place."""
    stage: dict[fx.Node, int] = field(default_factory=dict)
    """The number of barriers before a node. Nothing may be moved to another stage."""
    numbers: set[fx.Node] = field(default_factory=set)
    """Nodes that are no tensors, such as sizes."""
    families: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    """For each node the nodes that may share memory with it, itself among them."""
    shared: set[fx.Node] = field(default_factory=set)
    """Nodes whose memory may have been overwritten by code that is not known, or through the name of another node."""

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def is_add(self, node: fx.Node) -> bool:
        if node.target is in_place:
            return node.args[2] == "iadd"
        return node.op in ("call_function", "call_method") and node.target in ADD and "out" not in node.kwargs

    def activation(self, node: fx.Node) -> Activation | None:
        """The activation of an epilogue that a node computes; None for another node."""
        return activation_of(node, self.module(node))


def functionalize(root: nn.Module, training: bool = False) -> FunctionalGraph:
    """The graph of root's forward, made functional; in training, where dropout is no identity.

    Raises:
        TraceError: a graph would not do what the code does.
        Exception: whatever root's own code raises under torch.fx's symbolic tracing.
    """
    graph, opaque = trace(root)
    traced = FunctionalGraph(graph, dict(root.named_modules(remove_duplicate=False)), opaque)
    if not training:
        _remove_identities(traced)
        as_convolutions(root, traced.graph, traced.modules)
    _Pass(traced).run()
    return traced


def _remove_identities(traced: FunctionalGraph) -> None:
    """Removes modules that in eval mode return the very tensor that they get."""
    for node in traced.graph.nodes:
        module = traced.module(node)
        one_argument = len(node.args) == 1 and not node.kwargs
        identity = type(module) in IDENTITIES and not is_changed(module) and one_argument
        if (identity or _is_stochastic_depth(node)) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _is_stochastic_depth(node: fx.Node) -> bool:
    """Whether it is torchvision's stochastic depth in eval mode, which does nothing."""
    if getattr(node.target, "__module__", None) != "torchvision.ops.stochastic_depth" or not node.args:
        return False
    return argument(node, 3, "training", True) is False


class _Pass:
    """Visits the nodes in the order of running.

    `exposed` are nodes that code outside of PyTorch has been given, and may look at later.
    """

    def __init__(self, traced: FunctionalGraph) -> None:
        self.traced, self.families = traced, traced.families
        self.order = {node: index for index, node in enumerate(traced.graph.nodes)}
        self.exposed: set[fx.Node] = set()
        self.barriers = 0

    def run(self) -> None:
        for node in self.traced.graph.nodes:
            self.visit(node)
        for node in list(self.traced.shared):
            self.traced.shared |= self.families[node]

    def visit(self, node: fx.Node) -> None:
        traced = self.traced
        if _is_number(node, traced):
            traced.numbers.add(node)
        targets = [] if node in traced.numbers else _overwritten(node, traced)
        private = len(targets) == 1 and self.is_private(targets[0], node)
        if private:
            self.rename(targets[0], node)
        in_epilogue = (traced.is_add(node) or traced.activation(node)) and not _is_changed(node, traced)
        if in_epilogue and private and _may_be_fused(targets[0], traced):
            traced.once_in_place.add(node)
            targets = []
        if targets:
            self.refuse_parameters(targets)
            traced.overwriting.add(node)
        elif in_epilogue:
            traced.pure.add(node)
        unknown = _is_unknown(node, traced)
        self.join_families(node)
        if unknown or (targets and not (private and _is_elementwise_in_place(node, traced))):
            traced.shared |= self.behind_inputs(node)
        if unknown and not _is_of_pytorch(node, traced):
            self.exposed |= self.behind_inputs(node)
        if unknown or targets:
            self.barriers += 1
        traced.stage[node] = self.barriers

    def is_private(self, x: fx.Node, node: fx.Node) -> bool:
        """Whether nobody but the users of x sees that `node` overwrites x."""
        family = self.families[x] - {node}
        if any(member.op in ("placeholder", "get_attr") or member in self.exposed for member in family):
            return False
        others = (member for member in family if member is not x)
        return all(self.order[user] <= self.order[node] for member in others for user in member.users)

    def rename(self, x: fx.Node, node: fx.Node) -> None:
        """Users of x after `node`, which overwrites x, read `node` instead."""
        x.replace_all_uses_with(node, lambda user: self.order[user] > self.order[node])

    def refuse_parameters(self, targets: list[fx.Node]) -> None:
        """Fused layers have copies of the parameters, which would not see the change.

        Raises:
            TraceError: a target may share memory with a parameter.
        """
        for member in (member for target in targets for member in self.families[target]):
            if is_parameter(member):
                raise fx.proxy.TraceError(f"it overwrites {member.target}")

    def join_families(self, node: fx.Node) -> None:
        """The node is of the families of its inputs if it may share memory with them, and else of one of its own."""
        self.families[node] = {node}
        if node.op == "output" or is_fresh(node, self.traced):
            return
        self.families[node] |= self.behind_inputs(node)
        for member in self.families[node]:
            self.families[member] = self.families[node]

    def behind_inputs(self, node: fx.Node) -> set[fx.Node]:
        """The inputs of a node and all that may share memory with them."""
        return set().union(*(self.families[source] for source in node.all_input_nodes))


def _may_be_fused(x: fx.Node, traced: FunctionalGraph) -> bool:
    """Whether what overwrites x may become a part of the layer that computes it; it stays in place otherwise."""
    if kind_of(traced.module(x)) in ("conv2d", "linear", "batch_norm2d"):
        return not _is_changed(x, traced)
    return x in traced.pure and (
        traced.activation(x) is not None or all(isinstance(arg, fx.Node) for arg in x.args[:2])
    )


def _overwritten(node: fx.Node, traced: FunctionalGraph) -> list[fx.Node]:
    """What an operation in place writes to: its first argument, or `out`."""
    if node.op == "call_module":
        overwrites = getattr(traced.module(node), "inplace", False) is True and _is_of_pytorch(node, traced)
    elif node.op in ("call_method", "call_function"):
        if node.kwargs.get("out") is not None:
            return nodes_in(node.kwargs["out"])
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        overwrites = node.target is in_place or ends_in_place(name) or _named_argument(node, "inplace") is True
        overwrites = overwrites and (node.target is in_place or _is_of_pytorch(node, traced))
    else:
        return []
    return nodes_in([*node.args, *node.kwargs.values()][:1]) if overwrites else []


def nodes_in(x: object) -> list[fx.Node]:
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


def _is_elementwise_in_place(node: fx.Node, traced: FunctionalGraph) -> bool:
    """Whether the layout of the tensor does not matter."""
    if "out" in node.kwargs:
        return False
    if node.target is in_place or is_elementwise(node, traced.module(node)):
        return True
    name = name_of(node) or ""
    return ends_in_place(name) and (name[:-1] in ELEMENTWISE or name in ("fill_", "zero_"))


def _is_number(node: fx.Node, traced: FunctionalGraph) -> bool:
    """Whether a value is known to be no tensor, such as a size."""
    if node.target is getattr:
        return node.args[1] in LOOKS
    name = name_of(node)
    if name in ("size", "dim", "numel"):
        return True
    inputs = node.all_input_nodes
    computed = name == "getitem" or name in ELEMENTWISE or node.target is in_place
    return computed and bool(inputs) and all(source in traced.numbers for source in inputs)


def is_fresh(node: fx.Node, traced: FunctionalGraph) -> bool:
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


def _is_unknown(node: fx.Node, traced: FunctionalGraph) -> bool:
    """Whether it is code that may overwrite its arguments."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if is_fresh(node, traced) or node in traced.overwriting:
        return False
    module = traced.module(node)
    if module is not None:
        return is_changed(module) or type(module) not in (*IDENTITIES, nn.Flatten)
    return node.target is not getattr and name_of(node) not in VIEWS


def _is_changed(node: fx.Node, traced: FunctionalGraph) -> bool:
    module = traced.module(node)
    return module is not None and is_changed(module)


def _is_of_pytorch(node: fx.Node, traced: FunctionalGraph) -> bool:
    """Whether it is code of PyTorch, which keeps no argument for later."""
    module = traced.module(node)
    if module is not None:
        return node.target not in traced.opaque and is_layer(module) and not is_changed(module)
    module_name = getattr(node.target, "__module__", "") or "torch"
    return node.op == "call_method" or module_name.partition(".")[0] in LIBRARIES
