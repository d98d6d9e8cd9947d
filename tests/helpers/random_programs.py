"""Random small networks, for `tritonnn.fuse` and `tritonnn.swap` to run as PyTorch does.

    python tests/helpers/random_programs.py --seeds 10000
        [--first 0] [--without-kernels] [--cuda [--cuda-graph]] [--show SEED]

A program is the source of a module's forward: statements that PyTorch has run one by one as they were drawn, so that
it can run them all. Without a GPU, Triton's interpreter runs the kernels.
"""

import argparse
import copy
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if "--cuda" not in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import tritonnn
from tritonnn.layers.fused.conv2d import FusedConv2d

CHANNELS = (1, 2, 4, 6)
LARGEST = 1e4

LAYERS: dict[str, Callable[[random.Random, int], nn.Module]] = {
    "conv": lambda r, c: nn.Conv2d(c, r.choice(CHANNELS), 3, r.choice((1, 1, 2)), 1, bias=r.random() < 0.5),
    "same": lambda r, c: nn.Conv2d(c, c, r.choice((1, 3)), padding="same"),
    "conv1": lambda r, c: nn.Conv2d(c, r.choice(CHANNELS), 1),
    "depthwise": lambda r, c: nn.Conv2d(c, c, 3, padding=1, groups=c, padding_mode=r.choice(("zeros", "reflect"))),
    "norm": lambda r, c: nn.BatchNorm2d(c, affine=r.random() < 0.8),
    "group_norm": lambda r, c: nn.GroupNorm(1, c),
    "act": lambda r, c: r.choice(
        (nn.ReLU, nn.ReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.ELU, nn.LeakyReLU, nn.Hardtanh)
    )(inplace=r.random() < 0.6),
    "smooth": lambda r, c: r.choice(
        (nn.Sigmoid, nn.Tanh, nn.GELU, lambda: nn.GELU("tanh"), nn.Hardsigmoid, nn.Identity, nn.Dropout, nn.Softplus)
    )(),
    "pool": lambda r, c: r.choice((nn.MaxPool2d(2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Upsample(None, 2))),
    "shuffle": lambda r, c: r.choice((nn.ChannelShuffle(c), nn.Softmax(1), nn.ZeroPad2d(1), nn.Flatten(2))),
}

# Of images; {v} and {w} are values, {v} an image; {c} its channels, {layer} a layer made for it.
IMAGE_STATEMENTS = """
{n} = self.{conv}({v})
{n} = self.{norm}(self.{conv}({v}))
{n} = self.{act}(self.{norm}(self.{conv}({v})))
{n} = self.{norm}(self.{same}({v})); {n} += {v}; {n} = self.{act}({n})
{n} = self.{act}(self.{same}({v}) + {v})
{n} = self.{same}({v}); {m} = self.{conv1}({v}).relu_()
{n} = self.{same}({v}); {n} = {n} + self.{conv1}({n})[:, :1]
{n} = self.{same}({v}).add_({w}).relu_()
{n} = F.hardswish(self.{same}({v}).add_({w}), inplace=True)
{n} = self.{smooth}(self.{same}({v}) + {w})
{n} = torch.add({w}, self.{same}({v}))
{n} = {w} + self.{norm}(self.{same}({v}))
{w} += self.{same}({v})
{n} = self.{act}({v})
{n} = self.{act}({v})
{n} = self.{norm}({v})
{n} = self.{smooth}({v})
{n} = self.{pool}({v})
{n} = self.{group_norm}({v})
{n} = self.{shuffle}({v})
{n} = self.{conv1}({v})
{n} = self.{same}({v})
{n} = self.{same}({v}) + {v}
{n} = {v} + self.{same}({v})
{n} = self.{depthwise}({v})
{n} = F.adaptive_avg_pool2d({v}, {one_or_two})
{n} = F.max_pool2d({v}, 2, 1)
{n} = F.avg_pool2d({v}, 2, padding=1)
{n} = F.interpolate({v}, scale_factor=2, mode="nearest")
{n} = F.interpolate({v}, size=(3, 3), mode="bilinear")
{n} = F.pad({v}, (1, 0, 0, 1))
{n} = {v}.mean((2, 3), True)
{n} = {v}.mean([-2, -1], keepdim=True) * {v}
{n} = self.{conv1}({v}.mean((2, 3), True)).sigmoid()
{n} = {v}.amax((2, 3), keepdim=True)
{n} = {v}.sum(1, keepdim=True)
{n} = {v}.permute(0, 2, 3, 1)
{n} = {v}.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)
{n} = {v}.transpose(2, 3)
{n} = {v}[:, :1]
{n} = {v}[:, :, 1:, :-1]
{n} = {v}[..., ::2]
{n} = {v}.narrow(1, 0, 1)
{n}, {m} = {v}.chunk(2, 1)
{n}, {m} = {v}.split([1, {v}.size(1) - 1], dim=1)
{n} = {v}.expand(-1, 3, -1, -1)
{n} = {v}.contiguous(memory_format=torch.channels_last)
{n} = {v}.to(memory_format=torch.channels_last)
{n} = {v}.unsqueeze(1).squeeze(1)
{n} = {v}.flatten(2).unflatten(2, ({v}.shape[2], {v}.shape[3]))
{n} = {v}.view({v}.size(0), {v}.size(1), -1)
{n} = {v}.reshape({v}.shape[0], -1, {v}.shape[3])
{n} = {v}.view({v}.size(0), 1, {v}.size(1), {v}.size(2), {v}.size(3)).transpose(1, 2).contiguous().view({v}.shape)
{n} = self.{linear}({v}.flatten(1))[:, :{c}, None, None]
{n} = {v} * self.{linear}({v}.mean((2, 3))).view(-1, {c}, 1, 1)
{n} = {v} + self.{same}.bias[:, None, None]
{n} = self.{norm}(self.{same}({v})) - self.{norm}.running_mean[:, None, None]
{n} = {v}.to(self.{conv}.weight.dtype)
{n} = self.{conv}({v}) * self.{conv}.weight.mean()
{n} = F.conv2d({v}, self.{same}.weight, self.{same}.bias, padding="same")
{n} = F.batch_norm({v}, self.{norm}.running_mean, self.{norm}.running_var)
{n} = torch.cat([{v}, self.{conv1}({v})], 1)
{n} = torch.cat([self.{norm}({v}), {v}], dim=1)
{n} = self.{conv}(self.{act}(self.{norm}({v})))
{n} = self.{same}(self.{norm}({v}).relu()) + {v}
{m} = self.{same}({v}); {n} = torch.cat([{v}, {m}], 1); {n} = torch.cat([{n}, self.{conv1}({m})], 1)
{n} = torch.cat([self.{conv1}({v}), self.{same}({v}), {v}], 1)
{n} = self.{same}({v}); {n} = {n} * self.{same}({n}.mean((2, 3), keepdim=True)).sigmoid()
"""

STATEMENTS = """
{n} = {v} + {w}
{n} = {v} + {w}
{n} = torch.add({v}, {w})
{n} = torch.add({v}, {w}, alpha=0.5)
{n} = {v} - {w}
{n} = {v} * {w}
{n} = torch.where({v} > 0, {v}, {w})
{n} = torch.maximum({v}, {w})
{n} = torch.cat([{v}, {w}], 1)
{n} = torch.stack([{v}, {w}]).sum(0)
{v} += {w}
{v} += {w}
{v} *= {w}
{v} -= 0.5
{n} = {v}.add_({w})
{n} = {v}.mul_(0.5)
{n} = torch.add({v}, 1, out={w})
{v}.copy_({w})
{n} = {v}.clamp_(min=0)
{n} = {v}.neg_()
{n} = {v}.relu_()
{n} = torch.relu_({v})
{n} = F.relu({v}, inplace=True)
{n} = F.relu({v}, True)
{n} = F.silu({v}, inplace=True)
{n} = F.silu({v})
{n} = F.leaky_relu_({v}, 0.1)
{n} = F.leaky_relu({v}, negative_slope=2)
{n} = F.relu6({v}, True)
{n} = F.hardtanh({v}, 0, 6)
{n} = F.hardtanh_({v}, 0, 6)
{n} = {v}.clamp(0, 6)
{n} = torch.clamp({v}, min=0, max=6)
{n} = {v}.clamp_(0, 6)
{n} = F.hardswish({v}, inplace=True)
{n} = F.hardsigmoid({v}, inplace=True)
{n} = {v}.sigmoid()
{n} = torch.sigmoid_({v})
{n} = F.gelu({v}, approximate="tanh")
{n} = F.relu({v})
{n} = torch.relu({v})
{n} = {v}.relu()
{n} = {v}.relu() + {v}
{n} = torch.tanh({v})
{n} = F.gelu({v})
{n} = F.dropout({v}, 0.5, self.training)
{n} = {v}.softmax(1)
{n} = {v} * {v}.size(1)
{n} = {v} / ({v}.shape[-1] + 1)
{n} = {v}.view({v}.size(0), -1)
{n} = {v}.reshape({v}.shape[0], -1)
{n} = {v}.flatten(1)
{n} = torch.flatten({v}, start_dim=1)
{n} = {v}.view(-1)
{n} = {v}.ravel()[:4]
{n} = {v}.as_strided((2, 2), (2, 1))
{n} = {v} * {v}.stride(0)
{n} = {v}[0]
{n} = {v}[None]
{n} = {v}.transpose(0, 1)
{n} = {v}.unbind(0)[0]
{n} = {v}.detach()
{n} = {v}.clone()
{n} = {v}.contiguous()
{n} = {v}.float().to({v}.dtype)
{n} = {v}.expand_as({w})
{n} = {v}.view_as({w})
{n} = torch.zeros_like({v})
{n} = torch.empty_like({v}).fill_(0.5)
{n} = F.normalize({v}.flatten(1))
{n} = torch.erf({v})
{n} = self.{linear}({v})
{n} = self.{linear}({v}).relu()
{n} = self.{linear}({v}.flatten(1))
{n} = self.{linear}({v}.relu()) + {w}
{n} = {v}.cumsum(1)
{n} = {v}.data
{n} = {v} * self.number
{n} = {v} * self.tensor
{n} = {v} * self.buffer
outputs = [{v}]; outputs += [{w}]; {n} = sum(outputs)
{n} = {v}.flatten(1).mul_(0.5)
{n} = {v}.flatten(1).relu_()
{v}.view({v}.size(0), -1).add_(0.5)
{v}[:1].mul_(2)
torch._foreach_mul_([{v}, {w}], 0.5)
"""


# torch.fx cannot trace these.
RARE_STATEMENTS = """
{n} = {v} * {v}.is_contiguous()
{n} = {v}.t() if {v}.dim() == 2 else {v}
{n} = {v} if isinstance({v}, Tensor) else -{v}
{n} = {v} if {v}.sum() > -1e30 else -{v}
{n} = {v} if {v}.dim() == 4 else {v} * 2
{n} = {v} * torch.ones(1, dtype={v}.dtype, device={v}.device)
self.kept = {v}
{n} = self.kept
self.calls = getattr(self, "calls", 0) + 1
{n} = {v} * (self.calls % 2 + 1)
{v}[0] = {w}[0]
{v}[:, 0] = 0.5
"""


class Program(nn.Module):
    """`source` is its forward."""

    source = ""

    def __init__(self) -> None:
        super().__init__()
        self.number = 1.5
        self.tensor = torch.tensor([0.75])
        self.register_buffer("buffer", torch.tensor([0.5]))


def block(r: random.Random, channels: int, depth: int) -> nn.Module:
    """Something that is called with an image and perhaps one more argument."""
    kind = r.choice(("conv", "residual", "mlp", "sequential", "program", "program", "program"))
    if kind == "conv":
        norm = nn.BatchNorm2d(channels)
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm, nn.ReLU(inplace=True))
    if kind == "residual":
        return Residual(channels, r.random() < 0.5)
    if kind == "mlp":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, channels), nn.ReLU())
    if kind == "sequential" and depth:
        return nn.Sequential(block(r, channels, 0), nn.Conv2d(channels, channels, 1), nn.Identity())
    return program(r, channels, depth - 1, r.choice((1, 2, 4)))


