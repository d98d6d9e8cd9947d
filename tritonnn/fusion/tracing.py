"""A network's code as a torch.fx graph, and what keeps a part of it from becoming one.

What torch.fx would silently take for a constant, or never see, is an error here: the part stays a single node, called
as it is. That is code that asks what class a value has, computes with tensors that are no inputs, changes its own
attributes, or switches autocast or TF32.
"""

import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import is_dataclass

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute, TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers.layer import TritonLayer
from ..runtime.precision import CONVOLUTION, MATMUL
from ..swap import LAYERS

LAYER_TYPES = tuple(torch_class for pairs in LAYERS.values() for torch_class in pairs)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
IN_PLACE = ("add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
KEPT = (dict, tuple, list, torch.Size, fx.immutable_collections.immutable_list)
CALLS_OTHERWISE = "its class has a __call__ of its own"
CHANGES_SHAPE = (
    *("as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_"),
    "unsqueeze_",
)


def in_place(x: object, other: object, name: str) -> object:
    """x += other, for the name "iadd", and the like."""
    return getattr(operator, name)(x, other)


def ends_in_place(function: str) -> bool:
    """Whether a function or method of PyTorch of that name overwrites its first argument."""
    return function.endswith("_") and not function.endswith("__")


def is_parameter(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def is_changed(module: nn.Module) -> bool:
    """Whether hooks or a replaced forward make a call do something else than the module's class says."""
    return has_hooks(module) or "forward" in vars(module)


def why_changed(module: nn.Module) -> str:
    return "it has hooks" if has_hooks(module) else "its forward was replaced"


def calls_otherwise(module: nn.Module) -> bool:
    """Whether its class has a `__call__` of its own around the forward."""
    return type(module).__call__ is not nn.Module.__call__


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_layer(module: nn.Module) -> bool:
    """A module of torch.nn or a subclass of a Triton layer, as against one that is made of modules."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, *WRAPPERS)):
        return False
    return isinstance(module, TritonLayer) or type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


class _Asked:
    """A value whose class only torch may ask for: other code would draw conclusions about the tensor from its proxy."""

    @property
    def __class__(self) -> type:
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == "abc":
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            return type(self)
        raise TraceError("it asks for the class of a value")


class _Attribute(_Asked, Attribute):
    pass


class _Proxy(_Asked, fx.Proxy):
    """Records x += y as such. fx.Proxy would record x = x + y, which other references to x do not see."""

    def __getattr__(self, name: str) -> _Attribute:
        if not hasattr(torch.Tensor, name):
            raise AttributeError(f"a tensor has no attribute {name!r}")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(torch.Tensor, name):
            raise TraceError(f"it sets the attribute {name!r} of a value")
        super().__setattr__(name, value)


def _recorder(name: str) -> Callable:
    def record(self: _Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (self, other, name), {})

    return record


for _name in IN_PLACE:
    for _class in (_Proxy, _Attribute):
        setattr(_class, f"__i{_name}__", _recorder(f"i{_name}"))


class _NoTensors(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise TraceError("it computes with tensors that are not its inputs")


class _Tracer(fx.Tracer):
    """Layers are single nodes, and so are modules that were changed and those whose code fails under tracing."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: dict[str, str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.state = _state()

    def create_args_for_root(self, root_fn, is_module, concrete_args=None) -> tuple[Callable, list]:
        """Optional arguments are the very objects that are their defaults."""
        args, kwargs, forward = [], {}, self.root.forward
        for p in inspect.signature(forward).parameters.values():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            value = self.create_proxy("placeholder", p.name, (), {}) if p.default is p.empty else p.default
            if p.kind is p.KEYWORD_ONLY:
                kwargs[p.name] = value
            else:
                args.append(value)
        return lambda: forward(*args, **kwargs), []

    def create_node(self, kind: str, target, args: tuple, kwargs: dict, name=None, type_expr=None) -> fx.Node:
        if _state() != self.state:  # a graph would not say so
            raise RuntimeError("it sets autocast itself" if _state()[2:] == self.state[2:] else "it sets TF32 itself")
        if kind in ("call_method", "call_function"):
            function = target if kind == "call_method" else getattr(target, "__name__", "")
            if function in CHANGES_SHAPE:
                raise TraceError(f"it changes a tensor's shape or memory in place: {function}")
            if (target is in_place or ends_in_place(function)) and args and is_parameter(args[0]):
                raise TraceError(f"it overwrites {args[0].target}")
        return super().create_node(kind, target, args, kwargs, name, type_expr)

    def create_arg(self, a: object) -> object:
        """torch.fx would make plain dictionaries, lists and tuples of classes that are derived from them."""
        kind = type(a)
        if kind is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}).node
        if issubclass(kind, (dict, tuple, list)) and kind not in KEPT:
            if not (is_dataclass(kind) or hasattr(kind, "_fields")):
                raise TraceError(f"it makes a {kind.__name__}")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or isinstance(m, LAYER_TYPES) or module_qualified_name in self.opaque

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            if calls_otherwise(m):  # the graph would have it beside the call that does it
                raise TraceError(CALLS_OTHERWISE)
            return super().call_module(m, forward, args, kwargs)
        if has_hooks(m):
            self.opaque[name] = "it has hooks"
            return super().call_module(m, forward, args, kwargs)
        if isinstance(m, WRAPPERS):
            self.opaque[name] = f"it is a {type(m).__name__}"
            return super().call_module(m, forward, args, kwargs)
        traced = set(self.graph.nodes)
        stack = list(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            for node in reversed(self.graph.nodes):
                if node not in traced:
                    self.graph.erase_node(node)
            while len(self.module_stack) > len(stack):
                self.module_stack.popitem()
            self.opaque[name] = in_a_line(error)
        return super().call_module(m, forward, args, kwargs)


def _state() -> tuple:
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return *autocast, CONVOLUTION.fp32_precision, MATMUL.fp32_precision


def in_a_line(error: Exception) -> str:
    first_line, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line}"


