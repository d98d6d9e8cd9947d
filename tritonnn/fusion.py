"""For inference: convolution, batch norm, residual sum and ReLU in one kernel, over a whole network.

A network is traced with torch.fx, its batch norms become part of the convolutions before them, and what follows a
convolution or linear layer moves into its kernel's epilogue. What is left becomes Triton layers, as `swap`
does it, or stays PyTorch.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .cuda_graphs import CudaGraphs
from .fusion_pass import fuse_graph
from .fusion_report import FusionReport, few, join
from .layers.fused_conv2d import FusedPooledLinear
from .layers.layer import TritonLayer
from .pure_graph import describe, has_hooks, is_layer, optional_arguments, trace
from .runtime.memory_format import is_channels_last
from .swap import kind_of, swap


class FusedNetwork(nn.Module):
    """A network made by `fuse`: called like the model it was made of, in eval mode for good, without gradients.

    `report` is the `FusionReport`. `network` holds the layers; replaced or overwritten weights count from the next
    call.
    """

    def __init__(self, network: nn.Module, report: FusionReport, cuda_graph: bool, copy_output: bool) -> None:
        super().__init__()
        self.network = network
        self.report = report
        self._graphs = CudaGraphs(copy_output) if cuda_graph else None
        super().train(False)

    def forward(self, *args, **kwargs) -> object:
        if torch.is_grad_enabled():
            if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))):
                raise RuntimeError("a fused network has no gradients: call it with inputs that require none")
        with torch.no_grad():
            if self._graphs is None:
                return self.network(*args, **kwargs)
            return self._graphs(self.network, args, kwargs)

    def train(self, mode: bool = True) -> "FusedNetwork":
        """Raises RuntimeError unless `mode` is False: batch norms are folded, there is nothing to train."""
        if mode:
            raise RuntimeError("a fused network cannot be trained: train the model it was made of, and fuse that again")
        return self

    def _apply(self, fn, recurse: bool = True) -> "FusedNetwork":
        super()._apply(fn, recurse)
        if self._graphs is not None:
            self._graphs.clear()
        return self


class FusedPart(nn.Module):
    """A fused module inside one that torch.fx could not trace, whose code may also reach into `unfused`, the original.

    For contiguous images it returns contiguous images, as PyTorch's layers do.
    """

    def __init__(self, fused: nn.Module, unfused: nn.Module) -> None:
        super().__init__()
        self.fused, self.unfused = fused, unfused
        self.eval()

    def forward(self, *args, **kwargs) -> object:
        y = self.fused(*args, **kwargs)
        if any(_is_channels_last(x) for x in tree_leaves((args, kwargs))):
            return y
        return tree_map(lambda t: t.contiguous() if _is_channels_last(t) else t, y)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(super().__getattr__("unfused"), name)

    def __iter__(self) -> Iterator:
        return iter(self.unfused)

    def __len__(self) -> int:
        return len(self.unfused)

    def __getitem__(self, index: object) -> nn.Module:
        return self.unfused[index]


def fuse(model: nn.Module, cuda_graph: bool = False, copy_output: bool = True) -> FusedNetwork:
    """A fast copy of an eval network for inference; the model is left alone and shares nothing with it.

    Batch norms are folded into the convolutions before them, in float64: into float32 and float64 weights, rounded
    once; beside 16-bit weights, which stay as they are, the kernel scales the sums. Bias, residual sum and ReLU run in
    the kernel of the convolution or linear layer, whose images are channels_last. Operand types follow autocast and
    PyTorch's TF32 switches at each call.

    Args:
        cuda_graph: replay a CUDA graph, captured at the second call with inputs of a shape, type, autocast and TF32
            state; the first runs eagerly, and so do CPU tensors and calls inside another capture.
        copy_output: with CUDA graphs, return a copy; else the output is valid only until the next call.

    Raises:
        RuntimeError: the model or a part of it is in training mode.
        ValueError: it is a fused network already.
    """
    if isinstance(model, FusedNetwork):
        raise ValueError("the network is fused already")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(f"fuse wants a network in eval mode: call model.eval() first; training: {few(training)}")
    report = FusionReport()
    with torch.inference_mode(False), torch.no_grad():
        network = copy.deepcopy(model)
        if is_layer(network):
            network = nn.Sequential(network)
        network = _fused_if_traced(network, "", report)
        _swap_rest(network, report)
        network.requires_grad_(False)
    return FusedNetwork(network, report, cuda_graph, copy_output)


def _fused_if_traced(module: nn.Module, name: str, report: FusionReport) -> nn.Module:
    """The module as a fused graph or, where it cannot be traced, itself with its parts fused."""
    if has_hooks(module):
        reason = "it has hooks"
    else:
        try:
            traced = trace(module)
        except Exception as error:  # whatever the module's code makes of symbolic inputs
            reason = describe(error)
        else:
            fused = fuse_graph(module, traced, name, report)
            for target, why in traced.opaque.items():
                report.untraced[join(name, target)] = why
                _fuse_parts(fused.get_submodule(target), join(name, target), report)
            return fused
    report.untraced[name] = reason
    _fuse_parts(module, name, report)
    return module


def _fuse_parts(module: nn.Module, name: str, report: FusionReport) -> None:
    for child_name, child in module.named_children():
        full_name = join(name, child_name)
        if is_layer(child) or kind_of(child) is not None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or has_hooks(child) or optional_arguments(child):
            _fuse_parts(child, full_name, report)
            continue
        fused = _fused_if_traced(child, full_name, report)
        if fused is not child:
            setattr(module, child_name, FusedPart(fused, child))


def _swap_rest(network: nn.Module, report: FusionReport) -> None:
    """Triton layers in the place of those that were not fused; what only `FusedPart.unfused` has is not reported."""
    parts = [part for part in network.modules() if isinstance(part, FusedPart)]
    spare = {id(m) for part in parts for m in part.unfused.modules()} - {
        id(m) for part in parts for m in part.fused.modules()
    }
    spare |= {id(module.pool) for module in network.modules() if isinstance(module, FusedPooledLinear)}
    swapped = swap(network)
    for name, module in network.named_modules():
        if isinstance(module, TritonLayer) and kind_of(module) is not None and id(module) not in spare:
            report.modules[name.replace("fused.", "")] = module
            report.swapped[name.replace("fused.", "")] = kind_of(module)
    for name, reason in swapped.stayed.items():
        if id(network.get_submodule(name)) not in spare:
            report.stayed[name.replace("fused.", "")] = reason


def _is_channels_last(x: object) -> bool:
    return isinstance(x, torch.Tensor) and is_channels_last(x)
