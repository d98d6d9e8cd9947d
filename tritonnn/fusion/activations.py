"""Which modules, functions and methods of PyTorch compute an activation that an epilogue has."""

from torch import fx, nn

from ..layers.fused.activation import Activation
from ..swap import kind_of
from .known_functions import name_of
from .tracing import ends_in_place

PARAMETERS = {
    "relu": (),
    "relu6": (),
    "hardtanh": ("min_val", "max_val"),
    "clamp": ("min", "max"),
    "clip": ("min", "max"),
    "leaky_relu": ("negative_slope",),
    "silu": (),
    "hardswish": (),
    "hardsigmoid": (),
    "sigmoid": (),
    "gelu": ("approximate",),
}
"""The parameters of functions and methods, in place or not, between the tensor and `inplace`."""

MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU6: ("relu6", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.SiLU: ("silu", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.GELU: ("gelu", ("approximate",)),
}
"""The function that a module applies, and its attributes that are the function's arguments."""


def activation_of(node: fx.Node, module: nn.Module | None) -> Activation | None:
    """The activation that a node computes of its first argument, in place or not; None for anything else.

    `module` is the one that the node calls, if it calls one.
    """
    if module is not None:
        if kind_of(module) == "relu":
            return Activation("relu")
        if type(module) not in MODULES:
            return None
        function, attributes = MODULES[type(module)]
        return _activation(function, {name: getattr(module, name) for name in attributes})
    function = name_of(node) or ""
    function = function[:-1] if ends_in_place(function) else function
    if function not in PARAMETERS:
        return None
    names = (*PARAMETERS[function], "inplace")
    if len(node.args) > 1 + len(names):
        return None
    arguments = dict(zip(names, node.args[1:])) | node.kwargs
    unknown = arguments.keys() - {"input", *names}
    return None if unknown else _activation(function, arguments)


def _activation(function: str, arguments: dict[str, object]) -> Activation | None:
    match function:
        case "leaky_relu":
            slope = arguments.get("negative_slope", 0.01)
            return Activation("leaky_relu", float(slope)) if isinstance(slope, (int, float)) else None
        case "gelu":
            names = {"none": "gelu", "tanh": "gelu_tanh"}
            approximate = arguments.get("approximate", "none")
            return Activation(names[approximate]) if isinstance(approximate, str) and approximate in names else None
        case "hardtanh":
            limits = arguments.get("min_val", -1), arguments.get("max_val", 1)
            return Activation("relu6") if limits == (0, 6) else None
        case "clamp" | "clip":
            limits = arguments.get("min"), arguments.get("max")
            return Activation("relu6") if limits == (0, 6) else None
    return Activation(function)
