"""What the zoo measures: a network of any library in a type and batch size, and how its results are kept."""

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import peers
from benchmarks.cases import DTYPES, Case
from benchmarks.layers import distinct
from benchmarks.measure import Say, checked, outcome, prepared, time_right_ones
from benchmarks.networks import LIMITS, Setup, cudnn_benchmark, errors, spread
from benchmarks.peers import Call
from benchmarks.results import OK, Measured
from benchmarks.timing import failure
from tritonnn import kind_of, swap
from tritonnn.clocks import Timing
from tritonnn.command.networks import build, calibrate, random_images
from tritonnn.compiler import backend
from tritonnn.compiler.measured import measuring_alone
from tritonnn.latency import LayerCall, record_calls, time_alternately, twin

PYTORCH = ("eager", "graph", "compile-reduce-overhead", "compile-max-autotune")
OURS = ("swapped-graph", "fused-graph", "compile-tritonnn")
INCEPTION_SIZE, SIZE = 299, 224
BUDGET_S, LAYER_BUDGET_S = 2.0, 0.05
PROFILED_CALLS = 3
CHOOSES_ALGORITHMS = ("eager", "graph", "swapped-graph")
"""Ways in which cuDNN times its algorithms while they get ready."""
ERROR_OF_EAGER = 3.0
"""How many times the error of PyTorch's eager network a right result may have, or the limit of its type."""


@dataclass(frozen=True)
class ZooCase(Case):
    """`task` is the network's name; images and weights are channels_last."""

    @property
    def layout(self) -> str:
        return "channels-last"

    @property
    def network(self) -> str:
        """The network as `python -m tritonnn` names it."""
        return self.task if "/" in self.task or ":" in self.task else f"torchvision:{self.task}"

    @property
    def file(self) -> str:
        return f"{self.name.replace('/', '-').replace(':', '-')}.json"


@dataclass
class Peer:
    """What was found of a way to run a network; `first_call_s`: from the untouched network to the first result."""

    measured: Measured
    first_call_s: float | None = None


@dataclass
class Layer:
    """One distinct layer alone, in a CUDA graph: `count` times in the network; microseconds, errors against float64."""

    kind: str
    label: str
    count: int
    pytorch_us: float
    ours_us: float
    pytorch_error: float
    ours_error: float
    note: str = ""

    @property
    def speed(self) -> float:
        return self.pytorch_us / self.ours_us


@dataclass
class ZooResult:
    network: str
    dtype: str
    batch_size: int
    environment: dict[str, str]
    peers: dict[str, Peer] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    note: str = ""

    def save(self, path: Path) -> None:
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> "ZooResult":
        found = json.loads(path.read_text())
        for name, peer in found["peers"].items():
            measured = peer["measured"]
            timing = measured["timing"] and Timing(**measured["timing"])
            found["peers"][name] = Peer(Measured(**(measured | {"timing": timing})), peer["first_call_s"])
        found["layers"] = [Layer(**layer) for layer in found["layers"]]
        return cls(**found)

    def ms(self, name: str) -> float | None:
        timing = self.peers[name].measured.timing if name in self.peers else None
        return timing and timing.median

    def best_ms(self, names: Iterable[str]) -> float | None:
        return min((ms for name in names if (ms := self.ms(name)) is not None), default=None)


class ZooSetup(Setup):
    """Batch norms have the statistics of images in float32: random weights alone overflow or vanish."""

    def __init__(self, case: ZooCase, device: torch.device, calibrated: bool = True) -> None:
        self.case, self.device = case, device
        model = build(case.network).to(device)
        size = INCEPTION_SIZE if "inception" in case.task else SIZE
        if calibrated:
            with cudnn_benchmark(False):  # else cuDNN would time its algorithms for these images, too
                calibrate(model, random_images(model, 16, size).to(device))
        self._model = model.requires_grad_(False).to(DTYPES[case.dtype])
        self._images = random_images(model, case.batch_size, size).to(device, DTYPES[case.dtype])
        self._in_layout: dict[str, tuple[nn.Module, Tensor]] = {}


def compiled_by_tritonnn(setup: Setup) -> Call:
    model, images = setup.in_layout(setup.case.layout)
    return partial(torch.compile(copy.deepcopy(model), backend=backend, dynamic=False), images)


PEERS: dict[str, Callable[[Setup], Call]] = {
    "eager": peers.eager,
    "graph": peers.graph,
    "compile-reduce-overhead": partial(peers.compiled, mode="reduce-overhead"),
    "compile-max-autotune": partial(peers.compiled, mode="max-autotune"),
    "swapped-graph": peers.swapped_graph,
    "fused-graph": partial(peers.fused, cuda_graph=True, copy_output=False),
    "compile-tritonnn": compiled_by_tritonnn,
}


