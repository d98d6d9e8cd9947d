"""Which output of a module's step are logits, and where in the batch their labels are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lit_modules.side import Call, Side, named_outputs
from lit_modules.trees import described, named_tensors

Key = str | int
Inputs = Callable[[Any], Any] | Key | Sequence[Key]
Labels = Callable[[Any], Tensor] | Key | bool


@dataclass(frozen=True)
class Predictions:
    """Which output, by name, is logits [N, C] or [N, C, ...], and what function of a batch gives their `labels`.

    `source` names the labels: a place in the batch, or the argument that was given.
    """

    logits: str
    source: str
    labels: Callable[[Any], Tensor]

    def of(self, batch: Any, logits: Tensor) -> Tensor:
        """The labels of a batch: [N] or [N, ...].

        Raises:
            MisconfigurationException: there are none that fit the logits.
        """
        labels = self.labels(batch)
        if not isinstance(labels, Tensor) or (aligned := _aligned(logits, labels)) is None:
            raise MisconfigurationException(
                f"{self.source} gives {described(labels)}, but {self.logits} is {described(logits)}: labels must be "
                "integers [N] beside logits [N, C], or [N, ...] beside [N, C, ...]"
            )
        return aligned


class Uses(TorchFunctionMode):
    """Notes which integers of a batch a step computes with, and with which of a side's outputs together."""

    def __init__(self, side: Side, batch: Any) -> None:
        super().__init__()
        self.integers = {place: x for place, x in named_tensors(batch, "batch") if _is_integer(x)}
        self.side = side
        self.used: list[str] = []
        self.together: list[tuple[str, str]] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        given = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        integers = [place for place, x in self.integers.items() if id(x) in given]
        if integers and isinstance(result, Tensor):  # and is not asked for its length, say
            self.used += integers
            outputs = [name for name, x in named_outputs(self.side.calls) if id(x) in given]
            self.together += [(output, place) for output in outputs for place in integers]
        return result


def find_predictions(uses: Uses, batch: Any, calls: Sequence[Call], labels: Labels | None) -> Predictions | None:
    """What the logits and labels are of a step with this batch that made these calls, or None where it has none.

    Without a word on the labels they are integers of the batch with which the step computes, and which fit an output's
    shape; of several the pair that first meets in a function of PyTorch's, such as a loss, and else the first.

    Raises:
        MisconfigurationException: `labels` says what is not there, or does not fit.
    """
    outputs = dict(named_outputs(calls))
    if labels is not None and not isinstance(labels, bool):
        source = f"labels={labels!r}" if not callable(labels) else "labels"
        given = Predictions(next(iter(outputs), "forward"), source, lambda batch: chosen(batch, labels, "labels"))
        found = chosen(batch, labels, "labels")
        fitting = [name for name, x in outputs.items() if isinstance(found, Tensor) and _aligned(x, found) is not None]
        if not fitting:
            given.of(batch, outputs.get(given.logits, torch.empty(0)))
        return Predictions(fitting[0], source, given.labels)
    if labels is False:
        return None
    inputs = {id(x) for call in calls for _, x in named_tensors((call.args, call.kwargs))}
    used = {place: x for place, x in uses.integers.items() if place in uses.used and id(x) not in inputs}
    pairs = [(name, place) for name, x in outputs.items() for place, y in used.items() if _aligned(x, y) is not None]
    pair = next((pair for pair in uses.together if pair in pairs), pairs[0] if pairs else None)
    if pair is None:
        return None
    return Predictions(*pair, lambda batch: dict(named_tensors(batch, "batch")).get(pair[1]))


def chosen(batch: Any, wanted: Any, argument: str) -> Any:
    """What a key of the batch, several, or a function take of it; `argument` is whose value that is.

    Raises:
        MisconfigurationException: the batch has no such key.
    """
    if callable(wanted):
        return wanted(batch)
    if not isinstance(wanted, str | int):
        return tuple(chosen(batch, key, argument) for key in wanted)
    try:
        return batch[wanted]
    except (KeyError, IndexError, TypeError) as error:
        raise MisconfigurationException(
            f"TritonEvaluation({argument}={wanted!r}): the batch, {described(batch)}, has no such part"
        ) from error


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _aligned(logits: Tensor, labels: Tensor) -> Tensor | None:
    """The labels with a label for each [C] of logits [N, C, ...]; None where they are none."""
    if not logits.is_floating_point() or logits.dim() < 2 or logits.shape[1] < 2 or not _is_integer(labels):
        return None
    expected = logits.shape[:1] + logits.shape[2:]
    if labels.dim() == logits.dim() and labels.shape[1] == 1:  # masks [N, 1, H, W]
        labels = labels.squeeze(1)
    return labels if labels.shape == expected else None
