"""Registers launchers as PyTorch operators, `torch.ops.tritonnn.<name>`, so that autograd and compilers see them."""

import functools
from collections.abc import Callable

import torch
import triton

LIBRARY = torch.library.Library("tritonnn", "DEF")


def _on_current_device(launch: Callable) -> Callable:
    """Triton launches on the current GPU: makes it the one of the first argument."""

    @functools.wraps(launch)
    def guarded(x: torch.Tensor, *args):
        if x.device.index == torch.cuda.current_device():
            return launch(x, *args)
        with torch.cuda.device(x.device):
            return launch(x, *args)

    return guarded


def _in_interpreter(launch: Callable) -> Callable:
    """CPU tensors: only Triton's interpreter can run a kernel on them."""

    @functools.wraps(launch)
    def checked(x: torch.Tensor, *args):
        if not triton.knobs.runtime.interpret:
            raise RuntimeError(
                "tritonnn: CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before tritonnn is imported, "
                "or move the module and its input to a GPU"
            )
        return launch(x, *args)

    return checked


def register(
    schema: str,
    launch: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Defines the operator `schema` and returns what calls it.

    `launch` computes it with a Triton kernel, `fake` allocates its outputs only; `setup_context` and `backward` are
    those of `torch.library.register_autograd`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _on_current_device(launch), "CUDA")
    LIBRARY.impl(name, _in_interpreter(launch), "CPU")
    torch.library.register_fake(f"tritonnn::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"tritonnn::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.tritonnn, name).default
