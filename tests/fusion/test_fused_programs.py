"""tritonnn.fuse on code that torch.fx misunderstands: as PyTorch runs it, or by the module's own code."""

import copy
import pickle
from collections import OrderedDict
from functools import partial

import numpy
import pytest
import torch
from helpers.compare import DEVICE, image
from helpers.fused import Net, assert_same
from helpers.trained import trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune, weight_norm
from torch.utils._pytree import tree_flatten

import tritonnn


def same_at_every_call(
    model: nn.Module, *args, channels_last: bool | None = None, tolerance: float = 1e-10, **kwargs
) -> tritonnn.FusedNetwork:
    """Values, layout and what becomes of the inputs; three calls with contiguous and channels_last images each."""
    model = trained(model)
    fused = tritonnn.fuse(model)
    for last in (False, True) if channels_last is None else (channels_last,):
        for _ in range(3):
            x = image(2, 4, 6, 6, dtype=torch.float64, channels_last=last)
            both = [x.clone(memory_format=torch.preserve_format) for _ in range(2)]
            with torch.no_grad():
                expected, actual = (net(y, *args, **kwargs) for net, y in zip((model, fused), both))
            assert_identical_layout(actual, expected, tolerance)
            torch.testing.assert_close(both[1], both[0], rtol=tolerance, atol=tolerance)
    return fused


def assert_identical_layout(actual: object, expected: object, tolerance: float) -> None:
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected):
            assert_identical_layout(a, e, tolerance)
        return
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_stride=True)


def tied(net: Net) -> Net:
    net.b.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
    net.other = nn.Conv2d(4, 4, 1)
    net.other.weight = net.b.weight
    return net


READS_A_PARAMETER = {
    "dtype": lambda n, x: n.norm(n.a(x.to(n.a.weight.dtype))),
    "device": lambda n, x: n.norm(n.a(x.to(n.a.weight.device))),
    "bias": lambda n, x: n.norm(n.a(x)) + n.a.bias[:, None, None],
    "weight, after the layer": lambda n, x: n.relu(n.norm(n.a(x))) * n.a.weight.mean() + n.norm.weight.sum(),
    "weight, in a functional convolution": lambda n, x: n.norm(F.conv2d(n.a(x).relu(), n.a.weight, n.a.bias)),
    "running mean": lambda n, x: n.norm(n.a(x)) - n.norm.running_mean[:, None, None],
    "tied": lambda n, x: n.norm(n.b(x)) + n.other(x) * n.b.weight.sum(),
}


@pytest.mark.parametrize("code", READS_A_PARAMETER)
def test_a_parameter_that_the_code_reads_is_the_models(code):
    same_at_every_call(tied(Net(READS_A_PARAMETER[code])))


ACTIVATIONS = {
    "LeakyReLU": (nn.LeakyReLU(0.2, inplace=True), " + leaky_relu"),
    "ReLU6": (nn.ReLU6(inplace=True), " + relu6"),
    "SiLU": (nn.SiLU(inplace=True), " + silu"),
    "Hardswish": (nn.Hardswish(inplace=True), " + hardswish"),
    "ELU": (nn.ELU(inplace=True), ""),
    "Threshold": (nn.Threshold(0.1, 2.0, inplace=True), ""),
}
"""Operations in place, and what of them is in the convolution's kernel."""


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_view_after_an_activation_in_place(activation):
    class Classifier(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[2](self[1](self[0](x)))
            return self[3](h.view(h.size(0), -1))

    act, step = ACTIVATIONS[activation]
    layers = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), act, nn.Linear(64, 3)
    # PyTorch's hardswish of float64 multiplies by a sixth in float32 on a GPU.
    tolerance = 1e-6 if activation == "Hardswish" and DEVICE.type == "cuda" else 1e-10
    fused = same_at_every_call(Classifier(*layers), channels_last=False, tolerance=tolerance)
    assert fused.report.fused == {"0": f"conv2d + batch_norm2d{step}", "3": "linear"}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("first", ["a", "b"])
def test_a_convolution_of_the_residual_itself(first, relu):
    def code(net: Net, x: Tensor) -> Tensor:
        y = net.get_submodule(first)(x)
        z = y + net.get_submodule("b" if first == "a" else "a")(y)
        return z.relu() if relu else z

    report = same_at_every_call(Net(code)).report
    assert sorted(report.fused.values()) == ["conv2d", "conv2d + residual" + " + relu" * relu]


