"""The forms of the convolution: whole outputs against float64, and each that it takes in the interpreter."""

import dataclasses
import itertools

import pytest
import torch
from helpers.compare import DEVICE, image, tf32, worst_image
from helpers.gpus import A100, H100, RTX_5090, posing
from helpers.problems import pointers, product, sliced_k
from torch import nn
from torch.nn import functional as F

import tritonnn
from tritonnn.device.activation import ACTIVATIONS
from tritonnn.layers.fused.activation import activate
from tritonnn.ops.conv2d import op
from tritonnn.ops.conv2d.dispatch import can_run, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms import BY_NAME
from tritonnn.ops.conv2d.forms import sliced_k as sliced_k_form
from tritonnn.ops.conv2d.forms.depthwise import DepthwiseConfig
from tritonnn.ops.conv2d.forms.form import Config
from tritonnn.ops.conv2d.forms.tma_tiles import best_box, block_k_of, config_of, shared_memory
from tritonnn.ops.conv2d.pack import pack_weight
from tritonnn.ops.conv2d.problem import Choice, Problem, Product, Shortcut
from tritonnn.tuning.harness import Harness

in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

SHAPES = {
    "64 channels": (dict(in_channels=64, out_channels=64, kernel_size=3, padding=1), (200, 64, 32, 32)),
    "64 channels, stride 2": (
        dict(in_channels=64, out_channels=128, kernel_size=3, stride=2, padding=1),
        (200, 64, 32, 32),
    ),
    "128 channels": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1), (200, 128, 16, 16)),
    "256 channels": (dict(in_channels=256, out_channels=256, kernel_size=3, padding=1), (515, 256, 8, 8)),
    "512 channels": (dict(in_channels=512, out_channels=512, kernel_size=3, padding=1), (515, 512, 4, 4)),
    "512 channels, stride 2": (
        dict(in_channels=256, out_channels=512, kernel_size=3, stride=2, padding=1),
        (515, 256, 8, 8),
    ),
    "1x1": (dict(in_channels=256, out_channels=64, kernel_size=1), (64, 256, 56, 56)),
    "1x1, stride 2": (dict(in_channels=256, out_channels=512, kernel_size=1, stride=2), (128, 256, 8, 8)),
    "56x56": (dict(in_channels=64, out_channels=64, kernel_size=3, padding=1), (16, 64, 56, 56)),
    "14x14": (dict(in_channels=256, out_channels=256, kernel_size=3, padding=1), (70, 256, 14, 14)),
    "7x7": (dict(in_channels=512, out_channels=512, kernel_size=3, padding=1), (70, 512, 7, 7)),
    "odd sides, stride 2": (dict(in_channels=64, out_channels=64, kernel_size=3, stride=2), (33, 64, 31, 27)),
    "no padding": (dict(in_channels=64, out_channels=72, kernel_size=3), (33, 64, 19, 45)),
    "5x5, dilation 2": (
        dict(in_channels=64, out_channels=96, kernel_size=5, padding=4, dilation=2),
        (33, 64, 20, 24),
    ),
    "rectangular": (
        dict(in_channels=64, out_channels=200, kernel_size=(1, 3), padding=(0, 1)),
        (33, 64, 18, 33),
    ),
    "one image, 64 channels": (dict(in_channels=64, out_channels=64, kernel_size=3, padding=1), (1, 64, 32, 32)),
    "one image, 128 channels": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1), (1, 128, 16, 16)),
    "one image, 512 channels": (dict(in_channels=512, out_channels=512, kernel_size=3, padding=1), (1, 512, 4, 4)),
    "one image, stride 2": (
        dict(in_channels=256, out_channels=512, kernel_size=3, stride=2, padding=1),
        (1, 256, 8, 8),
    ),
    "eight images": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1), (8, 128, 16, 16)),
    "channels that are no power of 2": (
        dict(in_channels=48, out_channels=80, kernel_size=3, padding=1),
        (40, 48, 24, 24),
    ),
    "groups": (dict(in_channels=128, out_channels=128, kernel_size=3, padding=1, groups=2), (40, 128, 16, 16)),
    "3 channels": (dict(in_channels=3, out_channels=64, kernel_size=3, padding=1), (200, 3, 32, 32)),
}
PRECISIONS = {
    "float32": (torch.float32, "ieee"),
    "TF32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
}
LIMIT = {"float32": 2**-22, "TF32": 2**-11, "float16": 2**-11, "bfloat16": 2**-8}
"""The largest relative error of one rounding; in float32, where rounding the sums shows too, of four."""


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_image(shape, precision, channels_last):
    arguments, size = SHAPES[shape]
    dtype, fp32_precision = PRECISIONS[precision]
    torch.backends.cudnn.conv.fp32_precision = fp32_precision
    x = image(*size, dtype=dtype, channels_last=channels_last)
    layer = nn.Conv2d(**arguments).to("cuda", dtype)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(
        x.double(),
        layer.weight.double(),
        layer.bias.double(),
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
    tritonnn.swap(layer, strict=True)
    with torch.no_grad():
        first = layer(x)
        assert worst_image(first, exact) < LIMIT[precision]
        for _ in range(3):  # the same bits every time: no race
            assert torch.equal(layer(x), first)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", ["64 channels", "512 channels", "one image, 128 channels", "3 channels", "groups"])
def test_epilogue(shape, precision):
    arguments, size = SHAPES[shape]
    dtype, fp32_precision = PRECISIONS[precision]
    torch.backends.cudnn.conv.fp32_precision = fp32_precision

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(**arguments, bias=False)
            self.norm = nn.BatchNorm2d(self.conv.out_channels)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.conv(x)) + residual)

    block = Block().to("cuda", dtype).eval()
    x = image(*size, dtype=dtype, channels_last=True)
    with torch.no_grad():
        residual = torch.randn_like(block.conv(x))
        exact = Block().double().cuda().eval()
        exact.load_state_dict(block.state_dict())
        exact = exact(x.double(), residual.double())
        y = tritonnn.fuse(block)(x, residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert worst_image(y, exact) < LIMIT[precision]


WINDOWS = {
    "3x3": dict(x=(2, 32, 8, 8), k=48, kernel_size=(3, 3), padding=(1, 1)),
    "stride 2": dict(x=(3, 64, 8, 12), k=40, kernel_size=(3, 3), stride=2, padding=(1, 1)),
    "dilation": dict(x=(2, 32, 6, 8), k=40, kernel_size=(3, 5), padding=(2, 4), dilation=(2, 2)),
    "1x1 of one pixel": dict(x=(5, 32, 1, 1), k=8, kernel_size=(1, 1)),
    "sizes that no tile divides": dict(x=(3, 32, 7, 9), k=20, kernel_size=(3, 3), padding=(0, 2)),
}


def convolved(
    x: torch.Tensor, k: int, kernel_size, stride: int, padding, dilation, channels_last: bool
) -> tuple[Product, torch.Tensor]:
    """A product, and what is to be in its y."""
    weight, scale, bias = image(k, x.shape[1], *kernel_size), image(k), image(k)
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    exact = exact * scale.double()[:, None, None] + bias.double()[:, None, None]
    residual = image(*exact.shape, channels_last=True) if channels_last else None
    if residual is not None:
        exact += residual
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.full(exact.shape, float("nan")).contiguous(memory_format=memory_format)
    window = (stride, stride), padding, dilation
    epilogue = Epilogue(scale, bias, residual, activation="relu")
    packed = weight.permute(0, 2, 3, 1).contiguous()
    return Product(x, packed, y, channels_last, *window, 1, "ieee", False, epilogue), exact.relu()


@in_the_interpreter
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", WINDOWS)
def test_tma(case, channels_last):
    sizes = {"stride": 1, "padding": (0, 0), "dilation": (1, 1)} | WINDOWS[case]
    x = image(*sizes.pop("x"), channels_last=True)
    product, exact = convolved(x, **sizes, channels_last=channels_last)
    box = best_box(x.shape[0], *exact.shape[2:], 64)
    run(product, Choice(config_of(box, 32, 32, swap_ab=True, num_warps=4, num_stages=1)))
    torch.testing.assert_close(product.y.double(), exact, rtol=1e-4, atol=1e-4)


@in_the_interpreter
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", WINDOWS)
def test_sliced_k(case, channels_last, splits):
    sizes = {"stride": 1, "padding": (0, 0), "dilation": (1, 1)} | WINDOWS[case]
    x = image(*sizes.pop("x"), channels_last=channels_last)
    product, exact = convolved(x, **sizes, channels_last=channels_last)
    run(product, Choice(sliced_k(splits, 8, 16, 16, 32)))
    torch.testing.assert_close(product.y.double(), exact, rtol=1e-4, atol=1e-4)


@in_the_interpreter
@pytest.mark.parametrize("input_precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_shortcut(stride, splits, input_precision):
    x = image(2, 32, 6, 6, channels_last=True)
    sizes = dict(k=24, kernel_size=(3, 3), stride=1, padding=(1, 1), dilation=(1, 1), channels_last=True)
    product, _ = convolved(x, **sizes)
    weight, epilogue = product.packed, product.epilogue
    z = image(2, 64, 6 * stride[0] - stride[0] + 1, 6 * stride[1])
    second, scale, bias = image(24, 64, 1, 1), image(24), image(24)
    shortcut = Shortcut(z, second.permute(0, 2, 3, 1).contiguous(), scale, bias, stride, input_precision, False)
    exact = epilogue.scale.double()[:, None, None] * F.conv2d(
        x.double(), weight.permute(0, 3, 1, 2).double(), padding=1
    )
    exact += scale.double()[:, None, None] * F.conv2d(z.double(), second.double(), stride=stride)
    exact = (exact + (epilogue.bias + bias).double()[:, None, None] + epilogue.residual.double()).relu()
    product = product._replace(input_precision=input_precision, shortcut=shortcut)
    run(product, Choice(sliced_k(splits, 4, 16, 16, 32)))
    torch.testing.assert_close(product.y.double(), exact, rtol=1e-4, atol=1e-4)


@in_the_interpreter
@pytest.mark.parametrize("input_precision", ["ieee", "tf32x3"])
def test_operator_with_a_shortcut(input_precision, monkeypatch):
    monkeypatch.setattr(sliced_k_form, "default_config", lambda *_: sliced_k(1, 4, 16, 16, 32))
    x, weight, scale, bias = image(2, 32, 6, 6), image(24, 32, 3, 3), image(24), image(24)
    z, second, second_scale, second_bias = image(2, 64, 12, 12), image(24, 64, 1, 1), image(24), image(24)
    packed = [pack_weight(w, input_precision) for w in (weight, second)]
    assert op.takes_shortcut(x, 24, (3, 3), 6, 6, 64) and not op.takes_shortcut(x, 24, (3, 3), 6, 6, 48)
    exact = scale.double()[:, None, None] * F.conv2d(x.double(), weight.double(), padding=1)
    exact += second_scale.double()[:, None, None] * F.conv2d(z.double(), second.double(), stride=2)
    exact = (exact + (bias + second_bias).double()[:, None, None]).relu()
    window = (3, 3), (1, 1), (1, 1), (1, 1), (2, 2)
    y = op.conv2d_with_shortcut(
        x,
        packed[0],
        scale,
        bias,
        z,
        packed[1],
        second_scale,
        second_bias,
        "relu",
        0.01,
        *window,
        input_precision,
        False,
        input_precision,
        False,
        False,
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@in_the_interpreter
@pytest.mark.parametrize(
    "input_precision, form",
    [*itertools.product(["tf32", "tf32x3"], ["tma", "sliced_k", "pointers"]), ("tf32", "tma, SWAP_AB")],
)
def test_precision_of_operands(input_precision, form):
    """TF32 is the product of rounded operands; three of them are float32's, to a few roundings."""
    x, weight = image(2, 64, 6, 6, channels_last=True), image(24, 64, 3, 3)
    rounded = (tf32(x), tf32(weight)) if input_precision == "tf32" else (x, weight)
    exact = F.conv2d(*(t.double() for t in rounded), padding=1)
    y = torch.full(exact.shape, float("nan")).contiguous(memory_format=torch.channels_last)
    window = (1, 1), (1, 1), (1, 1)
    packed = pack_weight(weight, input_precision)
    rounds = input_precision == "tf32"
    if form == "sliced_k":
        config = sliced_k(1, 4, 16, 16, 32)
        packed = pack_weight(weight, "ieee")  # as it is
    elif form == "pointers":
        config = pointers(128, 32, 64)
    else:
        config = config_of((2, 4, 8), 32, 32, swap_ab=form == "tma, SWAP_AB", num_warps=4, num_stages=1)
    product = Product(x, packed, y, True, *window, 1, input_precision, rounds, Epilogue())
    run(product, Choice(config))
    assert float((y.double() - exact).norm() / exact.norm()) < 3e-7


ENDS_OF_BLOCKS = {
    "24 to 40": (24, 40, (1, 1), (1, 1)),
    "stride 2": (104, 72, (2, 1), (1, 1)),
    "whole blocks, stride 3": (64, 64, (3, 3), (1, 1)),
    "nine taps": (40, 24, (1, 1), (3, 3)),
    "seven in a row": (72, 16, (1, 1), (1, 7)),
    "seven in a column": (104, 72, (1, 1), (7, 1)),
}
"""Channels of x and y, strides, and rows and columns of the filter."""


@pytest.mark.parametrize("order", [("ieee", True), ("tf32", True), ("tf32", False), ("tf32x3", False)], ids=str)
@pytest.mark.parametrize("name", ENDS_OF_BLOCKS)
def test_tma_takes_any_channels_and_with_one_tap_any_stride(name, order):
    """The last block of the reduction ends with zeros, whatever lies behind."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    (c, k, stride, taps), (input_precision, swap_ab) = ENDS_OF_BLOCKS[name], order
    padding = taps[0] // 2, taps[1] // 2
    dtype = torch.bfloat16 if DEVICE.type == "cuda" and input_precision == "ieee" else torch.float32
    x, weight = image(3, c, 8, 10, dtype=dtype, channels_last=True), image(k, c, *taps, dtype=dtype)
    rounded = (tf32(x), tf32(weight)) if input_precision == "tf32" else (x, weight)
    exact = F.conv2d(*(t.double() for t in rounded), None, stride, padding)
    y = torch.full(exact.shape, float("nan"), dtype=dtype, device=DEVICE).contiguous(memory_format=torch.channels_last)
    packed = pack_weight(weight, input_precision)
    window = stride, padding, (1, 1), 1, input_precision, input_precision == "tf32"
    operands = Product(x, packed, y, True, *window, Epilogue())
    block_k, box = block_k_of(c, dtype.itemsize), best_box(3, *exact.shape[2:], 64)
    run(operands, Choice(config_of(box, 64, block_k, swap_ab, 4, 1 if DEVICE.type == "cpu" else 3)))
    assert worst_image(y, exact) < (
        2**-8 if dtype == torch.bfloat16 else 2**-17 if input_precision == "tf32" else 2**-20
    )


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [((1, 8, 16), 128, 32, True, 8, 3), ((2, 8, 8), 64, 32, True, 4, 4)], ids=str)
def test_swapped_operands_are_rounded(sizes, stride):
    window = (stride, stride), (1, 1), (1, 1)
    problem = Problem(40, 64, 32, 32, 128, 3, 3, *window, 1, torch.float32, "tf32", True, True, True, ("bias", "relu"))
    Harness(problem, torch.device("cuda")).check(
        Choice(config_of(*sizes)), limit=3.5e-4
    )  # 4.7e-4 where the tensor core truncates


@pytest.mark.parametrize(
    "output, pixels, box",
    [
        ((1024, 32, 32), 128, (1, 4, 32)),
        ((1024, 4, 4), 128, (8, 4, 4)),
        ((16, 56, 56), 128, (2, 8, 8)),
        ((256, 7, 7), 128, (128, 1, 1)),
        ((1, 5, 3), 64, (1, 8, 8)),
    ],
    ids=str,
)
def test_a_box_wastes_little(output, pixels, box):
    covered = 1
    for size, side in zip(output, best_box(*output, pixels)):
        covered *= -(-size // side) * side
    expected = 1
    for size, side in zip(output, box):
        expected *= -(-size // side) * side
    assert covered <= expected


@pytest.mark.usefixtures("on_hopper")
class TestWhatTmaCanRun:
    config = config_of((1, 4, 16), 64, 64, swap_ab=True, num_warps=4, num_stages=3)

    @pytest.mark.parametrize(
        "sizes, fits",
        {
            "stride 1": (dict(), True),
            "stride 2": (dict(stride=(2, 2)), True),
            "a list": (dict(stride=[2, 2]), True),
            "odd sides": (dict(side=7, stride=(2, 2)), False),
            "two strides": (dict(stride=(1, 2)), False),
            "half a line": (dict(c=32), True),
            "half a line, stride 2": (dict(c=32, stride=(2, 2)), False),
            "half a line, one tap": (dict(c=32, taps=1), True),
            "no whole blocks, one tap": (dict(c=104, taps=1), True),
            "no multiple of 16 bytes, one tap": (dict(c=100, taps=1), False),
            "fewer channels than a block": (dict(c=8, taps=1), False),
            "one tap, any stride": (dict(c=64, taps=1, side=7, stride=(3, 2)), True),
            "a line of float32": (dict(c=32, dtype=torch.float32), True),
            "float64": (dict(dtype=torch.float64), False),
            "groups": (dict(groups=2), False),
            "float32 not on tensor cores": (dict(dtype=torch.float32, input_precision="ieee"), False),
            "rows of y that are no multiple of 16 bytes": (dict(k=36), False),
        }.values(),
        ids=str,
    )
    def test_sizes(self, sizes, fits):
        """Strides come as lists from PyTorch's dispatcher."""
        assert BY_NAME["tma"].fits(product(**dict(n=2, side=8) | sizes)) is fits

    def test_it_wants_aligned_channels_last_operands(self):
        direct, copied = Choice(self.config), Choice(self.config, copies_x=True)
        assert can_run(product(), direct) and can_run(product(), copied)
        for odd in (product(nchw=True), product(misaligned=True)):
            assert not can_run(odd, direct) and can_run(odd, copied)
        residual = torch.empty(product().y.numel() + 1, dtype=torch.bfloat16, device="meta")[1:].view(1024, 64, 32, 32)
        assert not can_run(product(epilogue=Epilogue(residual=residual)), direct)

    def test_orders_of_the_operands(self):
        natural = config_of((1, 4, 16), 64, 64, swap_ab=False, num_warps=4, num_stages=3)
        assert not can_run(product(), Choice(natural))
        strict = product(dtype=torch.float32, input_precision="tf32x3")
        tiles = {order: config_of((1, 4, 16), 64, 32, order, 4, 3) for order in (False, True)}
        assert can_run(strict, Choice(tiles[False])) and not can_run(strict, Choice(tiles[True]))

    def test_on_another_gpu(self):
        assert can_run(product(), Choice(self.config))
        with posing(A100):  # which has no TMA
            assert not can_run(product(), Choice(self.config))
        with posing(dataclasses.replace(H100, capability=(10, 0))):
            assert can_run(product(), Choice(self.config))

    @pytest.mark.parametrize("n", [1, 8, 64, 1024])
    @pytest.mark.parametrize("taps", [1, 3])
    @pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
    def test_the_default_fits_the_memory_of_the_card(self, n, taps, precision):
        """An RTX 5090 has less than half of an H100's."""
        dtype = torch.bfloat16 if precision == "ieee" else torch.float32
        given = product(n=n, c=512, k=512, side=16, taps=taps, dtype=dtype, input_precision=precision)
        with posing(RTX_5090):
            config = BY_NAME["tma"].default(given).config
        pixels = config.TILE_N * config.TILE_P * config.TILE_Q
        sizes = pixels, config.BLOCK_N, config.BLOCK_K, config.num_stages, dtype.itemsize
        assert shared_memory(*sizes, split=precision == "tf32x3") <= RTX_5090.shared_memory
        with posing(dataclasses.replace(RTX_5090, shared_memory=8 * 1024)):
            assert BY_NAME["tma"].default(given) is None


# Activations

LINE = 128 // (2 if DEVICE.type == "cuda" else 4)
FORMS: dict[str, tuple[Config, int]] = {
    "pointers": (pointers(64, 32, 32), 1),
    "sliced_k": (sliced_k(1, 4, 16, 16, 32), 1),
    "sliced_k, split": (sliced_k(2, 4, 16, 16, 16), 1),
    "tma": (config_of((1, 8, 8), LINE, LINE, swap_ab=True, num_warps=4, num_stages=1), 1),
    "depthwise": (DepthwiseConfig(UNROLLED=True, STRIP=4, BLOCK_M=16, BLOCK_C=32, num_warps=4), 64),
}
"""A configuration of each that has no tests of its own on a GPU, and the groups."""
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 3.0, -3.0, 6.0, 88.0, -88.0, 1e-30)


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMS)
def test_activations(name, activation):
    """Of sums of usual sizes, and of NaN, infinities, the ends of pieces and what overflows an exponential.

    The filter is the identity, so that all of the error is the activation's: float32's, and on a GPU bfloat16's of y.
    """
    config, groups = FORMS[name]
    dtype, tolerance = (torch.bfloat16, 2**-8) if DEVICE.type == "cuda" else (torch.float32, 1e-6)
    x, bias = 4 * image(2, 64, 4, 5, dtype=dtype, channels_last=True), image(64)
    bias[: len(SPECIAL)] = torch.tensor(SPECIAL)
    x[:, : len(SPECIAL)] = 0
    weight = torch.eye(64, dtype=dtype, device=DEVICE) if groups == 1 else torch.ones(64, 1, dtype=dtype, device=DEVICE)
    epilogue = Epilogue(None, bias, None, activation, slope=0.2)
    y = torch.full_like(x, float("nan"))
    window = (1, 1), (0, 0), (1, 1)
    operands = Product(x, weight[:, None, None].contiguous(), y, True, *window, groups, "ieee", False, epilogue)
    if DEVICE.type == "cuda" and not can_run(operands, Choice(config)):
        pytest.skip("needs a Hopper GPU")
    run(operands, Choice(config))
    exact = activate(x.double() + bias.double()[:, None, None], activation, 0.2)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=1e-6, equal_nan=True)
