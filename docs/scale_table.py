"""Writes the table of scale.md: images a second and the cost of a million images, from measured milliseconds.

python docs/scale_table.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import load  # noqa: E402

DOLLARS_AN_HOUR = 3.0
CASES = {
    "imagenet-default-128": "224x224, default flags, 128 a batch",
    "cifar-bf16-1024": "32x32, bfloat16, 1,024 a batch",
    "cifar-bf16-128": "32x32, bfloat16, 128 a batch",
    "cifar-bf16-1": "32x32, bfloat16, one by one",
}
PEERS = {
    "PyTorch": ("eager-nchw", "eager-channels-last"),
    "torch.compile": ("compile-reduce-overhead",),
    "fused": ("fused-graph",),
}
START, END = "<!-- python docs/scale_table.py writes what follows -->\n", "<!-- end -->\n"


def table() -> str:
    results = load(ROOT / "benchmarks" / "results" / "h100" / "compare" / "results.json")
    networks = {network.case: network for network in results.networks}
    lines = [
        "| ResNet18, images of | images/s: " + " | ".join(PEERS) + " | $ a million: " + " | ".join(PEERS) + " |",
        "|---" + "|--:" * 2 * len(PEERS) + "|",
    ]
    for case, name in CASES.items():
        network = networks[case]
        fastest = [min(network.peers[peer].timing.median for peer in peers) for peers in PEERS.values()]
        rates = [network.batch_size / ms * 1e3 for ms in fastest]
        costs = [DOLLARS_AN_HOUR / 3600 * 1e6 / rate for rate in rates]
        cells = [*(f"{rate:,.0f}" for rate in rates), *(f"{cost:.4f}" for cost in costs)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = ROOT / "docs" / "scale.md"
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + START + "\n" + table() + "\n" + END + rest.partition(END)[2])