class Residual(nn.Module):
    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.relu(out)


SIGNATURES = (
    *[("x", "")] * 5,
    ("x, scale=1.0", "x = x * scale"),
    ("x, mask=None", "x = x if mask is None else x + mask"),
    ("x, size=(1, 1)", "x = x + F.adaptive_avg_pool2d(x, size)"),
    ("x, options={'k': 2}", "x = x * options['k']"),
    ("x, *others", "x = sum(others, x)"),
)
ARGUMENTS = ("", "", ", scale=1.0", ", scale=0.5", ", mask=None", ", size=(2, 2)", ", options={{'k': 1}}", ", 0.5")


def program(r: random.Random, channels: int, depth: int, statements: int) -> nn.Module:
    signature, prologue = r.choice(SIGNATURES)
    made: nn.Module = type("Program", (Program,), {"forward": None})().double()
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    scope = {"torch": torch, "F": F, "self": made, "x": x, "Tensor": Tensor}
    lines = [prologue] if prologue else []
    values = ["x"]
    made.eval()
    with torch.no_grad():
        for attempt in range(6 * statements):
            if len(lines) >= statements:
                break
            line, names = _statement(r, made, scope, values, depth, attempt)
            if line is not None:
                lines.append(line)
                values += names
    for name in ("kept", "calls"):
        vars(made).pop(name, None)
    images = [name for name in values if scope[name].dim() == 4] or values
    if depth == 0 or r.random() < 0.4:
        result = r.choice((values[-1], r.choice(images)))
    else:
        result = r.choice(("({}, {})", "[{}, {}]", "{{'a': {}, 'b': {}}}")).format(values[-1], r.choice(values))
    source = f"def forward(self, {signature}):\n    " + "\n    ".join([*lines, f"return {result}"])
    definition = {"torch": torch, "F": F, "Tensor": Tensor}
    exec(source, definition)
    type(made).forward, type(made).source = definition["forward"], source
    if r.random() < 0.1:
        hooked = r.choice(list(made.modules())[1:] or [made])
        hooked.register_forward_hook(lambda module, args, y: y * 0.5 if isinstance(y, Tensor) else y)
    return made


