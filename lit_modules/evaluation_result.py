"""The result of an evaluation. Console, Markdown, JSON and TensorBoard are views of it and compute nothing."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_modules.agreement import Agreement, Numbers, Quality, Verdict
from lit_modules.float64_errors import Float64Errors
from lit_modules.from_json import from_json
from tritonnn.clocks import Timing
from tritonnn.latency import KernelLatency, Latency, LayerLatency
from tritonnn.roofline import Roofline, Work

INTERPRETER = "interpreter"
"""The clock of a CPU, where Triton runs in its interpreter: times of Triton's side are no measure of its speed."""


@dataclass(frozen=True)
class Variant:
    """The network with some kinds swapped, or fused, compared with PyTorch's.

    `float32` is the agreement of its logits with PyTorch's in strict float32, None where that is the precision of the
    evaluation. `swapped` counts layers by kind, or by what was fused, `stayed` names layers by the reason for which
    they stayed PyTorch's, `fallbacks` counts the calls that ran PyTorch's own operation, by layer and reason.
    `quality` and `agreement` are None where no output is classified.
    """

    name: str
    quality: Quality | None
    agreement: Agreement | None
    float32: Agreement | None
    verdict: Verdict
    swapped: dict[str, int]
    stayed: dict[str, list[str]]
    fallbacks: dict[str, dict[str, int]]
    fused: bool = False


@dataclass(frozen=True)
class SideResult:
    """What the module logged on one side, and how far its outputs are, by name, from PyTorch's.

    Logits that have labels are not among the outputs, but for those of segmentation.
    """

    metrics: dict[str, float]
    outputs: dict[str, Numbers]


@dataclass(frozen=True)
class Proof:
    """PyTorch, its yardstick (itself in the other memory format) and the swapped variants on the same samples.

    In lower precision also PyTorch in strict float32, and how far PyTorch agrees with that; else None. `sides` are
    "pytorch", "yardstick", the variants by their names and, where it ran, the `reference`, "float32" or "float64".
    Qualities and agreements are None where no output is classified; `predictions` says which is, and by what labels.
    `float64` tells how far all sides are off on the first batch, None where the network does not run in float64.
    """

    samples: int
    exact: bool
    pytorch: Quality | None
    yardstick: Quality | None
    yardstick_format: str
    yardstick_agreement: Agreement | None
    float32: Quality | None
    float32_agreement: Agreement | None
    variants: list[Variant]
    passed: bool
    predictions: str | None = None
    reference: str | None = None
    sides: dict[str, SideResult] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    float64: Float64Errors | None = None

    @property
    def fused(self) -> Variant | None:
        return next((variant for variant in self.variants if variant.fused), None)

    @property
    def main(self) -> Variant | None:
        """The last variant with swapped layers, which is all that was asked for, else the fused one."""
        swapped = [variant for variant in self.variants if not variant.fused]
        return (swapped or self.variants or [None])[-1]


@dataclass(frozen=True)
class Pair:
    """Median milliseconds of both sides; `speedup` is how many times faster Triton's is, None where that is unknown."""

    pytorch: float
    triton: float | None
    speedup: float | None

    @classmethod
    def of(cls, pytorch: float, triton: float | None, clock: str) -> "Pair":
        comparable = triton is not None and clock != INTERPRETER
        return cls(pytorch, triton, pytorch / triton if comparable else None)


@dataclass(frozen=True)
class LayerRow:
    """One call of one layer. `bound_ms` is the least time by the roofline, None where there is none."""

    index: int
    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    fallback: str | None
    medians: dict[str, Pair]
    pytorch: Latency
    triton: Latency | None
    work: Work | None = None
    arithmetic: str = ""
    bound_ms: float | None = None


@dataclass(frozen=True)
class KernelRow:
    """One call of one layer of the fused network, and the `layers`, by their indices, whose work it does."""

    name: str
    what: str
    layers: list[int]
    medians: dict[str, float]
    latency: Latency
    work: Work
    arithmetic: str
    bound_ms: float | None


@dataclass(frozen=True)
class Breakdown:
    """By one clock: the layers timed alone, summed by kind and in all, beside the whole network, unhooked.

    The sums count PyTorch's time for a layer that was not swapped. `unattributed` is network minus layers: what lies
    between the layers, less what timing them alone adds.
    """

    kinds: dict[str, Pair]
    layers: Pair
    network: Pair
    unattributed: Pair


@dataclass(frozen=True)
class LatencyResult:
    """Clocks are "device" and "eager" on a GPU (see `tritonnn.latency.Latency`), "interpreter", the wall's, on a CPU.

    `networks` has a row for each variant, by clock; `breakdowns`, by clock, is of the last with swapped layers.
    `kernels` are those of the fused network, in the order of running; `roofline` is of the GPU.
    """

    device_clocks: list[str]
    layers: list[LayerRow]
    networks: dict[str, dict[str, Pair]]
    network_timings: dict[str, Latency]
    breakdowns: dict[str, Breakdown]
    kernels: list[KernelRow] = field(default_factory=list)
    roofline: Roofline | None = None

    @property
    def clock(self) -> str:
        """The one that counts."""
        return next(iter(self.breakdowns))

    @property
    def comparable(self) -> bool:
        """Whether Triton's times say something about its speed."""
        return self.clock != INTERPRETER

    def blocks(self) -> Iterator[tuple[list[LayerRow], KernelRow | None]]:
        """The layers in groups, in network order: those that share a fused kernel, and that kernel."""
        kernel_of = {index: kernel for kernel in self.kernels for index in kernel.layers}
        done: set[int] = set()
        for row in self.layers:
            if row.index in done:
                continue
            kernel = kernel_of.get(row.index)
            indices = [row.index] if kernel is None else kernel.layers
            done.update(indices)
            yield [self.layers[index] for index in indices], kernel


