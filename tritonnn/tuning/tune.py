"""Tunes the convolutions of a network for this GPU: tries forms and blocks, and keeps the fastest right ones on disk.

Triton's own autotuner does not check results, and keeps none on disk where arguments are tensor descriptors.
"""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
import triton
from torch import Tensor, nn

from ..compile_ahead import compile_ahead
from ..fusion.fuse import FusedNetwork
from ..ops.conv2d import tables
from ..ops.conv2d.dispatch import candidates, default_choice, run
from ..ops.conv2d.problem import Choice, Problem
from ..ops.conv2d.tables import Entry
from ..runtime import hardware
from ..runtime.dependent_launch import launches_as_in_graphs
from ..swap import swapped
from .harness import WORSE_THAN_DEFAULT, Harness, Wrong, operands

SAMPLES, FINAL_SAMPLES, FINALISTS = 2, 5, 3
FASTER_BY = 0.98
"""A choice replaces the default only if it takes less than this part of its time: smaller differences are noise."""

T = TypeVar("T")


@dataclass(frozen=True)
class Tuned:
    """The result for one problem: microseconds of GPU time, and the candidates that were wrong or did not run."""

    problem: Problem
    default: Choice
    default_us: float
    choice: Choice
    us: float
    tried: int
    rejected: Mapping[Choice, str]

    @property
    def wrong(self) -> dict[Choice, str]:
        return {choice: reason for choice, reason in self.rejected.items() if reason.startswith("wrong")}


