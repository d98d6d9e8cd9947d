"""Where PyTorch would have put a tensor of a graph, contiguous or channels_last, and where a fused network puts it.

Fused convolutions make channels_last images, whatever their input. What can tell the difference, such as `view`, code
that is not known, or the caller of the network, gets a tensor that lies in memory as PyTorch's would.
"""

from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..layers.fused.channel_shuffle import FusedChannelShuffle
from ..layers.layer import pair
from ..runtime.memory_format import is_channels_last
from ..swap import kind_of
from .functionalize import FunctionalGraph, is_fresh, nodes_in
from .known_functions import (
    BINARY,
    CONVERSIONS,
    LAYOUT_FREE_VIEWS,
    PARTS,
    POOLS,
    VIEWS,
    argument,
    flattens_images,
    is_elementwise,
    name_of,
)
from .tracing import is_changed

SPATIAL = ((2, 3), (-2, -1), (-1, -2), (3, 2))


KEEPS_STRIDES = (nn.Hardtanh, nn.PReLU, nn.ReLU6, "hardtanh", "prelu", "relu6")
"""Elementwise functions that keep their argument's strides where it fits both formats (one channel or one pixel)."""


NEVER, ON_A_CPU, ALWAYS = range(3)
"""Where what fits both formats is contiguous; elsewhere it is as its sources are."""


@dataclass(frozen=True)
class Format:
    """PyTorch's memory format of an image: channels_last if `always` or one of `sources` is, else contiguous.

    `pixel`: an image of one pixel, which decides nothing where it meets a larger one. `settled`: where it is contiguous
    if it fits both formats. `single`: it has one channel, None where that is not known. `part`: of a larger image, not
    dense. `odd`: its dimensions may lie in another order than in both.
    """

    sources: frozenset[fx.Node] = frozenset()
    always: bool = False
    pixel: bool = False
    settled: int = NEVER
    single: bool | None = None
    part: bool = False
    odd: bool = False

    @property
    def contiguous(self) -> bool:
        """Whether it is so in any case."""
        return not self.sources and not self.always and not self.odd

    @property
    def channels_last(self) -> tuple[frozenset[fx.Node], bool]:
        return self.sources, self.always


@dataclass(frozen=True)
class _Value:
    """`exact`: it lies in memory as PyTorch's does. `format` is None where it is no image of a format that is known.

    `parts`: a tuple or list of such. `like`: in PyTorch it is the memory of that node, which was overwritten; only a
    convolution takes it as it is.
    """

    exact: bool
    format: Format | None
    parts: bool = False
    like: fx.Node | None = None


def keep_formats(traced: FunctionalGraph) -> None:
    """Inserts `as_pytorch_puts_it` into the graph wherever it matters."""
    _Formats(traced).run()


def as_pytorch_puts_it(x: object, always: bool, settled: int, *sources: object) -> object:
    """The image x [(N,) C, H, W] in channels_last if `always` or one of the sources is, else contiguous.

    A source is a tensor, or whether it was. What fits both formats is contiguous where `settled` says so.
    """
    if isinstance(x, (tuple, list)):
        return tuple(as_pytorch_puts_it(part, always, settled, *sources) for part in x)
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.dim() not in (3, 4):
        return x
    channels_last = always or any(map(is_in_channels_last, sources))
    settles = settled == ALWAYS or (settled == ON_A_CPU and x.device.type == "cpu")
    if x.dim() == 3 or (settles and 1 in (x.shape[1], x.shape[2] * x.shape[3])):
        channels_last = False
    if x.is_cuda and x.dtype == torch.float64:  # of which PyTorch's convolutions make contiguous images
        channels_last = False
    strides = _strides(x.shape, channels_last)
    if x.stride() == strides:
        return x
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def is_in_channels_last(source: object) -> bool:
    """Whether a source of a format is, as far as it is a tensor, or was."""
    return source is True or (isinstance(source, torch.Tensor) and is_channels_last(source))


def as_overwritten(y: object, x: object) -> object:
    """y, computed beside x, with the strides that it would have had in its place."""
    if not isinstance(y, torch.Tensor) or y.layout != torch.strided or y.stride() == x.stride():
        return y
    if all(ours == theirs for size, ours, theirs in zip(x.shape, y.stride(), x.stride()) if size > 1):
        return y.as_strided(x.shape, x.stride())
    return torch.empty_strided(x.shape, x.stride(), dtype=y.dtype, device=y.device).copy_(y)


def _strides(shape: torch.Size, channels_last: bool) -> tuple[int, ...]:
    *_, C, H, W = (max(size, 1) for size in shape)
    if channels_last:
        return C * H * W, 1, C * W, C
    return (C * H * W, H * W, W, 1)[-len(shape) :]


