"""How long the host takes for a layer, forward, backward and in evaluation: microseconds, and calls of functions.

    python benchmarks/host.py
    python benchmarks/host.py --layers conv2d batch_norm2d --dtype float32

Small images, so that a GPU waits for the host, and chains of equal layers, which share what a call of the network and
of `backward` takes. On a GPU PyTorch's layers stand beside Triton's, and layers take turns.

Without a GPU, CPU tensors play those of an H100: launch plans are made and replayed as there, for the kernels and block
sizes that are chosen there, and Triton's launchers call a driver that does nothing (idle_driver.py). What is missing is
the time of the driver and of PyTorch's allocator on a GPU. PyTorch's layers have no time then: they would compute.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository's root

import torch
import triton
from torch import nn
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import tritonnn
from benchmarks import idle_driver
from benchmarks.pose import H100
from tritonnn.runtime import capabilities, hardware, launch_plan, operator, replay
from tritonnn.runtime.hardware import Gpu

OURS = str(Path(tritonnn.__file__).parent)
CHANNELS, LENGTH = 64, 8
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv2d": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
    "conv2d, bias": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
    "batch_norm2d": lambda: nn.BatchNorm2d(CHANNELS),
    "relu": lambda: nn.ReLU(),
    "max_pool2d": lambda: nn.MaxPool2d(3, 1, 1),
    "avg_pool2d": lambda: nn.AvgPool2d(3, 1, 1),
    "adaptive_avg_pool2d": lambda: nn.AdaptiveAvgPool2d(8),
    "linear": lambda: nn.Linear(CHANNELS, CHANNELS),
}


@contextmanager
def posing_as(gpu: Gpu = H100) -> Iterator[None]:
    """Inside, CPU tensors take the way of those on a GPU, and launches do nothing."""
    capabilities.notes()  # finds out what is known before it is replaced
    with ExitStack() as stack:
        for owner, name, value in (
            (hardware, "gpu", lambda device: gpu),
            (operator, "require_interpreter", lambda: None),
            (JITFunction, "run", idle_driver.compiled),
            (InterpretedFunction, "run", idle_driver.compiled),
            (triton.runtime.driver, "_active", idle_driver.driver()),
            (launch_plan, "can_record", bool),
            (replay, "current_stream", lambda device: 0),
        ):
            stack.enter_context(patch.object(owner, name, value))
        launch_plan.forget_plans()
        try:
            yield
        finally:
            launch_plan.forget_plans()


class Chain:
    """LENGTH layers of a kind, one after the other, under autocast unless all is float32."""

    def __init__(self, kind: str, swap: bool, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        self.net = nn.Sequential(*(LAYERS[kind]() for _ in range(LENGTH)))
        self.net = self.net.to(device=device, memory_format=torch.channels_last)
        if swap:
            tritonnn.swap(self.net, strict=True)
        shape = (8, CHANNELS) if kind == "linear" else (8, CHANNELS, 8, 8)
        self.x = torch.zeros(shape, dtype=dtype, device=device)
        if self.x.dim() == 4:
            self.x = self.x.to(memory_format=torch.channels_last)
        self.autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def forward(self) -> torch.Tensor:
        self.net.train()
        self.net.zero_grad()
        self.x.requires_grad_().grad = None
        return self._call()

    def _call(self) -> torch.Tensor:
        with self.autocast:
            return self.net(self.x)

    def backward(self, y: torch.Tensor) -> None:
        torch.autograd.backward(y, torch.empty_like(y))

    def evaluate(self, observed: Callable[[Callable], object]) -> object:
        """observed(a call without gradients)."""
        self.net.eval()
        with torch.no_grad():
            return observed(self._call)

    def observe(self, observed: Callable[[Callable], object]) -> tuple[object, object, object]:
        """What `observed` tells of a call forward in training, one backward, and one in evaluation."""
        results: list[torch.Tensor] = []
        self.forward()
        forward = observed(lambda: results.append(self._call()))
        backward = observed(lambda: self.backward(results[0]))
        return forward, backward, self.evaluate(observed)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def calls_of(call: Callable[[], object], folder: str = "") -> int:
    """How many calls of Python functions, of files in that folder, call() makes, without its own."""
    found = [0]

    def count(frame, event, arg) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            found[0] += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[0]


class Row(NamedTuple):
    """Of a layer: microseconds forward, backward and in evaluation, and calls of Python functions."""

    us: tuple[float, ...]
    calls: tuple[float, ...]


def measure(chains: list[Chain], rounds: int) -> list[Row]:
    """The least of so many rounds, in which the chains take turns."""
    best = [(float("inf"),) * 3 for _ in chains]
    for _ in range(3):
        for chain in chains:
            chain.observe(seconds)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for i, chain in enumerate(chains):
            best[i] = tuple(map(min, best[i], chain.observe(seconds)))
            if chain.x.is_cuda:
                torch.cuda.synchronize()
    gc.enable()
    counted = [chain.observe(calls_of) for chain in chains]
    return [
        Row(tuple(1e6 * t / LENGTH for t in times), tuple(n / LENGTH for n in calls))
        for times, calls in zip(best, counted)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="KIND")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=200, help="of which the fastest counts (default 200)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} is not at least 1")
    on_gpu, dtype = torch.cuda.is_available(), getattr(torch, args.dtype)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, triton {triton.__version__}, {args.dtype}, ", end="")
    print(torch.cuda.get_device_name() if on_gpu else "no GPU: launches do nothing, as if on an H100")
    print(f"{'':28}{'us a layer':^27}{'calls of Python functions':^30}")
    print(f"{'':28}" + 2 * f"{'forward':>9}{'backward':>9}{'eval':>9}")
    with nullcontext() if on_gpu else posing_as():
        for kind in args.layers:
            ways = [True, False] if on_gpu else [True]
            chains = [Chain(kind, swap, dtype, "cuda" if on_gpu else "cpu") for swap in ways]
            for swap, row in zip(ways, measure(chains, args.rounds)):
                name = kind if swap else "  PyTorch's"
                print(f"{name:28}" + "".join(f"{value:9.1f}" for value in (*row.us, *row.calls)))


if __name__ == "__main__":
    main()