@dataclass
class TuningReport:
    """Printed, it is a table; `known` problems were in the tables, `failed` ones keep the default."""

    tuned: list[Tuned] = field(default_factory=list)
    known: set[Problem] = field(default_factory=set)
    failed: dict[Problem, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __add__(self, other: "TuningReport") -> "TuningReport":
        """Both reports as one. What the first tuned does not count as known in the second."""
        before = {t.problem for t in self.tuned}
        known = (self.known | other.known) - before
        failed = self.failed | other.failed
        return TuningReport([*self.tuned, *other.tuned], known, failed, self.seconds + other.seconds)

    @property
    def summary(self) -> str:
        """One line."""
        known = f", {len(self.known)} were in the tables" if self.known else ""
        failed = f", {len(self.failed)} could not be" if self.failed else ""
        if not self.tuned:
            return f"no convolution was tuned{known}{failed}"
        us, default_us = sum(t.us for t in self.tuned), sum(t.default_us for t in self.tuned)
        tried, wrong = sum(t.tried for t in self.tuned), sum(len(t.wrong) for t in self.tuned)
        return (
            f"{len(self.tuned)} convolutions tuned in {self.seconds:.0f} s: {us:.1f} us together, by default "
            f"{default_us:.1f}; {tried} candidates, {wrong} of them wrong{known}{failed}"
        )

    def __str__(self) -> str:
        rows = [("convolution", "default us", "tuned us", "tried", "wrong", "choice")]
        rows += [
            (str(t.problem), f"{t.default_us:.1f}", f"{t.us:.1f}", str(t.tried), str(len(t.wrong)), str(t.choice))
            for t in self.tuned
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(
                cell.rjust(width) if 0 < i < 5 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        lines = lines if self.tuned else []
        wrong = ((t.problem, choice, reason) for t in self.tuned for choice, reason in t.wrong.items())
        lines += [f"{problem}: {choice}: {reason}" for problem, choice, reason in wrong]
        lines += [f"{problem}: {reason}" for problem, reason in self.failed.items()]
        return "\n".join([*(line.rstrip() for line in lines), self.summary])


def tune(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    layers: str | Sequence[str] = "all",
    again: bool = False,
    progress: bool = False,
) -> TuningReport:
    """Times forms and blocks for the convolutions that `model(*example)` runs, and uses the fastest from then on.

    Every candidate's result is checked before it is timed. What is found is kept for later processes, in the folder
    `TRITONNN_CACHE_DIR` or else the user's cache, by GPU, Triton version, shapes and type. The model is left as it was.
    Call it as the model will be called: under the same autocast and TF32 switches, in the same memory format.

    Args:
        model: with PyTorch's layers, which run as if swapped, with Triton's, or fused.
        example: its input, or a tuple of its inputs, on a GPU.
        layers: the kinds to swap, as in `swap`.
        again: tune also what the tables know.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown kind.
        RuntimeError: in the capture of a CUDA graph, under deterministic algorithms, or without a GPU.
    """
    start = time.perf_counter()
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    device = _check(inputs)
    report = TuningReport()
    with torch.cuda.device(device), launches_as_in_graphs(), _bar(progress) as advance:
        problems = find_problems(model, inputs, layers, advance)
        known = {} if again else tables.tuned_choices(device.index).maps[0]
        report.known = set(problems) & known.keys()
        todo = [problem for problem in problems if problem not in report.known]
        with torch.autocast("cuda", enabled=False):
            # Problems that differ in their epilogues only are tuned once, with the longest: each further one would
            # have all candidates compiled again. The others choose between its result and their own default.
            found = _by_shape(known)
            heads = set(_by_shape({p: p for p in todo if _shape(p) not in found}).values())
            _tune({p: _candidates(p, device) for p in todo if p in heads}, device, advance, report)
            found |= _by_shape({t.problem: t.choice for t in report.tuned})
            defaults = {p: _default(p, device) for p in todo if p not in heads}
            others = {p: [*dict.fromkeys((own, found.get(_shape(p), own)))] for p, own in defaults.items()}
            _tune(others, device, advance, report)
        if report.tuned:
            _keep(report.tuned, device)
    report.seconds = time.perf_counter() - start
    return report


def _check(inputs: tuple) -> torch.device:
    """The GPU of the inputs. Raises RuntimeError where tuning is not possible."""
    if not torch.cuda.is_available() or triton.knobs.runtime.interpret:
        raise RuntimeError("tritonnn.tune needs a CUDA GPU: in Triton's interpreter there is nothing to tune")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tritonnn.tune cannot run while a CUDA graph is captured: tune before")
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("tritonnn.tune picks by time: it does not run under torch.use_deterministic_algorithms")
    device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
    if device.type != "cuda":
        raise RuntimeError(f"tritonnn.tune needs its example on a CUDA GPU, got one on {device}")
    return device


def find_problems(
    model: nn.Module,
    inputs: tuple,
    layers: str | Sequence[str] = "all",
    advance: Callable[[str, int], None] | None = None,
) -> list[Problem]:
    """The distinct problems of one call in eval mode, with these kinds of layers swapped.

    With `advance`, which is told of it, their convolutions are compiled ahead.
    """
    training = [module for module in model.modules() if module.training]
    fused = [module for module in model.modules() if isinstance(module, FusedNetwork) and module.graphs is not None]
    graphs = [network.graphs for network in fused]
    try:
        for module in training:
            module.training = False
        for network in fused:
            network.graphs = None
        with torch.no_grad(), swapped(model, layers):
            if advance:
                compile_ahead([partial(model, *inputs)], partial(advance, "compiling"))
            with tables.recording() as problems:
                model(*inputs)
    finally:
        for module in training:
            module.training = True
        for network, captured in zip(fused, graphs):
            captured.clear()  # they replay what was chosen before
            network.graphs = captured
    return list(dict.fromkeys(problems))


def _shape(problem: Problem) -> Problem:
    return problem._replace(epilogue=())


def _by_shape(values: Mapping[Problem, T]) -> dict[Problem, T]:
    """One value for problems that differ in their epilogues only: that of the longest epilogue."""
    longest_last = sorted(reversed(values), key=lambda problem: len(problem.epilogue))
    return {_shape(problem): values[problem] for problem in longest_last}


def _default(problem: Problem, device: torch.device) -> Choice:
    return default_choice(operands(problem, device)[0])


def _candidates(problem: Problem, device: torch.device) -> list[Choice]:
    return candidates(operands(problem, device)[0], hardware.gpu(device))


def _tune(
    jobs: Mapping[Problem, Sequence[Choice]],
    device: torch.device,
    advance: Callable[[str, int], None],
    report: TuningReport,
) -> None:
    """Compiles all choices, and finds each problem's fastest."""
    compile_ahead(_runs(jobs, device), partial(advance, "compiling"))
    for problem, choices in jobs.items():
        try:
            harness = Harness(problem, device)
            report.tuned.append(fastest(harness, choices, harness.clock))
        except (Wrong, torch.OutOfMemoryError) as error:
            report.failed[problem] = str(error)
        advance("timing", len(jobs))


def _runs(jobs: Mapping[Problem, Sequence[Choice]], device: torch.device) -> Iterator[Callable[[], None]]:
    """Calls that run the choices, each on its problem's operands."""
    for problem, choices in jobs.items():
        product, _ = operands(problem, device)
        yield from (partial(run, product, choice) for choice in choices)


def fastest(harness: Harness, choices: Sequence[Choice], clock: Callable[[Choice], Callable[[], float]]) -> Tuned:
    """The fastest of the right choices; the first, the default, unless another is faster by more than noise.

    Raises:
        Wrong: no choice is right.
    """
    default = choices[0]
    rejected: dict[Choice, str] = {}
    clocks: dict[Choice, Callable[[], float]] = {}
    like, limit = None, None
    for choice in choices:
        try:
            y, error = harness.check(choice, like, limit)
            if choice == default:
                like, limit = y, WORSE_THAN_DEFAULT * error
            clocks[choice] = clock(choice)
        except Wrong as error:
            rejected[choice] = f"wrong: {error}"
        except Exception as error:  # Triton raises many kinds: too many registers, too much shared memory
            if harness.device.type == "cuda":
                torch.cuda.synchronize()  # raises where the GPU is lost
            rejected[choice] = f"{type(error).__name__}: {error}".splitlines()[0]
    if not clocks:
        raise Wrong("; ".join(dict.fromkeys(rejected.values())))
    times = {choice: min(clock() for _ in range(SAMPLES)) for choice, clock in clocks.items()}
    final = sorted(times, key=times.__getitem__)[:FINALISTS]
    final += [default] if default in clocks and default not in final else []
    rounds = [[clocks[choice]() for choice in final] for _ in range(FINAL_SAMPLES)]
    times = dict(zip(final, map(statistics.median, zip(*rounds))))
    choice = min(times, key=times.__getitem__)
    if default in times and times[choice] > FASTER_BY * times[default]:
        choice = default
    return Tuned(
        harness.problem, default, times.get(default, float("nan")), choice, times[choice], len(choices), rejected
    )


def _keep(tuned: Sequence[Tuned], device: torch.device) -> None:
    entries = {t.problem: Entry(t.choice, t.us, t.default_us) for t in tuned}
    path = tables.cache_folder() / tables.file_name(torch.cuda.get_device_name(device))
    tables.forget()
    try:
        tables.add(path, entries)
    except OSError as error:
        warnings.warn(f"tritonnn: what was tuned is lost with this process: {error}", stacklevel=3)
    tables.tuned_choices(device.index).update((problem, entry.choice) for problem, entry in entries.items())


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Gives a function that advances the named progress bar by one of so many steps."""
    if not shown:
        yield lambda name, total: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        tasks = {}

        def advance(name: str, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(f"Convolutions, {name}", total=total)
            elif progress.tasks[tasks[name]].finished:  # once more, others
                progress.reset(tasks[name], total=total)
            progress.advance(tasks[name])

        yield advance