class _Formats:
    def __init__(self, traced: FunctionalGraph) -> None:
        self.traced, self.graph = traced, traced.graph
        self.values: dict[fx.Node, _Value] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.looks: dict[fx.Node, fx.Node] = {}
        results = [result for node in self.graph.nodes for result in nodes_in(node.kwargs.get("out"))]
        self.resized = set().union(*(traced.families[result] for result in results))
        """What `out` may give another shape: how it lies is looked at before."""

    def run(self) -> None:
        for node in list(self.graph.nodes):
            value = self._known(node)
            if value is None:
                for x in node.all_input_nodes:
                    node.replace_input_with(x, self._exact(x))
                value = self._as_it_is(node)
            self.values[node] = value
            if not value.exact and node in self.traced.shared:
                exact = self._exact(node)
                node.replace_all_uses_with(exact, lambda user, exact=exact: user is not exact)

    def _as_it_is(self, node: fx.Node) -> _Value:
        """What is known of a node whose inputs lie in memory as PyTorch's do: so does its result."""
        formats = [self.values[x].format for x in node.all_input_nodes if self.values[x].format]
        module = self.traced.module(node)
        pixel = makes_pixels(node, module)
        if is_elementwise(node, module) or kind_of(module) in ("batch_norm2d", "conv2d"):
            pixel = bool(formats) and all(format.pixel for format in formats)
        odd = _reorders(node, self.traced) or (
            kind_of(module) not in ("conv2d", "linear", "avg_pool2d", "max_pool2d", "batch_norm2d")
            and any(format.odd for format in formats)
        )
        return _Value(True, Format(frozenset([node]), pixel=pixel, part=name_of(node) in VIEWS, odd=odd))

    def _exact(self, node: fx.Node) -> fx.Node:
        """The node, or one with the same value as PyTorch puts it."""
        value = self.values[node]
        if value.exact:
            return node
        if node not in self.copies:
            if name_of(node) in LAYOUT_FREE_VIEWS:
                with self.graph.inserting_after(node):
                    copy = self.graph.node_copy(node, self._exact)
            elif value.like is not None:
                with self.graph.inserting_after(node):
                    copy = self.graph.call_function(as_overwritten, (node, value.like))
            else:
                f = value.format
                sources = [self._look(x) if x in self.resized else x for x in sorted(f.sources, key=str)]
                arguments = (node, f.always, f.settled, *sources)
                with self.graph.inserting_after(node):
                    copy = self.graph.call_function(as_pytorch_puts_it, arguments)
            self.copies[node] = copy
            self.values[copy] = replace(value, exact=True)
            self.traced.stage[copy] = self.traced.stage[node]
        return self.copies[node]

    def _look(self, x: fx.Node) -> fx.Node:
        """A node that tells at once whether x is in channels_last."""
        if x not in self.looks:
            with self.graph.inserting_after(x):
                self.looks[x] = self.graph.call_function(is_in_channels_last, (x,))
            self.traced.stage[self.looks[x]] = self.traced.stage[x]
        return self.looks[x]

    def _known(self, node: fx.Node) -> _Value | None:
        """What is known of a node that takes its inputs in any format; None for any other."""
        if node.op == "get_attr" or node in self.traced.numbers:
            return _Value(True, None)
        module, name = self.traced.module(node), name_of(node)
        inputs = [self.values[x] for x in node.all_input_nodes]
        if not inputs or node.op == "output" or (module is not None and is_changed(module)):
            return None
        kind = kind_of(module)
        if kind == "conv2d":
            # Padding that is no zeros is put into a copy of the image, whose format depends on the device.
            return self._convolved(node, module) if module.padding_mode == "zeros" else None
        for x in node.all_input_nodes:
            if self.values[x].like is not None:
                node.replace_input_with(x, self._exact(x))
        if isinstance(module, FusedChannelShuffle):
            return _Value(False, Format())
        inputs = [self.values[x] for x in node.all_input_nodes]
        first = inputs[0]
        if all(x.exact for x in inputs):
            return self._beside_its_input(node) if node in self.traced.once_in_place else None
        if node in self.traced.overwriting or node in self.traced.once_in_place:
            return self._in_place(node)
        if kind == "batch_norm2d":
            return self._elementwise([node.all_input_nodes[0]], ON_A_CPU)
        if kind in ("max_pool2d", "avg_pool2d") or node.target in POOLS or _is_upsampling(node, module):
            return self._resized(node, first, module)
        if node in self.traced.pure or is_elementwise(node, module):
            operands = [x for x in node.all_input_nodes if x not in self.traced.numbers and not self._is_vector(x)]
            return self._elementwise(operands, _settles(node, module, operands))
        if name in ("cat", "concat"):
            return self._concatenated(node.all_input_nodes)
        if flattens_images(node, module) or (name == "mean" and _is_over_pixels(node)):
            return self._as_it_is(node)
        return self._viewed(node, first, name) if name in LAYOUT_FREE_VIEWS else None

    def _convolved(self, node: fx.Node, layer: nn.Module) -> _Value:
        """What is known of a convolution: whatever its input, its result does not lie in memory as PyTorch's does."""
        x = node.all_input_nodes[0]
        format = self.values[x].format
        if format is None or format.odd or (layer.in_channels == 1 and format.settled == ON_A_CPU):
            node.replace_input_with(x, self._exact(x))
            x = self._exact(x)
            format = replace(format or Format(), sources=frozenset([x]), always=False, settled=NEVER)
        if layer.in_channels == 1 and format.settled == ALWAYS:
            format = replace(format, sources=frozenset(), always=False)
        always = format.always or is_channels_last(layer.weight)
        single = layer.out_channels == 1
        pixel = format.pixel and _leaves_a_pixel(layer)
        return _Value(False, Format(format.sources, always, pixel=pixel, single=single))

    @staticmethod
    def _resized(node: fx.Node, x: _Value, module: nn.Module | None) -> _Value | None:
        if x.format is None or (x.format.settled == ALWAYS and x.format.single is None):
            return None
        format = replace(x.format, settled=NEVER, part=False)
        if x.format.settled == ON_A_CPU and (x.format.single is not False or x.format.pixel):
            return None
        if x.format.settled == ALWAYS and (x.format.single or x.format.pixel):
            format = replace(format, sources=frozenset(), always=False)
        indices = getattr(module, "return_indices", False) or argument(node, 6, "return_indices", False) is True
        pixel = makes_pixels(node, module) or (format.pixel and _keeps_pixels(node, module))
        return _Value(False, replace(format, pixel=pixel), bool(indices))

    def _beside_its_input(self, node: fx.Node) -> _Value | None:
        """What is known of an operation that was in place: its result lies as its input, which a fresh one may not."""
        x = node.all_input_nodes[0]
        format = self.values[x].format
        if format is None or self._is_of_linear(x):  # what a linear layer makes is contiguous, either way
            return None
        return _Value(False, format, like=x)

    def _is_of_linear(self, node: fx.Node) -> bool:
        if kind_of(self.traced.module(node)) == "linear":
            return True
        return node in self.traced.pure and any(map(self._is_of_linear, node.all_input_nodes))

    def _in_place(self, node: fx.Node) -> _Value | None:
        """What is known of an operation in place: its result is the first operand, however the others lie in memory."""
        first = self.values[node.all_input_nodes[0]]
        if first.format is None or first.format.part or first.format.odd:
            return None
        if node in self.traced.overwriting:
            return first if node not in self.traced.shared else None
        return replace(first, exact=False)

    def _elementwise(self, operands: list[fx.Node], settles: int) -> _Value | None:
        formats = [self.values[x].format for x in operands]
        if None in formats or not formats or any(format.odd for format in formats):
            return None
        deciding = [format for format in formats if not format.pixel] or formats
        if len(deciding) < len(formats) and any(format.single is not False for format in deciding):
            return None
        if len({format.channels_last for format in deciding}) > 1:
            return None
        settled = min(format.settled for format in deciding)
        settled = settled if any(format.part for format in formats) else max(settled, settles)
        singles = {format.single for format in formats}
        single = False if False in singles else None if None in singles else True
        return _Value(False, replace(deciding[0], settled=settled, single=single, part=False))

    def _concatenated(self, operands: list[fx.Node]) -> _Value | None:
        formats = [self.values[x].format for x in operands]
        if None not in formats and any(format.contiguous for format in formats):  # one is enough
            return _Value(False, Format())
        if None in formats or len({(format.channels_last, format.pixel) for format in formats}) > 1:
            return None
        if any(format.settled for format in formats) and any(format.single is not False for format in formats):
            return None
        if any(format.settled == ON_A_CPU and format.pixel for format in formats):
            return None
        if len({format.settled for format in formats}) > 1 and formats[0].pixel:
            return None
        settled = all(format.settled and format.pixel for format in formats)
        format = replace(formats[0], single=False, settled=NEVER, part=False)
        return _Value(False, replace(format, sources=frozenset(), always=False) if settled else format)

    @staticmethod
    def _viewed(node: fx.Node, x: _Value, name: str) -> _Value:
        one = x.format is not None and x.format.single is True
        part = x.format and replace(
            x.format,
            part=x.format.part or not (one and _is_whole_channels(node, name)),
            settled=x.format.settled if one else NEVER,
            single=one or None,
        )
        if name in PARTS:
            return replace(x, format=part, parts=name != "narrow")
        if name == "getitem" and x.parts:
            return replace(x, parts=False) if isinstance(node.args[1], int) else _Value(False, None)
        if name == "getitem" and _is_slices(node.args[1]) and not _has_steps(node.args[1]):
            return replace(x, format=part)
        converts = name in CONVERSIONS and not node.kwargs
        return x if converts else _Value(False, None)

    def _is_vector(self, node: fx.Node) -> bool:
        """Whether it is a parameter along one dimension, or a number, which decides nothing."""
        if node.op != "get_attr":
            return False
        owner, _, name = node.target.rpartition(".")
        tensor = getattr(self.traced.modules[owner], name)
        return sum(size > 1 for size in tensor.shape) <= 1


