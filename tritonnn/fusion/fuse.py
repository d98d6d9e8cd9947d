"""For inference: convolution, batch norm, residual sum and activation in one kernel, over a whole network.

A network is traced with torch.fx, its batch norms become part of the convolutions before them, and what follows a
convolution or linear layer moves into its kernel's epilogue. What is left becomes Triton layers, as `swap`
does it, or stays PyTorch.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..layers.fused.base import FusedLayer
from ..layers.fused.linear import FusedPooledLinear
from ..layers.layer import TritonLayer
from ..swap import check_is_module, few, kind_of, swap
from .cuda_graphs import CudaGraphs
from .first_calls import FirstCalls
from .functionalize import functionalize
from .fused_graph import FusedGraph
from .report import FusionReport, join
from .rewrite import fuse_graph
from .timm_layers import plain_timm_layers
from .tracing import CALLS_OTHERWISE, WRAPPERS, calls_otherwise, has_hooks, in_a_line, is_layer


class FusedForward:
    """A module's forward: the fused graph or, with other optional arguments than their defaults, the module's own code.
    That is `unfused`, and `fallbacks` counts its calls.
    """

    def __init__(self, graph: FusedGraph, unfused: Callable) -> None:
        self.graph, self.unfused = graph, unfused
        self.fallbacks: Counter[str] = Counter()
        self._signature: inspect.Signature | None = None

    def __call__(self, *args, **kwargs) -> object:
        required, other = self._bound(args, kwargs)
        if other is not None:
            self.fallbacks[f"called with another {other!r} than its default"] += 1
            return self.unfused(*args, **kwargs)
        return self.graph(**required)

    def runs_the_graph(self, *args) -> bool:
        """Whether a call with these arguments does, and not the module's own code."""
        return self._bound(args, {})[1] is None

    def _bound(self, args: tuple, kwargs: dict) -> tuple[dict[str, object], str | None]:
        """The required arguments by name, and the name of an optional one that is not its default."""
        if self._signature is None:
            self._signature = inspect.signature(self.unfused)
        parameters = self._signature.parameters
        required = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            p = parameters[name]
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty:
                if not _is_default(value, p):
                    return {}, name
            else:
                required[name] = value
        return required, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_signature": None}


def _is_default(value: object, parameter: inspect.Parameter) -> bool:
    """Whether an argument is its default, or a number or the like that equals it."""
    default = parameter.default
    if value is default:
        return True
    if type(value) is tuple and type(default) is tuple and len(value) == len(default):
        return all(_is_default(v, parameter.replace(default=d)) for v, d in zip(value, default))
    return type(value) is type(default) and type(value) in (bool, int, float, str) and value == default


def _has_options(forward: Callable) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


class FusedNetwork(nn.Module):
    """A network made by `fuse`: called like the model it was made of, in eval mode for good, without gradients.

    `report` is the `FusionReport`. `network` holds the layers. The next call uses weights that were replaced or
    overwritten in place. It does not see writes that PyTorch does not count (`Tensor._version`): through `.data`, to
    tensors made in inference mode, or by code outside PyTorch. Call `weights_changed` after these.

    `graphs` are its CUDA graphs, if it was made with some: `len(graphs)` of them are captured, and `graphs.refused` has
    the kinds of calls that cannot be captured, with the reason.

    `parts` are the graphs of modules inside others that could not be traced, `unfused` is the copied model itself
    where its forward has optional arguments: other values of these run it.
    """

    def __init__(
        self,
        network: nn.Module,
        report: FusionReport,
        cuda_graph: bool,
        copy_output: bool,
        parts: dict[str, FusedGraph] | None = None,
        unfused: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.parts = nn.ModuleList((parts or {}).values())
        self.unfused = unfused
        self.report = report
        self._with_options = None if unfused is None else FusedForward(network, unfused.forward)
        self._first_calls = FirstCalls(network)
        self.graphs = CudaGraphs(copy_output, self._first_calls) if cuda_graph else None
        super().train(False)

    def forward(self, *args, **kwargs) -> object:
        if torch.is_grad_enabled():
            if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves((args, kwargs))):
                raise RuntimeError("a fused network has no gradients: call it with inputs that require none")
        with torch.no_grad():
            call = self._with_options or self.network
            if torch.compiler.is_compiling():
                return call(*args, **kwargs)
            if self.graphs is None:
                self._first_calls.before(call, self, args, kwargs, in_graphs=False)
                return call(*args, **kwargs)
            return self.graphs(call, self, args, kwargs)

    def weights_changed(self) -> None:
        """Drops packed weights and CUDA graphs, so that the next call reads all weights anew."""
        for module in self.modules():
            if isinstance(module, FusedLayer):
                module.forget_packed_weights()
        if self.graphs is not None:
            self.graphs.clear()

    def train(self, mode: bool = True) -> "FusedNetwork":
        """Raises RuntimeError unless `mode` is False: batch norms are folded, there is nothing to train."""
        if mode:
            raise RuntimeError("a fused network cannot be trained: train the model it was made of, and fuse that again")
        return self

    def _apply(self, fn, recurse: bool = True) -> "FusedNetwork":
        super()._apply(fn, recurse)
        if self.graphs is not None:
            self.graphs.clear()
        return self


