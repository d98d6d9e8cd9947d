"""Which nodes of a network's graph become one kernel: convolutions and linear layers with what follows them."""

import copy
import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..layers.fused.activation import NO_ACTIVATION
from ..layers.fused.base import batch_norm_as_affine
from ..layers.fused.channel_shuffle import FusedChannelShuffle
from ..layers.fused.conv2d import FusedConv2d, FusedSum
from ..layers.fused.linear import FusedLinear, FusedLinearOfImages, FusedPooledLinear
from ..layers.layer import FLOATING_POINT, pair
from ..swap import kind_of, swap
from .as_convolutions import is_of_linear
from .channel_shuffles import find_channel_shuffles
from .concatenations import fuse_concatenations
from .formats import as_overwritten, as_pytorch_puts_it, is_in_channels_last, keep_formats
from .functionalize import FunctionalGraph
from .fused_graph import FusedGraph
from .known_functions import flattens_images, operands, unused_name
from .norms_and_gates import rewrite_norms_and_gates
from .report import FusionReport, join
from .rest import drop_signs_of_zeros, rewrite_rest
from .round_ahead import round_ahead
from .scaled import fuse_excitations, fuse_norms, only_user, scale_as_they_read
from .tracing import in_place, is_changed, why_changed

# Functions that only look at tensors.
LAYOUT = (as_pytorch_puts_it.__name__, as_overwritten.__name__, is_in_channels_last.__name__)
NO_COMPUTATION = ("getattr", "getitem", "size", "dim", *LAYOUT, "eq", "_assert")


