"""The times of an evaluation: every layer, every kernel of the fused network, and the network as a whole."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

import tritonnn
from lit_modules.evaluation_result import LatencyResult, summarise_latency
from tritonnn.latency import KernelLatency, Progress, time_kernels, time_layers, time_networks
from tritonnn.roofline import measured_roofline

Layers = str | Sequence[str]
Tell = Callable[[str, str, int, int], object]
"""Is told the step ("layers", "kernels", "networks"), what is timed next, how much is done and how much there is."""
NETWORK_BUDGET = 20
"""The networks as a whole get so many times the seconds of a layer."""


def measure(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    variants: Mapping[str, Layers],
    fused: Mapping[str, nn.Module],
    in_parts: tuple[nn.Module, Mapping[str, nn.Module]] | None,
    budget_s: float,
    interpreter: bool,
    tell: Tell = lambda step, what, done, total: None,
) -> LatencyResult:
    """Times PyTorch's network, its variants with swapped layers, and fused ones, on the same inputs.

    Args:
        model: with PyTorch's layers, in the mode in which it is to be timed; left alone.
        variants: what to swap, by name; the layers are timed as the last of them swaps them.
        fused: the model fused, by name.
        in_parts: the same without CUDA graphs, to time its kernels, and the parts of the model, by name, that stand
            in it as FusedNetworks.
        budget_s: seconds for one layer on one clock.
        interpreter: whether to time Triton's side also where it runs in its interpreter.
        tell: hears of every step.
    """
    device = inputs[0].device
    if device.type != "cuda" and not interpreter:
        variants, fused, in_parts = {}, {}, None
    swapped = list(variants)[-1] if variants else None
    kinds = variants[swapped] if swapped else ()
    layers = time_layers(model, *inputs, layers=kinds, budget_s=budget_s, progress=partial(tell, "layers"))
    kernels = _kernels(*in_parts, inputs, budget_s, partial(tell, "kernels")) if in_parts else []
    tell("networks", ", ".join(["PyTorch", *variants, *fused]), 0, 1)
    others, budget_s = list(fused.values()), NETWORK_BUDGET * budget_s
    latencies = time_networks(model, *inputs, variants=list(variants.values()), others=others, budget_s=budget_s)
    networks = dict(zip(["pytorch", *variants, *fused], latencies, strict=True))
    timed = [*layers, *(measured for *_, measured in kernels)]
    arithmetics = {each.arithmetic for each in timed if each.work and each.work.flop}
    roofline = measured_roofline(device, arithmetics) if device.type == "cuda" else None
    tell("networks", "", 1, 1)
    return summarise_latency(layers, networks, swapped, kernels, roofline)


def _kernels(
    network: nn.Module,
    parts: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    budget_s: float,
    progress: Progress,
) -> list[tuple[str, str, list[str], KernelLatency]]:
    """The network's kernels, with what `summarise_latency` wants to know of them."""
    known: dict[int, tuple[str, str, list[str]]] = {}
    for part, fused in parts.items():
        if isinstance(fused, tritonnn.FusedNetwork):
            report, prefix = fused.report, f"{part}." if part else ""
            for name, module in report.modules.items():
                layers = [f"{prefix}{layer}" for layer in report.stands_for.get(name, [name])]
                what = report.fused.get(name) or report.swapped.get(name, "")
                known[id(module)] = f"{prefix}{name}", what, layers
    found = []
    for measured in time_kernels(network, *inputs, budget_s=budget_s, progress=progress):
        layer = getattr(measured.layer, "last", measured.layer)  # a sum of two convolutions has the name of its last
        name, what, layers = known.get(id(layer), (type(layer).__name__, "", []))
        found.append((name, what, layers, measured))
    return found
