"""Registers launchers as PyTorch operators, `torch.ops.tritonnn.<name>`, so that autograd and compilers see them."""

import functools
import threading
from collections.abc import Callable

import torch
import triton

from .capabilities import check_interpreter, transforms_are_active
from .launch_plan import TENSORS, Plans, launch_key, plain_eager
from .recording import CONSTANTS

LIBRARY = torch.library.Library("tritonnn", "DEF")
PLAIN = (*TENSORS, type(None))
INTERPRETER = threading.RLock()  # Triton's interpreter replaces the functions of triton.language while a kernel runs


def _on_current_device(launch: Callable) -> Callable:
    """Makes the first argument's GPU the current one, on which Triton launches."""

    @functools.wraps(launch)
    def guarded(x: torch.Tensor, *args):
        if x.device.index == torch.cuda.current_device():
            return launch(x, *args)
        with torch.cuda.device(x.device):
            return launch(x, *args)

    return guarded


def _in_interpreter(launch: Callable) -> Callable:
    """Runs a kernel on CPU tensors, which only Triton's interpreter can."""

    @functools.wraps(launch)
    def checked(x: torch.Tensor, *args):
        if not triton.knobs.runtime.interpret:
            raise RuntimeError(
                "tritonnn: CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before tritonnn is imported, "
                "or move the module and its input to a GPU"
            )
        check_interpreter()
        with INTERPRETER:
            return launch(x, *args)

    return checked


def each_example(op: Callable) -> Callable:
    """The rule of torch.vmap for op: it is called once for each example."""

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


class _Context:
    """A context of autograd whose saved tensors have been unpacked, which may be done once only."""

    def __init__(self, ctx, saved_tensors: tuple) -> None:
        self.ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name: str) -> object:
        return getattr(self.ctx, name)


def _recorded(
    name: str, run: Callable, setup_context: Callable, backward: Callable, state: Callable[[], object] | None
) -> Callable:
    """run(*args) as autograd records it in plain eager mode, in less time than the operator's own way takes.

    The backward pass goes by plan, too, as a whole: it depends on the gradients, what was saved, which gradients are
    needed, the constants of the call, and `state()`.
    """
    plans = Plans(state)

    def forward(ctx, *args):
        outputs = run(*args)
        ctx.set_materialize_grads(False)
        setup_context(ctx, args, outputs)
        ctx.constants = tuple(arg for arg in args if type(arg) not in TENSORS)
        return outputs

    def backward_by_plan(ctx, *grads):
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or not plain_eager():
            return backward(ctx, *grads)
        saved = ctx.saved_tensors
        arguments = *grads, *saved, ctx.needs_input_grad, ctx.constants
        key = launch_key(arguments)
        context = _Context(ctx, saved)
        return backward(context, *grads) if key is None else plans.run(key, arguments, backward, context, *grads)

    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward_by_plan)}
    return type(torch.autograd.Function)(name, (torch.autograd.Function,), parts).apply


def _shortest_way(
    plans: Plans,
    on_gpu: Callable,
    on_cpu: Callable,
    op: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    state: Callable[[], object] | None = None,
) -> Callable:
    """Runs the kernel directly in plain eager mode, which saves the time of PyTorch's dispatcher, and `op` otherwise.

    What counts against plain eager mode: compilers, tracers, the transforms of torch.func, and modes and subclasses of
    tensors that see the operators called. The call raises RuntimeError for ONNX, which has no operator to put in the
    kernel's place.
    """
    defaults = [argument.default_value for argument in op._schema.arguments]

    def run(*args):
        key = launch_key(args)
        if key is not None:
            x = args[0]
            if x.is_cuda:
                return plans.run(key, args, on_gpu, *args)
            if x.is_cpu:
                return plans.run(key, args, on_cpu, *args)
        _refuse_onnx()
        return op(*args)

    recorded = transformed = op
    if setup_context is not None and backward is not None:
        recorded = _recorded(op._schema.name.rpartition(":")[2], run, setup_context, backward, state)
        transformed = _differentiable_by_transforms(op, setup_context, backward)

    def call(*args):
        if plain_eager():
            wanted = torch.is_grad_enabled() and _wants_gradient(args)
            if wanted:
                return recorded(*args, *defaults[len(args) :])
            if wanted is not None:
                return run(*args)
        elif transforms_are_active():
            return transformed(*args)
        _refuse_onnx()
        return op(*args)

    return call


