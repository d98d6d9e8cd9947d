"""Compiles ahead, in processes beside each other, what cases will run: Triton and Inductor keep it on disk.

    python benchmarks/ahead.py cifar bf16 1024 swapped-graph fused-graph

Nothing is timed meanwhile. torch.compile's "max-autotune" is left out: it chooses by times.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository's root

import torch

from benchmarks.cases import Case, flags
from benchmarks.networks import Setup
from benchmarks.peers import PEERS

LIMIT_S = 180.0
CALLS = 3
"""The second call of a network that captures graphs captures one; the third replays it."""
COMPILED_BY = {
    "compile-reduce-overhead": "compile-reduce-overhead",
    "swapped": "swapped-graph",
    "swapped-graph": "swapped-graph",
    "triton-channels-last": "swapped-graph",
    "fused": "fused-graph",
    "fused-graph": "fused-graph",
    "fused-graph-in-place": "fused-graph",
}
"""The peer of a network whose calls compile what a peer needs, eager or in a graph."""


def jobs(cases: Iterable[tuple[Case, Sequence[str]]]) -> dict[Case, list[str]]:
    """What to compile for cases and their peers: networks, and peers of theirs, without repetitions."""
    found: dict[Case, dict[str, None]] = {}
    for case, peers in cases:
        network = Case("cifar" if case.task == "layers" else case.task, case.dtype, case.batch_size)
        found.setdefault(network, {}).update(dict.fromkeys(COMPILED_BY[peer] for peer in peers if peer in COMPILED_BY))
    return {network: list(peers) for network, peers in found.items() if peers}


def compile_ahead(todo: Mapping[Case, Sequence[str]], processes: int, say: Callable[[str], None]) -> None:
    """Runs a process for each network, a few at a time.

    What fails here fails again in the measurement, which reports it.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(processes) as pool:
        succeeded = list(pool.map(_in_a_process, todo.items()))
    seconds = time.perf_counter() - start
    say(f"compiled ahead: {sum(succeeded)} of {len(todo)} networks in {seconds:.0f} s, {processes} at a time")


def _in_a_process(job: tuple[Case, Sequence[str]]) -> bool:
    case, peers = job
    command = [sys.executable, __file__, case.task, case.dtype, str(case.batch_size), *peers]
    try:
        return subprocess.run(command, capture_output=True, timeout=LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main(task: str, dtype: str, batch_size: str, *peers: str) -> None:
    setup = Setup(Case(task, dtype, int(batch_size)), torch.device("cuda", torch.cuda.current_device()))
    with flags(dtype), torch.no_grad():
        for name in peers:
            call = PEERS[name](setup)
            for _ in range(CALLS):
                call()
            del call
    torch.cuda.synchronize()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA GPU to compile for")
    main(*sys.argv[1:])
