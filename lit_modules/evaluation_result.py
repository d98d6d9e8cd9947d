"""The result of an evaluation. Console, Markdown, JSON and TensorBoard are views of it and compute nothing."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_modules.agreement import Agreement, Numbers, Quality, Verdict
from tritonnn.clocks import Timing
from tritonnn.latency import Latency, LayerLatency


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

    @property
    def main(self) -> Variant | None:
        """The last variant with swapped layers, which is all that was asked for, else the fused one."""
        swapped = [variant for variant in self.variants if not variant.fused]
        return (swapped or self.variants or [None])[-1]


@dataclass(frozen=True)
class Pair:
    """Median milliseconds of both sides and by how much Triton's is longer."""

    pytorch: float
    triton: float | None
    increase_percent: float | None

    @classmethod
    def of(cls, pytorch: float, triton: float | None) -> "Pair":
        return cls(pytorch, triton, None if triton is None else (triton / pytorch - 1) * 100)


@dataclass(frozen=True)
class LayerRow:
    """One call of one layer."""

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
    """

    device_clocks: list[str]
    layers: list[LayerRow]
    networks: dict[str, dict[str, Pair]]
    network_timings: dict[str, Latency]
    breakdowns: dict[str, Breakdown]


@dataclass(frozen=True)
class Evaluated:
    """What was evaluated: the checkpoint's file and epoch, from 0, None where the network came from none.

    `weights` is `weights_digest` of the checkpoint's state_dict, else of the network's.
    """

    path: str | None
    epoch: int | None
    weights: str


@dataclass(frozen=True)
class EvaluationResult:
    """All of it. `latency` is None if it was not asked for."""

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

    @property
    def passed(self) -> bool:
        return self.proof.passed

    def write_json(self, path: Path) -> None:
        """Writes strict JSON; infinities and NaN become strings.

        Raises:
            OSError: the file cannot be written.
        """
        path.write_text(json.dumps(_plain(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n")


def summarise_latency(
    layers: Sequence[LayerLatency], variants: Sequence[str], networks: Sequence[Latency], swapped_last: str | None
) -> LatencyResult:
    """Puts measured times in relation.

    `networks` are PyTorch's and then those of the variants, of which `swapped_last` is the last with swapped layers.
    """
    clocks = ["device", "eager"] if networks[0].device else ["interpreter"]
    rows = [_layer_row(index, layer, clocks) for index, layer in enumerate(layers)]
    pytorch, *swapped = networks
    pairs = {
        name: {clock: Pair.of(_median(pytorch, clock), _median(network, clock)) for clock in clocks}
        for name, network in zip(variants, swapped, strict=True)
    }
    none = {clock: Pair.of(_median(pytorch, clock), None) for clock in clocks}
    last = pairs.get(swapped_last, none)
    return LatencyResult(
        device_clocks=sorted({side.device_clock for side in _sides(layers, networks) if side.device_clock}),
        layers=rows,
        networks=pairs,
        network_timings=dict(zip(["pytorch", *variants], networks, strict=True)),
        breakdowns={clock: _breakdown(rows, last[clock], clock) for clock in clocks},
    )


def _sides(layers: Sequence[LayerLatency], networks: Sequence[Latency]) -> list[Latency]:
    return [*networks, *(side for layer in layers for side in (layer.pytorch, layer.triton) if side)]


def _layer_row(index: int, layer: LayerLatency, clocks: Sequence[str]) -> LayerRow:
    medians = {
        clock: Pair.of(_median(layer.pytorch, clock), _median(layer.triton, clock) if layer.triton else None)
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
    )


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
    return Pair.of(pytorch, triton) if swapped and pairs else Pair(pytorch, triton if swapped else None, None)


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
