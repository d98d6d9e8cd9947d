"""Timing several callables in turns, and the ceilings of a GPU.

A clock is a callable that returns the milliseconds of one call, as the mean over enough calls for the events to
resolve. One call precedes them untimed: it refills the caches and has the GPU busy when the first event is recorded.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from tritonnn.cuda_graphs import release_workspaces
from tritonnn.latency import Timing

WARM_UP_CALLS = 5
MIN_ROUNDS, MAX_ROUNDS = 7, 100
SAMPLE_MS = 2.0
MAX_REPEATS = 500


class DeviceLost(Exception):
    """The GPU takes no more work from this process."""


def failure(error: Exception, device: torch.device) -> str:
    """The first line of an error. Raises DeviceLost if the GPU did not survive it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as lost:
            raise DeviceLost(f"{type(error).__name__}: {first_line(error)}") from lost
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def summarize(samples: list[float]) -> Timing:
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, median, p90 = torch.tensor(samples, dtype=torch.float64).quantile(quantiles)
    return Timing(median.item(), p10.item(), p90.item(), len(samples))


def alternate(
    clocks: Mapping[str, Callable[[], float]],
    budget_s: float,
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Reads the clocks in turns, every other round in reverse, until the budget is spent.

    At least MIN_ROUNDS rounds, at most MAX_ROUNDS. A clock that fails is not read again: its error is in the second
    result, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    failures: dict[str, str] = {}
    start, rounds = now(), 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and now() - start < budget_s):
        for name in list(samples) if rounds % 2 == 0 else list(reversed(samples)):
            try:
                samples[name].append(clocks[name]())
            except Exception as error:
                failures[name] = failure(error, device)
                del samples[name]
        rounds += 1
    return {name: summarize(taken) for name, taken in samples.items()}, failures


def clock(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Events around back-to-back calls: the GPU's time, or the host's where launching takes longer than the work.

    The wall clock on a CPU.
    """
    read = read_events if device.type == "cuda" else _wall_clock
    read(call, 1)
    repeats = repeats_for(read(call, 1), SAMPLE_MS)
    return lambda: read(call, repeats)


def repeats_for(once_ms: float, target_ms: float) -> int:
    return min(max(math.ceil(target_ms / max(once_ms, 1e-3)), 1), MAX_REPEATS)


def read_events(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def _wall_clock(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


def capture(call: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """Warms up, captures the call in a CUDA graph; its replay and the result, which every replay overwrites."""
    for _ in range(WARM_UP_CALLS):
        call()
    torch.cuda.synchronize()
    release_workspaces()
    graph = torch.cuda.CUDAGraph()
    # The outer context puts the stream back after a failed capture; `torch.cuda.graph` itself does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def ceilings(
    device: torch.device, flags: Callable[[str], AbstractContextManager], n: int = 8192, copied: int = 2**29
) -> dict[str, float]:
    """Of the GPU, now: TFLOP/s of an n x n x n product of random numbers by type, GB/s read and written by a copy.

    `flags` sets PyTorch's switches for a type; `copied` numbers of 4 bytes are copied.
    """
    generator = torch.Generator(device).manual_seed(0)
    found = {}
    for dtype, torch_dtype in (
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("tf32", torch.float32),
        ("fp32", torch.float32),
    ):
        a, b = (torch.randn(n, n, generator=generator, device=device).to(torch_dtype) for _ in range(2))
        with flags(dtype):
            found[f"{dtype} TFLOP/s"] = 2 * n**3 / _median_ms(lambda a=a, b=b: a @ b, device) / 1e9
    # With PyTorch's default flags: the convolutions are what counts, and they use TF32.
    found["default TFLOP/s"] = found["tf32 TFLOP/s"]
    source = torch.randn(copied, generator=generator, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.nbytes / _median_ms(lambda: target.copy_(source), device) / 1e6
    return found


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(WARM_UP_CALLS):
        call()
    timings, failures = alternate({"ceiling": clock(call, device)}, 0.2, device)
    if failures:
        raise RuntimeError(failures["ceiling"])
    return timings["ceiling"].median