def _statement(
    r: random.Random, made: nn.Module, scope: dict, values: list[str], depth: int, attempt: int
) -> tuple[str | None, list[str]]:
    """One that PyTorch can run in the scope, where it has run, and the values that it adds."""
    recent = values[-3:]
    v, w = r.choice(recent), r.choice(values)
    names = {"v": v, "w": w, "n": f"a{attempt}", "m": f"b{attempt}", "one_or_two": r.choice((1, 2))}
    x, before = scope[v], set(made._modules)
    if depth and r.random() < 0.25 and x.dim() == 4:
        name = _reused(r, made, "block") or f"block{attempt}"
        if not hasattr(made, name):
            made.add_module(name, block(r, x.shape[1], depth).double().eval())
        template = f"{{n}} = self.{name}({{v}}{r.choice(ARGUMENTS)})"
    else:
        image = x.dim() == 4 and r.random() < 0.6
        statements = RARE_STATEMENTS if r.random() < 0.04 else IMAGE_STATEMENTS if image else STATEMENTS
        template = r.choice(statements.strip().splitlines())
    if x.dim() == 4:
        names["c"] = x.shape[1]
        for kind in LAYERS:
            if f"{{{kind}}}" in template:
                names[kind] = r.random() < 0.3 and _reused(r, made, kind) or f"{kind}{attempt}"
                if not hasattr(made, names[kind]):
                    made.add_module(names[kind], LAYERS[kind](r, x.shape[1]).double().eval())
    if "{linear}" in template and x.dim() > 1:
        features = x[0].numel() if "flatten" in template else x.shape[-1]
        names["linear"] = f"linear{features}"
        if not hasattr(made, names["linear"]):
            made.add_module(
                names["linear"], nn.Linear(features, features if x.dim() == 4 else r.choice(CHANNELS)).double()
            )
    try:
        line = template.format_map(names)
    except KeyError:
        return None, []
    new = [names[key] for key in ("n", "m") if f"{{{key}}}" in template]
    tried = dict(scope)
    try:
        exec(line, tried)
        fits = all(
            isinstance(y, Tensor) and 0 < y.numel() < 3000 and y.is_floating_point() and y.abs().max() < LARGEST
            for y in (tried[name] for name in (*new, v, w))
        )
    except Exception:
        fits = False
    if not fits:
        for name in set(made._modules) - before:
            del made._modules[name]
        return None, []
    scope.update(tried)
    return line, new


