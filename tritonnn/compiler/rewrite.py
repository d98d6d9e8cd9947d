"""Puts one call of `conv2d_fused` in the place of each chain."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .chains import Chain, has_neighbouring_channels, hint, is_open, placeholders, value
from .weights import Packed

ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks")
FUSED = torch.ops.tritonnn.conv2d_fused.default


def copy_of(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph of Dynamo with all that its backends read of it, over the same parameters."""
    nodes = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes.output(nodes.graph_copy(graph.graph, copies))
    for node in placeholders(graph.graph):
        copies[node]._dynamo_source = node._dynamo_source
    copied = fx.GraphModule(graph, nodes)
    copied.meta |= graph.meta
    for name in ATTRIBUTES:
        if hasattr(graph, name):
            setattr(copied, name, getattr(graph, name))
    return copied


def replace(graph: fx.GraphModule, chains: Sequence[tuple[Chain, Packed]]) -> list[Tensor]:
    """Changes the graph, which gets further inputs, after its own: the tensors that this returns."""
    nodes, extras = graph.graph, []
    images: list[tuple[fx.Node, Tensor]] = []
    for i, (chain, packed) in enumerate(chains):
        last = placeholders(nodes)[-1]
        parameters = []
        for name, tensor in zip(("weight", "scale", "bias"), packed.tensors):
            if tensor is None:
                parameters.append(None)
                continue
            with nodes.inserting_after(last):
                last = nodes.placeholder(f"tritonnn_{name}_{i}")
            last._dynamo_source = None  # nothing that guards could ask for
            last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}  # CUDA graphs need not copy it
            parameters.append(last)
            extras.append(tensor)
        with nodes.inserting_before(chain.tail):
            y, image = _call(nodes, chain, packed, parameters)
        if image is not None and not has_neighbouring_channels(chain.result):
            images.append((image, chain.result))
        tail = chain.tail
        y.meta |= {key: of_tail for key, of_tail in tail.meta.items() if key not in y.meta}
        tail.replace_all_uses_with(y)
        for node in reversed(chain.nodes):
            nodes.erase_node(node)
    for image, _ in images:
        _as_pytorch_puts_it(nodes, image)
    graph.recompile()
    return extras


def drop_unused_inputs(graph: fx.GraphModule) -> list[int]:
    """Removes tensors that nothing reads from the inputs, as each costs time at every call; the others' positions."""
    kept = []
    for i, node in enumerate(placeholders(graph.graph)):
        if node.users or not isinstance(value(node), Tensor):
            kept.append(i)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return kept


def _call(
    nodes: fx.Graph, chain: Chain, packed: Packed, parameters: list[fx.Node | None]
) -> tuple[fx.Node, fx.Node | None]:
    """The node that gives the chain's result, and the same where it is an image that a kernel has made."""
    x, residual = chain.x, chain.residual
    if value(x).dtype != packed.dtype:
        x = nodes.call_method("to", (x, packed.dtype))
    if chain.permute is not None:
        x = nodes.call_method("permute", (x, (0, 3, 1, 2)))
    elif chain.is_linear:
        K, C = value(chain.weight).shape
        x = nodes.call_method("reshape", (x, (-1, C, 1, 1)))
        residual = None if residual is None else nodes.call_method("reshape", (residual, (-1, K, 1, 1)))
    window = (chain.kernel_size, *chain.window)
    y = nodes.call_function(
        FUSED, (x, *parameters, residual, *chain.act, *window, packed.input_precision, False, False)
    )
    if not chain.is_linear or chain.permute is not None:
        return y, y
    sizes = [-1 if is_open(size) else hint(size) for size in chain.result.shape]
    return nodes.call_method("reshape", (y, tuple(sizes))), None


def _as_pytorch_puts_it(nodes: fx.Graph, image: fx.Node) -> None:
    """Gives a contiguous copy to whoever may tell the difference; other kernels of ours take channels_last."""
    others = [user for user in image.users if user.target is not FUSED]
    if not others:
        return
    with nodes.inserting_after(image):
        copy = nodes.call_method("contiguous", (image,))
    copy.meta = dict(image.meta)
    for user in others:
        user.replace_input_with(image, copy)


def as_inputs(graph: fx.GraphModule, extras: Sequence[Tensor]) -> list[Tensor]:
    """The further inputs without data, of sizes that do not change, among those that Dynamo has made so."""
    for node in placeholders(graph.graph):
        mode = getattr(value(node), "fake_mode", None)
        if mode is not None:
            return [mode.from_tensor(tensor, static_shapes=True) for tensor in extras]
    return list(extras)