class Optional(nn.Module):
    """Its second argument is called `given`; `use(y, given)` says for what."""

    def __init__(self, default: object, use) -> None:
        super().__init__()
        self.layer, self.use = nn.Conv2d(4, 4, 1), use
        self.default = default

    @staticmethod
    def of(default: object, use) -> nn.Module:
        class WithDefault(Optional):
            def forward(self, x: Tensor, given=default) -> Tensor:
                return self.use(self.layer(x), given)

        return WithDefault(default, use)


def masked(y: Tensor, mask: Tensor | None) -> Tensor:
    return y if mask is None else y * mask


OPTIONS = {
    "tuple": ((1, 1), lambda y, size: F.adaptive_avg_pool2d(y, size), (2, 2)),
    "list": ([1, 1], lambda y, size: F.adaptive_avg_pool2d(y, size), [2, 2]),
    "dict": ({"k": 1}, lambda y, o: y * o["k"], {"k": 3}),
    "tensor": (torch.ones(1, device=DEVICE), lambda y, t: y * t, torch.full((1,), 2.0, device=DEVICE)),
    "empty tuple": ((), lambda y, extra: sum(extra, y), (1.0, 2.0)),
    "None": (None, masked, torch.full((6, 6), 3.0, device=DEVICE)),
    "number": (2.0, lambda y, n: y * n, 5.0),
    "string": ("mean", lambda y, how: getattr(y, how)((2, 3)), "amax"),
    "type": (torch.float64, lambda y, dtype: y.to(dtype), torch.float32),
    "function": (torch.sigmoid, lambda y, f: f(y), torch.tanh),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_optional_arguments(option):
    default, use, other = OPTIONS[option]
    fused = same_at_every_call(Optional.of(default, use))
    step = " + sigmoid" if default is torch.sigmoid else ""
    assert fused.report.fused == {"layer": f"conv2d{step}"} and not fused.report.fallbacks
    same_at_every_call(Optional.of(default, use), given=copy.copy(default))
    same_at_every_call(Optional.of(default, use), default)
    fused = same_at_every_call(Optional.of(default, use), other)
    assert fused.report.fallbacks == {"the model": {"called with another 'given' than its default": 6}}
    same_at_every_call(Optional.of(default, use), given=other)


def test_an_argument_that_is_none_counts_as_the_default():
    assert not same_at_every_call(Optional.of(None, masked), given=None).report.fallbacks


def test_arguments_by_keyword_alone_and_any_number_of_them():
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, *others: Tensor, scale: float = 1.0, **more: Tensor) -> Tensor:
            return sum((*others, *more.values()), self.layer(x) * scale)

    same_at_every_call(Keywords())
    same_at_every_call(Keywords(), scale=2.0)
    one = torch.ones(1, device=DEVICE)
    same_at_every_call(Keywords(), one, one, more=one)


def test_copies_of_a_network_with_options():
    fused, x = tritonnn.fuse(trained(Optional.of(None, masked))), image(1, 4, 3, 3, dtype=torch.float64)
    mask = torch.rand(3, 3, device=x.device, dtype=x.dtype)
    twin = copy.deepcopy(fused)
    for args in ((x,), (x, mask)):
        torch.testing.assert_close(twin(*args), fused(*args))


SEES_MEMORY = {
    "as_strided": lambda y: y.as_strided((2, 8), (16, 2)),
    "torch.as_strided": lambda y: torch.as_strided(y, (3, 5), (5, 1), 1),
    "view of a type": lambda y: y.view(torch.float32)[..., 1::2],  # sign, exponent and leading bits
    "view": lambda y: y.view(2, 2, 2, 6, 6),
    "stride": lambda y: y * y.stride(1),
    "is_contiguous": lambda y: torch.where(torch.tensor(y.is_contiguous()), y, -y),
    "storage": lambda y: y.untyped_storage().nbytes() * y,
    "unfold": lambda y: y.unfold(2, 2, 2),
    "reshape, then written to": lambda y: y.reshape(2, -1).mul_(2) + y.reshape(2, -1),
    "flatten, then written to": lambda y: (y.flatten(1).add_(1), y),
    "ravel": lambda y: y.ravel(),
    "chunks": lambda y: torch.cat([t.as_strided((2, 2), (2, 1)) for t in y.chunk(2, 1)]),
    "permuted": lambda y: y.permute(0, 2, 3, 1).as_strided((4, 4), (4, 1)),
    "pixels": lambda y: y.mean((2, 3), True).as_strided((2, 4, 1, 1), (4, 1, 1, 1)),
    "squeezed": lambda y: F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1),
    "cumulated in memory": lambda y: torch.empty_like(y).copy_(y).as_strided((2, 3), (3, 1)),
}


