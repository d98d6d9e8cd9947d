"""Recording what a launcher does, to make a launch plan of it: the allocations and launches, if these are all.

Allocations are seen as PyTorch's dispatcher passes them on; launches and semaphores are told by `launch_plan.launch`
and `launch_plan.launch_semaphores`. Anything else that is seen, and any argument whose address cannot be traced back to
a tensor of the call or to an allocation, means that there is no plan.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from . import capabilities
from .replay import Descriptor, Launch, Plan, Pointer

CONSTANTS = frozenset((int, float, bool, str, tuple, torch.Size, torch.dtype, type(None)))
"""Types of arguments of which calls of one kind have equal ones."""
ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)
DESCRIPTORS = tuple(capabilities.descriptors())
MISSING = object()


class _Local(threading.local):
    recording: "Recording | None" = None


LOCAL = _Local()
"""The recording, if any, that notes the launches of the thread that asks."""


def record(tensors: list[torch.Tensor], function: Callable, *args) -> tuple[object, Plan | None]:
    """function(*args), which reads these tensors, and the plan to do that again if there can be one."""
    LOCAL.recording = recording = Recording(tensors)
    try:
        with recording:
            results = function(*args)
    finally:
        LOCAL.recording = None
    return results, recording.plan(results)


class Recording(TorchDispatchMode):
    """Notes the allocations and launches that it sees; `complete` as long as they are all that happened."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.created: list[torch.Tensor] = []
        self.semaphores: dict[int, int] = {}
        """For those of `created` that are semaphores, how many they are."""
        self.launches: list[Launch] = []
        self.complete = True
        self._paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if self._paused:
            return result
        if func in ALLOCATIONS:
            self.created.append(result)
        elif not func.is_view:
            self.complete = False
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no part of the plan: what Triton itself does, say."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def note_semaphores(self, counts: torch.Tensor, tiles: int) -> None:
        self.semaphores[len(self.created)] = tiles
        self.created.append(counts)

    def note_launch(self, kernel, compiled, grid, args, constants) -> None:
        """kernel[grid](*args, **constants), which launched `compiled`."""
        named = dict(zip(kernel.arg_names, args)) | constants
        arguments = [named.get(name, MISSING) for name in kernel.arg_names]
        pointers, descriptors = self._take_addresses(arguments)
        if not all(type(arg) in CONSTANTS or isinstance(arg, tl.dtype) for arg in arguments):
            self.complete = False
        if getattr(kernel, "pre_run_hooks", None):
            self.complete = False
        try:
            handles = compiled.run, (*grid, 1, 1)[:3], compiled.function, compiled.packed_metadata
        except AttributeError:  # another Triton
            self.complete = False
        else:
            self.launches.append(Launch(compiled, *handles, arguments, pointers, descriptors))

    def _take_addresses(self, arguments: list) -> tuple[list[Pointer], list[Descriptor]]:
        """The tensors and descriptors among arguments, in whose place None is put."""
        pointers, descriptors = [], []
        for position, arg in enumerate(arguments):
            if isinstance(arg, torch.Tensor):
                pointers.append(self._pointer(position, arg))
            elif isinstance(arg, DESCRIPTORS):
                descriptors.append(Descriptor.of(arg, self._pointer(position, arg.base)))
            else:
                continue
            arguments[position] = None
        if descriptors and not capabilities.knows("descriptors"):
            self.complete = False
        return pointers, descriptors

    def _pointer(self, position: int, tensor: torch.Tensor) -> Pointer:
        """Into the tensor of the call or the allocation that its memory belongs to."""
        address = tensor.data_ptr()
        for index, source in enumerate(self.tensors):
            if tensor is source or address in memory_of(source):
                return Pointer(position, index, address - source.data_ptr())
        for index, source in enumerate(self.created):
            if _same_storage(tensor, source):
                return Pointer(position, len(self.tensors) + index, address - source.data_ptr())
        self.complete = False
        return Pointer(position, 0, 0)

    def plan(self, results: object) -> Plan | None:
        """A plan of what was noted that returns `results`: an allocation, a tuple of such and of None, or None."""
        device = self.tensors[0].device
        if isinstance(results, tuple):
            returned = [None if y is None else self._allocation(y) for y in results]
        else:
            returned = None if results is None else self._allocation(results)
        if not self.complete or any(y.device != device for y in self.created):
            return None
        allocations = [self.semaphores.get(index, _form(y)[:3]) for index, y in enumerate(self.created)]
        addresses = [t.data_ptr() for t in (*self.tensors, *self.created)]
        return Plan(device, allocations, self.launches, returned, addresses)

    def _allocation(self, y: object) -> int:
        """The number of the one that y is; not all are handed out as the very objects that were made."""
        for index, created in enumerate(self.created):
            if isinstance(y, torch.Tensor) and _same_storage(y, created) and _form(y) == _form(created):
                return index
        self.complete = False
        return 0


def _form(t: torch.Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype, t.storage_offset()


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def memory_of(t: torch.Tensor) -> range:
    """The addresses from its first element to the end of its last."""
    if t.numel() == 0:
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return range(t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size())


def overlap(tensors: list[torch.Tensor]) -> bool:
    """Whether an address may belong to two of them."""
    memories = sorted((m.start, m.stop) for m in map(memory_of, tensors) if m)
    return any(first[1] > second[0] for first, second in zip(memories, memories[1:]))
