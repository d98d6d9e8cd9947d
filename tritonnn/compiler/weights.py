"""Packed weights of a compiled graph, which follow the parameters and buffers that they were made of."""

from types import SimpleNamespace

import torch
from torch import Tensor

from ..layers.fused.base import batch_norm_as_affine
from ..ops.conv2d.pack import pack_filters
from .chains import Chain


class Packed:
    """A chain's packed weight, and its scale [K] and bias [K] where it has them, at addresses that never change.

    `sources` are the positions of the graph's inputs that they are made of: weight, bias, and the batch norm's mean,
    variance, weight and bias, and a factor for each channel, None for what there is not.
    """

    def __init__(self, chain: Chain, positions: dict, dtype: torch.dtype, input_precision: str) -> None:
        nodes = (chain.weight, chain.bias, *(chain.norm_operands or [None] * 4), chain.channel_scale)
        self.sources = [None if node is None else positions[node] for node in nodes]
        self.has_norm, self.eps = chain.norm is not None, chain.eps
        self.dtype, self.input_precision, self.groups = dtype, input_precision, chain.window[-1]
        self.tensors: list[Tensor | None] = []

    def compute(self, inputs: list | tuple) -> None:
        """Packs the weights of the inputs, the second time into the same memory."""
        with torch.inference_mode(False), torch.no_grad():
            made = self._made_of(*[None if i is None else inputs[i].detach() for i in self.sources])
            if not self.tensors:
                self.tensors = made
                return
            for kept, new in zip(self.tensors, made):
                if kept is not None:
                    kept.copy_(new)

    def _made_of(self, weight, bias, mean, variance, norm_weight, norm_bias, factor) -> list[Tensor | None]:
        filters, scale = (weight if weight.dim() == 4 else weight[:, :, None, None]), None
        sums = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if self.has_norm:
            norm = SimpleNamespace(
                running_mean=mean, running_var=variance, weight=norm_weight, bias=norm_bias, eps=self.eps
            )
            scale, bias = batch_norm_as_affine(bias, norm)
        if factor is not None:
            factor = factor.double().flatten()
            scale = factor if scale is None else scale * factor
            bias = None if bias is None else bias * factor
        if scale is not None:
            if self.dtype.itemsize > 2:
                filters = (filters.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype)
                scale = None
            else:
                scale = scale.to(sums)
        packed = pack_filters(filters.to(self.dtype), self.input_precision, self.groups)
        if packed.data_ptr() == weight.data_ptr():
            packed = packed.clone(memory_format=torch.preserve_format)
        return [packed, scale, None if bias is None else bias.to(sums, copy=True)]


class Weights:
    """All packed weights of a graph. `refresh` packs anew those whose sources were replaced or overwritten."""

    def __init__(self, packed: list[Packed], inputs: list | tuple) -> None:
        """`packed` have been computed from the inputs."""
        self.packed = packed
        self._watched = sorted({i for one in packed for i in one.sources if i is not None})
        self._seen = self._states(inputs)

    def refresh(self, inputs: tuple) -> None:
        for i, tensor, address, version in self._seen:  # at every call: no function, no generator
            x = inputs[i]
            if x is not tensor or x.data_ptr() != address or (version is not None and x._version != version):
                break
        else:
            return
        before, self._seen = self._seen, self._states(inputs)
        changed = {now[0] for now, then in zip(self._seen, before) if now[1] is not then[1] or now[2:] != then[2:]}
        for one in self.packed:
            if changed.intersection(one.sources):
                one.compute(inputs)

    def _states(self, inputs: list | tuple) -> list[tuple[int, Tensor, int, int | None]]:
        """Inference tensors count no versions."""
        return [
            (i, x, x.data_ptr(), None if x.is_inference() else x._version) for i in self._watched for x in [inputs[i]]
        ]
