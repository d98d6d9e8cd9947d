"""Batch norm with the residual sum and the ReLU after it, for training."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ...ops.batch_norm2d import batch_norm2d_update_
from ...ops.batch_norm2d_relu import batch_norm2d_relu, train_directly
from ...runtime.memory_format import is_channels_last
from ..batch_norm2d import TritonBatchNorm2d, running_statistics
from ..layer import TritonLayer, by_plan, is_empty, parameters


def _normalize(layer: "BatchNormReLU2d", input: torch.Tensor, residual: torch.Tensor | None) -> tuple:
    return batch_norm2d_relu(input, residual, *parameters(layer.norm), layer.norm.eps)


def _depends_on(norm: TritonBatchNorm2d) -> tuple:
    return *parameters(norm), *running_statistics(norm), norm.eps


def _directly(layer: "BatchNormReLU2d", input: torch.Tensor, residual: torch.Tensor | None) -> Callable | None:
    """What `_train` comes down to for images like these."""
    if layer._reason_against(input, residual):
        return None
    twice = layer.twice and residual is not None
    recorded = train_directly(layer.norm.eps, twice)
    if twice:
        return lambda layer, addresses, args: recorded(layer, addresses, args)[:2]
    return lambda layer, addresses, args: recorded(layer, addresses, args)[0]


class BatchNormReLU2d(TritonLayer, nn.Module):
    """relu(norm(input) + residual), of a batch norm whose parameters and statistics it shares.

    Shape: [N, C, H, W], that of the residual too. One kernel where `norm` is in training; else, and for what no kernel
    takes, one operation after the other. `twice`: the output comes twice, in a tuple, for two readers that only read.
    """

    def __init__(self, norm: TritonBatchNorm2d, twice: bool = False) -> None:
        super().__init__()
        self.norm, self.twice = norm, twice

    def forward(
        self, input: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = self._output(input, residual)
        return y if not self.twice or isinstance(y, tuple) else (y, y)

    def _output(
        self, input: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        norm = self._modules["norm"]  # a look at `self.norm` takes the host longer
        if not norm.training or is_empty(input):
            return self._one_by_one(input, residual)
        if norm.track_running_stats and norm._updates_by_momentum():
            y = self._train(input, residual)
            if y is not None:
                norm._count_batch()
        else:
            found = self._from_batch(input, residual)
            y = None if found is None else found[0]
            if found is not None and norm.track_running_stats:
                norm._update_running_statistics(*found[1:3], input.numel() // input.shape[1])
        if y is None:
            reason = self._reason_against(input, residual)
            return self._fall_back(str(reason), self._one_by_one, input, residual)
        return y

    @by_plan(lambda self: _depends_on(self._modules["norm"]))
    def _from_batch(self, input: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
        """y, mean, variance and its inverse root; None where one operation after the other is to run."""
        return None if self._reason_against(input, residual) else _normalize(self, input, residual)

    @by_plan(
        lambda self: (*_depends_on(self._modules["norm"]), self._modules["norm"].momentum, self.twice),
        direct=_directly,
    )
    def _train(
        self, input: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """y, or two of it, with the running statistics updated; None where one operation after the other is to run."""
        if self._reason_against(input, residual):
            return None
        y, mean, var, _ = _normalize(self, input, residual)
        count = input.numel() // input.shape[1]
        batch_norm2d_update_(mean, var, *running_statistics(self.norm), self.norm.momentum, count)
        return y

    def _reason_against(self, input: torch.Tensor, residual: torch.Tensor | None) -> str | None:
        self.norm._check_input_dim(input)
        reason = self.norm._reason_to_fall_back(input, from_batch=True)
        if reason is None and input.dim() != 4:
            reason = f"{input.dim()} dimensions"
        if reason is None and residual is not None and not _are_alike(input, residual):
            reason = "a residual of another shape, type, device or memory format"
        return reason

    def _one_by_one(self, input: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        y = self.norm(input)
        return F.relu(y if residual is None else y + residual)


def _are_alike(x: torch.Tensor, residual: torch.Tensor) -> bool:
    same = (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
    return same and is_channels_last(residual) == is_channels_last(x)