@pytest.mark.parametrize("use", SEES_MEMORY)
def test_what_sees_how_a_tensor_lies_in_memory(use):
    def code(net: Net, x: Tensor) -> Tensor:
        return SEES_MEMORY[use](net.relu(net.norm(net.a(x))))

    strict = use in ("view", "view of a type")  # PyTorch refuses these in channels_last
    same_at_every_call(Net(code), channels_last=False if strict else None)


@pytest.mark.parametrize("use", ["as_strided", "chunks", "permuted"])
def test_channels_last_weights_make_channels_last_images(use):
    model = Net(lambda n, x: SEES_MEMORY[use](n.norm(n.a(x)))).to(memory_format=torch.channels_last)
    same_at_every_call(model)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_padded_copy_decides_how_the_result_lies_in_memory(mode, channels_last):
    """As PyTorch's padding has it on that device: some of a GPU's are contiguous whatever their input."""
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(6)
    model = trained(nn.Sequential(*layers), torch.float32)
    fused = tritonnn.fuse(model)
    for _ in range(2):
        x = image(2, 4, 6, 6, channels_last=channels_last)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-3, check_stride=True)


IN_PLACE = {
    "function": lambda n, y: F.relu(y, inplace=True),
    "module": lambda n, y: n.relu(y),
    "method": lambda n, y: y.clamp_(0, 6),
    "one after the other": lambda n, y: F.hardtanh_(y.relu_(), 0, 6),
    "after a norm": lambda n, y: n.one(y).relu_(),
    "after a convolution": lambda n, y: n.relu(n.to_one(y)),
    "a sum": lambda n, y: y.relu().add_(y),
}


@pytest.mark.parametrize("operation", IN_PLACE)
def test_what_is_in_place_keeps_its_strides(operation):
    """One channel fits both memory formats, and what is computed beside it would be contiguous."""

    def code(net: Net, x: Tensor) -> Tensor:
        y = x[:, :1].contiguous(memory_format=torch.channels_last) + x.mean((1, 2, 3), keepdim=True)
        y = IN_PLACE[operation](net, y)
        return torch.cat([y, y], 1)

    same_at_every_call(Net(code, one=nn.BatchNorm2d(1), to_one=nn.Conv2d(1, 1, 1)))


PARTS_OF_ONE_CHANNEL = {
    "its channel": lambda y: y[:, :1],
    "its channel, by narrow": lambda y: y.narrow(1, 0, 1),
    "an image": lambda y: y[1:, :],
    "chunks of images": lambda y: y.chunk(2)[0],
    "rows": lambda y: y[:, :, 1:],
    "columns": lambda y: y.split(3, dim=3)[1],
}


@pytest.mark.parametrize("part", PARTS_OF_ONE_CHANNEL)
def test_a_part_of_one_channel(part):
    def code(net: Net, x: Tensor) -> Tensor:
        y = PARTS_OF_ONE_CHANNEL[part](net.to_one(x))
        y = y + y.relu()
        return torch.cat([y, y], 1)

    same_at_every_call(Net(code, to_one=nn.Conv2d(4, 1, 1)))


def test_a_norm_of_one_channel_before_a_convolution():
    """On a CPU it is contiguous, whatever came before it."""

    def code(net: Net, x: Tensor) -> Tensor:
        y = net.one(net.to_one(x))
        return net.from_one(y) * net.from_one(net.one(net.to_one(y.expand(-1, 4, -1, -1)))).as_strided((1,), (3,))

    layers = {"to_one": nn.Conv2d(4, 1, 1), "one": nn.BatchNorm2d(1), "from_one": nn.Conv2d(1, 4, 3, padding=1)}
    same_at_every_call(Net(code, **layers))


ODD = {
    "columns left out of a row of odd length": lambda n, x: (lambda y: y + n.b(y))(F.pad(x, (1, 0, 0, 1))[..., ::2]),
    "columns left out of a result": lambda n, x: (lambda y: n.b(y[..., ::2]) + y[..., ::2])(
        n.a(F.pad(x, (1, 0, 0, 1)))
    ),
    "one image, in place": lambda n, x: F.leaky_relu_(x[0].relu() + x[0], 0.1).relu().clamp(0, 6),
    "a pixel made larger": lambda n, x: (
        F.adaptive_avg_pool2d(n.a(x.mean((2, 3), True)).sigmoid(), 2)[:, :1] + x[:, :1, :2, :2]
    ),
}


