"""Compiles kernels in parallel before their first launch: in threads, as most of compiling releases Python's lock."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .ops.conv2d.forms import FORMS
from .runtime.capabilities import knows
from .runtime.launch_plan import forget_plans

LOG = logging.getLogger(__name__)
PACKAGE = __name__.partition(".")[0]
MOST_THREADS = 16
_noting = threading.RLock()
"""Held while kernels are noted: a hook that another thread put back later would stay, and launch nothing for good."""
SILENT_S = 2.0
"""Seconds after which a first call shows a progress bar."""


class Kernel(NamedTuple):
    """A function, and its signature, constants and options as its `preload` takes them."""

    function: triton.JITFunction
    specialization: str


def compile_ahead(
    calls: Iterable[Callable[[], object]], advance: Callable[[int], None], every_kernel: bool = False
) -> None:
    """Compiles the convolutions of the calls, on the current GPU; tells `advance` of each kernel, one of so many.

    `every_kernel`: also those of other operations, and of packing weights: what the calls packed is nonsense then. An
    error of the compiler is met again at the launch.
    """
    if not knows("preloading"):
        return
    device = torch.cuda.current_device()

    def compile(kernel: Kernel) -> None:
        key.result()
        with torch.cuda.device(device), suppress(Exception):
            compiled = kernel.function.preload(kernel.specialization)
            if knows("launches"):
                _ = compiled.run  # builds its launcher, with a C compiler, and loads it on the GPU

    pool, start = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS)), time.perf_counter()
    try:
        futures: dict[Kernel, Future] = {}
        key = pool.submit(_hash_of_triton)
        for call in calls:
            for kernel in kernels_of(call, every_kernel):
                if kernel not in futures:
                    futures[kernel] = pool.submit(compile, kernel)
        found = time.perf_counter()
        for _ in as_completed(futures.values()):
            advance(len(futures))
        LOG.info(
            "%d kernels: %.1f s to find, %.1f s to compile", len(futures), found - start, time.perf_counter() - start
        )
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, kernels that have not begun to compile are dropped


def _hash_of_triton() -> None:
    """Has Triton read all of its own files once, as its cache asks for; else each thread would, a second of work."""
    known = getattr(triton.runtime.cache, "triton_key", None)
    if callable(known):
        known()


def kernels_of(call: Callable[[], object], every_kernel: bool = False) -> list[Kernel]:
    """The kernels of convolutions, or of all operations, that `call` would have to compile.

    These kernels are not launched, all others are, so that packed weights are kept. What `call` computes is nonsense,
    and so are its errors. Layers give zeros, because an index that was never written might be out of range.
    """
    with _noting_kernels(every_kernel) as kernels, _Zeros(), suppress(Exception):
        call()
    return list(kernels)


class _Zeros(TorchDispatchMode):
    """A mode in which the operators of this package give zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == PACKAGE:
            tree_map_only(torch.Tensor, torch.Tensor.zero_, result)
        return result


@contextmanager
def _noting_kernels(every_kernel: bool) -> Iterator[dict[Kernel, None]]:
    """Notes the kernels that this thread would launch; where the hook returns True, Triton does not compile them."""
    runtime, thread, kernels = triton.knobs.runtime, threading.get_ident(), {}
    convolutions = {id(kernel) for form in FORMS for kernel in form.kernels}  # their hash asks for a compiler's key

    def hook(**told: object) -> object:
        function = told["fn"]
        noted = id(function.jit_function) in convolutions or (every_kernel and _is_ours(function.jit_function))
        if not noted or threading.get_ident() != thread:
            return before and before(**told)
        kernels[Kernel(function.jit_function, told["compile"]["specialization_data"])] = None
        return True

    with _noting:
        before, runtime.jit_cache_hook = runtime.jit_cache_hook, hook
        try:
            yield kernels
        finally:
            runtime.jit_cache_hook = before
            forget_plans()  # a plan would repeat launches that were not made


def _is_ours(function: triton.JITFunction) -> bool:
    return getattr(function.fn, "__module__", "").startswith(f"{PACKAGE}.ops.")


@contextmanager
def progress_after(seconds: float = SILENT_S) -> Iterator[Callable[[int], None]]:
    """Gives what advances by one of so many kernels a bar that a terminal shows where it takes longer than that."""
    if not sys.stderr.isatty():
        yield lambda total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    start, done, lock = time.perf_counter(), 0, threading.Lock()
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("Compiling kernels", total=None)

    def advance(total: int) -> None:
        nonlocal done
        with lock:
            done += 1
            progress.update(task, total=total, completed=done)
            if not progress.live.is_started and time.perf_counter() - start > seconds:
                progress.start()

    try:
        yield advance
    finally:
        progress.stop()
