"""Launch plans: what a launcher did for arguments of one kind, done again without its Python.

The first call with arguments of a new kind (`launch_key`) runs the launcher, and what it allocates and launches is
recorded; later calls allocate and launch the same with their own addresses. A launcher that also computes with
PyTorch's operators, a copy of an input say, has no plan and runs at every call.

A launcher with plans decides by three things only: its launch key, the state that `Plans` is given, and what changes
only together with a call of `forget_plans` (the tuned tables).
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from . import capabilities
from .semaphores import semaphores

MOST_PLANS = 4096
"""Kinds of arguments an operator remembers."""
TENSORS = (torch.Tensor, torch.nn.Parameter)
CONSTANTS = frozenset((int, float, bool, str, tuple, torch.Size, torch.dtype, type(None)))
ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)
UNSEEN = object()
COMPILATION = triton.knobs.compilation
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
is_capturing = torch.cuda.is_current_stream_capturing
DESCRIPTORS = tuple(capabilities.descriptors())
OPTIONS = {} if triton.knobs.runtime.interpret else capabilities.options_of_launches()


_generation = 0
"""A launch that was planned in an earlier generation is planned anew."""


def forget_plans() -> None:
    """Has all launches planned anew: choices of kernels may have changed, or launches are noted and not made."""
    global _generation
    _generation += 1


class _Local(threading.local):
    recording: "_Recording | None" = None


LOCAL = _Local()


def launch(kernel: Callable, grid: tuple[int, ...], *args, **constants) -> None:
    """kernel[grid](*args, **constants), noted if somebody records."""
    recording = LOCAL.recording
    if recording is None:
        kernel[grid](*args, **constants, **OPTIONS)
        return
    recording.paused = True  # what Triton itself does is no part of the plan
    compiled = kernel[grid](*args, **constants, **OPTIONS)
    recording.paused = False
    recording.launched(kernel, compiled, grid, args, constants)


def launch_semaphores(device: torch.device, tiles: int) -> torch.Tensor:
    """`semaphores` for the next launch, noted if somebody records."""
    recording = LOCAL.recording
    if recording is None:
        return semaphores(device, tiles)
    recording.paused = True
    counts = semaphores(device, tiles)
    recording.paused = False
    recording.counted(counts, tiles)
    return counts


def launch_key(args: tuple, grad: bool = False) -> tuple[tuple, list[int]] | None:
    """The kind of these arguments, captured in a CUDA graph or not, and the addresses of the tensors among them.

    None where one is neither a plain tensor nor a constant or, with `grad`, requires a gradient.
    """
    kind, addresses, on_gpu = [], [], False
    try:
        for arg in args:
            cls = type(arg)
            if cls in TENSORS:
                if (grad and arg.requires_grad) or arg.is_neg():
                    return None
                address = arg.data_ptr()
                addresses.append(address)
                device = arg.get_device()
                on_gpu = on_gpu or device >= 0
                kind += arg.shape, arg.stride(), arg.dtype, device, address & 15
            elif cls in CONSTANTS:
                kind.append(arg)
            elif cls is list:  # from PyTorch's dispatcher
                kind.append(tuple(arg))
            else:
                return None
    except RuntimeError:  # a nested or sparse tensor has no strides
        return None
    kind.append(on_gpu and is_capturing())
    return tuple(kind), addresses


class Plans:
    """What a function did for the kinds of arguments that it was called with; `state()` is what else it decides by."""

    def __init__(self, state: Callable[[], object] | None = None) -> None:
        self.plans: dict[tuple, _Plan | None] = {}
        self.state = state

    def run(self, described: tuple[tuple, list[int]], args: tuple, function: Callable, *function_args) -> object:
        """function(*function_args), by plan where the kind of `args`, all that it depends on, was seen before.

        `described` is `launch_key(args)`.
        """
        if LOCAL.recording is not None or getattr(COMPILATION, "instrumentation_mode", ""):
            return function(*function_args)
        kind, addresses = described
        state = self.state and self.state()
        kind = kind, state, _generation
        try:
            plan = self.plans.get(kind, UNSEEN)
        except TypeError:  # a tuple of what has no hash
            plan = None
        if plan is None:
            return function(*function_args)
        if plan is not UNSEEN:
            return plan(addresses)
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if not _can_record(tensors) or _overlap(tensors):
            return function(*function_args)
        result, plan = _record(tensors, function, *function_args)
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        self.plans[kind] = plan
        return result


class _Address:
    """The base of a descriptor, as far as Triton's launcher asks for it."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Descriptor(NamedTuple):
    """A recorded tensor descriptor without its base: where it goes, what it points into, its class and other fields."""

    position: int
    source: int
    offset: int
    cls: type
    fields: dict[str, object]

    def at(self, address: int) -> object:
        """Of the same class, and alike but for the base. Its checks were made when it was recorded."""
        descriptor = object.__new__(self.cls)
        descriptor.__dict__.update(self.fields)
        descriptor.base = _Address(address)
        return descriptor


class _Launch(NamedTuple):
    """A compiled kernel, its grid and arguments, and where pointers go: (position, source, offset, ...)."""

    compiled: object
    run: Callable
    grid: tuple[int, int, int]
    function: int
    packed_metadata: tuple
    arguments: list
    pointers: list[tuple[int, int, int]]
    descriptors: list[_Descriptor]


