"""What a launch plan does at every call: allocate, fill addresses into recorded arguments, launch compiled kernels."""

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
import triton

from . import capabilities
from .direct_launch import direct_launch
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

    def __call__(self, stream: int, addresses: list[int], hooks: tuple = (None, None)) -> None:
        """Through Triton's launcher, which calls the hooks."""
        arguments = self.arguments.copy()
        for position, source, offset in self.pointers:
            arguments[position] = addresses[source] + offset
        for descriptor in self.descriptors:
            position, source, offset = descriptor.base
            arguments[position] = descriptor.at(addresses[source] + offset)
        metadata = None
        if hooks != (None, None):
            metadata = self.compiled.launch_metadata(self.grid, stream, *arguments)
        self.run(*self.grid, stream, self.function, self.packed_metadata, metadata, *hooks, *arguments)

    def directly(self, addresses: list[int]) -> Callable[[int, list[int]], None]:
        """The shortest way to launch it again, found out with the addresses of the first time."""
        direct = direct_launch(self.compiled, self.grid, self.arguments, self.pointers, self.descriptors, addresses)
        return self if direct is None else direct


class Plan:
    """Allocations (size, stride and type, or a number of semaphores), launches, and which allocations are returned.

    `addresses` are those of the tensors and allocations when it was recorded.
    """

    def __init__(
        self, device: torch.device, allocations: list, launches: list[Launch], results: object, addresses: list[int]
    ) -> None:
        self.allocations, self.launches = allocations, launches
        self.hand_out = _hand_out(results)
        self.device, self.torch_device = device.index, device
        self.direct = [launch.directly(addresses) for launch in launches]
        self.empty = capabilities.empty_strided(device.type)
        if self.empty is None:
            self.empty = lambda *of: torch.empty_strided(*of[:2], dtype=of[2], device=device)

    def __call__(self, addresses: list[int]) -> object:
        """Launches for tensors at these addresses; the list is overwritten."""
        device = self.device
        if device is not None and device != current_device():
            with torch.cuda.device(device):
                return self(addresses)
        created, empty = [], self.empty
        for allocation in self.allocations:
            y = semaphores(self.torch_device, allocation) if type(allocation) is int else empty(*allocation)
            created.append(y)
            addresses.append(y.data_ptr())
        stream = current_stream(device)
        hooks = _launch_hooks()
        if hooks is None:
            for launch in self.direct:
                launch(stream, addresses)
        else:
            for launch in self.launches:
                launch(stream, addresses, hooks)
        created.append(None)
        return self.hand_out(created)


def _hand_out(results: int | list[int | None] | None) -> Callable[[list], object]:
    """A function of the allocations and, last, None, that returns those of these numbers: one, a tuple, or None."""
    if not isinstance(results, list):
        return itemgetter(-1 if results is None else results)
    numbers = [-1 if i is None else i for i in results]
    return itemgetter(*numbers) if len(numbers) > 1 else lambda created: tuple(created[i] for i in numbers)


def _launch_hooks() -> tuple | None:
    """What Triton calls before and after a launch, for a profiler; None where nobody listens."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (enter, leave) if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) else None
