"""A network as a torch.fx graph whose additions and ReLUs overwrite nothing, so that they may be moved and merged.

Modules that cannot be traced stay single nodes. An operation in place is made one that is not where nothing else can
see the difference; where something might, it stays and is a barrier: nothing is moved across it.
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from .layers.layer import TritonLayer
from .runtime.memory_format import is_channels_last
from .swap import LAYERS, kind_of

LAYER_TYPES = tuple(torch_class for pairs in LAYERS.values() for torch_class in pairs)
ADD = (operator.add, torch.add, "add", "add_")
RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
# Their results share no memory with their arguments.
FRESH = (
    operator.add,
    operator.mul,
    operator.sub,
    torch.add,
    torch.cat,
    torch.mean,
    torch.mul,
    torch.relu,
    torch.sub,
    F.adaptive_avg_pool2d,
    F.avg_pool2d,
    F.batch_norm,
    F.conv2d,
    F.linear,
    F.max_pool2d,
    F.relu,
    "add",
    "dim",
    "mean",
    "mul",
    "relu",
    "size",
    "sub",
)
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
IN_PLACE = ("iadd", "iand", "ifloordiv", "imatmul", "imod", "imul", "ior", "ipow", "isub", "itruediv", "ixor")
LIBRARIES = ("torch", "_operator", "operator", "builtins", "math")


def in_place(x: object, other: object, name: str) -> object:
    """x += other, for the name "iadd", and the like."""
    return getattr(operator, name)(x, other)


@dataclass
class PureGraph:
    """`pure` are the nodes that compute a sum or a ReLU beside their input; `stage` counts the barriers before a node.

    `opaque` names the modules that stayed whole, with the reason; `overwriting` are the operations left in place.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    pure: set[fx.Node]
    stage: dict[fx.Node, int]
    opaque: dict[str, str]
    overwriting: set[fx.Node]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def is_add(self, node: fx.Node) -> bool:
        if node.target is in_place:
            return node.args[2] == "iadd"
        return node.op in ("call_function", "call_method") and node.target in ADD and "out" not in node.kwargs

    def is_relu(self, node: fx.Node) -> bool:
        return kind_of(self.module(node)) == "relu" or (
            node.op in ("call_function", "call_method") and node.target in RELU
        )


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_layer(module: nn.Module) -> bool:
    """A module of torch.nn or a subclass of a Triton layer, as against one that is made of modules."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return isinstance(module, TritonLayer) or type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


class _Proxy(fx.Proxy):
    """Records x += y as such; fx.Proxy takes it for x = x + y, which whoever else holds x does not see."""


def _recorder(name: str) -> Callable:
    def record(self: _Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (self, other, name), {})

    return record


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _recorder(_name))


class _Tracer(fx.Tracer):
    """Layers are single nodes, and so are modules with hooks and those whose code fails under tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: dict[str, str] = {}
        self.autocast = _autocast_state()

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _autocast_state() != self.autocast:  # a graph would not say so
            raise RuntimeError("it sets autocast itself")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or isinstance(m, LAYER_TYPES) or module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        if has_hooks(m):
            self.opaque[name] = "it has hooks"
            return super().call_module(m, forward, args, kwargs)
        traced = set(self.graph.nodes)
        stack = list(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            for node in reversed(self.graph.nodes):
                if node not in traced:
                    self.graph.erase_node(node)
            while len(self.module_stack) > len(stack):
                self.module_stack.popitem()
            self.opaque[name] = describe(error)
        return super().call_module(m, forward, args, kwargs)


def _autocast_state() -> list[tuple[bool, torch.dtype]]:
    return [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]


def describe(error: Exception) -> str:
    first_line, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line}"


