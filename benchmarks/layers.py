"""Every distinct layer of a network, alone: PyTorch's, Triton's and other libraries'.

The GPU's own time: a CUDA graph of many calls. They rotate among copies of the input that with their outputs exceed
twice the L2 cache, so that activations come from memory; weights may stay in the cache. Inside a running network, a
layer may find what the one before it wrote still there.
"""

import copy
import importlib
import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

import tritonnn
from benchmarks.cases import Case
from benchmarks.measure import Say, checked, prepared, time_right_ones
from benchmarks.networks import LAYER_LIMITS, MEMORY_FORMATS, Setup, cudnn_benchmark, spread
from benchmarks.peers import Unavailable
from benchmarks.results import OK, LayerShape, LayersResult, Measured
from benchmarks.timing import capture, failure, read_events
from tritonnn import kind_of
from tritonnn.clocks import Timing, repeats_for
from tritonnn.latency import LayerCall, record_calls

LAYER_BUDGET_S = 0.25
GRAPH_MS = 1.0
MAX_COPIES, MAX_CALLS = 64, 500


def pytorch(layer: nn.Module) -> nn.Module:
    return layer


def triton(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    tritonnn.swap(layer, strict=True)
    return layer


def flag_gems(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """FlagGems' functions: https://github.com/FlagOpen/FlagGems."""
    gems = _installed("flag_gems")
    match layer:
        case nn.Conv2d():
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            return lambda x: gems.conv2d(x, layer.weight, layer.bias, *geometry)
        case nn.BatchNorm2d():
            statistics = layer.running_mean, layer.running_var
            return lambda x: _first(
                gems.batch_norm(x, layer.weight, layer.bias, *statistics, False, layer.momentum, layer.eps)
            )
        case nn.Linear():
            return lambda x: gems.addmm(layer.bias, x, layer.weight.t())
        case nn.MaxPool2d():
            window = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode
            return lambda x: _first(gems.max_pool2d_with_indices(x, *window))
        case nn.AvgPool2d():
            window = layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode
            return lambda x: gems.avg_pool2d(x, *window)
        case nn.ReLU():
            return gems.relu
    raise Unavailable(f"FlagGems has no {type(layer).__name__}")


def attorch(layer: nn.Module) -> nn.Module:
    """attorch's layers: https://github.com/BobMcDear/attorch. Its Linear has the weight transposed."""
    library = _installed("attorch")
    cls = getattr(library, type(layer).__name__, None)
    match layer:
        case _ if cls is None:
            raise Unavailable(f"attorch has no {type(layer).__name__}")
        case nn.Conv2d():
            geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
            other = cls(layer.in_channels, layer.out_channels, *geometry, layer.bias is not None)
        case nn.BatchNorm2d():
            other = cls(layer.num_features, layer.eps, layer.momentum)
        case nn.Linear():
            other = cls(layer.in_features, layer.out_features)
        case nn.AvgPool2d():
            other = cls(layer.kernel_size, layer.stride, layer.padding)
        case nn.ReLU():
            other = cls()
        case _:
            raise Unavailable(f"attorch has no {type(layer).__name__}")
    state = layer.state_dict()
    if isinstance(layer, nn.Linear):
        state["weight"] = state["weight"].t().contiguous()
    other.load_state_dict(state)
    dtype = next((p.dtype for p in layer.parameters()), None)
    return other.to(dtype=dtype).eval().requires_grad_(False)


def _installed(package: str):
    try:
        return importlib.import_module(package)
    except Exception as error:  # some look for a GPU or a version of Triton when they are imported
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise Unavailable(f"{package} is not installed" if missing else f"{package}: {error}") from error


def _first(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


LAYER_PEERS: dict[str, tuple[str, Callable]] = {
    "pytorch-nchw": ("nchw", pytorch),
    "pytorch-channels-last": ("channels-last", pytorch),
    "triton-nchw": ("nchw", triton),
    "triton-channels-last": ("channels-last", triton),
    "flag-gems": ("nchw", flag_gems),
    "attorch": ("nchw", attorch),
}
# The libraries take NCHW; a Triton kernel for each layout is compiled only where it is asked for.
DEFAULT_LAYER_PEERS = tuple(name for name in LAYER_PEERS if name != "triton-nchw")


def layer_peers_of(wanted: Iterable[str] | None) -> list[str]:
    return [name for name in LAYER_PEERS if name in (DEFAULT_LAYER_PEERS if wanted is None else set(wanted))]


def unavailable(names: Iterable[str]) -> dict[str, str]:
    """The libraries among these peers that cannot be imported, and why."""
    found = {}
    for name, package in (("flag-gems", "flag_gems"), ("attorch", "attorch")):
        if name in names:
            try:
                _installed(package)
            except Unavailable as error:
                found[name] = str(error)
    return found


def layers_result(
    case: Case,
    device: torch.device,
    wanted: Iterable[str] | None,
    say: Say,
    width: int = 64,
    budget_s: float = LAYER_BUDGET_S,
) -> LayersResult:
    """`say` is told of each layer as it is done."""
    start = time.perf_counter()
    names = [name for name in layer_peers_of(wanted) if name not in unavailable(LAYER_PEERS)]
    result = LayersResult(case.name, "cifar", case.dtype, case.batch_size, [])
    with torch.no_grad():
        model, images = Setup(Case("cifar", case.dtype, case.batch_size), device, width).in_layout("nchw")
        for call, count in distinct(model, record_calls(model, images)):
            shape = measure_layer(model.get_submodule(call.name), call, count, case.dtype, names, budget_s)
            result.layers.append(shape)
            say(f"  {shape.label}: " + ", ".join(f"{name} {_brief(found)}" for name, found in shape.peers.items()))
    result.seconds = time.perf_counter() - start
    return result


def distinct(model: nn.Module, calls: list[LayerCall]) -> list[tuple[LayerCall, int]]:
    """The calls without repetitions of the same kind of layer on the same shape, and how often each occurs."""
    found: dict[tuple, list[LayerCall]] = {}
    for call in calls:
        found.setdefault((call.kind, repr(model.get_submodule(call.name)), call.shape), []).append(call)
    return [(same[0], len(same)) for same in found.values()]


class Rotating:
    """Calls of a layer on one input after another, in a CUDA graph: `calls` of them a call of this.

    The result is that of the first input. Without a graph, and with a `note`, where the layer cannot be captured.
    """

    def __init__(self, layer: Callable[[Tensor], Tensor], inputs: list[Tensor], graph: bool) -> None:
        self.layer, self.inputs, self.note = layer, inputs, ""
        self.calls = len(inputs)
        if not graph:
            self._run = self._eagerly
            return
        try:
            self._capture()
            self._run()
            turns = repeats_for(read_events(self._run, 1), GRAPH_MS)
            if turns > 1:
                self.calls *= min(turns, math.ceil(MAX_CALLS / self.calls))
                self._capture()
        except Exception as error:
            self.note = f"not in a CUDA graph: {failure(error, inputs[0].device)}"
            self.calls = len(inputs)
            self._run = self._eagerly

    def __call__(self) -> Tensor:
        return self._run()

    def _eagerly(self) -> Tensor:
        return self._outputs()[0]

    def _outputs(self) -> list[Tensor]:
        outputs: list[Tensor] = [None] * len(self.inputs)
        for i in range(self.calls):
            outputs[i % len(outputs)] = self.layer(self.inputs[i % len(outputs)])
        return outputs

    def _capture(self) -> None:
        replay, outputs = capture(self._outputs)
        for y in outputs:
            y.fill_(float("nan"))  # shows whether the graph writes its output at all

        def run() -> Tensor:
            replay()
            return outputs[0]

        self._run = run


def rotating(builder: Callable, layer: nn.Module, inputs: list[Tensor], layout: str) -> Rotating:
    """The peer's version of the layer over the inputs in its layout."""
    memory_format = MEMORY_FORMATS[layout]
    if inputs[0].dim() == 4:
        layer = copy.deepcopy(layer).to(memory_format=memory_format)
        inputs = [x.contiguous(memory_format=memory_format) for x in inputs]
    return Rotating(builder(layer), inputs, graph=inputs[0].is_cuda)


def measure_layer(
    layer: nn.Module, call: LayerCall, count: int, dtype: str, names: Iterable[str], budget_s: float
) -> LayerShape:
    device, n = call.device, call.shape[0]
    generator = torch.Generator(device).manual_seed(3)
    x = call.random_input(generator).contiguous()
    with cudnn_benchmark(False):
        reference = copy.deepcopy(layer).double()(x[spread(n)].double())
    shape = describe(layer, x, reference, count)
    copies, shape.cold = copies_of(shape.bytes, device)
    inputs = [x, *(call.random_input(generator).contiguous() for _ in range(copies - 1))]

    def check(y: Tensor) -> Measured:
        return checked(y, reference, n, LAYER_LIMITS[dtype])

    calls = {}
    for name in names:
        layout, builder = LAYER_PEERS[name]
        shape.peers[name], run = prepared(partial(rotating, builder, layer, inputs, layout), check, device)
        if shape.peers[name].status == OK:
            calls[name] = run
    time_right_ones(shape.peers, calls, check, device, budget_s)
    for name, run in calls.items():
        if shape.peers[name].timing:
            shape.peers[name].timing = _per_call(shape.peers[name].timing, run.calls)
    return shape


def _per_call(timing: Timing, calls: int) -> Timing:
    return Timing(timing.median / calls, timing.p10 / calls, timing.p90 / calls, timing.samples)


def describe(layer: nn.Module, x: Tensor, reference: Tensor, count: int) -> LayerShape:
    """The shape of a layer on x. `reference` is its output for the `spread` samples of x."""
    n, read = x.shape[0], x.numel()
    outputs = reference.numel() // reference.shape[0] * n
    size = "x".join(map(str, x.shape[2:]))
    match layer:
        case nn.Conv2d():
            r, s = layer.kernel_size
            label = f"conv {r}x{s}/{layer.stride[0]} {layer.in_channels}-{layer.out_channels}, {size}"
            flop = 2 * outputs * layer.in_channels // layer.groups * r * s
            under_the_filter = (min(side, p * f) for side, p, f in zip(x.shape[2:], reference.shape[2:], (r, s)))
            read = n * layer.in_channels * math.prod(under_the_filter)
        case nn.Linear():
            label, flop = f"linear {layer.in_features}-{layer.out_features}", 2 * outputs * layer.in_features
        case nn.MaxPool2d() | nn.AvgPool2d():
            label = f"{kind_of(layer)} {layer.kernel_size}/{layer.stride}, {x.shape[1]} at {size}"
            flop = 0
        case _:
            label, flop = f"{kind_of(layer)} {x.shape[1]} at {size}", 0
    parameters = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()) if t.dim())
    moved = (read + outputs) * x.element_size() + parameters
    return LayerShape(kind_of(layer), label, count, flop, moved, cold=False)


def copies_of(moved: int, device: torch.device) -> tuple[int, bool]:
    """How many copies of tensors of `moved` bytes exceed twice the L2 cache, and whether they are made.

    One if it would take too many: such small tensors are in the cache in a network too.
    """
    if device.type != "cuda":
        return 1, False
    copies = math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / moved)
    return (copies, True) if copies <= MAX_COPIES else (1, False)


def _brief(found: Measured) -> str:
    return f"{found.timing.median * 1e3:.1f} us" if found.timing else f"{found.status} {found.note}".strip()
