"""Registers launchers as PyTorch operators, `torch.ops.tritonnn.<name>`, so that autograd and compilers see them."""

import functools
import threading
from collections.abc import Callable

import torch
import triton

from .capabilities import apply_of, check_interpreter, transforms_are_active
from .launch_plan import TENSORS, Plans, launch_key, plain_eager

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
        require_interpreter()
        with INTERPRETER:
            return launch(x, *args)

    return checked


def require_interpreter() -> None:
    """Raises a RuntimeError where kernels cannot run on CPU tensors."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "tritonnn: CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before tritonnn is imported, "
            "or move the module and its input to a GPU"
        )
    check_interpreter()


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


class Recorded:
    """What autograd records in plain eager mode, in less time than an operator's own way takes.

    `apply` takes the operator's arguments and, last, how to compute the outputs: `Plans`, a launch key, the arguments
    that it is of, and the function and arguments that `Plans.run` is to have; then those of the operator's arguments
    that are constants. `hand_out` makes of the outputs what is returned.

    The backward pass goes by plan, too, as a whole: it depends on the gradients, what was saved, which gradients are
    needed, the constants of the call, and `state`. Where it also depends on a tensor that is not saved, on its shape
    say, `setup_context` puts that into `ctx.constants`.
    """

    def __init__(
        self,
        name: str,
        setup_context: Callable,
        backward: Callable,
        state: Callable[[torch.Tensor], object] | None = None,
        hand_out: Callable | None = None,
    ) -> None:
        self.state = state
        gradients = Plans(state)

        def forward(ctx, *args):
            plans, key, key_args, launch, launch_args, ctx.constants = args[-1]
            outputs = plans.run(key, key_args, launch, *launch_args)
            ctx.set_materialize_grads(False)
            setup_context(ctx, args[:-1], outputs)
            return outputs if hand_out is None else hand_out(outputs)

        def gradients_of(ctx, *grads):
            found = backward(ctx, *grads)
            return (*found, None) if isinstance(found, tuple) else (found, None)

        def launch_backward(ctx, saved, *grads):
            return gradients_of(_Context(ctx, saved), *grads)

        def backward_by_plan(ctx, *grads):
            if grads[0] is None and all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            if torch.is_grad_enabled() or not plain_eager():
                return gradients_of(ctx, *grads)
            saved = ctx.saved_tensors
            arguments = *grads, *saved, ctx.needs_input_grad, ctx.constants
            key = launch_key(arguments)
            if key is None:
                return launch_backward(ctx, saved, *grads)
            return gradients.run(key, arguments, launch_backward, ctx, saved, *grads)

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward_by_plan)}
        self.apply = apply_of(type(torch.autograd.Function)(name, (torch.autograd.Function,), parts))

    def shortcut(self, tensors: int, constants: tuple, launch: Callable, of_all: bool = False) -> Callable:
        """For `by_plan` (layers/layer.py): the call with so many tensors and these constants, computed by `launch`.

        What is returned takes the layer, the addresses of a launch key, and the arguments that this is of, always of
        one kind, the call's tensors first. `of_all`: `launch` takes all these, not the call's tensors and constants.
        """
        plans, apply = Plans(self.state), self.apply

        def run(_: object, addresses: list[int], args: tuple):
            inputs = *args[:tensors], *constants
            return apply(*inputs, (plans, (None, addresses), args, launch, args if of_all else inputs, constants))

        return run


class Operator:
    """Runs the kernel directly in plain eager mode, which saves the time of PyTorch's dispatcher, and `op` otherwise.

    What counts against plain eager mode: compilers, tracers, the transforms of torch.func, and modes and subclasses of
    tensors that see the operators called. The call raises RuntimeError for ONNX, which has no operator to put in the
    kernel's place.
    """

    def __init__(
        self,
        launch: Callable,
        op: Callable,
        setup_context: Callable | None,
        backward: Callable | None,
        state: Callable[[torch.Tensor], object] | None,
    ) -> None:
        self.op, self.plans, self.launch = op, Plans(state), launch
        self.defaults = tuple(argument.default_value for argument in op._schema.arguments)
        self.recorded: Recorded | None = None
        self.transformed = op
        if setup_context is not None and backward is not None:
            self.recorded = Recorded(op._schema.name.rpartition(":")[2], setup_context, backward, state)
            self.transformed = _differentiable_by_transforms(op, setup_context, backward)

    def __call__(self, *args):
        if plain_eager():
            key = launch_key(args)
            if key is not None:
                if key[2] and self.recorded is not None and torch.is_grad_enabled():
                    inputs = *args, *self.defaults[len(args) :]
                    constants = tuple([arg for arg in inputs if type(arg) not in TENSORS])
                    return self.recorded.apply(*inputs, (self.plans, key, args, self.launch, inputs, constants))
                return self.plans.run(key, args, self.launch, *args)
        elif transforms_are_active():
            return self.transformed(*args)
        _refuse_onnx()
        return self.op(*args)

    def shortcut(self, tensors: int, constants: tuple, launch: Callable | None = None) -> Callable:
        """`Recorded.shortcut` of the operator, which has a backward pass.

        `launch`, of all that the launch key is of, computes the outputs in the operator's place.
        """
        assert self.recorded is not None
        return self.recorded.shortcut(tensors, constants, launch or self.launch, launch is not None)


def on_its_device(launch: Callable, op: Callable) -> Callable:
    """launch(x, ...) where x is, and `op` on devices without kernels."""
    on_gpu, on_cpu = _on_current_device(launch), _in_interpreter(launch)

    def located(x: torch.Tensor, *args):
        if x.is_cuda:
            return on_gpu(x, *args)
        if x.is_cpu:
            return on_cpu(x, *args)
        _refuse_onnx()
        return op(x, *args)

    return located


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


def register(
    schema: str,
    launch: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    state: Callable[[torch.Tensor], object] | None = None,
) -> Operator:
    """Defines the operator `schema` and returns what calls it.

    `launch` computes it with a Triton kernel, `fake` allocates its outputs only; `setup_context` and `backward` are
    those of `torch.library.register_autograd`, which are also those of a `torch.autograd.Function`. `state(x)`, of the
    first argument, is what `launch` decides by besides its arguments.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.tritonnn, name).default
    operator = Operator(on_its_device(launch, op), op, setup_context, backward, state)

    def kernel(*args):
        key = launch_key(args)
        return operator.launch(*args) if key is None else operator.plans.run(key, args, operator.launch, *args)

    for key in ("CUDA", "CPU"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"tritonnn::{name}", _unless_for_onnx(fake), lib=LIBRARY)
    if backward is not None:
        torch.library.register_vmap(f"tritonnn::{name}", each_example(op), lib=LIBRARY)
        torch.library.register_autograd(f"tritonnn::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return operator


def register_gradient(
    schema: str,
    launch: Callable,
    fake: Callable,
    formula: Callable,
    state: Callable[[torch.Tensor], object] | None = None,
) -> Operator:
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
