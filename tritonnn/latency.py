"""How long a network's layers take: which calls it makes, and the timing of several callables in alternation.

Nothing is timed inside the running network, where hooks and launches would count: the calls are recorded once, then
each layer is replayed alone on random input of the shape, type and strides it saw. Times are milliseconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from .clocks import Clock, Timing, alternate, captured, event_clock, mend_generator, repeated, repeats_for, wall_clock
from .layers.fused.base import FusedLayer
from .layers.fused.concatenation import FusedConcatenation
from .layers.fused.conv2d import FusedSum
from .layers.fused.scaled import FusedExcitation, FusedNorm, FusedScaledConv2d
from .roofline import Work, arithmetic_of, work_of
from .swap import kind_of, swap

Progress = Callable[[str, int, int], object]
"""Is told what is timed next, how much of it is done and how much there is in all."""

WARM_UP_CALLS = 3
MIN_SAMPLES, MAX_SAMPLES = 3, 100
# Work between two readings of a clock: events resolve 0.5 us, a graph launch or a synchronisation costs some 10 us.
GRAPH_MS, EAGER_MS = 1.0, 2.0


@dataclass(frozen=True)
class LayerCall:
    """One call of a leaf layer: where it stands in the network and what tensor it was given."""

    name: str
    kind: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def memory_format(self) -> str:
        """ "contiguous", "channels_last" or "strided"; what is both counts as contiguous."""
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if x.is_contiguous():
            return "contiguous"
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return "channels_last"
        return "strided"

    def random_input(self, generator: torch.Generator) -> Tensor:
        """Normally distributed values with the shape, type and strides of the call; `generator` is on its device."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        if self.shape:  # of some channels of images, also what lies behind the last ones
            extent = max(extent, self.shape[0] * self.stride[0])
        storage = torch.randn(extent, generator=generator, device=self.device).to(self.dtype)
        return storage.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Latency:
    """Times of a callable: `eager` is the wall clock of a call from Python; `device` the GPU's own time, None on a CPU.

    `device_clock` says how the latter was taken: "CUDA graph" (no launch cost) or "CUDA events" (around eager calls,
    where the callable cannot be captured: launch cost shows if it exceeds the work).
    """

    eager: Timing
    device: Timing | None = None
    device_clock: str | None = None


@dataclass(frozen=True)
class LayerLatency:
    """A layer's call timed as PyTorch's and as Triton's layer; `triton` is None for a kind that was not asked for.

    `fallback` is the reason for which the Triton layer ran PyTorch's own operation instead, if it did; `arithmetic` is
    as in `tritonnn.roofline`.
    """

    call: LayerCall
    pytorch: Latency
    triton: Latency | None = None
    fallback: str | None = None
    work: Work | None = None
    arithmetic: str = ""


@dataclass(frozen=True)
class KernelLatency:
    """One call of a fused layer, or of a Triton layer beside them, in a network made by `tritonnn.fuse`."""

    layer: nn.Module
    latency: Latency
    work: Work
    arithmetic: str


