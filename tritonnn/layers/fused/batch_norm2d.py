"""Batch norm with the residual sum and the ReLU after it, for training."""

import torch
from torch import nn
from torch.nn import functional as F

from ...ops.batch_norm2d_relu import batch_norm2d_relu, batch_norm2d_relu_backward
from ...runtime.capabilities import transforms_are_active
from ...runtime.memory_format import is_channels_last
from ..batch_norm2d import TritonBatchNorm2d, running_statistics
from ..layer import TritonLayer, by_plan, is_empty, parameters


def _normalize(layer: "BatchNormReLU2d", input: torch.Tensor, residual: torch.Tensor | None) -> tuple:
    return batch_norm2d_relu(input, residual, *parameters(layer.norm), layer.norm.eps)


class _Twice(torch.autograd.Function):
    """`batch_norm2d_relu` whose y comes twice, for two readers, so that backward gets their gradients apart.

    PyTorch would add these up in a pass of its own; here they are added as they are read.
    """

    @staticmethod
    def forward(ctx, input, residual, weight, bias, eps):
        y, mean, var, inverse = batch_norm2d_relu(input, residual, weight, bias, eps)
        ctx.save_for_backward(input, y, weight, bias, mean, var, inverse)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y), mean, var

    @staticmethod
    def backward(ctx, first, second, *_):
        if first is None:
            first, second = second, None
        if first is None:
            return None, None, None, None, None
        grads = batch_norm2d_relu_backward(first, second, *ctx.saved_tensors, ctx.eps)
        grad_x, grad_weight, grad_bias, grad_residual = grads
        return *(
            grad if needed else None
            for grad, needed in zip((grad_x, grad_residual, grad_weight, grad_bias), ctx.needs_input_grad)
        ), None


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
        norm = self.norm
        if not norm.training or is_empty(input):
            return self._one_by_one(input, residual)
        y: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
        if self.twice and _records_gradients() and residual is not None and not self._reason_against(input, residual):
            *ys, mean, var = _Twice.apply(input, residual, *parameters(norm), norm.eps)
            y = tuple(ys)
        else:
            found = self._from_batch(input, residual)
            if found is None:
                reason = self._reason_against(input, residual)
                return self._fall_back(str(reason), self._one_by_one, input, residual)
            y, mean, var, _ = found
        if norm.track_running_stats:
            norm._update_running_statistics(mean, var, input.numel() // input.shape[1])
        return y

    @by_plan(
        lambda self: (*parameters(self.norm), *running_statistics(self.norm), self.norm.eps),
        direct=lambda self, *images: None if self._reason_against(*images) else _normalize,
    )
    def _from_batch(self, input: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, ...] | None:
        """y, mean, variance and its inverse root; None where one operation after the other is to run."""
        return None if self._reason_against(input, residual) else _normalize(self, input, residual)

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


def _records_gradients() -> bool:
    """Whether `_Twice` is what autograd runs: not where compilers or transforms look on, which see the operator."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transforms_are_active()


def _are_alike(x: torch.Tensor, residual: torch.Tensor) -> bool:
    same = (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
    return same and is_channels_last(residual) == is_channels_last(x)
