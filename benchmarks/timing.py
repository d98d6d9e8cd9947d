"""What a benchmark needs besides the clocks of tritonnn: errors that end a run, and the ceilings of a GPU.

One call precedes the timed ones: it refills the caches and has the GPU busy when the first event is recorded.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from tritonnn import clocks
from tritonnn.clocks import Clock, Timing, captured, event_clock, repeated, repeats_for, wall_clock
from tritonnn.fusion.cuda_graphs import release_workspaces

WARM_UP_CALLS = 5
MIN_ROUNDS, MAX_ROUNDS = 7, 100
SAMPLE_MS = 2.0


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


def alternate(
    named: Mapping[str, Clock],
    budget_s: float,
    device: torch.device,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The timings of the clocks, read in turns, and by name the errors of those that failed.

    At least MIN_ROUNDS rounds, at most MAX_ROUNDS.
    """
    return clocks.alternate(named, budget_s, (MIN_ROUNDS, MAX_ROUNDS), lambda error: failure(error, device), now)


def clock(call: Callable[[], object], device: torch.device) -> Clock:
    """Events around back-to-back calls: the GPU's time, or the host's where launching takes longer than the work.

    The wall clock on a CPU.
    """
    read = read_events if device.type == "cuda" else wall_clock
    read(call, 1)
    repeats = repeats_for(read(call, 1), SAMPLE_MS)
    return lambda: read(call, repeats)


def read_events(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one of so many back-to-back calls, after one that is not timed."""
    call()
    return event_clock(repeated(call, repeats), repeats)()


def capture(call: Callable[[], object]) -> tuple[Callable[[], object], object]:
    """Warms up, captures the call in a CUDA graph; its replay and the result, which every replay overwrites."""
    for _ in range(WARM_UP_CALLS):
        call()
    torch.cuda.synchronize()
    release_workspaces()
    results = []
    return captured(lambda: results.append(call()), 1), results[0]


def ceilings(
    device: torch.device, flags: Callable[[str], AbstractContextManager], n: int = 8192, copied: int = 2**29
) -> dict[str, float]:
    """Measures the GPU now: TFLOP/s of an n x n x n product of random numbers by type, GB/s that a copy moves.

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
