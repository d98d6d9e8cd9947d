"""Compiles kernels in processes beside each other; Triton keeps them on disk, where the first launch finds them.

Not in threads, of which one at a time holds Python's lock, as Triton's front end does. The processes need no GPU.
"""

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget

from .kernels import tuned_blocks

CONVOLUTIONS = "_gemm_forward_kernel"
MOST_PROCESSES = 16
WORK = "from tritonnn.compile_ahead import work; work()"


class Kernel(NamedTuple):
    """What `JITFunction.preload` needs: where the function is, and its signature, constants and options in JSON."""

    module: str
    name: str
    specialization: str


def kernels_of(call: Callable[[], object]) -> list[Kernel]:
    """The kernels of convolutions that `call` would have to compile.

    They are not launched, while all else is: packed weights are kept. What `call` computes is nonsense, and so are its
    errors: layers give zeros, as an index that nobody wrote would be out of range.
    """
    with _noting_kernels() as kernels, _Zeros(), suppress(Exception):
        call()
    return list(kernels)


class _Zeros(TorchDispatchMode):
    """Operators of this package give zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == __package__:
            tree_map_only(torch.Tensor, torch.Tensor.zero_, result)
        return result


@contextmanager
def _noting_kernels() -> Iterator[dict[Kernel, None]]:
    """In this thread: Triton launches nothing where the hook returns True, before it compiles."""
    runtime, thread, kernels = triton.knobs.runtime, threading.get_ident(), {}
    before = runtime.jit_cache_hook

    def hook(**told: object) -> object:
        function = told["fn"]
        ours = function.module.startswith(f"{__package__}.") and function.name.endswith(CONVOLUTIONS)
        if not ours or threading.get_ident() != thread:
            return before and before(**told)
        kernels[Kernel(function.module, function.name, told["compile"]["specialization_data"])] = None
        return True

    runtime.jit_cache_hook = hook
    try:
        yield kernels
    finally:
        runtime.jit_cache_hook = before
        tuned_blocks.generation += 1  # a plan would repeat launches that were not made


class Compilers:
    """Processes that compile for the current GPU until the context ends: one imports PyTorch, the others are its forks.

    They start with the first kernel.
    """

    def __init__(self) -> None:
        self._target = triton.runtime.driver.active.get_current_target()
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()

    def compile_for(self, calls: Iterable[Callable[[], object]], advance: Callable[[int], None]) -> list[str]:
        """Compiles what the calls need, and tells `advance` of each kernel, one of so many. Gives what went wrong.

        What was not compiled will be at its launch, where an error of the compiler is met again.
        """
        kernels: dict[Kernel, None] = {}
        wrong: list[str] = []
        try:
            for call in calls:
                for kernel in kernels_of(call):
                    if kernel not in kernels:
                        kernels[kernel] = None
                        self._send(kernel)
            for _ in kernels:
                wrong.append(pickle.load(self._process.stdout))
                advance(len(kernels))
        except (EOFError, OSError) as error:
            wrong.append(f"the compilers ended: {error}")
        return [reason for reason in wrong if reason]

    def _send(self, kernel: Kernel) -> None:
        if self._process is None:
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TRITON_CACHE_DIR": triton.knobs.cache.dir,
            }
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self._process = subprocess.Popen([sys.executable, "-c", WORK], env=environment, **pipes)
            pickle.dump(self._target, self._process.stdin)
        pickle.dump(kernel, self._process.stdin)
        self._process.stdin.flush()


class _Target:
    """What Triton's compiler asks of a driver, without a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def work() -> None:
    """The process of `Compilers`: has compiled what it is sent, until nobody sends."""
    replies, lock = os.fdopen(os.dup(1), "wb"), threading.Lock()
    os.dup2(2, 1)  # whatever a compiler prints is no reply

    def reply(future: Future[str]) -> None:
        with lock:
            pickle.dump(str(future.exception() or future.result()), replies)
            replies.flush()

    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        triton.runtime.driver.set_active(_Target(pickle.load(sys.stdin.buffer)))
        processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
        try:
            while True:
                pool.submit(_compile, pickle.load(sys.stdin.buffer)).add_done_callback(reply)
        finally:
            pool.shutdown(cancel_futures=True)


def _compile(kernel: Kernel) -> str:
    """What went wrong, in one line; empty where nothing did."""
    try:
        getattr(importlib.import_module(kernel.module), kernel.name).preload(kernel.specialization)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
