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
    images: Tensor,
    variants: Mapping[str, Layers],
    fused: Mapping[str, tritonnn.FusedNetwork],
    budget_s: float,
    interpreter: bool,
    tell: Tell = lambda step, what, done, total: None,
) -> LatencyResult:
    """Times PyTorch's network, its variants with swapped layers, and fused ones, on the same images.

    Args:
        model: with PyTorch's layers, in the mode in which it is to be timed; left alone.
        variants: what to swap, by name; the layers are timed as the last of them swaps them.
        fused: made of the model, by name; the kernels of the first are timed too.
        budget_s: seconds for one layer on one clock.
        interpreter: whether to time Triton's side also where it runs in its interpreter.
        tell: hears of every step.
    """
    on_gpu = images.device.type == "cuda"
    if not on_gpu and not interpreter:
        variants, fused = {}, {}
    swapped = list(variants)[-1] if variants else None
    layers = time_layers(
        model,
        images,
        layers=variants[swapped] if swapped else (),
        budget_s=budget_s,
        progress=partial(tell, "layers"),
    )
    kernels = _kernels(model, images, budget_s, partial(tell, "kernels")) if fused else []
    tell("networks", ", ".join(["PyTorch", *variants, *fused]), 0, 1)
    latencies = time_networks(
        model,
        images,
        variants=list(variants.values()),
        others=list(fused.values()),
        budget_s=NETWORK_BUDGET * budget_s,
    )
    networks = dict(zip(["pytorch", *variants, *fused], latencies, strict=True))
    timed = [*layers, *(measured for *_, measured in kernels)]
    arithmetics = {each.arithmetic for each in timed if each.work and each.work.flop}
    roofline = measured_roofline(images.device, arithmetics) if on_gpu else None
    tell("networks", "", 1, 1)
    return summarise_latency(layers, networks, swapped, kernels, roofline)


def _kernels(
    model: nn.Module, images: Tensor, budget_s: float, progress: Progress
) -> list[tuple[str, str, list[str], KernelLatency]]:
    """Of the model fused without CUDA graphs, into which hooks can look; what else they are, as `summarise_latency`."""
    network = tritonnn.fuse(model)
    report = network.report
    names = {id(module): name for name, module in report.modules.items()}
    found = []
    for measured in time_kernels(network, images, budget_s=budget_s, progress=progress):
        layer = getattr(measured.layer, "last", measured.layer)  # a sum of two convolutions has the name of its last
        name = names.get(id(layer), type(layer).__name__)
        what = report.fused.get(name) or report.swapped.get(name, "")
        found.append((name, what, report.stands_for.get(name, [name]), measured))
    return found
