"""Batches and outputs, whatever they are made of: their tensors by name, and copies of them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each tensor in a tree of mappings, sequences, dataclasses and PyTorch's pytrees, with its place as an expression.

    That is `name` and keys, indices or fields after it, such as "batch['image']" or "forward[0].boxes".
    """
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        for field in tree._fields:
            yield from named_tensors(getattr(tree, field), f"{name}.{field}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from named_tensors(value, f"{name}[{index}]")
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from named_tensors(getattr(tree, field.name), f"{name}.{field.name}")
    elif (leaves := tree_leaves(tree)) != [tree]:  # of a class that PyTorch was told of
        for index, value in enumerate(leaves):
            yield from named_tensors(value, f"{name}[{index}]")


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The tree with each tensor replaced; its containers are copies too."""
    return apply_to_collection(tree, Tensor, function)


def batch_size(batch: Any) -> int:
    """The size that most tensors' first dimensions have; 1 for a batch without tensors."""
    sizes = Counter(tensor.shape[0] for _, tensor in named_tensors(batch) if tensor.dim())
    return sizes.most_common(1)[0][0] if sizes else 1


def described(tree: Any) -> str:
    """What a batch or an output is, for an error message."""
    if isinstance(tree, Tensor):
        return f"a {str(tree.dtype).removeprefix('torch.')} tensor of {list(tree.shape)}"
    if isinstance(tree, Mapping):
        return f"a {type(tree).__name__} of {', '.join(map(repr, tree))}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"
