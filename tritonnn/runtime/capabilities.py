"""Which private parts of Triton and PyTorch can be used: each is checked once, and unused if it has changed.

The public way then gives the same numbers and takes longer; `notes` and the reports say so. The checks were written for
triton 3.6 to 3.9 and torch 2.11 to 2.15.
"""

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable

import torch
import triton
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

from . import hardware

LAUNCHER = ("self", "gridX", "gridY", "gridZ", "stream", "function")
AND_HOOKS = (*LAUNCHER, "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
"""Parameters of Triton's launchers. In 3.6 the launch metadata and hooks are part of `args`."""
DESCRIPTOR = {"base", "shape", "strides", "block_shape", "layout", "padding", "round_f32_to_tf32"}
"""Fields of descriptors, of which `base` alone is an address."""
PRIVATE_OF_TORCH = {
    "plain eager calls": (
        "_are_functorch_transforms_active",
        "_len_torch_function_stack",
        "_len_torch_dispatch_stack",
        "_is_tracing",
    ),
    "CUDA graphs": ("_cuda_clearCublasWorkspaces",),
}


def _has(owner: object, *names: str) -> bool:
    return all(hasattr(owner, name) for name in names)


def _launchers() -> list[type]:
    """Those of the backends that Triton brings."""
    found = []
    for backend, name in (("nvidia", "CudaLauncher"), ("amd", "HIPLauncher")):
        try:
            found.append(getattr(importlib.import_module(f"triton.backends.{backend}.driver"), name))
        except ImportError:  # left out of this Triton
            continue
    return found


def _knows_launches() -> bool:
    """A compiled kernel is launched by run(x, y, z, stream, function, metadata, launch metadata, two hooks, *args)."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    called = set(JITFunction.run.__code__.co_names)
    calls = {"run", "function", "packed_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"} <= called
    signatures = [tuple(inspect.signature(launcher.__call__).parameters) for launcher in _launchers()]
    launches = all(signature in ((*LAUNCHER, "args"), (*AND_HOOKS, "args")) for signature in signatures)
    hooks = _has(triton.knobs.runtime, "launch_enter_hook", "launch_exit_hook")
    watched = hasattr(triton.knobs.compilation, "instrumentation_mode")
    return calls and launches and hooks and watched and _has(CompiledKernel, "run", "launch_metadata")


OF_LAUNCHER = set(
    """_allocation _allocator _profile_allocator _stream_sync active active_driver alloc_fn
    allocate_default_profile_scratch arg_annotations driver experimental gsan get get_current_device get_device_rank
    get_global_state_pointer get_launch_state global_scratch_align global_scratch_size gsan_enabled
    has_profile_allocator is_stream_capturing kernel_signature launch launch_cooperative_grid launch_pdl num_ctas
    profile_scratch_align profile_scratch_size runtime triton utils triton.experimental.gsan._allocator
    triton.experimental.gsan._stream_sync GSAN_PER_DEVICE_STATE_STRIDE synchronize_launch_stream RuntimeError""".split()
)
"""All that Triton's launcher for NVIDIA calls and reads: scratch memory and a sanitizer are asked for in
`is_plain_launcher`, the rest is arguments."""


def _knows_launchers() -> bool:
    """What a launcher does besides calling `launch` is to allocate scratch memory, and to serve a sanitizer."""
    code = _nvidia_launcher().__call__.__code__
    codes = [code, *(inner for inner in code.co_consts if inspect.iscode(inner))]
    return knows("launches") and all(set(code.co_names) <= OF_LAUNCHER for code in codes)


def _nvidia_launcher() -> type:
    from triton.backends.nvidia.driver import CudaLauncher

    return CudaLauncher


def is_plain_launcher(run: object) -> bool:
    """Whether a launcher that is known needs no scratch memory, and is watched by no sanitizer."""
    scratch = getattr(run, "global_scratch_size", 1), getattr(run, "profile_scratch_size", 1)
    return type(run) is _nvidia_launcher() and scratch == (0, 0) and not getattr(run, "gsan_enabled", False)


def _knows_descriptors() -> bool:
    """What a launcher reads of a descriptor is its fields, and of its base the address."""
    return all(_is_known_descriptor(cls) for cls in descriptors())


def descriptors() -> list[type]:
    """The classes of tensor descriptors, Triton's and, where it is where it was known, Gluon's."""
    try:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as OfGluon
    except ImportError:
        return [TensorDescriptor]
    return [TensorDescriptor, OfGluon]


def _is_known_descriptor(cls: type) -> bool:
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return {"base", "shape", "strides", "padding"} <= fields <= DESCRIPTOR and not hasattr(cls, "__slots__")


def _knows_preloading() -> bool:
    """A hook is told of what is about to be compiled, in a form that `preload` takes."""
    from triton.runtime.jit import JITFunction, JitFunctionInfo

    takes = list(inspect.signature(JITFunction.preload).parameters) == ["self", "specialization_data"]
    told = "jit_function" in {field.name for field in dataclasses.fields(JitFunctionInfo)}
    return takes and told and hasattr(triton.knobs.runtime, "jit_cache_hook")


def _knows_cache_keys() -> bool:
    from triton.runtime.jit import JITCallable

    return isinstance(inspect.getattr_static(JITCallable, "cache_key"), property)


def _knows_watchers() -> bool:
    """Whether it can be told that transforms, modes or tracers watch a call."""
    return _has(torch._C, *PRIVATE_OF_TORCH["plain eager calls"]) and hasattr(forward_ad, "_current_level")


def _knows_recording() -> bool:
    """`torch.autograd.Function.apply` is its base's, or checks whether a transform is active, and calls that."""
    base = super(torch.autograd.Function, torch.autograd.Function).apply
    if torch.autograd.Function.apply == base:  # in torch 2.15
        return True
    known = {"_is_setup_context_defined", "setup_context", "forward", "torch", "_C", "_are_functorch_transforms_active"}
    known |= {"_functorch", "utils", "unwrap_dead_wrappers", "super", "apply", "RuntimeError", "custom_function_call"}
    return set(torch.autograd.Function.apply.__func__.__code__.co_names) <= known


def _knows_workspaces() -> bool:
    return _has(torch._C, *PRIVATE_OF_TORCH["CUDA graphs"])


CHECKS: dict[str, tuple[Callable[[], bool], str]] = {
    "launches": (_knows_launches, "every launch is found out anew by Triton, which takes the host longer"),
    "descriptors": (_knows_descriptors, "launches with tensor descriptors are found out anew by Triton"),
    "launchers": (_knows_launchers, "every launch goes through Triton's launcher, which takes the host longer"),
    "preloading": (_knows_preloading, "tuning compiles one kernel after the other"),
    "cache keys": (_knows_cache_keys, "a kernel may be compiled again in another process"),
    "watchers": (_knows_watchers, "every call goes through PyTorch's dispatcher, which takes the host longer"),
    "recording": (_knows_recording, "autograd records every call as PyTorch does, which takes the host longer"),
    "workspaces": (_knows_workspaces, "networks are not captured in CUDA graphs"),
}
"""For each part the check, and what is done without the part."""
_OF_TORCH = ("watchers", "recording", "workspaces")


KNOWN: dict[str, bool] = {}
"""What was checked, in a dictionary, which compilers can read."""


def knows(part: str) -> bool:
    """Whether a part of `CHECKS` is as it was known."""
    if part not in KNOWN:
        try:
            KNOWN[part] = CHECKS[part][0]()
        except Exception:  # whatever an unknown version raises
            KNOWN[part] = False
    return KNOWN[part]


knows("watchers")  # compilers find it answered


def notes() -> list[str]:
    """A line for each part that is not used, for the reports."""
    found = []
    for part, (_, instead) in CHECKS.items():
        if not knows(part):
            of = f"torch {torch.__version__}" if part in _OF_TORCH else f"triton {triton.__version__}"
            found.append(f"{part} of {of} are not as they were known: {instead}")
    if not triton.__version__.startswith(hardware.GLUON_VERSIONS):
        found.append(f"kernels in Gluon were not checked with triton {triton.__version__}: slower ones run instead")
    return found


@functools.lru_cache
def empty_strided(device: str) -> Callable | None:
    """PyTorch's allocation for compiled code on a kind of device, past the dispatcher: (size, stride, dtype)."""
    try:
        allocate = getattr(torch._C._dynamo.guards, f"_empty_strided_{device}")
        y = allocate((2, 1), (1, 2), torch.float16)
        as_known = y.device.type == device and y.shape == (2, 1) and y.stride() == (1, 2) and y.dtype == torch.float16
    except Exception:
        return None
    return allocate if as_known else None


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` for plain eager mode: without its checks for the transforms of torch.func, if it can be told."""
    return super(torch.autograd.Function, function).apply if knows("recording") else function.apply


def transforms_are_active() -> bool:
    """Whether a transform of torch.func runs; where that cannot be told, no: PyTorch's dispatcher deals with them."""
    return knows("watchers") and torch._C._are_functorch_transforms_active()


def current_level() -> int:
    """Of forward-mode differentiation; -1 outside."""
    return getattr(forward_ad, "_current_level", -1)


def any_autocast() -> bool:
    """Whether autocast is on for some device."""
    if hasattr(torch._C, "_is_any_autocast_enabled"):
        return torch._C._is_any_autocast_enabled()
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


ROUNDS_ON_LOAD: tuple[str, ...] = ("3.9.",) if triton.knobs.runtime.interpret else ("3.7.", "3.8.", "3.9.")
"""Versions of Triton whose descriptors were shown on a GPU to round float32 to TF32, to nearest, as they load.

The interpreters of 3.7 and 3.8 leave float32 as it is.
"""


@functools.lru_cache
def can_round_on_load() -> bool:
    """Whether all descriptors have the field that asks for it."""
    return all("round_f32_to_tf32" in {field.name for field in dataclasses.fields(cls)} for cls in descriptors())


def rounds_on_load() -> bool:
    """Whether x that is to be rounded to TF32 is so by the descriptors that load it, at no cost."""
    return triton.__version__.startswith(ROUNDS_ON_LOAD) and can_round_on_load()


def rounding_on_load(round_x: bool) -> dict[str, bool]:
    """Arguments of the descriptors of x, which is to be rounded to TF32 or not; empty where a kernel is to do that."""
    return {"round_f32_to_tf32": True} if round_x and rounds_on_load() else {}


def options_of_launches() -> dict[str, bool]:
    """What every launch tells the compiler: from triton 3.9 on, to fuse products with sums, as before by itself."""
    return {"enable_fp_fusion": True} if hasattr(getattr(triton.knobs, "language", None), "fp_fusion_enabled") else {}


@functools.lru_cache
def check_interpreter() -> None:
    """Raises a RuntimeError where Triton's interpreter cannot run with the installed NumPy."""
    import numpy

    if _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} fails on loops with numpy {numpy.__version__}: "
            'pip install "numpy<2.4", or take triton 3.7 or newer, or a GPU'
        )


def _version(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def forget() -> None:
    """Has all parts checked anew."""
    KNOWN.clear()
    can_round_on_load.cache_clear()
    empty_strided.cache_clear()
