"""Compiles kernels in parallel before their first launch: in threads, as most of compiling releases Python's lock."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..ops.conv2d.forms import FORMS
from ..runtime.capabilities import knows
from ..runtime.launch_plan import forget_plans

PACKAGE = __package__.partition(".")[0]
MOST_THREADS = 16


class Kernel(NamedTuple):
    """A function, and its signature, constants and options as its `preload` takes them."""

    function: triton.JITFunction
    specialization: str


def compile_ahead(calls: Iterable[Callable[[], object]], advance: Callable[[int], None]) -> None:
    """Compiles the convolutions of the calls, on the current GPU; tells `advance` of each kernel, one of so many.

    An error of the compiler is met again at the launch.
    """
    if not knows("preloading"):
        return
    device = torch.cuda.current_device()

    def compile(kernel: Kernel) -> None:
        with torch.cuda.device(device), suppress(Exception):
            kernel.function.preload(kernel.specialization)

    pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS))
    try:
        futures: dict[Kernel, Future] = {}
        for call in calls:
            for kernel in kernels_of(call):
                if kernel not in futures:
                    futures[kernel] = pool.submit(compile, kernel)
        for _ in as_completed(futures.values()):
            advance(len(futures))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, kernels that have not begun to compile are dropped


def kernels_of(call: Callable[[], object]) -> list[Kernel]:
    """The kernels of convolutions that `call` would have to compile.

    These kernels are not launched, all others are, so that packed weights are kept. What `call` computes is nonsense,
    and so are its errors. Layers give zeros, because an index that was never written might be out of range.
    """
    with _noting_kernels() as kernels, _Zeros(), suppress(Exception):
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
def _noting_kernels() -> Iterator[dict[Kernel, None]]:
    """In this thread: Triton launches nothing where the hook returns True, before it compiles."""
    runtime, thread, kernels = triton.knobs.runtime, threading.get_ident(), {}
    convolutions = {id(kernel) for form in FORMS for kernel in form.kernels}  # their hash asks for a compiler's key
    before = runtime.jit_cache_hook

    def hook(**told: object) -> object:
        function = told["fn"]
        if id(function.jit_function) not in convolutions or threading.get_ident() != thread:
            return before and before(**told)
        kernels[Kernel(function.jit_function, told["compile"]["specialization_data"])] = None
        return True

    runtime.jit_cache_hook = hook
    try:
        yield kernels
    finally:
        runtime.jit_cache_hook = before
        forget_plans()  # a plan would repeat launches that were not made