def optional_arguments(module: nn.Module) -> dict[str, object]:
    """The arguments of its forward that have defaults."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def trace(root: nn.Module) -> PureGraph:
    """Arguments of root's forward that have defaults are fixed at these.

    Raises:
        Exception: whatever root's own code raises under torch.fx's symbolic tracing.
    """
    tracer = _Tracer()
    graph = tracer.trace(root, concrete_args=optional_arguments(root) or None)
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    opaque = {name: reason for name, reason in tracer.opaque.items() if name in called}
    traced = PureGraph(graph, dict(root.named_modules(remove_duplicate=False)), set(), {}, opaque, set())
    _remove_identities(traced)
    _make_pure(traced)
    return traced


def _remove_identities(traced: PureGraph) -> None:
    """In eval mode they hand on the very tensor they get."""
    for node in traced.graph.nodes:
        module = traced.module(node)
        if type(module) in IDENTITIES and not has_hooks(module) and len(node.args) == 1 and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _make_pure(traced: PureGraph) -> None:
    """One sweep in the order of running; `family` is the set of earlier nodes that may share memory with a node."""
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    family: dict[fx.Node, set[fx.Node]] = {}
    stage = 0
    viewed: set[fx.Node] = set()
    for node in traced.graph.nodes:
        x = _overwritten(node, traced)
        summand_or_relu = traced.is_add(node) or traced.is_relu(node)
        if x is not None and summand_or_relu and _is_private(x, node, family[x], order):
            x.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
            x = None
        elif x is not None:
            traced.overwriting.add(node)
        if x is None and summand_or_relu:
            traced.pure.add(node)
        family[node] = {node}
        if x is not None or not _is_fresh(node, traced):
            for source in node.all_input_nodes:
                family[node] |= family[source]
            for member in family[node]:
                family[member] = family[node]
        if x is not None:
            viewed |= {m for m in family[node] if _is_fresh(m, traced)} if _has_views(family[node], traced) else set()
        if x is not None or _may_overwrite(node, traced):
            stage += 1
        traced.stage[node] = stage
    for node in viewed:
        with traced.graph.inserting_after(node):
            contiguous = traced.graph.call_function(as_contiguous, (node,))
        node.replace_all_uses_with(contiguous, lambda user, contiguous=contiguous: user is not contiguous)
        traced.stage[contiguous] = traced.stage[node]


def as_contiguous(x: object) -> object:
    """Images contiguous, anything else as it is: for code that counts on the memory format of a plain network."""
    return x.contiguous() if isinstance(x, torch.Tensor) and is_channels_last(x) else x


def _has_views(family: set[fx.Node], traced: PureGraph) -> bool:
    """Whether a tensor that is overwritten may have views, which in another memory format would be copies."""
    return any(not _is_fresh(node, traced) and _overwritten(node, traced) is None for node in family)


def _is_private(x: fx.Node, node: fx.Node, family: set[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether nobody but the users of x sees that `node` overwrites x."""
    if any(member.op in ("placeholder", "get_attr") for member in family):
        return False
    others = (member for member in family if member is not x)
    return all(order[user] <= order[node] for member in others for user in member.users)


def _overwritten(node: fx.Node, traced: PureGraph) -> fx.Node | None:
    """What an operation in place writes to: its first argument, or `out`."""
    if node.op == "call_module":
        overwrites = getattr(traced.module(node), "inplace", False) is True
    elif node.op == "call_method":
        overwrites = node.target.endswith("_") and not node.target.endswith("__")
    elif node.op == "call_function":
        if isinstance(node.kwargs.get("out"), fx.Node):
            return node.kwargs["out"]
        name = getattr(node.target, "__name__", "")
        of_torch = getattr(node.target, "__module__", "") != operator.add.__module__
        overwrites = (
            node.target is in_place
            or (of_torch and name.endswith("_") and not name.endswith("__"))
            or _argument(node, "inplace") is True
        )
    else:
        return None
    sources = node.all_input_nodes
    return sources[0] if overwrites and sources else None


def _argument(node: fx.Node, name: str) -> object:
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get(name)
    except (TypeError, ValueError):  # a built-in function
        return node.kwargs.get(name)


def _is_fresh(node: fx.Node, traced: PureGraph) -> bool:
    if node in traced.pure:
        return True
    if node.op == "call_module":
        return kind_of(traced.module(node)) is not None
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return node.op in ("call_function", "call_method") and node.target in FRESH


def _may_overwrite(node: fx.Node, traced: PureGraph) -> bool:
    """Code that is not known."""
    if node.op == "call_module":
        return node.target in traced.opaque or not is_layer(traced.module(node))
    if node.op != "call_function" or node.target is in_place:
        return False
    return not (getattr(node.target, "__module__", "") or "torch").startswith(LIBRARIES)