@dataclass(frozen=True)
class Evaluated:
    """What was evaluated: the checkpoint's file and epoch, from 0, None where the network came from none.

    `weights` is `weights_digest` of the checkpoint's state_dict, else of the network's.
    """

    path: str | None
    epoch: int | None
    weights: str


@dataclass(frozen=True)
class Epoch:
    """A validation during training, of both sides on the same batches: metrics and milliseconds a batch, by side."""

    epoch: int
    metrics: dict[str, dict[str, float]]
    batch_ms: dict[str, float]


@dataclass(frozen=True)
class EvaluationResult:
    """All of it. `latency` is None if it was not asked for; `network` names the class of what was evaluated."""

    checkpoint: Evaluated
    environment: dict[str, str]
    flags: dict[str, str]
    triton_layers: str
    precision: str
    memory_format: str
    batch_size: int
    processes: int
    parameters: dict[str, str | int | float | bool]
    proof: Proof
    latency: LatencyResult | None
    network: str = ""
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.proof.passed

    def write_json(self, path: Path) -> None:
        """Writes strict JSON; infinities and NaN become strings.

        Raises:
            OSError: the file cannot be written.
        """
        path.write_text(json.dumps(_plain(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read_json(cls, path: Path) -> "EvaluationResult":
        """What `write_json` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds something else, or the result of another version.
        """
        try:
            return from_json(cls, json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no result of this version's evaluate.py: {error}") from error


def summarise_latency(
    layers: Sequence[LayerLatency],
    networks: dict[str, Latency],
    swapped_last: str | None,
    kernels: Sequence[tuple[str, str, list[str], KernelLatency]] = (),
    roofline: Roofline | None = None,
) -> LatencyResult:
    """Puts measured times in relation.

    `networks` are PyTorch's, "pytorch", and those of the variants, of which `swapped_last` is the last with swapped
    layers. `kernels` come with a name, what they do, and the names of the layers whose work they do.
    """
    pytorch = networks["pytorch"]
    clocks = ["device", "eager"] if pytorch.device else [INTERPRETER]
    rows = [_layer_row(index, layer, clocks, roofline) for index, layer in enumerate(layers)]
    pairs = {
        name: {clock: Pair.of(_median(pytorch, clock), _median(network, clock), clock) for clock in clocks}
        for name, network in networks.items()
        if name != "pytorch"
    }
    none = {clock: Pair.of(_median(pytorch, clock), None, clock) for clock in clocks}
    last = pairs.get(swapped_last, none)
    timed = [*networks.values(), *(side for layer in layers for side in (layer.pytorch, layer.triton) if side)]
    return LatencyResult(
        device_clocks=sorted({latency.device_clock for latency in timed if latency.device_clock}),
        layers=rows,
        networks=pairs,
        network_timings=networks,
        breakdowns={clock: _breakdown(rows, last[clock], clock) for clock in clocks},
        kernels=_kernel_rows(kernels, rows, clocks, roofline),
        roofline=roofline,
    )


def _layer_row(index: int, layer: LayerLatency, clocks: Sequence[str], roofline: Roofline | None) -> LayerRow:
    medians = {
        clock: Pair.of(_median(layer.pytorch, clock), _median(layer.triton, clock) if layer.triton else None, clock)
        for clock in clocks
    }
    call, dtype = layer.call, str(layer.call.dtype).removeprefix("torch.")
    return LayerRow(
        index,
        call.name,
        call.kind,
        call.shape,
        dtype,
        call.memory_format,
        layer.fallback,
        medians,
        layer.pytorch,
        layer.triton,
        layer.work,
        layer.arithmetic,
        roofline.bound_ms(layer.work, layer.arithmetic) if roofline and layer.work else None,
    )


def _kernel_rows(
    kernels: Sequence[tuple[str, str, list[str], KernelLatency]],
    rows: Sequence[LayerRow],
    clocks: Sequence[str],
    roofline: Roofline | None,
) -> list[KernelRow]:
    """Each call of a layer is done by one kernel only: the first that names it."""
    free: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        free[row.name].append(row.index)
    found = []
    for name, what, layers, measured in kernels:
        latency = measured.latency
        found.append(
            KernelRow(
                name,
                what,
                sorted(free[layer].pop(0) for layer in layers if free[layer]),
                {clock: _median(latency, clock) for clock in clocks},
                latency,
                measured.work,
                measured.arithmetic,
                roofline.bound_ms(measured.work, measured.arithmetic) if roofline else None,
            )
        )
    return found


def _breakdown(rows: Sequence[LayerRow], network: Pair, clock: str) -> Breakdown:
    by_kind: dict[str, list[LayerRow]] = defaultdict(list)
    for row in rows:
        by_kind[row.kind].append(row)
    swapped = network.triton is not None
    layers = _sum(rows, clock, swapped)
    return Breakdown(
        kinds={kind: _sum(by_kind[kind], clock, swapped) for kind in sorted(by_kind)},
        layers=layers,
        network=network,
        unattributed=Pair(network.pytorch - layers.pytorch, network.triton - layers.triton if swapped else None, None),
    )


def _sum(rows: Sequence[LayerRow], clock: str, swapped: bool) -> Pair:
    pairs = [row.medians[clock] for row in rows]
    pytorch = sum(pair.pytorch for pair in pairs)
    triton = sum(pair.pytorch if pair.triton is None else pair.triton for pair in pairs)
    return Pair.of(pytorch, triton, clock) if swapped and pairs else Pair(pytorch, triton if swapped else None, None)


def timing(latency: Latency, clock: str) -> Timing:
    return latency.device if clock == "device" else latency.eager


def _median(latency: Latency, clock: str) -> float:
    return timing(latency, clock).median


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