@pytest.mark.parametrize("channels_last_weights", [False, True])
@pytest.mark.parametrize("code", ODD)
def test_layouts_that_are_neither_format(code, channels_last_weights):
    model = Net(ODD[code])
    same_at_every_call(model.to(memory_format=torch.channels_last) if channels_last_weights else model)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_an_image_that_gets_another_shape_meanwhile():
    """How it lay decides about what was made of it before."""

    def code(net: Net, x: Tensor) -> Tensor:
        y = x.sigmoid()
        z = net.a(y)
        torch.add(y.sum(1, keepdim=True), 1, out=y)
        return F.interpolate(z, size=(3, 3), mode="bilinear")[0]

    same_at_every_call(Net(code))


@pytest.mark.gpu
def test_a_norm_of_one_channel_keeps_its_format_on_a_gpu():
    """By that it decides how the images lie that are made of it."""

    def code(net: Net, x: Tensor) -> Tensor:
        y = net.to_one(x)
        return torch.cat([net.one(y), y], 1) + y

    model = trained(Net(code, one=nn.BatchNorm2d(1), to_one=nn.Conv2d(4, 1, 1)), torch.float32)
    fused = tritonnn.fuse(model)
    for channels_last in (False, True):
        x = image(2, 4, 6, 6, channels_last=channels_last)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4, check_stride=True)


def relu_of_the_input(net: Net, x: Tensor) -> Tensor:
    y = net.relu(x)
    x += 1
    return net.a(y)


def silu_of_the_input(net: Net, x: Tensor) -> Tensor:
    y = F.silu(x, inplace=True)
    x.mul_(2)
    return net.a(y) + net.b(x)


def a_list_in_place(net: Net, x: Tensor) -> Tensor:
    y, z = net.a(x), net.b(x)
    torch._foreach_add_([y, z], 1.0)
    return y * z


def out_argument(net: Net, x: Tensor) -> Tensor:
    y, z = net.a(x), net.b(x)
    w = y.relu() + z
    torch.mul(y, 2, out=z)
    return w + z