def _reorders(node: fx.Node, traced: FunctionalGraph) -> bool:
    """Whether a node, of ordinary images, may make something else: no image, or dimensions in another order."""
    if node.op == "placeholder" or is_fresh(node, traced) or node in traced.overwriting:
        return False
    if name_of(node) == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return _has_steps(index) or not all(isinstance(i, (slice, int)) or i is Ellipsis for i in index)
    return name_of(node) not in (*PARTS, *CONVERSIONS, "contiguous", "detach", "dropout", "flatten")


def _has_steps(index: tuple) -> bool:
    """Whether pixels are left out between others, so that columns may lie further from each other than rows."""
    return any(isinstance(i, slice) and i.step not in (None, 1) for i in index)


def _is_slices(index: object) -> bool:
    return isinstance(index, tuple) and all(isinstance(i, slice) for i in index)


def _is_whole_channels(node: fx.Node, name: str) -> bool:
    """Whether a part of images is one of whole channels: dense, if there is but one channel."""
    if name == "getitem":
        if not _is_slices(node.args[1]):
            return False
        images, _, *pixels = [*node.args[1], *[slice(None)] * 4][:4]
        return images.step in (None, 1) and all(pixel == slice(None) for pixel in pixels)
    return argument(node, 1 if name == "narrow" else 2, "dim", 0) in (0, 1, -3, -4)


