"""The one timer: clocks that read the milliseconds of a call, in turns, so that drift and neighbours hit all alike."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Clock = Callable[[], float]
"""Reads the milliseconds of one call, as the mean over enough calls for the clock to resolve."""

MAX_REPEATS = 500


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    p10: float
    p90: float
    samples: int


def summarize(samples: list[float]) -> Timing:
    """Median, tenth and ninetieth percentile of milliseconds."""
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, median, p90 = torch.tensor(samples, dtype=torch.float64).quantile(quantiles)
    return Timing(median.item(), p10.item(), p90.item(), len(samples))


def alternate(
    clocks: Mapping[str, Clock],
    budget_s: float,
    rounds: tuple[int, int],
    failed: Callable[[Exception], str] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Reads the clocks in turns, every other round in reverse, until the budget is spent.

    Args:
        clocks: by name.
        budget_s: seconds for all of them together.
        rounds: at least and at most so many.
        failed: what to say of a clock's error; the clock is then not read again. None: errors are raised.

    Returns:
        The timings, and what was said of clocks that failed, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    failures: dict[str, str] = {}
    start, read = now(), 0
    while read < rounds[0] or (read < rounds[1] and now() - start < budget_s):
        for name in list(samples) if read % 2 == 0 else list(reversed(samples)):
            try:
                samples[name].append(clocks[name]())
            except Exception as error:
                if failed is None:
                    raise
                failures[name] = failed(error)
                del samples[name]
        read += 1
    return {name: summarize(taken) for name, taken in samples.items()}, failures


def repeats_for(once_ms: float, target_ms: float) -> int:
    """Calls that together take about `target_ms`."""
    return min(max(math.ceil(target_ms / max(once_ms, 1e-3)), 1), MAX_REPEATS)


def event_clock(launch: Callable[[], object], calls: int) -> Clock:
    """Milliseconds of GPU time of one of the calls that `launch` makes."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def read() -> float:
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return read


def wall_clock(call: Callable[[], object], repeats: int, synchronize: Callable[[], object] = lambda: None) -> float:
    """Milliseconds of one of back-to-back calls that end with a synchronisation, seen from the host."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) * 1e3 / repeats


def repeated(call: Callable[[], object], repeats: int) -> Callable[[], object]:
    """Makes `repeats` calls from Python and keeps none of their results."""

    def launch() -> None:
        for _ in range(repeats):
            call()

    return launch


def captured(call: Callable[[], object], repeats: int) -> Callable[[], object]:
    """The replay of a CUDA graph of so many calls, which have been warmed up.

    Raises:
        RuntimeError: the call synchronises, or allocates on the host. `mend_generator` is then in order.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer context puts the stream back after a failed capture; `torch.cuda.graph` itself does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def mend_generator() -> None:
    """Mends the random generator, which a failed capture leaves as if it were captured still."""
    torch.cuda.synchronize()
    captured(lambda: torch.zeros(1, device="cuda"), 1)
