"""A run's results as pictures."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.peers import PEERS
from benchmarks.report import DTYPES, NETWORKS, floor_ms
from benchmarks.results import LayersResult, NetworkResult, Results
from tritonnn.clocks import Timing

PALETTE = matplotlib.colormaps["tab20"]  # in pairs, a full colour and a light one
COLOURS = {
    name: PALETTE(index)
    for name, index in {
        "eager-nchw": 1,
        "eager-channels-last": 0,
        "graph-nchw": 3,
        "graph-channels-last": 2,
        "compile-reduce-overhead": 5,
        "compile-max-autotune": 4,
        "cudnn-fused": 14,
        "swapped": 9,
        "swapped-graph": 8,
        "fused": 7,
        "fused-graph": 6,
        "fused-graph-in-place": 12,
        "pytorch-nchw": 1,
        "pytorch-channels-last": 0,
        "triton-nchw": 7,
        "triton-channels-last": 6,
        "flag-gems": 14,
        "attorch": 10,
    }.items()
}


def save_plots(results: Results, folder: Path) -> list[str]:
    """Writes what there is something to show for; the names of the files."""
    written = []
    if any(found.timing for network in results.networks for found in network.peers.values()):
        _save(networks_figure(results.networks), folder / "networks.png", written)
    for result in results.layers:
        if any(found.timing for shape in result.layers for found in shape.peers.values()):
            _save(layers_figure(result, results.ceilings), folder / f"{result.case}.png", written)
    return written


def networks_figure(networks: list[NetworkResult]) -> Figure:
    """Time against batch size: a panel a network and type, a line a peer."""
    panels = sorted(
        {(result.task, result.dtype) for result in networks}, key=lambda p: (p[0], list(DTYPES).index(p[1]))
    )
    figure = Figure(figsize=(4.2 * len(panels) + 2.4, 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    lines = {}
    for axis, (task, dtype) in zip(axes, panels):
        here = sorted((r for r in networks if (r.task, r.dtype) == (task, dtype)), key=lambda r: r.batch_size)
        for name in PEERS:
            points: dict[int, Timing] = {}
            for result in here:
                if name in result.peers and result.peers[name].timing:
                    points.setdefault(result.batch_size, result.peers[name].timing)
            if not points:
                continue
            medians = [timing.median for timing in points.values()]
            spread = [
                [t.median - t.p10 for t in points.values()],
                [t.p90 - t.median for t in points.values()],
            ]
            lines[name] = axis.errorbar(
                list(points), medians, spread, marker="o", ms=4, color=COLOURS[name], label=name
            )
        axis.set(xscale="log", yscale="log", xlabel="batch size", title=f"{NETWORKS[task]}, {dtype}")
        sizes = sorted({r.batch_size for r in here})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a panel may span less than a decade
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a batch")
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize=8)
    return figure


def layers_figure(result: LayersResult, ceilings: dict[str, float]) -> Figure:
    """Time of each layer, a bar a peer, and the roofline's floor as a black line across its bars."""
    names = list(dict.fromkeys(name for shape in result.layers for name in shape.peers))
    figure = Figure(figsize=(13, 6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        times = [shape.peers[name].timing if name in shape.peers else None for shape in result.layers]
        positions = [i - 0.4 + (index + 0.5) * width for i in range(len(times))]
        heights = [timing.median * 1e3 if timing else 0 for timing in times]
        axis.bar(positions, heights, width, color=COLOURS[name], label=name)
    for i, shape in enumerate(result.layers):
        floor = floor_ms(shape, ceilings, result.dtype)
        if floor:
            label = "roofline" if i == 0 else None
            axis.hlines(floor * 1e3, i - 0.4, i + 0.4, colors="black", linewidth=1.5, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("us a call")
    axis.set_title(f"Layers of {NETWORKS[result.task]}, batch {result.batch_size}, {result.dtype}")
    axis.set_xticks(range(len(result.layers)), [shape.label for shape in result.layers], rotation=60, ha="right")
    axis.tick_params(axis="x", labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _save(figure: Figure, path: Path, written: list[str]) -> None:
    figure.savefig(path, dpi=120)
    written.append(path.name)