def trace(root: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of root's forward, its optional arguments fixed at their defaults, and which modules in it stayed
    whole, with the reason.

    Raises:
        Exception: whatever root's own code raises under torch.fx's symbolic tracing.
    """
    opaque: dict[str, str] = {}
    whole: set[str] = set()
    while True:
        before = _attributes(root)
        tracer = _Tracer(opaque)
        try:
            with _NoTensors():
                graph = tracer.trace(root)
        finally:
            changed = _restore(root, before)
        if not changed:
            break
        for name in changed:
            while name and name in whole:  # not its own code did, then
                name = name.rpartition(".")[0]
            if not name:
                raise TraceError("it changes attributes of modules")
            whole.add(name)
            opaque[name] = "it changes attributes of modules"
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    return graph, {name: reason for name, reason in opaque.items() if name in called}


def _attributes(root: nn.Module) -> dict[str, dict[str, tuple[object, object]]]:
    """The attributes of each module, with the elements of those that are lists and the like."""
    return {
        name: {
            key: (value, value.copy() if isinstance(value, (list, dict, set)) else None)
            for key, value in vars(module).items()
        }
        for name, module in root.named_modules()
    }


def _restore(root: nn.Module, before: dict[str, dict[str, tuple[object, object]]]) -> list[str]:
    """Undoes what tracing did to the attributes of modules, whose names are returned."""
    changed = []
    for name, module in list(root.named_modules()):
        attributes, now = before.get(name, {}), vars(module)
        same = attributes.keys() == {key for key in now if not key.startswith("_tensor_constant")}
        same = same and all(now[key] is value and _same(value, then) for key, (value, then) in attributes.items())
        if same:
            continue
        changed.append(name)
        for key in list(now):
            if key not in attributes and not key.startswith("_tensor_constant"):
                del now[key]
        for key, (value, then) in attributes.items():
            now[key] = value
            if isinstance(value, list):
                value[:] = then
            elif then is not None:
                value.clear()
                value.update(then)
    return changed


def _same(value: object, then: object) -> bool:
    if isinstance(value, list):
        return len(value) == len(then) and all(map(operator.is_, value, then))
    if isinstance(value, dict):
        return value.keys() == then.keys() and all(value[key] is then[key] for key in then)
    return not isinstance(value, set) or value == then
