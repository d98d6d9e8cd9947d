"""Draws speed.png, the picture of results.md, from the committed results of a run of benchmarks/compare.py.

    python docs/speed_figure.py

A group of bars is a case. Heights are speeds relative to PyTorch in a CUDA graph, in the faster of its memory formats.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import NetworkResult, load  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "h100" / "compare"
PAGE = ROOT / "docs" / "speed.png"
CASES = {
    "cifar-bf16-1024": "1,024 images\n32x32, bfloat16",
    "cifar-tf32-1024": "1,024 images\n32x32, TF32",
    "cifar-fp32-1024": "1,024 images\n32x32, strict float32",
    "cifar-bf16-128": "128 images\n32x32, bfloat16",
    "imagenet-default-128": "128 images\n224x224, default flags",
    "cifar-bf16-1": "1 image\n32x32, bfloat16",
}
PEERS = {
    "PyTorch, CUDA graph": (("graph-nchw", "graph-channels-last"), "#b9bec6"),
    'torch.compile, "reduce-overhead"': (("compile-reduce-overhead",), "#6f8fb0"),
    "tritonnn.fuse, CUDA graph": (("fused-graph-in-place",), "#e0662c"),
}
"""A peer's names in the results, of which the fastest counts, and its colour."""


def milliseconds(result: NetworkResult) -> list[float]:
    """The time of each of `PEERS` for a batch."""
    return [min(result.peers[name].timing.median for name in names) for names, _ in PEERS.values()]


def speed_figure(networks: dict[str, NetworkResult], device: str) -> Figure:
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axis = figure.subplots()
    width = 0.29
    for index, (label, (_, colour)) in enumerate(PEERS.items()):
        times = [milliseconds(networks[case]) for case in CASES]
        speeds = [row[0] / row[index] for row in times]
        positions = [group + (index - 1) * width for group in range(len(CASES))]
        axis.bar(positions, speeds, 0.9 * width, color=colour, label=label)
        last = index == len(PEERS) - 1
        for x, speed, row in zip(positions, speeds, times):
            style = {"ha": "center", "va": "bottom", "textcoords": "offset points"}
            axis.annotate(f"{row[index]:.3g} ms", (x, speed), (0, 2), fontsize=7, color="#444444", **style)
            if index > 0:
                weight = "bold" if last else "normal"
                axis.annotate(f"{speed:.1f}x", (x, speed), (0, 11), fontsize=13 if last else 11, weight=weight, **style)
    axis.set_xticks(range(len(CASES)), CASES.values(), fontsize=10)
    axis.tick_params(axis="x", length=0)
    axis.set_yticks([])
    axis.margins(x=0.01, y=0.12)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(f"ResNet18 inference on an {device}: speed relative to PyTorch", loc="left", fontsize=13)
    axis.legend(loc="upper left", fontsize=10.5, frameon=False)
    return figure


def main() -> None:
    results = load(RESULTS / "results.json")
    networks = {result.case: result for result in results.networks}
    device = results.environment["device"].split()[1]
    speed_figure(networks, f"NVIDIA {device}").savefig(PAGE, dpi=120)


if __name__ == "__main__":
    main()
