"""The backend: which graphs it changes, how it changes them, and what runs at each call."""

import warnings
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor, fx
from torch._dynamo import lookup_backend

from ..runtime.dependent_launch import launches_as_in_graphs
from ..runtime.precision import (
    convolution_input_precision,
    convolutions_in_tf32,
    matmul_input_precision,
    matmuls_in_tf32,
)
from .chains import Chain, find, placeholders, value
from .choice import compile_kernels, faster_ones
from .rewrite import as_inputs, copy_of, drop_unused_inputs, replace
from .weights import Packed, Weights

DEFAULT_MODE = "reduce-overhead"
CALLS_TO_WARM_UP = 2
"""Before Inductor has captured a CUDA graph."""


def _settings(mode: str | None, options: dict | None) -> dict[str, object]:
    from torch._inductor import list_mode_options

    return list_mode_options(mode or DEFAULT_MODE) | (options or {})


def inductor(graph: fx.GraphModule, inputs: Sequence[object], mode: str | None, options: dict | None) -> Callable:
    patches = _settings(mode, options)
    return lookup_backend("inductor")(graph, inputs, config_patches=patches)


def compile_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[object],
    mode: str | None = None,
    options: dict | None = None,
    rest: Callable = inductor,
) -> Callable:
    """See `backend`; `rest` compiles what is not ours."""

    def by_inductor(graph: fx.GraphModule, inputs: Sequence[object]) -> Callable:
        return rest(graph, inputs, mode, options)

    if _needs_gradients(example_inputs):
        return by_inductor(graph, example_inputs)
    reason = _unknown(graph, example_inputs)
    if reason is None:
        in_graphs = bool(_settings(mode, options).get("triton.cudagraphs"))
        try:
            return _with_kernels(graph, example_inputs, by_inductor, in_graphs) or by_inductor(graph, example_inputs)
        except Exception as error:  # what Inductor alone can compile is not to fail; its own errors come again
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    warnings.warn(f"tritonnn changes nothing in what torch.compile captured: {reason}", stacklevel=2)
    return by_inductor(graph, example_inputs)


def _with_kernels(
    graph: fx.GraphModule, example_inputs: Sequence[object], by_inductor: Callable, in_graphs: bool
) -> "Compiled | None":
    """The graph with kernels of ours; None where it has nothing that they compute faster."""
    changed = copy_of(graph)  # Dynamo reads its own again
    chains = [chain for chain in find(changed.graph) if not _needs_interpreter(chain)]
    if not chains:
        return None
    positions = {node: i for i, node in enumerate(placeholders(changed.graph))}
    packed = [Packed(chain, positions, value(chain.layer).dtype, input_precision(chain)) for chain in chains]
    compile_kernels(chains, packed, example_inputs, in_graphs)
    for one in packed:
        one.compute(example_inputs)
    kept = [pair for pair, ours in zip(zip(chains, packed), faster_ones(chains, packed)) if ours]
    if not kept:
        return None
    extras = replace(changed, kept)
    further = as_inputs(changed, extras)
    read = drop_unused_inputs(changed)
    compiled = by_inductor(changed, [[*example_inputs, *further][i] for i in read])
    read = read[: len(read) - len(extras)]
    return Compiled(compiled, graph, Weights([one for _, one in kept], example_inputs), read, extras, in_graphs)


class Compiled:
    """What Dynamo calls: the compiled graph, with the inputs that it reads and its packed weights, `extras`.

    Precision follows PyTorch's TF32 switches at the first call, for float32; where they were changed since, the graph
    runs as Dynamo captured it, one operation after the other.
    """

    def __init__(
        self,
        compiled: Callable,
        unchanged: Callable,
        weights: Weights,
        read: list[int],
        extras: list[Tensor],
        in_graphs: bool,
    ) -> None:
        self.compiled, self.unchanged, self.weights = compiled, unchanged, weights
        self.read, self.extras = read, extras
        self.calls_to_warm_up = CALLS_TO_WARM_UP if in_graphs else 0
        self.in_float32 = any(one.dtype == torch.float32 for one in weights.packed)
        self.switches = _switches()
        self.warned = False

    def __call__(self, *inputs: object) -> object:
        if self.in_float32 and _switches() != self.switches:
            return self._as_captured(inputs)
        self.weights.refresh(inputs)
        read = [inputs[i] for i in self.read]
        if self.calls_to_warm_up:  # in graphs kernels are others: the first calls need not compile them twice
            self.calls_to_warm_up -= 1
            with launches_as_in_graphs():
                return self.compiled(*read, *self.extras)
        return self.compiled(*read, *self.extras)

    def _as_captured(self, inputs: tuple) -> object:
        if not self.warned:
            self.warned = True
            warnings.warn(
                "the TF32 switches were changed after torch.compile: the network runs uncompiled until they are put "
                "back, or torch.compiler.reset() is called",
                stacklevel=3,
            )
        return self.unchanged(*inputs)


def _switches() -> tuple[bool, bool]:
    return convolutions_in_tf32(), matmuls_in_tf32()


def _needs_gradients(inputs: Sequence[object]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _unknown(graph: fx.GraphModule, inputs: Sequence[object]) -> str | None:
    """What of a graph is not as Dynamo's were known with torch 2.11 to 2.14, if anything."""
    nodes = placeholders(graph.graph)
    if len(nodes) != len(inputs):
        return "its inputs are not those of its graph"
    for node, x in zip(nodes, inputs):
        if "example_value" not in node.meta or not hasattr(node, "_dynamo_source"):
            return f"nothing is known of its input {node.name}"
        if isinstance(x, Tensor) and not isinstance(value(node), Tensor):
            return f"its input {node.name} is a tensor, and none in the graph"
    return None


def _needs_interpreter(chain: Chain) -> bool:
    """Whether the kernels would need Triton's interpreter, which does not run."""
    return chain.result.device.type == "cpu" and not triton.knobs.runtime.interpret


def input_precision(chain: Chain) -> str:
    """The input precision of the kernel, by PyTorch's switches as they are now."""
    if value(chain.layer).dtype != torch.float32:
        return "ieee"
    x, weight, y = value(chain.x), value(chain.weight), value(chain.layer)
    if chain.is_linear:
        return matmul_input_precision(x.reshape(-1, x.shape[-1]), weight)
    return convolution_input_precision(x, weight, y.numel() // y.shape[1])
