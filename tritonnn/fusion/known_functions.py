"""What `fuse` knows about functions and modules of PyTorch; of any other it assumes the worst.

Names stand for the functions of torch, operator and torch.nn.functional and for the methods of tensors alike.
"""

from torch import fx, nn
from torch.nn import functional as F

from ..swap import kind_of

LIBRARIES = ("torch", "_operator", "operator", "builtins", "math", "collections")

ELEMENTWISE = frozenset(
    """abs add ceil celu clamp clamp_max clamp_min cos div elu eq exp floor floordiv ge gelu gt hardshrink hardsigmoid
    hardswish hardtanh le leaky_relu log log1p logsigmoid lt maximum minimum mish mod mul ne neg pow prelu
    relu relu6 round rsqrt selu sigmoid silu sin softplus softsign sqrt square sub tanh true_divide truediv
    where""".split()
)
"""Results are new tensors in the memory format of the arguments; of numbers, numbers."""

BINARY = frozenset("add div eq ge gt le lt maximum minimum mul ne pow sub true_divide truediv".split())
"""The elementwise functions that take two operands."""

ELEMENTWISE_MODULES = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign),
    nn.Tanh,
)

FRESH = frozenset(
    """all any arange argmax argmin bmm cat concat conv2d cumsum empty_like full_like group_norm
    interpolate layer_norm linear log_softmax matmul mean mm new_empty new_full new_ones new_zeros normalize numel
    one_hot ones_like pad scaled_dot_product_attention softmax stack std sum topk var zeros_like amax amin clone
    dim size""".split()
)
"""Others whose results share no memory with the arguments, which they do not overwrite."""

POOLS = (F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d)

CONVERSIONS = frozenset("bfloat16 double float half to type_as".split())
"""Conversions to another type. A tensor that has it already is returned itself, as by a view."""

LAYOUT_FREE_VIEWS = CONVERSIONS | frozenset(
    """chunk getitem movedim narrow permute select split squeeze swapaxes tensor_split transpose unbind
    unsqueeze""".split()
)
"""Views of tensors in any memory format."""

VIEWS = LAYOUT_FREE_VIEWS | frozenset(
    "broadcast_to contiguous detach dropout expand expand_as flatten reshape reshape_as unflatten view view_as".split()
)

PARTS = frozenset("chunk narrow split tensor_split".split())
"""Views that are images in the memory format of their argument."""

LOOKS = ("shape", "dtype", "device", "ndim")
"""Attributes that are not tensors."""


def name_of(node: fx.Node) -> str | None:
    """The name of a function or method of PyTorch or of Python's operators, None for other code and for modules."""
    if node.op == "call_method":
        return node.target
    if node.op != "call_function":
        return None
    library = (getattr(node.target, "__module__", "") or "torch").partition(".")[0]
    return getattr(node.target, "__name__", None) if library in LIBRARIES else None


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return type(module) in ELEMENTWISE_MODULES or kind_of(module) == "relu"
    return name_of(node) in ELEMENTWISE


def flattens_images(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether it flattens images to [N, *], contiguous."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    return name_of(node) == "flatten" and (node.args[1:], node.kwargs) in (((1,), {}), ((), {"start_dim": 1}))


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def operands(node: fx.Node) -> tuple[object, object]:
    named = {key: value for key, value in node.kwargs.items() if key in ("input", "other")}
    a, b, *_ = [*node.args, *named.values(), None, None]
    return a, b


def unused_name(name: str, modules: dict[str, nn.Module]) -> str:
    while name in modules:
        name += "_"
    return name