class _Plan:
    """Allocations (size, stride and type, or a number of semaphores), launches, and which allocations are returned."""

    def __init__(self, device: torch.device, allocations: list, launches: list[_Launch], results: object) -> None:
        self.allocations, self.launches, self.results = allocations, launches, results
        self.device, self.torch_device = device.index, device
        self.empty = capabilities.empty_strided() if device.type == "cuda" else None
        if self.empty is None:
            self.empty = lambda *of: torch.empty_strided(*of[:2], dtype=of[2], device=device)

    def __call__(self, addresses: list[int]) -> object:
        """For tensors at these addresses; the list is overwritten."""
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
                arguments[descriptor.position] = descriptor.at(addresses[descriptor.source] + descriptor.offset)
            if hooks is None:
                run(*grid, stream, function, packed_metadata, None, None, None, *arguments)
            else:
                metadata = compiled.launch_metadata(grid, stream, *arguments)
                run(*grid, stream, function, packed_metadata, metadata, *hooks, *arguments)
        results = self.results
        if results is None:
            return None
        return created[results] if type(results) is int else tuple(created[i] for i in results)


class _Recording(TorchDispatchMode):
    """Notes the allocations and launches that it sees; `complete` as long as they are all that happened."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors, self.created, self.launches = tensors, [], []
        self.counts: dict[int, int] = {}
        self.complete, self.paused = True, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if self.paused:
            return result
        if func in ALLOCATIONS:
            self.created.append(result)
        elif not func.is_view:
            self.complete = False
        return result

    def counted(self, counts: torch.Tensor, tiles: int) -> None:
        self.counts[len(self.created)] = tiles
        self.created.append(counts)

    def launched(self, kernel, compiled, grid, args, constants) -> None:
        named = dict(zip(kernel.arg_names, args)) | constants
        arguments = [named.get(name, self) for name in kernel.arg_names]
        pointers, descriptors = [], []
        for position, arg in enumerate(arguments):
            if isinstance(arg, torch.Tensor):
                pointers.append((position, *self._source(arg)))
                arguments[position] = None
            elif isinstance(arg, DESCRIPTORS):
                fields = {name: value for name, value in vars(arg).items() if name != "base"}
                descriptors.append(_Descriptor(position, *self._source(arg.base), type(arg), fields))
                arguments[position] = None
                self.complete = self.complete and capabilities.knows("descriptors")
            elif type(arg) not in CONSTANTS and not isinstance(arg, tl.dtype):
                self.complete = False
        grid = (*grid, 1, 1)[:3]
        try:
            handles = compiled.run, grid, compiled.function, compiled.packed_metadata
        except AttributeError:  # another Triton
            self.complete = False
        else:
            self.launches.append(_Launch(compiled, *handles, arguments, pointers, descriptors))
        if getattr(kernel, "pre_run_hooks", None):
            self.complete = False

    def _source(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Which tensor the memory of this one belongs to, among inputs and allocations, and the offset in bytes."""
        address = tensor.data_ptr()
        for index, source in enumerate(self.tensors):
            if tensor is source or address in _memory(source):
                return index, address - source.data_ptr()
        for index, source in enumerate(self.created):
            if _same_storage(tensor, source):
                return len(self.tensors) + index, address - source.data_ptr()
        self.complete = False
        return 0, 0

    def plan(self, results: object) -> _Plan | None:
        device = self.tensors[0].device
        if isinstance(results, tuple):
            indices = [self._index(y) for y in results]
        else:
            indices = None if results is None else self._index(results)
        if not self.complete or any(y.device != device for y in self.created):
            return None
        allocations = [self.counts.get(index, _form(y)[:3]) for index, y in enumerate(self.created)]
        return _Plan(device, allocations, self.launches, indices)

    def _index(self, y: torch.Tensor) -> int:
        """Which allocation y is; not all of them are handed out as the very objects that were made."""
        for index, created in enumerate(self.created):
            if isinstance(y, torch.Tensor) and _same_storage(y, created) and _form(y) == _form(created):
                return index
        self.complete = False
        return 0


def _record(tensors: list[torch.Tensor], function: Callable, *args) -> tuple[object, _Plan | None]:
    """function(*args), and the plan to do that again if there can be one."""
    recording = _Recording(tensors)
    LOCAL.recording = recording
    try:
        with recording:
            results = function(*args)
    finally:
        LOCAL.recording = None
    return results, recording.plan(results)


def _form(t: torch.Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype, t.storage_offset()


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _memory(t: torch.Tensor) -> range:
    """The addresses from its first element to the end of its last."""
    if t.numel() == 0:
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return range(t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size())


def _overlap(tensors: list[torch.Tensor]) -> bool:
    """Whether an address may belong to two of them."""
    memories = sorted((m.start, m.stop) for m in map(_memory, tensors) if m)
    return any(first[1] > second[0] for first, second in zip(memories, memories[1:]))


def plain_eager() -> bool:
    """Whether nobody wants to see which operators run: compilers, tracers, transforms, forward mode, modes."""
    if torch.compiler.is_compiling():
        return False
    return capabilities.knows("watchers") and not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or (torch._C._len_torch_dispatch_stack() and LOCAL.recording is None)
        or torch._C._is_tracing()
        or capabilities.current_level() >= 0
    )


def _can_record(tensors: list[torch.Tensor]) -> bool:
    """On a GPU, where kernels are compiled; modes and transforms may not expect another mode."""
    if not (capabilities.knows("launches") and capabilities.knows("watchers")):
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return bool(tensors) and tensors[0].is_cuda and not (triton.knobs.runtime.interpret or watched)


def current_stream(device: int) -> int:
    return triton.runtime.driver.active.get_current_stream(device)


def _launch_hooks() -> tuple | None:
    """What Triton calls before and after a launch, for a profiler; None where nobody listens."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (enter, leave) if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) else None
