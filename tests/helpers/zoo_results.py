"""Results of `benchmarks/zoo.py` that nobody measured."""

from pathlib import Path

from benchmarks.results import FAILED, OK, Measured
from benchmarks.zoo_case import Layer, Peer, ZooCase, ZooResult
from tritonnn.clocks import Timing


def peer(ms: float, first_call_s: float | None = 1.5, taken: str = "today") -> Peer:
    return Peer(Measured(OK, Timing(ms, 0.9 * ms, 1.1 * ms, 20), 1e-2, 3e-3), first_call_s, taken)


def made_up(network: str, faster: float) -> ZooResult:
    layers = [
        Layer("convolution 1x1", f"conv 1x1/1 8-{8 * faster:.0f}, 7x7", 2, 10.0, 10.0 / faster, 1e-3, 2e-3),
        Layer("Linear", "linear 8-4, 2", 1, 10.0, 20.0, 1e-3, 1e-3, "dtype torch.int8"),
    ]
    peers = {
        "eager": peer(4.0),
        "graph": peer(2.0),
        "compile-reduce-overhead": peer(1.0, None),
        "compile-max-autotune": peer(1.1),
        "fused-graph": peer(1.0 / faster),
        "compile-tritonnn": peer(0.8),
        "swapped-graph": Peer(Measured(FAILED, note="RuntimeError: out of memory")),
    }
    return ZooResult(network, "bf16", 64, {"device": "NVIDIA H100", "command": "python zoo.py"}, peers, layers)


def saved(folder: Path, *results: ZooResult) -> list[ZooCase]:
    cases = [ZooCase(result.network, result.dtype, result.batch_size) for result in results]
    for case, result in zip(cases, results):
        result.save(folder / case.file)
    return cases
