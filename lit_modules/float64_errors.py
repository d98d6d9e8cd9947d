"""How far each side's outputs are from what the network gives in float64."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from lit_modules.environment import strict_float32


@dataclass(frozen=True)
class Error:
    """The mean and the largest absolute error of all numbers that a network gave."""

    mean: float
    largest: float


@dataclass(frozen=True)
class Float64Errors:
    """Errors of the outputs for a batch of `samples`: PyTorch's in its own precision, "pytorch", and each variant's."""

    samples: int
    errors: dict[str, Error]


def float64_errors(model: nn.Module, inputs: Any, outputs: Mapping[str, Any]) -> Float64Errors | None:
    """Compares what the sides gave for one batch with the model in float64, on the same weights and inputs.

    Args:
        model: with PyTorch's layers; left alone.
        inputs: the model's arguments, a tree of tensors; the first one's first dimension counts samples.
        outputs: by side, a tree of tensors, alike for all.

    Returns:
        None where the network does not run in float64, as on a device that has none.
    """
    try:
        state = {name: _double(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        with strict_float32(_tensors(inputs)[0].device):
            exact = _tensors(functional_call(model, state, tree_map(_double, inputs)))
    except (RuntimeError, TypeError):  # it converts to a type of its own, or has an operation without float64
        return None
    if not exact:
        return None
    return Float64Errors(
        len(_tensors(inputs)[0]), {name: _error(exact, _tensors(output)) for name, output in outputs.items()}
    )


def _error(exact: list[Tensor], output: list[Tensor]) -> Error:
    differences = [(a - b.double()).abs().flatten() for a, b in zip(exact, output, strict=True)]
    every = torch.cat(differences)
    return Error(every.mean().item(), every.max().item())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
