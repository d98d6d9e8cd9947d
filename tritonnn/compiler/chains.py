"""Which nodes of a graph of Dynamo become one kernel: a convolution or linear layer and what follows it.

The graph has PyTorch's functions and methods as the model's code calls them, with parameters among its inputs, and
`meta["example_value"]` of each node has the shape, strides and type of its result.
"""

import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import fx

from ..fusion.activations import PARAMETERS, activation_of
from ..fusion.known_functions import argument, name_of
from ..fusion.tracing import ends_in_place
from ..layers.fused.activation import NO_ACTIVATION, Activation
from ..layers.layer import FLOATING_POINT, pair, windows_fit
from ..runtime.hardware import reason_against

IN_PLACE = frozenset(f"i{name}" for name in ("add", "and", "floordiv", "mod", "mul", "or", "pow", "sub", "truediv"))
FRESH = frozenset(("conv2d", "linear", "batch_norm", "add", "mul", "iadd", "imul", *PARAMETERS))
"""Functions whose result shares no memory with another tensor, but for one that is overwritten."""
LAYERS = ("conv2d", "linear")
STORED_FOR = (*LAYERS, "add", "iadd")


def value(node: object) -> object:
    """What Dynamo knows of a node's result: a tensor without data, or a number."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def base_name(node: fx.Node) -> str:
    """The function's or method's name, the same for the one in place."""
    name = name_of(node) or ""
    return name.rstrip("_") if not name.startswith("__") else name


@dataclass
class Chain:
    """Nodes that become one call of `conv2d_fused`."""

    layer: fx.Node
    norm: fx.Node | None = None
    permute: fx.Node | None = None
    """What makes images [N, K, H, W] of a linear layer's result [N, H, W, K]."""
    scale: fx.Node | None = None
    """A product with a parameter, one number a channel of such images."""
    add: fx.Node | None = None
    activation: fx.Node | None = None
    window: tuple = field(default=((1, 1), (0, 0), (1, 1), 1))
    """Stride, padding, dilation, groups."""

    @property
    def is_linear(self) -> bool:
        return base_name(self.layer) == "linear"

    @property
    def nodes(self) -> list[fx.Node]:
        nodes = self.layer, self.norm, self.permute, self.scale, self.add, self.activation
        return [node for node in nodes if node is not None]

    @property
    def tail(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def x(self) -> fx.Node:
        return operand(self.layer, 0, "input")

    @property
    def weight(self) -> fx.Node:
        return operand(self.layer, 1, "weight")

    @property
    def bias(self) -> fx.Node | None:
        return operand(self.layer, 2, "bias")

    @property
    def weights(self) -> list[fx.Node]:
        """Weight and bias of the layer."""
        return [node for node in (self.weight, self.bias) if node is not None]

    @property
    def residual(self) -> fx.Node | None:
        """The other operand of the sum."""
        return None if self.add is None else _other(self.add, self.nodes[self.nodes.index(self.add) - 1])

    @property
    def channel_scale(self) -> fx.Node | None:
        """The parameter of the product."""
        return None if self.scale is None else _other(self.scale, self.permute)

    @property
    def norm_operands(self) -> list[fx.Node | None]:
        """Mean, variance, weight and bias of the batch norm."""
        names = ("running_mean", "running_var", "weight", "bias")
        return [] if self.norm is None else [operand(self.norm, i, name) for i, name in enumerate(names, 1)]

    @property
    def eps(self) -> float:
        return 0.0 if self.norm is None else argument(self.norm, 7, "eps", 1e-5)

    @property
    def act(self) -> Activation:
        return NO_ACTIVATION if self.activation is None else activation_of(self.activation, None)

    @property
    def result(self) -> torch.Tensor:
        return value(self.tail)

    @property
    def kernel_size(self) -> tuple[int, int]:
        return (1, 1) if self.is_linear else tuple(value(self.weight).shape[2:])

    @property
    def is_stored(self) -> bool:
        """Whether somebody reads the result who computes nothing on the way: Inductor needs a kernel that writes it.

        Sums count, as they are in the epilogue of another layer, or one reads the result besides.
        """
        return any(user.op == "output" or base_name(user) in STORED_FOR for user in self.tail.users)


def operand(node: fx.Node, position: int, name: str) -> fx.Node | None:
    return argument(node, position, name)


def overwritten(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes whose memory the call writes to; None where that is not known: any."""
    inputs = node.all_input_nodes
    if node.op in ("placeholder", "get_attr", "output") or not any(isinstance(value(x), torch.Tensor) for x in inputs):
        return ()
    name = name_of(node)
    if name is None or isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _by_schema(node)
    if node.kwargs.get("out") is not None or name == "setitem":
        return tuple(inputs)
    in_place = ends_in_place(name) or name in IN_PLACE or (name.startswith("__i") and name.endswith("__"))
    if in_place or _has_flag(node):
        first = node.args[0] if node.args else node.kwargs.get("input")
        return (first,) if isinstance(first, fx.Node) else tuple(inputs)
    if name == "batch_norm" and argument(node, 5, "training", False) is not False:
        return tuple(inputs)
    return ()


def _by_schema(node: fx.Node) -> tuple[fx.Node, ...] | None:
    schema = getattr(node.target, "_schema", None)
    return () if schema is not None and not schema.is_mutable else None


def _has_flag(node: fx.Node) -> bool:
    """Whether `inplace` is set."""
    if node.op == "call_function":
        try:
            return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace"))
        except (TypeError, ValueError):  # a built-in function
            pass
    return bool(node.kwargs.get("inplace"))


def is_fresh(node: fx.Node) -> bool:
    """Whether the result's memory is nobody else's: that of an input, or of a larger tensor."""
    if base_name(node) not in FRESH and name_of(node) not in IN_PLACE:
        return False
    writes = overwritten(node)
    return writes is not None and all(is_fresh(x) and len(x.users) == 1 for x in writes)


class Stages:
    """Counts, for each node, how often memory that others may see was overwritten before it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._stage: dict[fx.Node, int] = {}
        self.changed: set[fx.Node] = set()
        """Nodes whose memory may be overwritten after they were computed, by another name too."""
        self.pure: set[fx.Node] = set()
        """Nodes that overwrite nothing that another node sees."""
        stage = 0
        for node in graph.nodes:
            self._stage[node] = stage
            writes = overwritten(node)
            if writes is not None and all(is_fresh(x) and len(x.users) == 1 for x in writes):
                self.pure.add(node)
            else:
                stage += 1
                for x in node.all_input_nodes if writes is None else writes:
                    self._note_changed(x)

    def _note_changed(self, x: fx.Node) -> None:
        """x, and what it may be a view of."""
        if x not in self.changed:
            self.changed.add(x)
            for source in [] if is_fresh(x) else x.all_input_nodes:
                self._note_changed(source)

    def only_user(self, node: fx.Node) -> fx.Node | None:
        """The one node that uses the result, if it is pure and nothing is overwritten up to there."""
        users = list(node.users)
        if len(users) != 1 or users[0] not in self.pure or self._stage[users[0]] != self._stage[node]:
            return None
        return users[0]


def find(graph: fx.Graph) -> list[Chain]:
    """The chains of the graph, in the order of running; a sum of two goes to the one that is computed last."""
    stages = Stages(graph)
    claimed: set[fx.Node] = set()
    chains: list[Chain] = []
    for node in reversed(graph.nodes):
        chain = _begin(node)
        if chain is None or node not in stages.pure or stages.changed.intersection(chain.weights):
            continue

        def follower(chain: Chain = chain, same_shape: bool = True) -> fx.Node | None:
            found, y = stages.only_user(chain.tail), value(chain.tail)
            of = value(found)
            if found in claimed or not isinstance(of, torch.Tensor) or of.dtype != y.dtype:
                return None
            return found if of.shape == y.shape or not same_shape else None

        found = follower()
        if found and _folds(found, chain) and not stages.changed.intersection(found.all_input_nodes[1:]):
            chain.norm = found
            found = follower()
        if chain.is_linear and _makes_images(permute := follower(same_shape=False), chain):
            chain.permute = permute
            found = follower()
            if found and _scales_channels(found, chain) and _other(found, permute) not in stages.changed:
                chain.scale = found
                found = follower()
        if found and _adds(found, chain.tail):
            chain.add = found
            found = follower()
        if found and _first(found) is chain.tail and activation_of(found, None) is not None:
            chain.activation = found
        if chain.tail is chain.permute:
            chain.permute = None
        claimed.update(chain.nodes)
        chains.append(chain)
    return chains[::-1]


def _first(node: fx.Node) -> object:
    return argument(node, 0, "input")


def _begin(node: fx.Node) -> Chain | None:
    """The chain of a layer alone, None for what is none that the kernels take."""
    if base_name(node) not in LAYERS or node.op != "call_function":
        return None
    chain = Chain(node)
    x, weight, y = value(chain.x), value(chain.weight), value(node)
    if not all(isinstance(t, torch.Tensor) for t in (x, weight, y)) or not isinstance(chain.weight, fx.Node):
        return None
    if any(t is not None and t.op != "placeholder" for t in (chain.weight, chain.bias)):
        return None  # a weight that the graph computes is another one at every call
    if y.dtype not in FLOATING_POINT or weight.dtype not in FLOATING_POINT or not y.is_floating_point():
        return None
    if reason_against(y.device) is not None or weight.device != y.device or x.device != y.device:
        return None
    if 0 in [hint(size) for size in y.shape]:
        return None
    channels = -1 if chain.is_linear else 1
    if not (is_static(weight) and _may_be_open(x, channels) and _may_be_open(y, channels)):
        return None
    if chain.is_linear:
        return chain if weight.dim() == 2 and x.dim() > 1 and weight.shape[0] > 0 and x.shape[-1] > 0 else None
    if x.dim() != 4 or weight.dim() != 4:
        return None
    stride, dilation = (pair(argument(node, i, name, 1)) for i, name in ((3, "stride"), (5, "dilation")))
    padding, groups = argument(node, 4, "padding", 0), argument(node, 6, "groups", 1)
    if isinstance(padding, str):
        if padding != "valid":
            return None
        padding = 0
    chain.window = stride, pair(padding), dilation, groups
    if not all(type(n) is int for sizes in chain.window[:3] for n in sizes or ("",)) or type(groups) is not int:
        return None
    shape = SimpleNamespace(shape=[hint(size) for size in x.shape])
    return chain if windows_fit(shape, chain.kernel_size, *chain.window[:3]) else None


def is_open(size: object) -> bool:
    """Whether it may be another one at later calls."""
    return type(size) is not int and getattr(size.node, "maybe_as_int", lambda: None)() is None


def is_static(t: torch.Tensor) -> bool:
    return not any(map(is_open, t.shape))


def hint(size: object) -> int | None:
    """A size, or what it is at this first call where it may be another one at later ones."""
    if type(size) is int:
        return size
    found = getattr(getattr(size, "node", None), "hint", None)
    return found if type(found) is int else None


def _may_be_open(t: torch.Tensor, channels: int) -> bool:
    """Whether no size is open, or for types that need no choice of precision any but the channels.

    Of a linear layer's only one: `reshape` finds that out.
    """
    if is_static(t):
        return True
    known = all(hint(size) is not None for size in t.shape)
    few = channels == 1 or sum(map(is_open, t.shape)) == 1
    return t.dtype.itemsize == 2 and known and few and not is_open(t.shape[channels])


def has_neighbouring_channels(t: torch.Tensor) -> bool:
    """Whether an image [N, C, H, W] is channels_last, or of one pixel, which is both."""
    return t.shape[1] == 1 or t.stride(1) == 1


def _folds(node: fx.Node, chain: Chain) -> bool:
    """Whether it is a batch norm in eval mode of what the chain gives."""
    if base_name(node) != "batch_norm" or chain.is_linear or _first(node) is not chain.tail:
        return False
    operands = [operand(node, i, name) for i, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1)]
    if argument(node, 5, "training", False) is not False or any(x is None for x in operands[:2]):
        return False
    if not isinstance(argument(node, 7, "eps", 1e-5), float):  # an input of the graph
        return False
    return all(x is None or (isinstance(x, fx.Node) and x.op == "placeholder") for x in operands)


def _makes_images(node: fx.Node | None, chain: Chain) -> bool:
    """Whether it makes [N, K, H, W] of [N, H, W, K]."""
    if node is None or base_name(node) != "permute" or _first(node) is not chain.tail or value(node).dim() != 4:
        return False
    dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    return tuple(dims) == (0, 3, 1, 2)


def _scales_channels(node: fx.Node, chain: Chain) -> bool:
    """Whether it multiplies the images by a parameter [(1,) K, 1, 1]."""
    other = _other(node, chain.tail) if base_name(node) in ("mul", "imul") else None
    if other is None or other.op != "placeholder" or not isinstance(value(other), torch.Tensor):
        return False
    K = value(chain.weight).shape[0]
    return tuple(value(other).shape) in ((K, 1, 1), (1, K, 1, 1))


def _adds(node: fx.Node, tail: fx.Node) -> bool:
    """Whether it is a plain sum of the tail and a tensor of the same kind."""
    if base_name(node) not in ("add", "iadd") or argument(node, 2, "alpha", 1) != 1:
        return False
    residual = _other(node, tail)
    other, y = value(residual), value(tail)
    if not isinstance(other, torch.Tensor):
        return False
    return (other.shape, other.dtype, other.device) == (y.shape, y.dtype, y.device)


def _other(node: fx.Node, tail: fx.Node) -> fx.Node | None:
    """The other one of two operands, where it is another node."""
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    if a is b or tail not in (a, b):
        return None
    other = b if a is tail else a
    return other if isinstance(other, fx.Node) else None


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