@dataclass
class _Chain:
    """Nodes that become one: a convolution or linear layer and some of what follows it; or an average pool before."""

    layer: fx.Node
    pool: fx.Node | None = None
    """An average pool whose result, flattened, is the input of a linear layer."""
    norm: fx.Node | None = None
    add: fx.Node | None = None
    add_first: bool = True
    """Whether the layer's result is the first summand."""
    activation: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        flatten = None if self.pool is None else _input(self.layer)
        nodes = (self.pool, flatten, self.layer, self.norm, self.add, self.activation)
        return [node for node in nodes if node is not None]

    @property
    def tail(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The inputs of the fused node.

        They are read from the graph as it is now, where the residual may be fused already.
        """
        x = _input(self.pool or self.layer)
        return (x,) if self.add is None else (x, _summands(self.add)[self.add_first])


def fuse_graph(root: nn.Module, traced: FunctionalGraph, name: str, report: FusionReport) -> FusedGraph:
    """The traced module `root`, called `name`, with everything fused that can be; tells `report`."""
    graph = traced.graph
    find_channel_shuffles(traced)
    keep_formats(traced)
    chains = _chains(traced)
    _report_apart(traced, chains, name, report)
    calls: Counter[str] = Counter()
    modules = dict(traced.modules)
    fused_nodes = {chain.layer for chain in chains}
    kept = {node.target for node in graph.nodes if node.op == "call_module" and node not in fused_nodes}
    for chain in chains:
        layer = chain.layer.target
        calls[layer] += 1
        target = layer if calls[layer] == 1 else f"{layer}_call{calls[layer]}"
        if target != layer or layer in kept or any(layer.startswith(f"{name}.") for name in traced.opaque):
            target = unused_name(target.replace(".", "_") if target == layer else target, modules)
        modules[target] = _fused_layer(chain, traced)
        with graph.inserting_before(chain.tail):
            fused = graph.call_module(target, chain.inputs)
        traced.stage[fused] = traced.stage[chain.layer]
        chain.tail.replace_all_uses_with(fused)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
        report.fused[join(name, target)] = _in_words(chain, traced)
        report.modules[join(name, target)] = modules[target]
        layers = [node.target for node in chain.nodes if kind_of(traced.module(node)) is not None]
        report.stands_for[join(name, target)] = [join(name, layer) for layer in layers]
    _join_shortcuts(traced, modules, name, report)
    fuse_norms(traced, modules, name, report)
    rewrite_rest(traced, modules)
    for target, what in rewrite_norms_and_gates(root, graph, modules).items():
        report.fused[join(name, target)] = what
        report.modules[join(name, target)] = modules[target]
    scale_as_they_read(traced, modules, name, report)
    fuse_excitations(traced, modules, name, report)
    fuse_concatenations(traced, modules, name, report)
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and _function_name(node) not in NO_COMPUTATION:
            report.stayed[join(name, node.name)] = f"no Triton layer for the function {_function_name(node)}"
        elif isinstance(modules.get(node.target), FusedChannelShuffle):
            report.fused[join(name, node.target)] = "channel_shuffle"
            report.modules[join(name, node.target)] = modules[node.target]
        elif _makes_channels_last(modules.get(node.target)):
            modules[node.target].to(memory_format=torch.channels_last)
        elif node.op == "get_attr":
            _keep(node, root, modules)
    round_ahead(graph, modules)
    drop_signs_of_zeros(graph, modules)
    return FusedGraph(modules, graph, type(root).__name__).eval()


def _makes_channels_last(module: nn.Module | None) -> bool:
    """Whether it is a convolution of its own that is to, as fused ones do; others come out as PyTorch puts them."""
    return kind_of(module) == "conv2d" and not is_changed(module) and module.padding_mode == "zeros"


def _keep(node: fx.Node, root: nn.Module, modules: dict[str, nn.Module]) -> None:
    """The parameter or other tensor that a node reads, under a name of its own where its module was replaced."""
    tensor = operator.attrgetter(node.target)(root)
    owner, _, _ = node.target.rpartition(".")
    if owner in modules and modules[owner] is not root.get_submodule(owner):
        node.target = node.target.replace(".", "_")
        while modules.get(node.target, tensor) is not tensor or hasattr(root, node.target):
            node.target += "_"
    modules[node.target] = tensor


def _join_shortcuts(traced: FunctionalGraph, modules: dict[str, nn.Module], name: str, report: FusionReport) -> None:
    """Two fused convolutions whose results are added become one node where one of them is a shortcut.

    The first one then runs later than before, so nothing may be overwritten in between.
    """

    def fused(node: fx.Node) -> bool:
        return node.op == "call_module" and type(modules[node.target]) is FusedConv2d

    for node in traced.graph.nodes:
        if not fused(node) or len(node.args) < 2 or not fused(node.args[1]) or len(node.args[1].users) > 1:
            continue
        if node.args[0] is node.args[1] or traced.stage[node] != traced.stage[node.args[1]]:
            continue
        last, other = modules[node.target], modules[node.args[1].target]
        if other.activation != NO_ACTIVATION or other.sums is not None or not (last.is_shortcut or other.is_shortcut):
            continue
        modules[node.target] = FusedSum(last, other)
        source = node.args[1]
        node.args = (node.args[0], source.args[0])
        traced.graph.erase_node(source)
        report.stands_for[join(name, node.target)] += report.stands_for.pop(join(name, source.target))


def _chains(traced: FunctionalGraph) -> list[_Chain]:
    """The chains, in the order of running. A sum of two convolutions belongs to the one that is computed last."""
    chains: list[_Chain] = []
    claimed: set[fx.Node] = set()
    for node in reversed(traced.graph.nodes):
        if kind_of(traced.module(node)) not in ("conv2d", "linear") or _reason_to_leave(node, traced):
            continue
        chain = _Chain(node, _pool_before(node, traced))
        follower = only_user(node, traced)
        if follower and _is_norm(follower, traced) and _reason_not_to_fold(follower, traced) is None:
            chain.norm = follower
            follower = only_user(chain.tail, traced)
        if _is_plain_sum(follower, traced) and follower not in claimed:
            summands = _summands(follower)
            chain.add_first = summands[0] is chain.tail
            chain.add = follower
            follower = only_user(follower, traced)
        if follower in traced.pure and traced.activation(follower):
            chain.activation = follower
        claimed.update(chain.nodes)
        chains.append(chain)
    return chains[::-1]


def _pool_before(node: fx.Node, traced: FunctionalGraph) -> fx.Node | None:
    """The average pool whose result a linear layer gets, flattened, if nothing else does."""
    flatten = _input(node)
    if flatten is None or kind_of(traced.module(node)) != "linear" or _hooked(flatten, traced):
        return None
    if not flattens_images(flatten, traced.module(flatten)):
        return None
    pool = flatten.all_input_nodes[0]
    if kind_of(traced.module(pool)) != "avg_pool2d" or _hooked(pool, traced) or _input(pool) is None:
        return None
    return pool if only_user(pool, traced) is flatten and only_user(flatten, traced) is node else None


def _is_plain_sum(node: fx.Node | None, traced: FunctionalGraph) -> bool:
    return node in traced.pure and traced.is_add(node) and _summands(node) is not None


def _is_norm(node: fx.Node, traced: FunctionalGraph) -> bool:
    return kind_of(traced.module(node)) == "batch_norm2d"


def _hooked(node: fx.Node, traced: FunctionalGraph) -> bool:
    module = traced.module(node)
    return module is not None and is_changed(module)


def _input(node: fx.Node) -> fx.Node | None:
    """The input of a layer that has one."""
    inputs = [*node.args, *node.kwargs.values()]
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], fx.Node) else None


def _summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of a plain sum of two different values."""
    a, b = operands(node)
    plain = isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b
    return (a, b) if plain and node.kwargs.get("alpha", 1) == 1 else None


def _reason_to_leave(node: fx.Node, traced: FunctionalGraph) -> str | None:
    """Why a convolution or linear layer is no fused one."""
    layer = traced.module(node)
    if is_changed(layer):
        return why_changed(layer)
    if _input(node) is None:
        return "it is called with other arguments than one tensor"
    if layer.weight.dtype not in FLOATING_POINT:
        return f"dtype {layer.weight.dtype}"
    if kind_of(layer) == "conv2d":
        if layer.padding_mode != "zeros":
            return f"padding_mode {layer.padding_mode!r}"
        if _padding(layer) is None:
            return f"padding {layer.padding!r} that differs between the sides"
    return None


def _padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    """(rows, columns) of zeros on either side, None where the sides differ."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding != "same":
        return pair(layer.padding)
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    return (top, left) if (top, left) == (bottom, right) else None


def _reason_not_to_fold(node: fx.Node, traced: FunctionalGraph) -> str | None:
    norm = traced.module(node)
    if is_changed(norm):
        return why_changed(norm)
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    source = _input(node)
    if source is None or kind_of(traced.module(source)) != "conv2d":
        return "it does not follow a convolution"
    if (reason := _reason_to_leave(source, traced)) is not None:
        return f"the convolution before it is not fused: {reason}"
    if norm.num_features != traced.module(source).out_channels:
        return "it has not the channels of the convolution before it"
    return _reason_not_to_join(source, node, traced)


def _reason_not_to_join(source: fx.Node, node: fx.Node, traced: FunctionalGraph) -> str | None:
    if len(source.users) > 1:
        return "what it follows is used elsewhere too"
    return None if traced.stage[source] == traced.stage[node] else "something may be overwritten before it"


def _report_apart(traced: FunctionalGraph, chains: list[_Chain], name: str, report: FusionReport) -> None:
    fused = {node for chain in chains for node in chain.nodes}
    tails = {chain.tail for chain in chains}
    for node in traced.graph.nodes:
        if node in fused:
            continue
        if kind_of(traced.module(node)) in ("conv2d", "linear"):
            reason = _reason_to_leave(node, traced)
        elif _is_norm(node, traced):
            reason = _reason_not_to_fold(node, traced)
        elif traced.is_add(node) or traced.activation(node):
            reason = _reason_not_in_epilogue(node, tails, traced)
        else:
            continue
        report.apart[join(name, node.target if node.op == "call_module" else node.name)] = reason


def _reason_not_in_epilogue(node: fx.Node, tails: set[fx.Node], traced: FunctionalGraph) -> str:
    if node in traced.overwriting and node in traced.shared:
        return "it overwrites what others may see"
    if _hooked(node, traced):
        return why_changed(traced.module(node))
    if traced.is_add(node) and _summands(node) is None:
        return "it is no plain sum of two tensors"
    sources = [source for source in node.all_input_nodes if source in tails]
    if not sources:
        return "it does not follow a convolution or linear layer"
    reasons = [_reason_not_to_join(source, node, traced) for source in sources]
    return next((reason for reason in reasons if reason), "it does not follow directly")


def _fused_layer(chain: _Chain, traced: FunctionalGraph) -> nn.Module:
    layer = traced.module(chain.layer)
    weight, scale, bias = layer.weight.detach(), None, layer.bias
    if chain.norm:
        scale, bias = batch_norm_as_affine(bias, traced.module(chain.norm))
    overwrites = chain.add is not None and chain.add.target in (in_place, "add_")
    epilogue = {
        "sums": None
        if chain.add is None
        else "beside"
        if not overwrites
        else "into y"
        if chain.add_first
        else "into residual",
        "activation": NO_ACTIVATION if chain.activation is None else traced.activation(chain.activation),
    }
    bias = None if bias is None else bias.detach().clone()
    if kind_of(layer) == "linear":
        if chain.pool is None:
            return FusedLinear(weight.clone(), scale, bias, **epilogue)
        pool = copy.deepcopy(traced.module(chain.pool))
        swap(pool)
        return FusedPooledLinear(pool, weight.clone(), scale, bias, **epilogue)
    weight = weight.clone(memory_format=torch.channels_last)
    convolution = FusedLinearOfImages if is_of_linear(layer) else FusedConv2d
    return convolution(
        weight, scale, bias, pair(layer.stride), _padding(layer), pair(layer.dilation), layer.groups, **epilogue
    )


def _in_words(chain: _Chain, traced: FunctionalGraph) -> str:
    steps = [kind_of(traced.module(node)) for node in (chain.pool, chain.layer) if node]
    of_linear = is_of_linear(traced.module(chain.layer))
    steps = ["linear"] if of_linear else steps
    steps += ["scale" if of_linear else "batch_norm2d"] * (chain.norm is not None) + ["residual"] * (
        chain.add is not None
    )
    steps += [traced.activation(chain.activation).name] if chain.activation else []
    return " + ".join(steps)


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
