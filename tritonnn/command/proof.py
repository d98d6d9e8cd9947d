"""How far networks are off the same network in float64, and what error counts as no worse than PyTorch's."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .networks import UserError

CHECKED_IMAGES = 16
# In strict float32 both errors are a few roundings, which the depth of a network amplifies at random.
STRICT_FACTOR, STRICT_FLOOR = 3.0, 1e-6
FACTOR = 1.1

Network = Callable[[Tensor], object]


@dataclass(frozen=True)
class Side:
    """One network's output beside float64: errors are root mean squares relative to the output's."""

    name: str
    error: float
    same_predictions: int | None
    """How many images have PyTorch's largest logit; None where the output is no [N, C]."""


@dataclass(frozen=True)
class Proof:
    """`sides` are PyTorch's network and the others; `noise` is how far PyTorch's two memory formats lie apart."""

    sides: list[Side]
    noise: float
    limit: float
    checked: int
    images: int

    @property
    def passed(self) -> bool:
        return all(side.error <= self.limit for side in self.sides)


def prove(model: nn.Module, others: Mapping[str, Network], images: Tensor, strict: bool) -> Proof:
    """Compares the outputs of PyTorch's `model` and the `others` with the model's in float64, for up to 16 images.

    An error may be 1.1 times PyTorch's, in the worse of its two memory formats, and their difference more; in strict
    float32 and float64 (`strict`) three times PyTorch's.

    Raises:
        UserError: the model does not run on such images, or its output is no tensors or not finite.
    """
    chosen = _spread(len(images))
    x = images[chosen]
    try:
        expected = _floats(model(images))
        exact = [y.detach() for y in _floats(copy.deepcopy(model).double()(x.double()))]
        other_format = torch.contiguous_format if _is_channels_last(images) else torch.channels_last
        twin = copy.deepcopy(model).to(memory_format=other_format)  # type: ignore[call-overload]
        again = _floats(twin(images.contiguous(memory_format=other_format)))
    except UserError:
        raise
    except Exception as error:  # whatever the network's own code raises
        shape = "x".join(map(str, images.shape))
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"PyTorch's network does not take images of {shape} (another --size or --batch?): {message}"
        ) from error
    if not all(y.isfinite().all() for y in (*expected, *exact)):
        raise UserError("the output of PyTorch's network is not finite: try another --dtype or --size")

    def chosen_of(outputs: list[Tensor]) -> list[Tensor]:
        return [y[chosen] if y.dim() and len(y) == len(images) else y for y in outputs]

    errors = [_error(chosen_of(y), exact) for y in (expected, again)]
    noise = _error(chosen_of(again), chosen_of(expected))
    limit = STRICT_FACTOR * max(errors) + STRICT_FLOOR if strict else FACTOR * max(errors) + noise
    sides = [Side("PyTorch", errors[0], None)]
    for name, network in others.items():
        actual = _floats(network(images))
        if [y.shape for y in actual] != [y.shape for y in expected]:
            sides.append(Side(name, math.inf, None))
            continue
        same = None
        if len(expected) == 1 and expected[0].dim() == 2 and expected[0].shape[1] > 1:
            same = int((actual[0].argmax(1) == expected[0].argmax(1)).sum())
        sides.append(Side(name, _error(chosen_of(actual), exact), same))
    return Proof(sides, noise, limit, len(chosen), len(images))


def _spread(n: int) -> list[int]:
    """Up to 16 of n images, the first and the last among them."""
    count = min(n, CHECKED_IMAGES)
    return sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)})


def _floats(output: object) -> list[Tensor]:
    """The floating-point tensors of an output, whatever it is made of."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not tensors:
        raise UserError(f"the network's output, {type(output).__name__}, has no floating-point tensor to compare")
    return tensors


def _error(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """The largest of the tensors' errors; infinite where one is not finite."""
    errors = [
        float((y.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)) for y, e in zip(outputs, exact)
    ]
    return max((error if math.isfinite(error) else math.inf) for error in errors)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