def _reused(r: random.Random, made: nn.Module, kind: str) -> str | None:
    names = [name for name in made._modules if name.rstrip("0123456789") == kind]
    return r.choice(names) if names and r.random() < 0.5 else None


def random_program(seed: int) -> nn.Module:
    """A model in eval mode and float64 whose batch norms change something; every fifth has channels_last weights."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    model = program(r, r.choice(CHANNELS), 2, r.randint(2, 14))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    if r.random() < 0.1:
        _tie(model)
    if seed % 5 == 0:
        model.to(memory_format=torch.channels_last)
    return model.eval()


def _tie(model: nn.Module) -> None:
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for a, b in zip(convs, convs[1:]):
        if a.weight.shape == b.weight.shape:
            b.weight = a.weight


def source_of(model: nn.Module) -> str:
    """All forwards, and the layers."""
    forwards = [f"# {name or 'the model'}\n{m.source}" for name, m in model.named_modules() if isinstance(m, Program)]
    return "\n".join([*forwards, repr(model)])


def type_on(device: torch.device) -> torch.dtype:
    """float64, whose convolutions PyTorch lays out otherwise on a GPU."""
    return torch.float32 if device.type == "cuda" else torch.float64


def inputs_of(seed: int, device: torch.device) -> list[Tensor]:
    """Contiguous and channels_last images, another batch, a part of larger images."""
    torch.manual_seed(seed + 1)
    channels = random.Random(seed).choice(CHANNELS)
    x = torch.randn(3, channels + 1, 7, 6, dtype=torch.float64).to(device, type_on(device))
    images = x[:2, :channels, :6].contiguous()
    last = images.to(memory_format=torch.channels_last)
    return [images, last, images.flip(0), x[:, :channels, :6].contiguous(), x[:2, 1:, 1:], last.flip(1), images]


class Difference(AssertionError):
    """What came out otherwise than PyTorch's."""


