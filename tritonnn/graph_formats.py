"""Where PyTorch would have put a tensor of a graph, contiguous or channels_last, and where a fused network puts it.

Fused convolutions make channels_last images, whatever their input. What can tell the difference, such as `view`, code
that is not known, or the caller of the network, gets a tensor that lies in memory as PyTorch's would.
"""

from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn import functional as F

from .kernels.memory_format import is_channels_last
from .known_functions import LAYOUT_FREE_VIEWS, PARTS, POOLS, argument, flattens_images, is_elementwise, name_of
from .layers.layer import pair
from .pure_graph import PureGraph
from .swap import kind_of
from .tracing import in_place, is_changed

SPATIAL = ((2, 3), (-2, -1), (-1, -2), (3, 2))


@dataclass(frozen=True)
class Format:
    """PyTorch's memory format of an image: channels_last if `always` or one of `sources` is, else contiguous.

    `pixel`: an image of one pixel, which decides nothing where it meets a larger one.
    """

    sources: frozenset[fx.Node] = frozenset()
    always: bool = False
    pixel: bool = False


@dataclass(frozen=True)
class _Value:
    """`exact`: it lies in memory as PyTorch's does. `format` is None where it is no image of a format that is known.

    `parts`: a tuple or list of such.
    """

    exact: bool
    format: Format | None
    parts: bool = False


def keep_formats(traced: PureGraph) -> None:
    """Inserts `as_pytorch_puts_it` into the graph wherever it matters."""
    _Formats(traced).run()


def as_pytorch_puts_it(x: object, always: bool, *sources: object) -> object:
    """The image x [(N,) C, H, W] in channels_last if `always` or one of the sources is, else contiguous."""
    if isinstance(x, (tuple, list)):
        return tuple(as_pytorch_puts_it(part, always, *sources) for part in x)
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.dim() not in (3, 4):
        return x
    channels_last = x.dim() == 4 and (
        always or any(isinstance(s, torch.Tensor) and is_channels_last(s) for s in sources)
    )
    strides = _strides(x.shape, channels_last)
    if x.stride() == strides:
        return x
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _strides(shape: torch.Size, channels_last: bool) -> tuple[int, ...]:
    *_, C, H, W = (max(size, 1) for size in shape)
    if channels_last:
        return C * H * W, 1, C * W, C
    return (C * H * W, H * W, W, 1)[-len(shape) :]


