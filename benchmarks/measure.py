"""Runs one case: every peer is built and checked, then all that are right are timed in turns."""

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.networks import LIMITS, Setup, errors
from benchmarks.peers import MAX_AUTOTUNE_PEERS, PEERS, Call, Unavailable
from benchmarks.results import FAILED, MISSING, OK, WRONG, Measured, NetworkResult
from benchmarks.timing import WARM_UP_CALLS, alternate, clock, failure

NETWORK_BUDGET_S = 3.0
Say = Callable[[str], None]


def peers_of(case: Case, wanted: Iterable[str] | None) -> list[str]:
    """The peers to run in a network's case; "max-autotune" compiles for minutes and so only where the case is of it."""
    slow = "compile-max-autotune"
    if case.max_autotune:
        names = set(MAX_AUTOTUNE_PEERS if wanted is None else wanted)
        return [name for name in PEERS if name in names and slow in names]
    return [name for name in PEERS if name != slow and (wanted is None or name in wanted)]


def network_result(
    case: Case,
    device: torch.device,
    wanted: Iterable[str] | None,
    say: Say,
    width: int = 64,
    budget_s: float = NETWORK_BUDGET_S,
) -> NetworkResult:
    """`say` is told of each peer as it gets ready."""
    start = time.perf_counter()
    with torch.no_grad():
        setup = Setup(case, device, width)
        builders = {name: partial(PEERS[name], setup) for name in peers_of(case, wanted)}
        peers = measure(builders, setup, say, budget_s)
    seconds = time.perf_counter() - start
    return NetworkResult(case.name, case.task, case.dtype, case.batch_size, case.layout, peers, seconds)


def measure(
    builders: Mapping[str, Callable[[], Call]], setup: Setup, say: Say, budget_s: float = NETWORK_BUDGET_S
) -> dict[str, Measured]:
    case, device = setup.case, setup.device

    def check(y: Tensor) -> Measured:
        return checked(y, setup.reference, case.batch_size, LIMITS[case.dtype])

    calls, measured = {}, {}
    for name, builder in builders.items():
        start = time.perf_counter()
        measured[name], call = prepared(builder, check, device)
        if measured[name].status == OK:
            calls[name] = call
        say(f"  {name}: {outcome(measured[name])}, ready in {time.perf_counter() - start:.1f} s")
    time_right_ones(measured, calls, check, device, budget_s)
    return measured


def checked(y: Tensor, reference: Tensor, n: int, limit: float) -> Measured:
    largest, rms = errors(y, reference, n)
    return Measured(OK if rms <= limit else WRONG, max_error=largest, rms_error=rms)


def prepared(
    builder: Callable[[], Call], check: Callable[[Tensor], Measured], device: torch.device
) -> tuple[Measured, Call | None]:
    """Builds a peer, warms it up and checks its last result."""
    try:
        call = builder()
        for _ in range(WARM_UP_CALLS):
            y = call()
        found = check(y)
        found.note = getattr(call, "note", "")
        return found, call
    except Unavailable as error:
        return Measured(MISSING, note=str(error)), None
    except Exception as error:
        return Measured(FAILED, note=failure(error, device)), None


def time_right_ones(
    measured: dict[str, Measured],
    calls: dict[str, Call],
    check: Callable[[Tensor], Measured],
    device: torch.device,
    budget_s: float,
) -> None:
    """Adds the timings to `measured`; a peer whose result is not right any more afterwards loses its own."""
    clocks = {}
    for name, call in calls.items():
        try:
            clocks[name] = clock(call, device)
        except Exception as error:
            measured[name] = Measured(FAILED, note=failure(error, device))
    timings, failures = alternate(clocks, budget_s, device)
    for name, note in failures.items():
        measured[name] = Measured(FAILED, note=note)
    for name, timing in timings.items():
        after = check(calls[name]())
        if after.status == OK:
            measured[name].timing = timing
        else:
            after.note = "right at first, wrong after the timing"
            measured[name] = after


def outcome(measured: Measured) -> str:
    if measured.status == OK:
        return f"ok, rms error {measured.rms_error:.1e}"
    if measured.status == WRONG:
        return f"WRONG, rms error {measured.rms_error:.1e}"
    return f"{measured.status}: {measured.note}"


def release(device: torch.device) -> None:
    """Forgets what torch.compile has compiled, and returns the memory of what is no longer referred to."""
    with suppress(RuntimeError):  # the GPU is lost: another call reports that
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