def check(seed: int, device: torch.device, cuda_graph: bool = False) -> bool:
    """Raises Difference; False where PyTorch itself cannot run the program."""
    model = random_program(seed).to(device, type_on(device))
    variants: dict[str, nn.Module] = {"swap": copy.deepcopy(model), "fuse": model}
    tritonnn.swap(variants["swap"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    variants["fuse"] = tritonnn.fuse(model)
    if cuda_graph:
        variants["fuse(cuda_graph=True)"] = tritonnn.fuse(model, cuda_graph=True)
    if any(not torch.equal(t, before[name]) for name, t in model.state_dict().items()):
        raise Difference("fuse changed the model")
    ran = False
    for i, x in enumerate(inputs_of(seed, device)):
        own = x.clone(memory_format=torch.preserve_format)
        with torch.no_grad():
            try:
                expected = model(own)
            except Exception:
                return ran  # its state may be anything now
            ran = True
            for name, network in list(variants.items()):
                y = x.clone(memory_format=torch.preserve_format)
                try:
                    actual = network(y)
                except Exception as error:
                    raise Difference(f"{name}, call {i}: {traceback.format_exc()}") from error
                _compare(f"{name}, call {i}", actual, expected)
                _compare(f"{name}, call {i}, its input", y, own)
    return ran


def _compare(name: str, actual: object, expected: object) -> None:
    if isinstance(expected, dict):
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (tuple, list)):
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            _compare(f"{name}[{i}]", a, e)
        return
    if not isinstance(expected, Tensor):
        if actual != expected:
            raise Difference(f"{name}: {actual} for {expected}")
        return
    got, wanted = ((tuple(t.shape), t.dtype, _strides(t)) for t in (actual, expected))
    if got != wanted:
        raise Difference(f"{name}: {got} for {wanted}")
    if expected.numel() == 0 or not expected.isfinite().all():
        return
    error, scale = float((actual - expected).abs().max()), max(1.0, float(expected.abs().max()))
    if not error <= (1e-8 if expected.dtype == torch.float64 else 2e-3) * scale:
        raise Difference(f"{name}: error {error} of {scale}")


def _strides(x: Tensor) -> tuple[int | None, ...]:
    """The strides of dimensions with more than one element, None for the others."""
    return tuple(stride if size > 1 else None for size, stride in zip(x.shape, x.stride()))


def without_kernels(replace: Callable[[object, str, object], None] = setattr) -> None:
    """Layers run PyTorch's operations, fused ones as they lay out their results: what is tried is `fuse`, fast."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tritonnn.layers."):
            for function in ("reason_to_fall_back", "reason_to_fall_back_image"):
                if hasattr(module, function):
                    replace(module, function, lambda *args, **kwargs: "without kernels")
    computed = FusedConv2d._with_pytorch

    def channels_last(self: FusedConv2d, x: Tensor, residual: object) -> Tensor:
        y = computed(self, x, residual)
        return y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y[None].contiguous()[0]

    replace(FusedConv2d, "_with_pytorch", channels_last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    parser.add_argument("--cuda-graph", action="store_true", help="CUDA graphs too; needs --cuda")
    parser.add_argument("--without-kernels", action="store_true", help="PyTorch's operations instead: fast")
    parser.add_argument("--show", type=int, metavar="SEED", help="print one program and what fuse made of it")
    args = parser.parse_args()
    if args.cuda_graph and not args.cuda:
        parser.error("--cuda-graph needs --cuda")
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda: there is no CUDA GPU")
    if args.without_kernels:
        without_kernels()
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    if args.show is not None:
        model = random_program(args.show).to(device, type_on(device))
        print(source_of(model))
        fused = tritonnn.fuse(model)
        print(fused.report, getattr(fused.network, "code", ""), sep="\n")
        args.first, args.seeds = args.show, 1
    ran, wrong, start = 0, [], time.perf_counter()
    for seed in range(args.first, args.first + args.seeds):
        try:
            ran += check(seed, device, args.cuda_graph)
        except Exception as error:
            wrong.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{ran} of {args.seeds} programs ran, {len(wrong)} came out wrong: {wrong[:20]}; {seconds:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
