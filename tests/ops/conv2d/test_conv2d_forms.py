"""The forms of the convolution: which one a GPU runs, whole outputs against float64, and each in the interpreter."""

import itertools

import pytest
import torch
import triton
from helpers.compare import image, tf32, worst_image
from torch import nn
from torch.nn import functional as F
from tritonnn.kernels import conv2d
from tritonnn.kernels.block_sizes import DescriptorBlocks, SplitBlocks, tile
from tritonnn.kernels.channels_last import pack_weight
from tritonnn.kernels.descriptor_gemm import fits_descriptors
from tritonnn.kernels.epilogue import Epilogue
from tritonnn.kernels.implicit_gemm import pointer_blocks
from tritonnn.kernels.product import Choice, Problem, Product, Shortcut
from tritonnn.trial import Trial

import tritonnn

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
    "dilation": dict(x=(3, 64, 8, 12), k=40, kernel_size=(3, 5), padding=(2, 4), dilation=(2, 2)),
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
    epilogue = Epilogue(scale, bias, residual, relu=True)
    packed = weight.permute(0, 2, 3, 1).contiguous()
    return Product(x, packed, y, channels_last, *window, 1, "ieee", False, epilogue), exact.relu()


@in_the_interpreter
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", WINDOWS)
def test_descriptors(case, channels_last):
    sizes = {"stride": 1, "padding": (0, 0), "dilation": (1, 1)} | WINDOWS[case]
    x = image(*sizes.pop("x"), channels_last=True)
    product, exact = convolved(x, **sizes, channels_last=channels_last)
    blocks = DescriptorBlocks(*tile(x.shape[0], *exact.shape[2:], 64), 32, 32, True, 4, 1)
    conv2d.run_gemm(product, Choice(blocks, copies_x=False))
    torch.testing.assert_close(product.y.double(), exact, rtol=1e-4, atol=1e-4)


@in_the_interpreter
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", WINDOWS)
def test_split_among_warps_and_programs(case, channels_last, splits):
    sizes = {"stride": 1, "padding": (0, 0), "dilation": (1, 1)} | WINDOWS[case]
    x = image(*sizes.pop("x"), channels_last=channels_last)
    product, exact = convolved(x, **sizes, channels_last=channels_last)
    conv2d.run_gemm(product, Choice(SplitBlocks(splits, 8, 16, 16, 32, 4, 1), copies_x=False))
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
    conv2d.run_gemm(product, Choice(SplitBlocks(splits, 4, 16, 16, 32, 4, 1), copies_x=False))
    torch.testing.assert_close(product.y.double(), exact, rtol=1e-4, atol=1e-4)


@in_the_interpreter
@pytest.mark.parametrize("input_precision", ["ieee", "tf32x3"])
def test_operator_with_a_shortcut(input_precision, monkeypatch):
    monkeypatch.setattr(conv2d, "split_blocks", lambda *_: SplitBlocks(1, 4, 16, 16, 32, 4, 1))
    x, weight, scale, bias = image(2, 32, 6, 6), image(24, 32, 3, 3), image(24), image(24)
    z, second, second_scale, second_bias = image(2, 64, 12, 12), image(24, 64, 1, 1), image(24), image(24)
    packed = [pack_weight(w, input_precision) for w in (weight, second)]
    assert conv2d.takes_shortcut(x, 24, (3, 3), 6, 6, 64) and not conv2d.takes_shortcut(x, 24, (3, 3), 6, 6, 48)
    exact = scale.double()[:, None, None] * F.conv2d(x.double(), weight.double(), padding=1)
    exact += second_scale.double()[:, None, None] * F.conv2d(z.double(), second.double(), stride=2)
    exact = (exact + (bias + second_bias).double()[:, None, None]).relu()
    window = (3, 3), (1, 1), (1, 1), (1, 1), (2, 2)
    y = conv2d.conv2d_with_shortcut(
        x,
        packed[0],
        scale,
        bias,
        z,
        packed[1],
        second_scale,
        second_bias,
        True,
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
    [*itertools.product(["tf32", "tf32x3"], ["descriptors", "split among warps", "pointers"]), ("tf32", "swapped")],
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
    if form in ("descriptors", "swapped"):
        blocks = DescriptorBlocks(2, 4, 8, 32, 32, form == "swapped", 4, 1)
    elif form == "split among warps":
        blocks = SplitBlocks(1, 4, 16, 16, 32, 4, 1)
        packed = pack_weight(weight, "ieee")  # as it is
    else:
        blocks = pointer_blocks(2 * 6 * 6, 24, 64, 9, 4, input_precision)
    product = Product(x, packed, y, True, *window, 1, input_precision, rounds, Epilogue())
    conv2d.run_gemm(product, Choice(blocks, copies_x=False))
    assert float((y.double() - exact).norm() / exact.norm()) < 3e-7


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("blocks", [(1, 8, 16, 128, 32, True, 8, 3), (2, 8, 8, 64, 32, True, 4, 4)], ids=str)
def test_swapped_form_rounds_x(blocks, stride):
    window = (stride, stride), (1, 1), (1, 1)
    problem = Problem(40, 64, 32, 32, 128, 3, 3, *window, 1, torch.float32, "tf32", True, True, True, ("bias", "relu"))
    choice = Choice(DescriptorBlocks(*blocks), copies_x=False)
    Trial(problem, torch.device("cuda")).check(choice, limit=3.5e-4)  # 4.7e-4 where the tensor core truncates


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
def test_tile_wastes_little(output, pixels, box):
    covered = 1
    for size, side in zip(output, tile(*output, pixels)):
        covered *= -(-size // side) * side
    expected = 1
    for size, side in zip(output, box):
        expected *= -(-size // side) * side
    assert covered <= expected


@pytest.mark.parametrize(
    "shape, stride, dtype, fits",
    [
        ((2, 64, 8, 8), [1, 1], torch.bfloat16, True),
        ((2, 64, 8, 8), [2, 2], torch.bfloat16, True),
        ((2, 64, 8, 8), (2, 2), torch.bfloat16, True),
        ((2, 64, 7, 8), [2, 2], torch.bfloat16, False),
        ((2, 64, 8, 8), [1, 2], torch.bfloat16, False),
        ((2, 32, 8, 8), [1, 1], torch.bfloat16, False),
        ((2, 32, 8, 8), [1, 1], torch.float32, True),
        ((2, 64, 8, 8), [1, 1], torch.float64, False),
    ],
    ids=["stride 1", "stride 2", "a tuple", "odd side", "two strides", "half a line", "float32", "float64"],
)
def test_what_descriptors_can_fetch(shape, stride, dtype, fits, monkeypatch):
    """Strides come as lists from PyTorch's dispatcher."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert fits_descriptors(torch.empty(shape, dtype=dtype), 64, stride, 1) is fits
