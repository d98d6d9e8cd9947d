"""Compiles kernels in processes beside each other; Triton keeps them on disk, where the first launch finds them.

Not in threads: Triton's front end is Python, whose lock one thread holds, and compilers in one process wait for each
other's memory. The processes need no GPU and none of its memory.
"""

import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from typing import NamedTuple

import triton
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

    They are not launched, so what `call` computes is nonsense, and its errors say nothing. All else is: weights that
    were packed are kept, and an index that nobody wrote would be out of range.
    """
    with _noting_kernels() as kernels, suppress(Exception):
        call()
    return list(kernels)


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
    """Processes that compile for the current GPU; they start when they are needed, and end with the context."""

    def __init__(self) -> None:
        self._target = triton.runtime.driver.active.get_current_target()
        self._thread = threading.local()
        self._processes: list[subprocess.Popen] = []
        self._pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_PROCESSES))

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def compile_for(self, calls: Iterable[Callable[[], object]], advance: Callable[[int], None]) -> list[str]:
        """Compiles what the calls need, and tells `advance` of each kernel, one of so many. Gives what went wrong.

        An error of the compiler will be met again at the launch.
        """
        futures: dict[Kernel, Future[str | None]] = {}
        for call in calls:
            for kernel in kernels_of(call):
                if kernel not in futures:
                    futures[kernel] = self._pool.submit(self._compile, kernel)
        for _ in as_completed(futures.values()):
            advance(len(futures))
        return [reason for future in futures.values() if (reason := future.result())]

    def _compile(self, kernel: Kernel) -> str | None:
        try:
            if not hasattr(self._thread, "process"):
                self._thread.process = self._start()
            process = self._thread.process
            _send(kernel, process)
            return pickle.load(process.stdout)
        except (EOFError, OSError) as error:
            return f"the compiler's process ended: {error}"

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process = subprocess.Popen([sys.executable, "-c", WORK], env=environment, **pipes)
        self._processes.append(process)
        _send(self._target, process)
        return process


def _send(what: object, process: subprocess.Popen) -> None:
    pickle.dump(what, process.stdin)
    process.stdin.flush()


class _Target:
    """What Triton's compiler asks of a driver, without a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def work() -> None:
    """A process of `Compilers`: compiles what it is sent, until nobody sends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a compiler prints is no reply
    with suppress(EOFError, KeyboardInterrupt):
        triton.runtime.driver.set_active(_Target(pickle.load(sys.stdin.buffer)))
        while True:
            kernel = pickle.load(sys.stdin.buffer)
            try:
                getattr(importlib.import_module(kernel.module), kernel.name).preload(kernel.specialization)
                reply = None
            except Exception as error:
                reply = f"{type(error).__name__}: {error}"
            pickle.dump(reply, replies)
            replies.flush()