def _wants_gradient(args: tuple) -> bool | None:
    """Whether a tensor among them requires a gradient; None where one is neither a plain tensor nor a constant."""
    wanted = False
    for arg in args:
        cls = type(arg)
        if cls in TENSORS:
            wanted = wanted or arg.requires_grad
        elif cls not in CONSTANTS:
            return None
    return wanted


def _refuse_onnx() -> None:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "ONNX has no Triton kernels: restore the model first (tritonnn.restore) and export that; instead of a "
            "fused network export the model that it was made of"
        )


def _unless_for_onnx(fake: Callable) -> Callable:
    """What runs where ONNX's newer exporter looks at the operator, and where its older one does not."""

    @functools.wraps(fake)
    def checked(*args):
        _refuse_onnx()
        return fake(*args)

    return checked


def _by_plan(plans: Plans, launch: Callable) -> Callable:
    """The operator's kernel for PyTorch's dispatcher."""

    def kernel(*args):
        key = launch_key(args)
        return launch(*args) if key is None else plans.run(key, args, launch, *args)

    return kernel


def register(
    schema: str,
    launch: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    state: Callable[[], object] | None = None,
) -> Callable:
    """Defines the operator `schema` and returns what calls it.

    `launch` computes it with a Triton kernel, `fake` allocates its outputs only; `setup_context` and `backward` are
    those of `torch.library.register_autograd`, which are also those of a `torch.autograd.Function`. `state()` is what
    `launch` decides by besides its arguments.
    """
    name = schema.partition("(")[0]
    plans, on_gpu, on_cpu = Plans(state), _on_current_device(launch), _in_interpreter(launch)
    LIBRARY.define(schema)
    LIBRARY.impl(name, _by_plan(plans, on_gpu), "CUDA")
    LIBRARY.impl(name, _by_plan(plans, on_cpu), "CPU")
    torch.library.register_fake(f"tritonnn::{name}", _unless_for_onnx(fake), lib=LIBRARY)
    op = getattr(torch.ops.tritonnn, name).default
    if backward is not None:
        torch.library.register_vmap(f"tritonnn::{name}", each_example(op), lib=LIBRARY)
        torch.library.register_autograd(f"tritonnn::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return _shortest_way(plans, on_gpu, on_cpu, op, setup_context, backward, state)


def register_gradient(
    schema: str,
    launch: Callable,
    fake: Callable,
    formula: Callable,
    state: Callable[[], object] | None = None,
) -> Callable:
    """As `register`, for an operator that computes gradients; its own derivatives are those of `formula`.

    `formula(*args)` are the same gradients, a tensor or a tuple of them, by PyTorch's operators, which can be derived
    again and again.
    """

    def setup_context(ctx, inputs, output) -> None:
        ctx.arguments = [None if isinstance(arg, torch.Tensor) else arg for arg in inputs]
        ctx.positions = [i for i, arg in enumerate(inputs) if isinstance(arg, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))

    def backward(ctx, *grads) -> tuple:
        derivatives: list = [None] * len(ctx.arguments)
        arguments, again = list(ctx.arguments), torch.is_grad_enabled()
        with torch.enable_grad():
            for i, t in zip(ctx.positions, ctx.saved_tensors):
                arguments[i] = t.view_as(t)  # not t, from which another argument may have been computed
            gradients = formula(*arguments)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            outputs = [
                (y, grad) for y, grad in zip(gradients, grads) if grad is not None and y is not None and y.requires_grad
            ]
            wanted = [i for i in ctx.positions if ctx.needs_input_grad[i]]
            if outputs and wanted:
                ys, cotangents = zip(*outputs)
                inputs = [arguments[i] for i in wanted]
                found = torch.autograd.grad(ys, inputs, cotangents, create_graph=again, allow_unused=True)
                for i, derivative in zip(wanted, found):
                    derivatives[i] = derivative
        return tuple(derivatives)

    return register(schema, launch, fake, setup_context, backward, state)