def fuse(model: nn.Module, cuda_graph: bool = False, copy_output: bool = True) -> FusedNetwork:
    """A fast copy of an eval network for inference; the model is left alone and shares nothing with it.

    Batch norms are folded into the convolutions before them, in float64: into float32 and float64 weights, rounded
    once; beside 16-bit weights, which stay as they are, the kernel scales the sums. Bias, residual sum and activation
    run in the kernel of the convolution or linear layer, whose images are channels_last; what leaves the network lies
    in memory as the model's output would, for images in one of both memory formats and parts of such. Operand types
    follow autocast and PyTorch's TF32 switches at each call.

    Activations are ReLU, ReLU6, LeakyReLU, SiLU, Hardswish, Hardsigmoid, Sigmoid and both kinds of GELU, as modules,
    functions or methods, in place or not; others stay PyTorch's.

    Gates of squeeze-and-excitation and batch norms before a convolution of one tap are applied as it reads its image.
    Convolutions write to their channels of a concatenation, which grows without being copied in dense blocks.

    The forward is fused with its optional arguments at their defaults. A call with another value runs a copy of the
    model's own code, and the report's `fallbacks` count it.

    For a DataParallel or DistributedDataParallel model, the wrapped model is fused, for one device.

    Args:
        cuda_graph: replay a CUDA graph, captured at the second call with inputs of a shape, type, autocast and TF32
            state; the first runs eagerly, and so do CPU tensors and calls inside another capture.
        copy_output: with CUDA graphs, return a copy; else the output is valid only until the next call.

    Raises:
        RuntimeError: the model or a part of it is in training mode.
        TypeError: it is no module.
        ValueError: it is a fused network already.
    """
    check_is_module(model)
    if isinstance(model, FusedNetwork):
        raise ValueError("the network is fused already")
    while isinstance(model, WRAPPERS) and not has_hooks(model):
        model = model.module
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise RuntimeError(f"fuse wants a network in eval mode: call model.eval() first; training: {few(training)}")
    report, parts = FusionReport(), {}
    with torch.inference_mode(False), torch.no_grad():
        network = copy.deepcopy(model, _computed_attributes(model))
        plain_timm_layers(network)
        if is_layer(network):
            network = nn.Sequential(network)
        graph = _graph_of(network, "", report, parts)
        unfused = network if graph is not None and _has_options(network.forward) else None
        fused = FusedNetwork(network if graph is None else graph, report, cuda_graph, copy_output, parts, unfused)
        _swap_rest(fused, parts)
        fused.requires_grad_(False)
    return fused


def _computed_attributes(model: nn.Module) -> dict[int, torch.Tensor]:
    """Copies of results with a gradient among the attributes of modules, such as pruned weights, by their identity.

    PyTorch's deepcopy refuses these; hooks compute them anew at each call.
    """
    attributes = (value for module in model.modules() for value in vars(module).values())
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, torch.Tensor) and not t.is_leaf}


def _graph_of(module: nn.Module, name: str, report: FusionReport, parts: dict[str, FusedGraph]) -> FusedGraph | None:
    """The module as a fused graph; None where it cannot be traced, and its parts, by name, have become graphs."""
    if has_hooks(module):
        reason = "it has hooks"
    elif calls_otherwise(module) and not is_layer(module):
        reason = CALLS_OTHERWISE
    elif isinstance(module, WRAPPERS):
        reason = f"it is a {type(module).__name__}"
    else:
        try:
            traced = functionalize(module)
        except Exception as error:  # whatever the module's code makes of symbolic inputs
            reason = in_a_line(error)
        else:
            graph = fuse_graph(module, traced, name, report)
            for target, why in traced.opaque.items():
                report.untraced[join(name, target)] = why
                _fuse_parts(graph.get_submodule(target), join(name, target), report, parts)
            return graph
    report.untraced[name] = reason
    _fuse_parts(module, name, report, parts)
    return None


def _fuse_parts(module: nn.Module, name: str, report: FusionReport, parts: dict[str, FusedGraph]) -> None:
    """Replaces the forward of the module's parts and nothing else, as the module's code may ask them for anything."""
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:  # which calls copies on other devices
        return
    for child_name, child in module.named_children():
        full_name = join(name, child_name)
        if is_layer(child) or kind_of(child) is not None or "forward" in vars(child):
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            _fuse_parts(child, full_name, report, parts)
            continue
        graph = _graph_of(child, full_name, report, parts)
        if graph is not None:
            parts[full_name] = graph
            unfused = child.forward
            forward = FusedForward(graph, unfused) if _has_options(unfused) else graph
            child.__dict__["forward"] = forward
            if isinstance(forward, FusedForward):
                report.modules[full_name] = forward


def _swap_rest(fused: FusedNetwork, parts: dict[str, FusedGraph]) -> None:
    """Swaps the layers that were not fused for Triton layers, and reports those that a call runs."""
    report, runs = fused.report, {id(module) for module in _running(fused.network)}
    runs -= {id(module.pool) for module in fused.modules() if isinstance(module, FusedPooledLinear)}
    if fused._with_options is not None:
        report.modules["the model"] = fused._with_options
    swapped = swap(fused)
    prefixes = {"network": ""} | {f"parts.{i}": name for i, name in enumerate(parts)}

    def name_of(name: str) -> str:
        prefix = next(prefix for prefix in prefixes if name == prefix or name.startswith(f"{prefix}."))
        return join(prefixes[prefix], name.removeprefix(prefix).removeprefix("."))

    for name, module in fused.named_modules():
        if isinstance(module, TritonLayer) and kind_of(module) is not None and id(module) in runs:
            report.modules[name_of(name)] = module
            report.swapped[name_of(name)] = kind_of(module)
    for name, reason in swapped.stayed.items():
        if id(fused.get_submodule(name)) in runs and not isinstance(fused.get_submodule(name), FusedGraph):
            report.stayed[name_of(name)] = reason


def _running(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a call of `module` runs: those of its graph where it was fused, not its own."""
    forward = vars(module).get("forward")
    graph = forward.graph if isinstance(forward, FusedForward) else forward
    if isinstance(graph, FusedGraph):
        yield from _running(graph)
        return
    yield module
    for child in module.children():
        yield from _running(child)