class _Formats:
    def __init__(self, traced: PureGraph) -> None:
        self.traced, self.graph = traced, traced.graph
        self.values: dict[fx.Node, _Value] = {}
        self.copies: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            value = self._known(node)
            if value is None:
                for x in node.all_input_nodes:
                    node.replace_input_with(x, self._exact(x))
                value = _Value(True, Format(frozenset([node])))
                if _makes_pixels(node):
                    value = replace(value, format=replace(value.format, pixel=True))
            self.values[node] = value
            if not value.exact and node in self.traced.shared:
                exact = self._exact(node)
                node.replace_all_uses_with(exact, lambda user, exact=exact: user is not exact)

    def _exact(self, node: fx.Node) -> fx.Node:
        """The node, or one with the same value as PyTorch puts it."""
        value = self.values[node]
        if value.exact:
            return node
        if node not in self.copies:
            if name_of(node) in LAYOUT_FREE_VIEWS:
                with self.graph.inserting_after(node):
                    copy = self.graph.node_copy(node, self._exact)
            else:
                arguments = (node, value.format.always, *sorted(value.format.sources, key=str))
                with self.graph.inserting_after(node):
                    copy = self.graph.call_function(as_pytorch_puts_it, arguments)
            self.copies[node] = copy
            self.values[copy] = replace(value, exact=True)
            self.traced.stage[copy] = self.traced.stage[node]
        return self.copies[node]

    def _known(self, node: fx.Node) -> _Value | None:
        """What is known of a node that takes its inputs in any format; None for any other."""
        inputs = [self.values[x] for x in node.all_input_nodes]
        if node.op == "get_attr" or node in self.traced.numbers:
            return _Value(True, None)
        if not inputs or node.op == "output":
            return None
        module, name = self.traced.module(node), name_of(node)
        if module is not None and is_changed(module):
            return None
        first, kind = inputs[0], kind_of(module)
        if kind == "conv2d":
            return self._convolved(node, module)
        if node in self.traced.overwriting or _adds_in_place(node, self.traced):
            return self._in_place(node)
        if kind in ("max_pool2d", "avg_pool2d", "batch_norm2d") or node.target in POOLS or _is_upsampling(node, module):
            return self._preserved(node, first, module)
        if node in self.traced.pure or is_elementwise(node, module):
            return self._elementwise(node)
        if name in ("cat", "concat"):
            return self._merged(node.all_input_nodes, pixels=True)
        if flattens_images(node, module) or (name == "mean" and _is_over_pixels(node)):
            pixel = name == "mean" and argument(node, 2, "keepdim", False) is True
            return _Value(True, Format(frozenset(), pixel=pixel) if pixel else Format(frozenset([node])))
        if name in LAYOUT_FREE_VIEWS and not first.exact:
            return self._viewed(node, first, name)
        if name == "getitem" and first.parts:
            return replace(first, parts=False)
        if name in PARTS:
            return replace(first, parts=name != "narrow")
        return None

    @staticmethod
    def _preserved(node: fx.Node, x: _Value, module: nn.Module | None) -> _Value | None:
        if x.format is None:
            return None
        indices = getattr(module, "return_indices", False) or argument(node, 6, "return_indices", False) is True
        pixel = x.format.pixel or _pools_whole_images(node, module)
        return _Value(x.exact, replace(x.format, pixel=pixel), bool(indices))

    def _convolved(self, node: fx.Node, layer: nn.Module) -> _Value:
        """Whatever its input, it is not put where PyTorch puts it."""
        x = node.all_input_nodes[0]
        if self.values[x].format is None:
            node.replace_input_with(x, self._exact(x))
            x = self._exact(x)
        format = self.values[x].format or Format(frozenset([x]))
        one_tap = tuple(layer.kernel_size) == (1, 1) and layer.padding in ("valid", "same", 0, (0, 0))
        always = format.always or is_channels_last(layer.weight)
        return _Value(False, Format(format.sources, always, format.pixel and one_tap))

    def _in_place(self, node: fx.Node) -> _Value | None:
        """The result is the first operand, wherever the others are."""
        first, *others = [self.values[x] for x in node.all_input_nodes]
        if node in self.traced.overwriting:
            return first if node not in self.traced.shared else None
        exact = first.exact and all(x.exact for x in others)
        return None if first.format is None and not exact else replace(first, exact=exact)

    def _elementwise(self, node: fx.Node) -> _Value | None:
        operands = [x for x in node.all_input_nodes if x not in self.traced.numbers and not self._is_vector(x)]
        return self._merged(operands, pixels=False, exact_as=node)

    def _merged(self, operands: list[fx.Node], pixels: bool, exact_as: fx.Node | None = None) -> _Value | None:
        """Of tensors in one format; `pixels` says that those of one pixel count."""
        values = [self.values[x] for x in operands]
        exact = all(value.exact for value in values)
        formats = [value.format for value in values]
        if None not in formats and formats:
            deciding = [f for f in formats if not f.pixel] or formats
            if len(set(formats if pixels else deciding)) == 1:
                return _Value(exact, deciding[0])
        return _Value(True, Format(frozenset([exact_as]))) if exact and exact_as else None

    def _viewed(self, node: fx.Node, x: _Value, name: str) -> _Value:
        if name in PARTS:
            return replace(x, parts=name != "narrow")
        if name == "getitem":
            if x.parts and isinstance(node.args[1], int):
                return replace(x, parts=False)
            keeps = not x.parts and isinstance(node.args[1], tuple) and all(isinstance(i, slice) for i in node.args[1])
            return x if keeps else _Value(False, None)
        converts = name in ("bfloat16", "double", "float", "half", "to", "type_as") and not node.kwargs
        return x if converts else _Value(False, None)

    def _is_vector(self, node: fx.Node) -> bool:
        """Whether it is a parameter along one dimension, or a number, which decides nothing."""
        if node.op != "get_attr":
            return False
        owner, _, name = node.target.rpartition(".")
        tensor = getattr(self.traced.modules[owner], name)
        return sum(size > 1 for size in tensor.shape) <= 1


def _adds_in_place(node: fx.Node, traced: PureGraph) -> bool:
    """Where PyTorch would."""
    return node in traced.pure and node.target in (in_place, "add_")


def _makes_pixels(node: fx.Node) -> bool:
    """Such as view(n, c, 1, 1)."""
    name = name_of(node)
    if name == "getitem":
        return isinstance(node.args[1], tuple) and node.args[1][-2:] == (None, None)
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return name in ("view", "reshape") and len(sizes) == 4 and tuple(sizes[-2:]) == (1, 1)


def _is_upsampling(node: fx.Node, module: nn.Module | None) -> bool:
    if type(module) is nn.Upsample:
        return module.mode in ("nearest", "bilinear")
    return node.target is F.interpolate and argument(node, 3, "mode", "nearest") in ("nearest", "bilinear")


def _pools_whole_images(node: fx.Node, module: nn.Module | None) -> bool:
    if node.target is F.adaptive_avg_pool2d:
        return argument(node, 1, "output_size") in (1, (1, 1), [1, 1])
    return isinstance(module, nn.AdaptiveAvgPool2d) and pair(module.output_size) == (1, 1)


def _is_over_pixels(node: fx.Node) -> bool:
    dim = argument(node, 1, "dim")
    return isinstance(dim, (tuple, list)) and tuple(dim) in SPATIAL and not node.kwargs.keys() - {"dim", "keepdim"}
