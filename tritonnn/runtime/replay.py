"""What a launch plan does at every call: allocate, fill addresses into recorded arguments, launch compiled kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from . import capabilities
from .semaphores import semaphores

current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""The address of a device's stream, as Triton asks for it."""


class Pointer(NamedTuple):
    """An argument that is an address: its position, which tensor it points into, and the offset there in bytes.

    Tensors are numbered: those of the call first, then the allocations in their order.
    """

    position: int
    source: int
    offset: int


class _Address:
    """The base of a descriptor, as far as Triton's launcher asks for it."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Descriptor(NamedTuple):
    """An argument that is a tensor descriptor: where its base goes, its class and its other fields."""

    base: Pointer
    cls: type
    fields: dict[str, object]

    @classmethod
    def of(cls, descriptor: object, base: Pointer) -> "Descriptor":
        return cls(base, type(descriptor), {name: value for name, value in vars(descriptor).items() if name != "base"})

    def at(self, address: int) -> object:
        """A descriptor like the recorded one, at this address. Its checks were made when it was recorded."""
        descriptor = object.__new__(self.cls)
        descriptor.__dict__.update(self.fields)
        descriptor.base = _Address(address)
        return descriptor


class Launch(NamedTuple):
    """A compiled kernel with what its launcher takes, its grid, and its arguments, empty where addresses go."""

    compiled: object
    run: Callable
    grid: tuple[int, int, int]
    function: int
    packed_metadata: tuple
    arguments: list
    pointers: list[Pointer]
    descriptors: list[Descriptor]


class Plan:
    """Allocations (size, stride and type, or a number of semaphores), launches, and which allocations are returned."""

    def __init__(self, device: torch.device, allocations: list, launches: list[Launch], results: object) -> None:
        self.allocations, self.launches, self.results = allocations, launches, results
        self.device, self.torch_device = device.index, device
        self.empty = capabilities.empty_strided() if device.type == "cuda" else None
        if self.empty is None:
            self.empty = lambda *of: torch.empty_strided(*of[:2], dtype=of[2], device=device)

    def __call__(self, addresses: list[int]) -> object:
        """Launches for tensors at these addresses; the list is overwritten."""
        if self.device is not None and self.device != current_device():
            with torch.cuda.device(self.device):
                return self(addresses)
        created = []
        for allocation in self.allocations:
            y = semaphores(self.torch_device, allocation) if type(allocation) is int else self.empty(*allocation)
            created.append(y)
            addresses.append(y.data_ptr())
        stream = current_stream(self.device)
        hooks = _launch_hooks()
        for compiled, run, grid, function, packed_metadata, arguments, pointers, descriptors in self.launches:
            arguments = arguments.copy()
            for position, source, offset in pointers:
                arguments[position] = addresses[source] + offset
            for descriptor in descriptors:
                position, source, offset = descriptor.base
                arguments[position] = descriptor.at(addresses[source] + offset)
            if hooks is None:
                run(*grid, stream, function, packed_metadata, None, None, None, *arguments)
            else:
                metadata = compiled.launch_metadata(grid, stream, *arguments)
                run(*grid, stream, function, packed_metadata, metadata, *hooks, *arguments)
        results = self.results
        if results is None:
            return None
        if type(results) is int:
            return created[results]
        return tuple([None if i is None else created[i] for i in results])


def _launch_hooks() -> tuple | None:
    """What Triton calls before and after a launch, for a profiler; None where nobody listens."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (enter, leave) if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) else None
