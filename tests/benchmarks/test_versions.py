"""Versions of Triton are timed in the settled state of a GPU, and the noise of a run is a column of its table."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.versions import differ, medians, settled

ROOT = Path(__file__).parents[2]
COMMAND = runpy.run_path(str(ROOT / "docs" / "versions.py"))


def gpu_that_was_idle(ms: float, spent: list[float]) -> Callable[[int], float]:
    """Samples of a call that takes so long once the GPU has been busy for 100 ms, and a twentieth less before."""

    def sample(times: int) -> float:
        before = sum(spent)
        for _ in range(times):
            spent.append(ms if sum(spent) >= 100 else 0.95 * ms)
        return (sum(spent) - before) / times

    return sample


@pytest.mark.parametrize("ms", [0.1, 1.9, 22.0])
def test_what_runs_faster_after_a_pause_is_not_what_is_told(ms):
    spent: list[float] = []
    assert settled(gpu_that_was_idle(ms, spent)) == pytest.approx(ms)
    assert sum(spent) < 300 + 25 * ms, "a run with four versions takes two minutes"


def test_of_the_turns_the_median_counts():
    us = medians({"3.6.0": [1836.0, 1937.0, 1928.0, 1930.0], "3.9.0": [1924.0, 1927.0]})
    assert us == {"3.6.0": 1929.0, "3.9.0": 1925.5} and not differ(us)


@pytest.mark.parametrize("names", [["3.6.0", "3.10.0"], ["3.6.0", "again", "3.10.0"], ["3.6.0", "3.6.0-again"]])
def test_a_second_process_of_a_version_is_a_column(names):
    us = {"bf16 1 fused": {name: 50.0 + i for i, name in enumerate(names)}, "tf32 1 fused": {names[-1]: 70.0}}
    run = dict(gpu="NVIDIA H200", torch="2.11.0", date="2026-11-28", command="python ...", us=us)
    *said, head, _, row, without_first = COMMAND["times"]({"times": [run]})
    columns = [cell.strip().removeprefix("Triton ") for cell in head.strip("|").split("|")][1:]
    assert columns == [*names, "times that of 3.6.0"]
    assert row.endswith(f"| {', '.join(f'{1 + i / 50:.3f}' for i in range(1, len(names)))} |")
    assert ("again: another process of 3.6.0" in " ".join(said)) == ("again" in names)
    assert without_first.count("|") == row.count("|")