def measure_network(
    case: ZooCase,
    device: torch.device,
    names: Sequence[str],
    say: Say,
    budget_s: float = BUDGET_S,
    turn: Callable[[], AbstractContextManager] = nullcontext,
    calls: dict[str, Call] | None = None,
) -> dict[str, Peer]:
    """Every way to run the network: its first call, its error, and its time, taken in turns, within `turn()`.

    `calls` gets those that gave right results.
    """
    setup = ZooSetup(case, device)
    limit = LIMITS[case.dtype]
    measured, first = {}, {}
    calls = {} if calls is None else calls

    def check(y: Tensor) -> Measured:
        return checked(y, setup.reference, case.batch_size, limit)

    if "eager" not in names:
        with measuring_alone(device):
            limit = max(limit, ERROR_OF_EAGER * check(PEERS["eager"](setup)()).rms_error)
    for name in names:

        def builder(name: str = name) -> Call:
            start = time.perf_counter()
            call = PEERS[name](setup)
            call()
            _synchronize(device)
            first[name] = time.perf_counter() - start
            return call

        with measuring_alone(device) if name in CHOOSES_ALGORITHMS else nullcontext():
            measured[name], call = prepared(builder, check, device)
        if name == "eager" and measured[name].rms_error is not None:
            limit = max(limit, ERROR_OF_EAGER * measured[name].rms_error)
            measured[name] = check(call())
        if measured[name].status == OK:
            calls[name] = call
        say(f"{name}: {outcome(measured[name])}, first result after {first.get(name, float('nan')):.1f} s")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # others get ready on the same GPU
    with turn():
        time_right_ones(measured, calls, check, device, budget_s)
    return {name: Peer(found, first.get(name)) for name, found in measured.items()}


def kernels_of(call: Call) -> list[tuple[str, float]]:
    """The kernels of one call on the GPU, in the order in which they began, and their microseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_CALLS):
            call()
        torch.cuda.synchronize()
    events = sorted(
        (event for event in profiler.events() if event.device_type == DeviceType.CUDA),
        key=lambda event: event.time_range.start,
    )
    last = events[len(events) - len(events) // PROFILED_CALLS :]
    return [(event.name[:120], round(event.time_range.elapsed_us(), 2)) for event in last]


def compile_only(case: ZooCase, device: torch.device, name: str) -> None:
    """Has the peer compile what it needs; the second call of a network that captures graphs captures one."""
    call = PEERS[name](ZooSetup(case, device, calibrated=False))
    for _ in range(3):
        call()
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_layers(case: ZooCase, device: torch.device, say: Say, budget_s: float = LAYER_BUDGET_S) -> list[Layer]:
    """Every distinct layer of the network that has a Triton version, PyTorch's and ours in turns."""
    setup = ZooSetup(case, device)
    model, images = setup.in_layout("nchw" if case.dtype == "default" else "channels-last")
    found = []
    for call, count in distinct(model, record_calls(model, images)):
        layer = model.get_submodule(call.name)
        try:
            found.append(_layer(layer, call, count, budget_s))
        except Exception as error:  # a layer that cannot be run alone is told, and the others go on
            say(f"{call.name}: {failure(error, device)}")
        else:
            say(f"{found[-1].label}: {found[-1].pytorch_us:.1f} us, ours {found[-1].ours_us:.1f} us")
    return found


def _layer(layer: nn.Module, call: LayerCall, count: int, budget_s: float) -> Layer:
    x = call.random_input(torch.Generator(call.device).manual_seed(3))
    n = call.shape[0]
    with cudnn_benchmark(False):
        reference = copy.deepcopy(layer).double()(x[spread(n)].double())
    triton_layer = twin(layer)
    report = swap(triton_layer)
    sides = layer, triton_layer
    _, pytorch_error = errors(layer(x), reference, n)
    _, ours_error = errors(triton_layer(x), reference, n)
    times = time_alternately([partial(side, x) for side in sides], call.device, budget_s)
    pytorch_us, ours_us = ((time.device or time.eager).median * 1e3 for time in times)
    note = "; ".join(reason for reasons in report.fallbacks.values() for reason in reasons)
    size = "x".join(map(str, call.shape[2:] or call.shape[:-1]))
    return Layer(
        _kind(layer), f"{_label(layer, call)}, {size}", count, pytorch_us, ours_us, pytorch_error, ours_error, note
    )


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv2d):
        return "AdaptiveAvgPool2d" if isinstance(layer, nn.AdaptiveAvgPool2d) else type(layer).__name__
    window = "x".join(map(str, layer.kernel_size))
    if layer.groups == 1:
        return f"convolution {window}" if window in ("1x1", "3x3") else "convolution, other filters"
    return f"depthwise {window}" if layer.groups == layer.in_channels else "grouped convolution"


def _label(layer: nn.Module, call: LayerCall) -> str:
    match layer:
        case nn.Conv2d():
            groups = f", {layer.groups} groups" if layer.groups > 1 else ""
            r, s = layer.kernel_size
            return f"conv {r}x{s}/{layer.stride[0]} {layer.in_channels}-{layer.out_channels}{groups}"
        case nn.Linear():
            return f"linear {layer.in_features}-{layer.out_features}"
    return f"{kind_of(layer)} {call.shape[1]}"
