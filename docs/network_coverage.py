"""Writes coverage.md: which layers of torchvision's classification networks a swap turns into Triton layers.

    python docs/network_coverage.py

The networks are built on the "meta" device: nothing is computed.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.torchvision_networks import NAMES, meta_network  # noqa: E402

import tritonnn  # noqa: E402

SIZES = {"inception_v3": 299}
FUNCTIONS = {
    "relu": "relu",
    "relu_": "relu",
    "conv2d": "conv2d",
    "linear": "linear",
    "batch_norm": "batch_norm2d",
    "max_pool2d": "max_pool2d",
    "boolean_dispatch": "max_pool2d",
    "avg_pool2d": "avg_pool2d",
    "adaptive_avg_pool2d": "avg_pool2d",
    "multi_head_attention_forward": "attention",
    "scaled_dot_product_attention": "attention",
}


class FunctionalCalls(TorchFunctionMode):
    """Counts the functions of our kinds, and attention, that a network calls itself: no modules, so never swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in FUNCTIONS:
            self.counts[FUNCTIONS[name]] += 1
        return function(*args, **(kwargs or {}))


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "-"


def page() -> str:
    rows, stayed_in = [], {}
    swapped_in_all = modules_in_all = 0
    for name in NAMES:
        model = meta_network(name).eval()
        report = tritonnn.swap(model, strict=True)
        with FunctionalCalls() as calls, torch.no_grad():
            model(torch.empty(2, 3, SIZES.get(name, 224), SIZES.get(name, 224), device="meta"))
        stayed = Counter(type(model.get_submodule(layer)).__name__ for layer in report.stayed)
        for layer, reason in report.stayed.items():
            stayed_in.setdefault((type(model.get_submodule(layer)).__name__, reason), {})[name] = None
        leaves = len(report.swapped) + len(report.stayed)
        swapped_in_all, modules_in_all = swapped_in_all + len(report.swapped), modules_in_all + leaves
        share = f"{len(report.swapped)} of {leaves}"
        kinds = listed(Counter(report.swapped.values()))
        rows.append(f"| {name} | {share} | {kinds} | {listed(stayed)} | {listed(calls.counts)} |")
    reasons = [
        f"| {layer} | {reason.removesuffix(f' for {layer}')} | {', '.join(names)} |"
        for (layer, reason), names in sorted(stayed_in.items())
    ]
    lines = [
        "# Coverage of torchvision's classification networks",
        "",
        "One network of every family in torchvision; `python docs/network_coverage.py` writes this page. A swap turns "
        f"{swapped_in_all:,} of the {modules_in_all:,}",
        "layers below into Triton layers. None of them falls back to PyTorch's operation in eval mode in float32. What",
        "a network calls as a function, and not as a module, stays PyTorch's.",
        "",
        "| network | layers swapped | by kind | layers that stay | functions that stay |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "## Layers that stay PyTorch's",
        "",
        "| layer | why it stays | networks |",
        "|---|---|---|",
        *reasons,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "coverage.md").write_text(page())
