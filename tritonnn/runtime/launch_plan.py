"""Launch plans: what a launcher did for arguments of one kind, done again without its Python.

The first call with arguments of a new kind (`launch_key`) runs the launcher, and what it allocates and launches is
recorded (recording.py); later calls allocate and launch the same with their own addresses (replay.py). A launcher that
also computes with PyTorch's operators, a copy of an input say, has no plan and runs at every call.

A launcher with plans decides by three things only: its launch key, the state that `Plans` is given, and what changes
only together with a call of `forget_plans` (the tuned tables).
"""

from collections.abc import Callable

import torch
import triton
from torch.autograd import forward_ad

from . import capabilities
from .recording import CONSTANTS, LOCAL, overlap, record
from .replay import Plan
from .semaphores import semaphores

MOST_PLANS = 4096
"""Kinds of arguments an operator remembers."""
TENSORS = (torch.Tensor, torch.nn.Parameter)
UNSEEN = object()
COMPILATION = getattr(triton.knobs, "compilation", None)
KNOWN = capabilities.KNOWN
is_capturing = torch.cuda.is_current_stream_capturing
OPTIONS = {} if triton.knobs.runtime.interpret else capabilities.options_of_launches()


_generation = 0
"""A launch that was planned in an earlier generation is planned anew."""


def forget_plans() -> None:
    """Has all launches planned anew: choices of kernels may have changed, or the launchers are to be seen running."""
    global _generation
    _generation += 1


def launch(kernel: Callable, grid: tuple[int, ...], *args, **constants) -> None:
    """kernel[grid](*args, **constants), noted if somebody records."""
    recording = LOCAL.recording
    if recording is None:
        kernel[grid](*args, **constants, **OPTIONS)
        return
    with recording.paused():
        compiled = kernel[grid](*args, **constants, **OPTIONS)
    recording.note_launch(kernel, compiled, grid, args, constants)


def launch_semaphores(device: torch.device, tiles: int) -> torch.Tensor:
    """`semaphores` for the next launch, noted if somebody records."""
    recording = LOCAL.recording
    if recording is None:
        return semaphores(device, tiles)
    with recording.paused():
        counts = semaphores(device, tiles)
    recording.note_semaphores(counts, tiles)
    return counts


def launch_key(args: tuple) -> tuple[tuple, list[int], bool] | None:
    """The kind of these arguments, captured in a CUDA graph or not, the addresses of the tensors among them, and
    whether one of these requires a gradient.

    None where one is neither a plain tensor nor a constant.
    """
    kind, addresses, on_gpu, wanted = [], [], False, False
    try:
        for arg in args:
            cls = type(arg)
            if cls in TENSORS:
                if arg.is_neg():
                    return None
                address = arg.data_ptr()
                addresses.append(address)
                device = arg.get_device()
                if device >= 0:
                    on_gpu = True
                if arg.requires_grad:
                    wanted = True
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
    return tuple(kind), addresses, wanted


class Plans:
    """What a function did for the kinds of arguments that it was called with.

    `state(first)`, of the first of them, a tensor, is what else it decides by.
    """

    def __init__(self, state: Callable[[torch.Tensor], object] | None = None) -> None:
        self.plans: dict[tuple, Plan | None] = {}
        self.state = state

    def run(self, key: tuple[tuple, list[int], bool], args: tuple, function: Callable, *function_args) -> object:
        """function(*function_args), by plan where the kind of `args`, all that it depends on, was seen before.

        `key` is `launch_key(args)`.
        """
        if LOCAL.recording is not None or getattr(COMPILATION, "instrumentation_mode", ""):
            return function(*function_args)
        state = self.state
        try:
            kind = key[0], None if state is None else state(args[0]), _generation
            plan = self.plans.get(kind, UNSEEN)
        except (AttributeError, TypeError):  # the first is no tensor; a tuple of what has no hash
            plan = None
        if plan is None:
            return function(*function_args)
        if plan is not UNSEEN:
            return plan(key[1])
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if not can_record(tensors) or overlap(tensors):
            return function(*function_args)
        result, plan = record(tensors, function, *function_args)
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        self.plans[kind] = plan
        return result


def plain_eager() -> bool:
    """Whether no compiler, tracer, transform, mode or forward-mode differentiation sees which operators run."""
    if torch.compiler.is_compiling():
        return False
    if not (KNOWN.get("watchers") or capabilities.knows("watchers")):
        return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or (torch._C._len_torch_dispatch_stack() and LOCAL.recording is None)
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def can_record(tensors: list[torch.Tensor]) -> bool:
    """Whether kernels run compiled on a GPU, and no other mode or transform is active that a mode might disturb."""
    if not (capabilities.knows("launches") and capabilities.knows("watchers")):
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return bool(tensors) and tensors[0].is_cuda and not (triton.knobs.runtime.interpret or watched)