def _settles(node: fx.Node, module: nn.Module | None, operands: list[fx.Node]) -> int:
    """Where an elementwise result that fits both formats is contiguous: if all operands are of one shape."""
    if type(module) in KEEPS_STRIDES or name_of(node) in KEEPS_STRIDES:
        return NEVER
    alike = module is not None or name_of(node) not in BINARY or all(x in operands for x in node.args[:2])
    return ALWAYS if alike else NEVER


def makes_pixels(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether it makes images of one pixel, as view(n, c, 1, 1) does."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return pair(module.output_size) == (1, 1)
    if node.target is F.adaptive_avg_pool2d:
        return argument(node, 1, "output_size") in (1, (1, 1), [1, 1])
    name = name_of(node)
    if name == "mean":
        return _is_over_pixels(node) and argument(node, 2, "keepdim", False) is True
    if name == "getitem":
        return isinstance(node.args[1], tuple) and node.args[1][-2:] == (None, None)
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return name in ("view", "reshape") and len(sizes) == 4 and tuple(sizes[-2:]) == (1, 1)


def _leaves_a_pixel(layer: nn.Conv2d) -> bool:
    """Whether its result for an image of one pixel is another."""
    if layer.padding == "same":
        return True
    padding = (0, 0) if layer.padding == "valid" else layer.padding
    sizes = zip(layer.kernel_size, layer.stride, padding, layer.dilation)
    return all(0 <= 2 * p - d * (k - 1) < s for k, s, p, d in sizes)


def _keeps_pixels(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a pool of an image of one pixel is of one pixel."""
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        return module.padding in (0, (0, 0))
    return node.target in (F.max_pool2d, F.avg_pool2d) and argument(node, 3, "padding", 0) in (0, (0, 0))


def _is_upsampling(node: fx.Node, module: nn.Module | None) -> bool:
    if type(module) is nn.Upsample:
        return module.mode in ("nearest", "bilinear")
    return node.target is F.interpolate and argument(node, 3, "mode", "nearest") in ("nearest", "bilinear")


def _is_over_pixels(node: fx.Node) -> bool:
    dim = argument(node, 1, "dim")
    return isinstance(dim, (tuple, list)) and tuple(dim) in SPATIAL and not node.kwargs.keys() - {"dim", "keepdim"}
