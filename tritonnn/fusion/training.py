"""For training: batch norm, the residual sum and ReLU in one kernel, forward and backward, over a whole network.

The network is traced with torch.fx, and while it trains, its forward is the traced graph. In it a batch norm takes the
sum and the ReLU after it; all layers are Triton's. The model keeps its modules, parameters, buffers and state dict.
"""

from collections import Counter
from dataclasses import dataclass, field
from operator import getitem

from torch import fx, nn

from ..layers.fused.activation import Activation
from ..layers.fused.batch_norm2d import BatchNormReLU2d
from ..swap import SwapReport, kind_of, swap
from .functionalize import FunctionalGraph, functionalize
from .fused_graph import FusedGraph
from .tracing import in_a_line, is_changed


@dataclass
class TrainingReport:
    """What `fuse_for_training` did: `fused` are the names of batch norms, with what they took; `swapped` the layers.

    `untraced`: why nothing was fused, or None.
    """

    fused: dict[str, str] = field(default_factory=dict)
    swapped: SwapReport | None = None
    untraced: str | None = None
    modules: dict[str, BatchNormReLU2d] = field(default_factory=dict, repr=False)

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Name to reason to the number of calls, so far, in which a layer ran PyTorch's own ops."""
        layers = self.swapped.fallbacks if self.swapped is not None else {}
        return layers | {name: dict(module.fallbacks) for name, module in self.modules.items() if module.fallbacks}

    def __str__(self) -> str:
        lines = [f"not fused: {self.untraced}"] if self.untraced else []
        lines += [f"{count} x {what}" for what, count in Counter(self.fused.values()).items()]
        return "\n".join([*lines, str(self.swapped)])


class TrainingForward:
    """A model's forward: the graph where all its modules are in training as they were when it was traced."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        self.model, self.graph = model, graph
        self.modes = [(module, module.training) for module in model.modules()]
        self.inputs = sum(node.op == "placeholder" for node in graph.graph.nodes)

    def __call__(self, *args, **kwargs) -> object:
        """Where optional arguments are given, or any by name, the model's own code runs."""
        if kwargs or len(args) != self.inputs or any(m.training != mode for m, mode in self.modes):
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.graph(*args)


def fuse_for_training(model: nn.Module) -> TrainingReport:
    """Swaps the layers of `model` in place, and has its batch norms take the residual sums and ReLUs after them.

    The same parameters, buffers, state dict and gradients; `tritonnn.restore(model)` undoes it. In eval mode, and
    wherever a module's mode is another than now, the model's own forward runs on Triton's layers.

    Raises:
        RuntimeError: the model is not in training mode.
    """
    if not model.training:
        raise RuntimeError("fuse_for_training wants a network in training mode: call model.train() first")
    report = TrainingReport(swapped=swap(model))
    if "forward" in vars(model):
        report.untraced = "its forward was replaced"
        return report
    try:
        traced = functionalize(model, training=True)
    except Exception as error:  # whatever the model's code makes of symbolic inputs
        report.untraced = in_a_line(error)
        return report
    modules = dict(traced.modules)
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for relu in list(traced.graph.nodes):
        chain = _chain(relu, traced, calls)
        if chain is None:
            continue
        norm, add, inputs = chain
        target = f"{norm.target}_relu".replace(".", "_")
        while target in modules:
            target += "_"
        readers = list(relu.users)
        twice = add is not None and len(readers) == 2 and all(_reads_once(reader, relu, traced) for reader in readers)
        modules[target] = BatchNormReLU2d(modules[norm.target], twice)
        with traced.graph.inserting_before(relu):
            fused = traced.graph.call_module(target, inputs)
            if twice:
                for i, reader in enumerate(readers):
                    reader.replace_input_with(relu, traced.graph.call_function(getitem, (fused, i)))
        relu.replace_all_uses_with(fused)
        for node in (relu, add, norm):
            if node is not None:
                traced.graph.erase_node(node)
        report.fused[norm.target] = "batch norm, ReLU" if add is None else "batch norm, sum, ReLU"
        report.modules[norm.target] = modules[target]
    if report.fused:
        graph = _with_short_names(traced.graph, modules | _tensors(traced.graph, model))
        vars(model).update(forward=TrainingForward(model, graph), _fused_for_training=True)
    return report


def _reads_once(reader: fx.Node, y: fx.Node, traced: FunctionalGraph) -> bool:
    """Whether it is a convolution or a sum that takes y once, and overwrites nothing: so it can have a y of its own."""
    layer = traced.module(reader)
    is_convolution = kind_of(layer) == "conv2d" and not is_changed(layer)
    is_sum = reader in traced.pure and traced.is_add(reader)
    return (is_convolution or is_sum) and sum(node is y for node in reader.args) == 1 and not reader.kwargs


def _tensors(graph: fx.Graph, model: nn.Module) -> dict[str, object]:
    """The parameters and buffers that the model's own code reads."""
    found: dict[str, object] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            found[node.target] = getattr(model.get_submodule(owner), name)
    return found


def _with_short_names(graph: fx.Graph, targets: dict[str, object]) -> FusedGraph:
    """The graph as a module that finds each target at its first look, not one look for each dot of its name."""
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = names.setdefault(node.target, f"{node.target.replace('.', '_')}_{len(names)}")
    return FusedGraph({short: targets[name] for name, short in names.items()}, graph)


def _chain(
    relu: fx.Node, traced: FunctionalGraph, calls: Counter
) -> tuple[fx.Node, fx.Node | None, tuple[fx.Node, ...]] | None:
    """The batch norm and the sum before a ReLU that nobody else reads, and the inputs of the three; or None."""

    def is_norm(node: object) -> bool:
        if not isinstance(node, fx.Node) or kind_of(traced.module(node)) != "batch_norm2d":
            return False
        alone = len(node.users) == 1 and calls[node.target] == 1 and len(node.args) == 1 and not node.kwargs
        return alone and not is_changed(traced.module(node)) and traced.stage[node] == traced.stage[relu]

    if relu not in traced.pure or traced.activation(relu) != Activation("relu"):
        return None
    source = relu.all_input_nodes[0]
    if is_norm(source):
        return source, None, (source.args[0],)
    if source not in traced.pure or not traced.is_add(source) or len(source.users) != 1 or source.kwargs:
        return None
    summands = source.args[:2]
    for norm, residual in (summands, summands[::-1]):
        if is_norm(norm) and isinstance(residual, fx.Node) and residual is not norm:
            return norm, source, (norm.args[0], residual)
    return None
