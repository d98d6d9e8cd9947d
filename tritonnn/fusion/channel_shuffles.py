"""Channel shuffles, written as views and a copy: one node, which takes and makes images in channels_last.

As written, the copy is contiguous, and all that follows would be computed on images in NCHW.
"""

import operator

from torch import fx

from ..layers.fused.channel_shuffle import FusedChannelShuffle
from .functionalize import FunctionalGraph
from .known_functions import argument, name_of, unused_name

RESHAPES = ("view", "reshape")


def find_channel_shuffles(traced: FunctionalGraph) -> None:
    """Changes view(transpose(view(x, n, groups, c // groups, h, w), 1, 2), n, c, h, w), copied anywhere, in the graph.

    Sizes must be asked of x itself, so that the images are known to be [n, c, h, w].
    """
    shuffles = {node: found for node in traced.graph.nodes if (found := _shuffle(node, traced)) is not None}
    for node, (source, groups) in shuffles.items():
        target = unused_name(f"shuffled_{node.name}", traced.modules)
        traced.modules[target] = FusedChannelShuffle(groups)
        node.op, node.target, node.args, node.kwargs = "call_module", target, (source,), {}
    for node in reversed(traced.graph.nodes) if shuffles else ():
        if not node.users and (node in traced.numbers or name_of(node) in (*RESHAPES, "transpose", "contiguous")):
            traced.graph.erase_node(node)


def _shuffle(node: fx.Node, traced: FunctionalGraph) -> tuple[fx.Node, int] | None:
    """What a node shuffles, and in how many groups, if it is the last of such views."""
    source, sizes = _reshaped(node)
    if source is None:
        return None
    before = source
    while name_of(before) == "contiguous" and len(before.args) == 1 and not before.kwargs:
        before = before.args[0]
    if name_of(before) not in ("transpose", "swapaxes"):
        return None
    if before is source and name_of(node) == "view":  # which would fail
        return None
    dims = argument(before, 1, "dim0"), argument(before, 2, "dim1")
    split, parts = _reshaped(before.args[0]) if before.args and isinstance(before.args[0], fx.Node) else (None, ())
    if split is None or set(dims) not in ({1, 2}, {-4, -3}) or len(parts) != 5 or len(sizes) != 4:
        return None
    nodes = [node, source, before, before.args[0]]
    if len({traced.stage[n] for n in nodes}) > 1 or any(n in traced.shared for n in nodes[1:]):
        return None
    groups, asked = parts[1], ((parts, (0, 3, 4)), (sizes, (0, 2, 3)))
    if type(groups) is not int or groups < 1:
        return None
    if not all(_is_size(of[place], split, dim) for of, places in asked for place, dim in zip(places, (0, 2, 3))):
        return None
    whole = sizes[1] == -1 or _is_size(sizes[1], split, 1)
    part = parts[2]
    divided = isinstance(part, fx.Node) and name_of(part) == "floordiv" and part.args[1] == groups
    divides = part == -1 or (divided and _is_size(part.args[0], split, 1))
    return (split, groups) if whole and divides else None


def _reshaped(node: fx.Node) -> tuple[fx.Node | None, tuple]:
    """What a node reshapes, and to which sizes."""
    if name_of(node) not in RESHAPES or node.kwargs or len(node.args) < 2 or not isinstance(node.args[0], fx.Node):
        return None, ()
    sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return node.args[0], tuple(sizes)


def _is_size(size: object, x: fx.Node, dim: int) -> bool:
    """Whether it is the size of x [N, C, H, W] along a dimension."""
    if not isinstance(size, fx.Node):
        return False
    if size.target is operator.getitem and size.args[1] in (dim, dim - 4):
        of = size.args[0]
        whole = name_of(of) == "size" and len(of.args) == 1 and not of.kwargs
        return whole and of.args[0] is x or (of.target is getattr and of.args == (x, "shape"))
    return name_of(size) == "size" and size.args in ((x, dim), (x, dim - 4))