def record_calls(model: nn.Module, *inputs: Tensor) -> list[LayerCall]:
    """Runs the model once and returns the calls of its leaf layers of a supported kind, in the order of running."""
    calls: list[LayerCall] = []

    def recorder(layer: nn.Module, name: str, kind: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if module is layer:  # and not its twin, which has the same hooks
                x = args[0] if args else next(iter(kwargs.values()))
                calls.append(LayerCall(name, kind, tuple(x.shape), x.stride(), x.dtype, x.device))

        return record

    handles = [
        module.register_forward_pre_hook(recorder(module, name, kind), with_kwargs=True)
        for name, module in model.named_modules()
        if (kind := kind_of(module)) is not None
    ]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters, buffers and hooks: one can be swapped while the other is not.

    Bound methods that stand in a module's dictionary, as Lightning leaves a `forward` there, are the twin's.
    """
    twins: dict[nn.Module, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if module not in twins:
            twins[module] = other = module.__class__.__new__(module.__class__)
            other.__dict__.update(module.__dict__)
            other.__dict__["_modules"] = {name: child and copy(child) for name, child in module._modules.items()}
        return twins[module]

    other = copy(model)
    for module in twins.values():
        for name, value in module.__dict__.items():
            if isinstance(value, MethodType) and value.__self__ in twins:
                module.__dict__[name] = MethodType(value.__func__, twins[value.__self__])
    return other


def time_layers(
    model: nn.Module,
    *inputs: Tensor,
    layers: str | Sequence[str] = "all",
    budget_s: float = 0.1,
    progress: Progress | None = None,
) -> list[LayerLatency]:
    """Times every leaf layer of a supported kind alone, PyTorch's and Triton's in alternation, in network order.

    Args:
        model: with PyTorch's layers, in the mode (eval, autocast, inference) in which it is to be timed; left alone.
        inputs: of one call of the model; they decide the shapes.
        layers: the kinds that are timed on the Triton side too, as in `swap`; () for none.
        budget_s: roughly how many seconds to spend on each clock of each layer.
        progress: is told before each layer.

    Raises:
        ValueError: for an unknown kind.
    """
    latencies = []
    calls = record_calls(model, *inputs)
    with _autocast_as_in_one_step():
        for index, call in enumerate(calls):
            if progress:
                progress(call.name, index, len(calls))
            layer = model.get_submodule(call.name)
            triton_layer = twin(layer)
            report = swap(triton_layer, layers=layers)
            # A generator of its own: a failed graph capture may leave the default one unusable.
            x = call.random_input(torch.Generator(call.device).manual_seed(0))
            contenders = [layer, triton_layer] if report.swapped else [layer]
            pytorch, *triton = time_alternately(
                [partial(contender, x) for contender in contenders], call.device, budget_s
            )
            fallbacks = [reason for reasons in report.fallbacks.values() for reason in reasons]
            y = layer(x)
            latencies.append(
                LayerLatency(
                    call,
                    pytorch,
                    triton[0] if triton else None,
                    fallbacks[0] if fallbacks else None,
                    work_of(layer, (x,), y if isinstance(y, Tensor) else y[0]),
                    arithmetic_of(call.kind, call.dtype),
                )
            )
    return latencies


def time_kernels(
    network: nn.Module, *inputs: Tensor, budget_s: float = 0.1, progress: Progress | None = None
) -> list[KernelLatency]:
    """Times each layer of a network made by `tritonnn.fuse`, without CUDA graphs, alone, in the order of running.

    Args:
        network: in the mode (autocast, inference) in which it is to be timed; left alone.
        inputs: of one call; they decide the shapes.
        budget_s: roughly how many seconds to spend on each clock of each layer.
        progress: is told before each layer.
    """
    latencies = []
    network(*inputs)  # the first call goes through the network twice, to compile its kernels ahead
    calls = _record_kernels(network, *inputs)
    with _autocast_as_in_one_step():
        for index, (layer, operands) in enumerate(calls):
            if progress:
                progress(operands[0].name, index, len(calls))
            device = operands[0].device
            generator = torch.Generator(device).manual_seed(0)
            tensors = tuple(operand.random_input(generator) for operand in operands)
            (latency,) = time_alternately([partial(layer, *tensors)], device, budget_s)
            arithmetic = arithmetic_of(operands[0].kind, operands[0].dtype)
            latencies.append(KernelLatency(layer, latency, _work_of_kernel(layer, tensors), arithmetic))
    return latencies


def _record_kernels(network: nn.Module, *inputs: Tensor) -> list[tuple[nn.Module, list[LayerCall]]]:
    """The calls of its fused and Triton layers, in the order of running, each with the tensors that it got."""
    calls: list[tuple[nn.Module, list[LayerCall]]] = []
    inside: list[nn.Module] = []

    def enter(layer: nn.Module, args: tuple, name: str) -> None:
        if not inside:  # and not a part of another
            weight = getattr(layer, "weight", None)
            of_weight = "linear" if weight is not None and weight.dim() == 2 else "conv2d"
            kind = kind_of(layer) or ("batch_norm2d" if isinstance(layer, FusedNorm) else of_weight)
            operands = [x for x in args if isinstance(x, Tensor)]
            calls.append(
                (layer, [LayerCall(name, kind, tuple(x.shape), x.stride(), x.dtype, x.device) for x in operands])
            )
        inside.append(layer)

    handles = []
    for name, module in network.named_modules():
        kernels = FusedLayer | FusedNorm | FusedScaledConv2d | FusedSum | FusedConcatenation | FusedExcitation
        if isinstance(module, kernels) or kind_of(module) is not None:
            handles.append(module.register_forward_pre_hook(partial(enter, name=name)))
            handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _work_of_kernel(layer: nn.Module, operands: tuple[Tensor, ...]) -> Work:
    y = layer(*operands)
    if isinstance(layer, FusedScaledConv2d):
        factors = layer.first.factors(*operands[: layer.first.operands])
        x = operands[0] if isinstance(factors, str) else factors[0]
        return work_of(layer.last, (x, *(t for t in operands if t is not x)), y)
    if isinstance(layer, FusedExcitation):
        inner = layer.first(*operands)
        first, second = work_of(layer.first, operands, inner), work_of(layer.last, (inner,), y)
        return Work(first.flop + second.flop, first.bytes + second.bytes - 2 * inner.nbytes)
    if isinstance(layer, FusedConcatenation):
        works = [
            work_of(part, (x,), part(x)) for part, x in zip(layer.layers, operands[-len(layer.layers) :], strict=True)
        ]
        return Work(sum(work.flop for work in works), sum(work.bytes for work in works))
    if not isinstance(layer, FusedSum):
        return work_of(layer, operands, y)
    last, other = (work_of(part, (x,), y) for part, x in zip((layer.last, layer.other), operands, strict=True))
    return Work(last.flop + other.flop, last.bytes + other.bytes - y.nbytes)


def time_networks(
    model: nn.Module,
    *inputs: Tensor,
    variants: Sequence[str | Sequence[str]],
    others: Sequence[nn.Module] = (),
    budget_s: float = 2.0,
) -> list[Latency]:
    """Times the whole model, PyTorch's first and then with each of `variants` (as in `swap`) swapped, in alternation.

    `others` are further networks that take the same inputs, such as the model fused; they come last.

    Raises:
        ValueError: for an unknown kind, or where a layer is reached other than as a submodule and so cannot be swapped.
    """
    networks = [model]
    for layers in variants:
        networks.append(twin(model))
        swap(networks[-1], layers=layers)
    expected = [call.name for call in record_calls(model, *inputs)]
    for network in networks[1:]:
        if [call.name for call in record_calls(network, *inputs)] != expected:
            raise ValueError(
                f"{type(model).__name__} reaches some layers other than as submodules: it cannot be timed."
            )
    with _autocast_as_in_one_step():
        calls = [partial(network, *inputs) for network in (*networks, *others)]
        return time_alternately(calls, inputs[0].device, budget_s)


def time_alternately(
    calls: Sequence[Callable[[], object]], device: torch.device, budget_s: float = 0.5
) -> list[Latency]:
    """Times callables in turns, so that drifting clocks and neighbours hit all alike; caches are warm.

    Warm-up and compilation are not counted. One sample is the mean of as many calls as take a millisecond or two:
    between two readings of the wall clock, the last after a synchronisation, for `eager`; between events for `device`.

    Args:
        calls: without arguments, all working on `device`.
        device: where they run.
        budget_s: roughly how many seconds to spend on each clock, over all callables; at least 3 samples are taken.
    """
    if device.type != "cuda":
        return [Latency(eager) for eager in _sample([_eager_clock(call, lambda: None) for call in calls], budget_s)]
    with torch.cuda.device(device):
        for call in calls:
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.synchronize()
        eager = _sample([_eager_clock(call, torch.cuda.synchronize) for call in calls], budget_s)
        device_clocks, names = zip(*[_device_clock(call) for call in calls], strict=True)
        device_times = _sample(device_clocks, budget_s)
        return [Latency(*latency) for latency in zip(eager, device_times, names, strict=True)]


def _sample(clocks: Sequence[Clock], budget_s: float) -> list[Timing]:
    """Reads the clocks in turns until the budget is spent."""
    timings, _ = alternate({str(i): clock for i, clock in enumerate(clocks)}, budget_s, (MIN_SAMPLES, MAX_SAMPLES))
    return list(timings.values())


def _eager_clock(call: Callable[[], object], synchronize: Callable[[], object]) -> Clock:
    """The wall clock of a call, as the mean of back-to-back calls that end with a synchronisation."""

    def read(repeats: int) -> float:
        if repeats > 1:  # caches hold what ran in between
            wall_clock(call, 1, synchronize)
        return wall_clock(call, repeats, synchronize)

    once = read(1)
    if once < 10 * EAGER_MS:  # what takes longer is not called again to be warm
        once = read(1)
    return partial(read, repeats_for(once, EAGER_MS))


def _device_clock(call: Callable[[], object]) -> tuple[Clock, str]:
    """Events around a CUDA graph of repeated calls, or around the calls themselves if they cannot be captured."""
    name, launcher = "CUDA graph", captured
    try:
        once = event_clock(launcher(call, 1), 1)
    except RuntimeError:
        mend_generator()
        name, launcher = "CUDA events", repeated
        once = event_clock(call, 1)
    once()  # the first replay uploads the graph
    repeats = repeats_for(once(), GRAPH_MS)
    clock = event_clock(launcher(call, repeats), repeats)
    clock()
    return clock, name


@contextmanager
def _autocast_as_in_one_step() -> Iterator[None]:
    """Autocast converts a weight once a step; its cache would make every call after the first cheaper than that."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
