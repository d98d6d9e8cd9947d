"""torch.nn.BatchNorm2d on Triton."""

from collections.abc import Callable

import torch
from torch import nn

from ..ops.batch_norm2d import (
    batch_norm2d_inference,
    batch_norm2d_training,
    batch_norm2d_update_,
    train_directly,
)
from .layer import TritonLayer, by_plan, is_empty, parameters, reason_to_fall_back_image


def running_statistics(layer: nn.BatchNorm2d) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Running mean and variance, read from the dictionary as in `parameters`."""
    try:
        return layer._buffers["running_mean"], layer._buffers["running_var"]
    except KeyError:
        return layer.running_mean, layer.running_var


def _normalize(layer: nn.BatchNorm2d, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and mean and variance of the batch."""
    return batch_norm2d_training(input, *parameters(layer), layer.eps)


def _directly(layer: "TritonBatchNorm2d", input: torch.Tensor) -> Callable | None:
    """What `_train` comes down to for images like these."""
    if layer._reason_against_a_batch(input):
        return None
    recorded = train_directly(layer.eps)
    return lambda layer, addresses, args: recorded(layer, addresses, args)[0]


class TritonBatchNorm2d(TritonLayer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with Triton kernels, training and eval: the same arguments, state_dict and results.

    Shape: [N, C, H, W], kept; floating-point types, the parameters in that of the input or in float32. Falls back to
    PyTorch for other types. https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input) if self.training else self._evaluate(input)

    @by_plan(lambda self: (*parameters(self), *running_statistics(self), self.eps))
    def _evaluate(self, input: torch.Tensor) -> torch.Tensor:
        return self._compute(input)

    @by_plan(lambda self: (*parameters(self), *running_statistics(self), self.eps))
    def _from_batch(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """y, mean and variance; None where PyTorch's own op is to run."""
        return None if self._reason_against_a_batch(input) else _normalize(self, input)

    @by_plan(
        lambda self: (*parameters(self), *running_statistics(self), self.eps, self.momentum),
        direct=_directly,
    )
    def _train(self, input: torch.Tensor) -> torch.Tensor | None:
        """y, with the running statistics updated; None where PyTorch's own op is to run."""
        if self._reason_against_a_batch(input):
            return None
        y, mean, var = _normalize(self, input)
        count = input.numel() // input.shape[1]
        batch_norm2d_update_(mean, var, *running_statistics(self), self.momentum, count)
        return y

    def _reason_against_a_batch(self, input: torch.Tensor) -> str | None:
        self._check_input_dim(input)
        return "empty" if is_empty(input) else self._reason_to_fall_back(input, from_batch=True)

    def _compute(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and self.track_running_stats and self._updates_by_momentum():
            y = self._train(input)
            if y is not None:
                self._count_batch()
                return y
        elif self.training:
            found = self._from_batch(input)
            if found is not None:
                y, mean, var = found
                if self.track_running_stats:
                    self._update_running_statistics(mean, var, input.numel() // input.shape[1])
                return y
        self._check_input_dim(input)
        if is_empty(input):  # nothing to compute, and PyTorch's formulas for the gradient do not expect it
            return super().forward(input)
        from_batch = self.training or (self.running_mean is None and self.running_var is None)
        reason = self._reason_to_fall_back(input, from_batch)
        if reason is not None:
            return self._fall_back(reason, super().forward, input)
        if not from_batch:
            return batch_norm2d_inference(input, self.weight, self.bias, self.running_mean, self.running_var, self.eps)
        return _normalize(self, input)[0]

    def _updates_by_momentum(self) -> bool:
        """Whether there are running statistics, which move by the same share with every batch."""
        return isinstance(self.momentum, (int, float)) and running_statistics(self)[0] is not None

    def _count_batch(self) -> None:
        """Counts a batch whose statistics a kernel has added to the running ones."""
        tracked = self._buffers.get("num_batches_tracked")
        if tracked is not None:
            tracked.add_(1)

    def _update_running_statistics(self, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
        momentum, tracked = self.momentum, self.num_batches_tracked
        if tracked is not None:
            tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(tracked) if tracked is not None else 0.0
        running_mean, running_var = running_statistics(self)
        if running_mean is not None:
            batch_norm2d_update_(mean, var, running_mean, running_var, momentum, count)

    def _reason_to_fall_back(self, x: torch.Tensor, from_batch: bool) -> str | None:
        tensors = [t for t in (self.weight, self.bias, self.running_mean, self.running_var) if t is not None]
        reason = reason_to_fall_back_image(x, *tensors)
        if reason is not None:
            return reason
        if any(t.numel() != x.shape[1] for t in tensors):
            return f"{x.shape[1]} channels"
        if any(
            t.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64) != (t.dtype == torch.float64)
            for t in tensors
        ):
            return "input and parameters of several types"
        if (self.running_mean is None) != (self.running_var is None):
            return "one of two running statistics"
        if self.eps <= 0:
            return f"eps {self.eps}"
        if from_batch and x.numel() // max(x.shape[1], 1) <= 1:
            return "no more than one value per channel"
        return None
