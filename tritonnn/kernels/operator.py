"""Registers launchers as PyTorch operators, `torch.ops.tritonnn.<name>`, so that autograd and compilers see them."""

import functools
import threading
from collections.abc import Callable

import torch
import triton

LIBRARY = torch.library.Library("tritonnn", "DEF")
PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
CONSTANTS = (tuple, int, float, bool, str)
INTERPRETER = threading.RLock()  # Triton's interpreter replaces the functions of triton.language while a kernel runs


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
        with INTERPRETER:
            return launch(x, *args)

    return checked


def each_example(op: Callable) -> Callable:
    """The rule of torch.vmap for op: one call an example."""

    def rule(info, in_dims, *args):
        examples = [
            op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if examples[0] is None:  # an operator in place
            return None, None
        if not isinstance(examples[0], tuple):
            return torch.stack(examples), 0
        return tuple(torch.stack(outputs) for outputs in zip(*examples)), (0,) * len(examples[0])

    return rule


def _differentiable_by_transforms(op: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """op under the transforms of torch.func, which do not see what `register_autograd` registers."""

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

    Transformable.forward = staticmethod(lambda *args: op(*args))
    Transformable.setup_context = staticmethod(setup_context)
    Transformable.backward = staticmethod(backward)
    return Transformable.apply


def _shortest_way(direct: dict[str, Callable], op: Callable, transformed: Callable) -> Callable:
    """Calls `direct` where nobody watches, which saves the time of PyTorch's dispatcher; `op` where somebody may.

    Watchers are autograd, compilers, tracers, the transforms of torch.func (which call `transformed`), and modes and
    subclasses of tensors that see the operators called.
    """

    def call(x: torch.Tensor, *args):
        if torch._C._are_functorch_transforms_active():
            return transformed(x, *args)
        watched = (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch.jit.is_tracing()
            or x.device.type not in direct
            or not all(type(t) in PLAIN or type(t) in CONSTANTS for t in (x, *args))
        )
        return op(x, *args) if watched else direct[x.device.type](x, *args)

    return call


def register(
    schema: str,
    launch: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Defines the operator `schema` and returns what calls it.

    `launch` computes it with a Triton kernel, `fake` allocates its outputs only; `setup_context` and `backward` are
    those of `torch.library.register_autograd`, which are also those of a `torch.autograd.Function`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _on_current_device(launch), "CUDA")
    LIBRARY.impl(name, _in_interpreter(launch), "CPU")
    torch.library.register_fake(f"tritonnn::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.tritonnn, name).default
    if "(a!" in schema:  # only the dispatcher counts that a tensor was overwritten
        return op
    direct = {"cuda": _on_current_device(launch), "cpu": _in_interpreter(launch)}
    if backward is None:
        return _shortest_way(direct, op, op)
    torch.library.register_vmap(f"tritonnn::{name}", each_example(op), lib=LIBRARY)
    torch.library.register_autograd(f"tritonnn::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return _shortest_way(direct, op, _differentiable_by_transforms(op, setup_context, backward))