def written_through_a_chunk(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    first, second = y.chunk(2, 1)
    first.add_(1)
    return net.b(y) + torch.cat([second, first], 1)


def written_through_a_copy_that_is_none(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.contiguous().mul_(2)
    y.to(y.dtype).add_(1)
    return net.b(y)


def number_in_place(net: Net, x: Tensor) -> Tensor:
    n = x.size(1)
    n += 1
    n *= 2
    return net.a(x) * n


def written_after_it_was_used(net: Net, x: Tensor) -> Tensor:
    y = net.b(x)
    z = net.a(y)
    y.clamp_(min=0)
    return z + y


def asks_for_what_a_tensor_has_not(net: Net, x: Tensor) -> Tensor:
    return net.a(x.tensors) if hasattr(x, "tensors") else net.b(x)


UNDERSTOOD = [
    *(relu_of_the_input, silu_of_the_input, a_list_in_place, out_argument, written_through_a_chunk),
    *(written_through_a_copy_that_is_none, number_in_place, written_after_it_was_used, asks_for_what_a_tensor_has_not),
]


@pytest.mark.parametrize("code", UNDERSTOOD)
def test_what_a_graph_gets_right(code):
    same_at_every_call(Net(code))


def asks_for_the_class(net: Net, x: Tensor) -> Tensor:
    return net.a(x) if isinstance(x, Tensor) else net.b(x)


def sets_an_attribute(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.data = y.data * 2
    return net.b(y)


def adds_up_in_a_tensor_of_its_own(net: Net, x: Tensor) -> Tensor:
    total = torch.zeros(1, dtype=x.dtype, device=x.device)
    total += net.a(x).sum()
    return total


def counts_its_calls(net: Net, x: Tensor) -> Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return net.a(x) * (net.calls % 3)


def keeps_its_features(net: Net, x: Tensor) -> Tensor:
    before = getattr(net, "features", None)
    net.features = net.a(x)
    return net.features if before is None else net.features + before


def overwrites_a_buffer(net: Net, x: Tensor) -> Tensor:
    net.norm.num_batches_tracked += 1
    return net.a(x) * net.norm.num_batches_tracked


def overwrites_a_weight(net: Net, x: Tensor) -> Tensor:
    net.a.weight.mul_(0.5)
    return net.a(x)


def changes_its_shape(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).transpose_(2, 3)
    return net.b(y)


MISUNDERSTOOD = [
    *(asks_for_the_class, sets_an_attribute, adds_up_in_a_tensor_of_its_own, counts_its_calls, keeps_its_features),
    *(overwrites_a_buffer, overwrites_a_weight, changes_its_shape),
]


@pytest.mark.parametrize("code", MISUNDERSTOOD)
def test_what_a_graph_would_get_wrong_runs_as_it_is(code):
    fused = same_at_every_call(Net(code))
    assert list(fused.report.untraced) == [""] and fused.report.swapped["a"] == "conv2d"


@pytest.mark.parametrize("code", MISUNDERSTOOD)
def test_around_it_all_is_fused(code):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), Net(code))
    if code is adds_up_in_a_tensor_of_its_own:
        model = nn.Sequential(*model, nn.Identity())
    fused = same_at_every_call(model)
    assert fused.report.fused == {"0": "conv2d + relu"} and list(fused.report.untraced) == ["2"]


class Block(nn.Sequential):
    scale = 3.0

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def by_class(net: nn.Module, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
        if isinstance(block, Single) or type(block) is Block:
            x = x * 2
    return x


def by_attribute(net: nn.Module, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x) * getattr(block, "scale", 0.5)
    return x


def by_length_and_truth(net: nn.Module, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = (block or torch.neg)(x)
        if hasattr(block, "__len__"):
            x = x * len(block) + len(list(block.children()))
    return x


def by_its_layers(net: nn.Module, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x) + block(x) * next(block.parameters()).mean()
        for layer in list(block.children())[:1]:
            x = layer(x) + x
    return x


def by_name_of_the_forward(net: nn.Module, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block.forward(x) + type(block).forward(block, x)
    return x


PARENTS = [by_class, by_attribute, by_length_and_truth, by_its_layers, by_name_of_the_forward]


class Parent(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Single(), nn.Sequential(Block(), Single())])
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x if x.sum() > -1e9 else -x)


@pytest.mark.parametrize("code", PARENTS)
def test_a_part_of_what_cannot_be_traced_is_what_it_was(code):
    fused = same_at_every_call(Parent(code))
    expected = {f"blocks.{name}": "conv2d + batch_norm2d + relu" for name in ("0.0", "1.conv", "2.0.0", "2.1.conv")}
    assert fused.report.fused == expected and not fused.report.swapped
    x = image(2, 4, 6, 6, dtype=torch.float64)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), fused(x))
        for part in twin.parts:
            part.requires_grad_(False).apply(lambda m: [b.zero_() for b in m.buffers(recurse=False)])
        assert not torch.equal(twin(x), fused(x))


class Sized(Single):
    """Truth that is not its own, and none at all."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("part", [Single, Sized, Block])
def test_an_untraceable_parent_of_one_part(part):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = part()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) if x.sum() > -1e9 else x

    fused = same_at_every_call(Outer())
    assert list(fused.report.fused.values()) == ["conv2d + batch_norm2d + relu"]


class Named(OrderedDict):
    """Like a library's output that can be asked by attribute."""


class Pair(list):
    pass


MADE = {
    "OrderedDict": lambda n, x: OrderedDict(out=n.norm(n.a(x)), aux=x.mean()),
    "nested": lambda n, x: [OrderedDict(out=(n.norm(n.a(x)), 1))],
    "class of dict": lambda n, x: Named(out=n.norm(n.a(x))),
    "class of list": lambda n, x: Pair([n.norm(n.a(x))]),
}


