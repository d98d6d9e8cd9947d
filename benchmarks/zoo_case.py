"""What the zoo measures: a network of any library in a type and batch size, and how its results are kept."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
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
from benchmarks.results import FAILED, OK, Measured
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
BY_VALUE = ("eager", "graph", "fused-graph", "compile-reduce-overhead", "swapped-graph", "compile-tritonnn")
BY_VALUE += ("compile-max-autotune",)
"""The order in which peers are compiled ahead and get ready: a run that is cut off has what tells the most."""
BUDGET_S, SHARED_BUDGET_S, LAYER_BUDGET_S = 2.0, 0.5, 0.05
"""Seconds in which the peers of a case take turns: alone, or while other cases are stopped; and those of a layer."""
PROFILED_CALLS = 3
BEGINS = "gets ready: "
"""What is said before the name of a peer: should the process end then, that peer ended it."""
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
    """What was found of a way to run a network.

    `first_call_s`: from the untouched network to the first result, if nothing was compiled. `taken`: the date of the
    run that it was timed in, by turns with all others of that date.
    """

    measured: Measured
    first_call_s: float | None = None
    taken: str = ""


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
            taken = peer.get("taken", found["environment"].get("date", ""))
            found["peers"][name] = Peer(Measured(**(measured | {"timing": timing})), peer["first_call_s"], taken)
        found["layers"] = [Layer(**layer) for layer in found["layers"]]
        return cls(**found)

    @classmethod
    def begun(cls, path: Path, case: ZooCase, environment: dict[str, str]) -> "ZooResult":
        """A result to which peers are added: those that the file has, if the card and all versions are the same."""
        result = cls(case.task, case.dtype, case.batch_size, environment)
        if path.exists():
            before = cls.load(path)
            if _without_occasion(before.environment) == _without_occasion(environment):
                result.peers = before.peers
        return result

    def add(self, peers: Mapping[str, Peer]) -> None:
        date = self.environment.get("date", "")
        found = self.peers | {name: replace(peer, taken=date) for name, peer in peers.items()}
        self.peers = {name: found[name] for name in PEERS if name in found}

    def ms(self, name: str) -> float | None:
        timing = self.peers[name].measured.timing if name in self.peers else None
        return timing and timing.median

    def best_ms(self, names: Iterable[str]) -> float | None:
        return min((ms for name in names if (ms := self.ms(name)) is not None), default=None)


def _without_occasion(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in ("command", "date")}


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


class Contest:
    """The peers of a case: they get ready one by one, and those that are ready are timed in turns.

    Where getting ready is interrupted, those that were ready stay so. `calls` has those with right results.
    """

    def __init__(self, case: ZooCase, device: torch.device, say: Say) -> None:
        self.case, self.device, self.say = case, device, say
        self.limit = LIMITS[case.dtype]
        self.ready: dict[str, tuple[Measured, Call | None, float | None]] = {}
        """By name: what was found, what calls it, and the seconds to its first result."""

    @property
    def calls(self) -> dict[str, Call]:
        return {name: call for name, (found, call, _) in self.ready.items() if call and found.status == OK}

    def get_ready(self, names: Iterable[str], until: float = math.inf) -> None:
        """Has the peers give their first results, within the limit that the error of PyTorch's eager network sets.

        In that network's first call cuDNN chooses its algorithms, for all peers, and does so alone on the GPU.
        `until`: when it is interrupted, in seconds since the epoch. What fails then does so for that reason.
        """
        start = time.perf_counter()
        self.setup = ZooSetup(self.case, self.device)
        _ = self.setup.reference  # is computed now, while others may have cuDNN choose
        waits = time.perf_counter()
        with measuring_alone(self.device):
            waited = time.perf_counter() - waits
            eager = self._prepared("eager")
        found, _, seconds = eager
        ready_s, chosen_s = waits - start, seconds or math.nan
        self.say(f"network and reference in {ready_s:.1f} s, waited {waited:.1f} s, cuDNN chose in {chosen_s:.1f} s")
        if found.rms_error is not None and math.isfinite(found.rms_error):
            self.limit = max(self.limit, ERROR_OF_EAGER * found.rms_error)
            found.status = OK
        for name in sorted(names, key=BY_VALUE.index):
            self.say(f"{BEGINS}{name}")
            found, call, seconds = eager if name == "eager" else self._prepared(name)
            if found.status == FAILED and time.time() >= until:
                return
            self.ready[name] = found, call, seconds
            self.say(f"{name}: {outcome(found)}, first result after {seconds or math.nan:.1f} s")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # others get ready on the same GPU

    def _prepared(self, name: str) -> tuple[Measured, Call | None, float | None]:
        seconds = None

        def builder() -> Call:
            nonlocal seconds
            start = time.perf_counter()
            call = PEERS[name](self.setup)
            call()
            _synchronize(self.device)
            seconds = time.perf_counter() - start
            return call

        found, call = prepared(builder, self._check, self.device)
        return found, call, seconds

    def _check(self, y: Tensor) -> Measured:
        return checked(y, self.setup.reference, self.case.batch_size, self.limit)

    def timed(self, budget_s: float = BUDGET_S) -> dict[str, Peer]:
        """Every peer that is ready, with its time if its result is right."""
        measured = {name: found for name, (found, *_) in self.ready.items()}
        time_right_ones(measured, self.calls, self._check, self.device, budget_s)
        return {name: Peer(found, self.ready[name][2]) for name, found in measured.items()}


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