@pytest.mark.parametrize("made", MADE)
def test_what_is_made_is_of_the_same_class(made):
    model, x = trained(Net(MADE[made])), image(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = tritonnn.fuse(model)(x), model(x)
    assert type(actual) is type(expected)
    (actual, as_it_was), (expected, spec) = tree_flatten(actual), tree_flatten(expected)
    assert as_it_was == spec
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class TwiceConv2d(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class PlusOne(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


CALLED_OTHERWISE = {
    "layer": lambda: nn.Sequential(TwiceConv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "part": lambda: nn.Sequential(PlusOne(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()),
    "model": lambda: PlusOne(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("where", CALLED_OTHERWISE)
def test_a_class_with_a_call_of_its_own(where):
    same_at_every_call(CALLED_OTHERWISE[where]())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", [partial(prune.random_unstructured, amount=0.5), weight_norm])
def test_a_weight_that_hooks_compute(compute):
    """PyTorch refuses to copy it."""
    model = trained(Net(lambda n, x: n.relu(n.norm(n.a(x)))))
    compute(model.a, name="weight")
    assert not model.a.weight.is_leaf
    same_at_every_call(model)


@pytest.mark.parametrize("layers", ["a", "linear"])
@pytest.mark.parametrize("x", [None, [1.0], numpy.ones((2, 4, 6, 6))], ids=lambda x: type(x).__name__)
def test_an_input_that_is_no_tensor(x, layers):
    model = trained(Net(lambda n, x: getattr(n, layers)(x), linear=nn.Linear(6, 6)))
    for network in (model, tritonnn.fuse(model)):
        with pytest.raises(TypeError):
            network(x)


def test_a_batch_norm_takes_batches_alone():
    model, x = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), image(4, 6, 6, dtype=torch.float64)
    for network in (model, tritonnn.fuse(model)):
        with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
            network(x)


def test_a_forward_of_the_instances_own():
    model = Net(lambda n, x: n.b(n.a(x)))
    model.a.forward = partial(lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1) * 2, model.a)
    fused = same_at_every_call(model)
    assert fused.report.apart == {"a": "its forward was replaced"} and fused.report.fused == {"b": "conv2d"}


def test_a_layer_called_in_two_ways_is_fused_in_one():
    def code(net: Net, x: Tensor) -> Tensor:
        return net.norm(net.a(x)) + net.a.forward(x) + net.whole(x)

    model = Net(code)
    model.whole = nn.Sequential(model.a, nn.ReLU())
    model.whole.register_forward_hook(lambda module, args, y: y * 2)
    same_at_every_call(model)


@pytest.mark.parametrize("wrapper", ["DataParallel", "DistributedDataParallel"])
def test_a_parallel_model_is_fused_inside(wrapper):
    model = trained(Block())
    parallel = nn.DataParallel(model) if wrapper == "DataParallel" else distributed(model)
    assert_same_network(tritonnn.fuse(parallel.eval()), model)
    part = trained(nn.Sequential(nn.Conv2d(4, 4, 1), nn.DataParallel(Block()), nn.ReLU()))
    report = tritonnn.fuse(part).report
    assert report.fused == {"0": "conv2d", "1.module.0": "conv2d + batch_norm2d + relu"}


def distributed(model: nn.Module) -> nn.Module:
    """What fuse asks of a DistributedDataParallel model, without its process group."""
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = model
    return parallel


def assert_same_network(fused: tritonnn.FusedNetwork, model: nn.Module) -> None:
    x = image(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert fused.report.fused == {"0": "conv2d + batch_norm2d + relu"}


def test_weights_that_pytorch_does_not_count_as_changed():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), torch.float32)
    fused, x = tritonnn.fuse(model, cuda_graph=True), image(2, 4, 6, 6)
    with torch.autocast(x.device.type, torch.bfloat16):
        for _ in range(3):
            before = fused(x)
        for module in fused.modules():
            for name in ("weight", "bias"):
                if name in module._buffers:
                    module._buffers[name].data.mul_(0)
        fused.weights_changed()
        for _ in range(3):
            assert before.any() and fused(x).abs().max() < 1e-30


def test_exports_and_compiles():
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch.export reads the legacy switch, which rejects a mixture
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Hardswish(), nn.Conv2d(4, 6, 1), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.LeakyReLU(0.3))
    fused = tritonnn.fuse(trained(model, torch.float32))
    x = image(2, 4, 6, 6)
    expected = [fused(x) for _ in range(2)][-1]
    dynamic = ({0: torch.export.Dim("n")},)
    programs = {
        "export": torch.export.export(fused, (x,)).module(),
        "strict": torch.export.export(fused, (x,), strict=True).module(),
        "dynamic": torch.export.export(fused, (x,), dynamic_shapes=(dynamic,)).module(),
        "compile": torch.compile(fused, fullgraph=True, backend="aot_eager"),
    }
    for name, program in programs.items():
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4, msg=name)
    many = torch.cat([x] * 3)
    torch.testing.assert_close(programs["dynamic"](many), fused(many), rtol=1e-4, atol=1e-4)


def test_an_image_leaves_the_network_as_pytorchs():
    fused = assert_same(trained(Block()), image(2, 4, 6, 6, dtype=torch.float64))
    assert fused(image(2, 4, 6, 6, dtype=torch.float64)).view(2, -1).shape == (2, 144)
