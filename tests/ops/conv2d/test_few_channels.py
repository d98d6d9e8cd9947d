"""The form for few channels: whole outputs against float64 in the interpreter, and what it can run."""

import pytest
import torch
from helpers.compare import DEVICE, image, tf32, worst_image
from torch import Tensor, nn
from torch.nn import functional as F

import tritonnn
from tritonnn.ops.conv2d.dispatch import can_run, default_choice, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms.few_channels import FewChannelsConfig, padded_rows
from tritonnn.ops.conv2d.forms.pointers import PointersForm
from tritonnn.ops.conv2d.pack import pack_weight
from tritonnn.ops.conv2d.problem import Choice, Product
from tritonnn.tuning.harness import LIMITS


def few_channels(block_m: int, block_n: int, num_warps: int = 4, num_stages: int = 1) -> FewChannelsConfig:
    return FewChannelsConfig(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)


in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
CONFIG = few_channels(256, 16)


def product(
    x: Tensor,
    weight: Tensor,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    channels_last_y=True,
    input_precision="ieee",
    round_x=None,
    steps=(),
) -> tuple[Product, Tensor]:
    """With y to be filled, and in float64 what is to be in it."""
    rounded = (tf32(x), tf32(weight)) if input_precision == "tf32" else (x, weight)
    exact = F.conv2d(*(t.double() for t in rounded), None, stride, padding, dilation)
    memory_format = torch.channels_last if channels_last_y else torch.contiguous_format
    y = torch.full_like(exact, float("nan"), dtype=x.dtype).contiguous(memory_format=memory_format)
    epilogue = Epilogue()
    if steps:
        scale, bias = image(exact.shape[1]), image(exact.shape[1])
        residual = torch.randn_like(y) if "residual" in steps else None
        epilogue = Epilogue(scale, bias, residual, "relu" if "relu" in steps else "none", "round_y" in steps)
        exact = exact * scale.double()[:, None, None] + bias.double()[:, None, None]
        exact = exact if residual is None else exact + residual.double()
        exact = exact.relu() if "relu" in steps else exact
    packed = pack_weight(weight, input_precision)
    rounds = input_precision == "tf32" if round_x is None else round_x
    operands = x, packed, y, channels_last_y, stride, padding, dilation, 1, input_precision, rounds, epilogue
    return Product(*operands), exact


def assert_right(operands: Product, exact: Tensor, config: FewChannelsConfig = CONFIG) -> None:
    assert can_run(operands, Choice(config))
    run(operands, Choice(config))
    rounding = operands.input_precision == "tf32" and operands.epilogue.round_y
    limit = LIMITS["tf32" if rounding else operands.x.dtype]
    assert worst_image(operands.y, exact) < limit


STEM = dict(stride=(2, 2), padding=(3, 3))
CASES = {
    "ImageNet's first layer": ((2, 3, 15, 18), (20, 7, 7), STEM),
    "1 channel": ((2, 1, 11, 9), (5, 9, 9), dict(padding=(4, 4))),
    "2 channels, 7x5": ((2, 2, 11, 9), (17, 7, 5), dict(stride=(2, 1), padding=(1, 2))),
    "4 channels, 5x5": ((2, 4, 9, 12), (8, 5, 5), dict(stride=(1, 2), padding=(2, 2))),
    "11x11, stride 4": ((1, 3, 35, 31), (8, 11, 11), dict(stride=(4, 4), padding=(2, 2))),
    "no padding": ((2, 3, 12, 13), (8, 5, 7), dict()),
    "padding as wide as the filter": ((2, 3, 5, 4), (8, 5, 5), dict(stride=(2, 2), padding=(5, 7))),
    "columns that no window reaches": ((2, 3, 9, 16), (8, 5, 6), dict(stride=(5, 5))),
    "rows apart": ((2, 3, 14, 12), (8, 5, 7), dict(stride=(1, 2), padding=(4, 3), dilation=(2, 1))),
    "one column": ((2, 4, 20, 6), (8, 17, 1), dict(padding=(3, 0))),
    "image smaller than the filter": ((3, 3, 2, 3), (8, 7, 7), dict(padding=(3, 3))),
}
"""Sizes of x [N, C, H, W] and of the weight [K, R, S]."""


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("case", CASES)
def test_every_output(case, channels_last):
    shape, (k, *kernel_size), window = CASES[case]
    x, weight = image(*shape, channels_last=channels_last), image(k, shape[1], *kernel_size)
    assert_right(*product(x, weight, **window, channels_last_y=channels_last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    x, weight = image(2, 3, 15, 18, dtype=dtype), image(20, 3, 7, 7, dtype=dtype)
    assert_right(*product(x, weight, **STEM))


@in_the_interpreter
@pytest.mark.parametrize("channels_last_y", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("input_precision", ["ieee", "tf32", "tf32x3"])
def test_precision_and_epilogue(input_precision, channels_last_y):
    """TF32 is the product of operands rounded by the copies; strict float32 has the weight in three parts."""
    x, weight = image(2, 3, 15, 18), image(20, 3, 7, 7)
    settings = dict(channels_last_y=channels_last_y, input_precision=input_precision)
    assert_right(*product(x, weight, **STEM, **settings))
    assert_right(*product(x, weight, **STEM, **settings, steps=("residual", "relu")))


@in_the_interpreter
def test_rounded_before_and_after():
    x, weight = tf32(image(2, 3, 15, 18)), image(20, 3, 7, 7)
    rounded, exact = product(x, weight, **STEM, input_precision="tf32", round_x=False, steps=("relu", "round_y"))
    assert_right(rounded, exact)
    assert torch.equal(rounded.y, tf32(rounded.y))


VIEWS = {
    "every other pixel": lambda: image(2, 3, 30, 36)[:, :, ::2, 1::2],
    "channels of more": lambda: image(2, 8, 15, 18, channels_last=True)[:, 2:5],
    "one image for all": lambda: image(1, 3, 15, 18).expand(2, -1, -1, -1),
    "transposed": lambda: image(2, 3, 18, 15).transpose(2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view):
    x = VIEWS[view]()
    assert not x.is_contiguous() and x.shape == (2, 3, 15, 18)
    assert_right(*product(x, image(20, 3, 7, 7), **STEM))


@pytest.mark.parametrize("block_m, block_n", [(16, 16), (64, 16), (256, 32)])
def test_tiles(block_m, block_n):
    x, weight = image(2, 3, 9, 10), image(20, 3, 7, 7)
    assert_right(*product(x, weight, **STEM), few_channels(block_m, block_n))


@pytest.mark.parametrize("round_to_tf32", [True, False], ids=["rounded", "as it is"])
@pytest.mark.parametrize("padding, columns", [(3, 16), (0, 16), (20, 16), (2, 5), (0, 600)])
def test_padded_rows(padding, columns, round_to_tf32):
    x = image(2, 3, 4, 9)
    y = padded_rows(x, padding, columns, round_to_tf32)
    expected = F.pad(x, (padding, columns))[..., :columns]
    expected = tf32(expected) if round_to_tf32 else expected
    assert y.is_contiguous() and y.shape == (2, 4, columns, 4)
    assert torch.equal(y[..., :3], expected.permute(0, 2, 3, 1)) and not y[..., 3].any()


@pytest.mark.parametrize("stride, padding", [(1, 3), (2, 3), (3, 0)])
def test_the_compiler_can_see_that_loads_are_aligned(stride, padding, monkeypatch):
    """Strides are 1, which is compiled in, or multiples of 16; what a step to the next pixel takes is a constant."""
    seen = []
    monkeypatch.setattr(PointersForm, "run", lambda self, product, config: seen.append(product))
    operands, _ = product(image(2, 3, 15, 18), image(20, 3, 7, 7), (stride, stride), (padding, padding))
    run(operands, Choice(CONFIG))
    windows, taps, (_, step) = seen[0].x, seen[0].packed, seen[0].stride
    assert windows.stride()[1::2] == (1, 1) and step == 4 * stride
    assert windows.stride(0) % 16 == windows.stride(2) % 16 == windows.data_ptr() % 16 == 0
    assert windows.shape[1] == 32 and taps.shape == (20, 7, 1, 32)


def test_nothing_of_an_image_is_read_beside_it():
    """It is not even multiplied by zero, as it may be infinite."""
    around = torch.full((2, 5, 21, 24), float("inf"), device=DEVICE)
    x = around[:, 1:4, 3:18, 3:21]
    x.copy_(image(2, 3, 15, 18))
    assert_right(*product(x, image(20, 3, 7, 7), **STEM))


def sized(n=128, c=3, side=224, k=64, size=7, **changes) -> Product:
    """Operands without memory."""
    settings = dict(stride=(2, 2), padding=(size // 2,) * 2, dilation=(1, 1), groups=1, dtype=torch.float32)
    settings |= dict(input_precision="tf32", round_x=True) | changes
    dtype, groups = settings.pop("dtype"), settings["groups"]
    x, weight = torch.empty(n, c, side, side, device="meta", dtype=dtype), torch.empty(k, c // groups, size, size)
    window = settings["stride"], settings["padding"], settings["dilation"]
    y = F.conv2d(x, weight.to("meta", dtype), None, *window, groups)
    packed = torch.empty(k, size, size, c // groups, device="meta")
    return Product(x, packed, y, False, *window, groups, settings["input_precision"], settings["round_x"], Epilogue())


NOT_CHOSEN = {
    "CIFAR's first layer": dict(n=1024, side=32, size=3, stride=(1, 1)),
    "3x3 of a large image": dict(size=3),
    "one image": dict(n=1),
}
CANNOT_RUN = {
    "5 channels": dict(c=5),
    "groups": dict(c=4, k=64, groups=2),
    "columns apart": dict(dilation=(1, 2)),
    "float64": dict(dtype=torch.float64, input_precision="ieee", round_x=False),
}


@pytest.mark.usefixtures("on_hopper")
class TestChoice:
    @pytest.mark.parametrize("sizes", [dict(), dict(c=1, size=9), dict(dilation=[1, 1])], ids=str)
    def test_default_for_large_filters_of_few_channels(self, sizes):
        choice = default_choice(sized(**sizes))
        assert choice.config.form == "few_channels" and can_run(sized(**sizes), choice)

    @pytest.mark.parametrize("name", NOT_CHOSEN)
    def test_another_default_where_gathering_costs_little(self, name):
        operands = sized(**NOT_CHOSEN[name])
        assert default_choice(operands).config.form == "pointers" and can_run(operands, Choice(CONFIG))

    @pytest.mark.parametrize("name", CANNOT_RUN)
    def test_what_it_cannot_run(self, name):
        operands = sized(**CANNOT_RUN[name])
        assert default_choice(operands).config.form == "pointers" and not can_run(operands, Choice(CONFIG))


PRECISIONS = {
    "float32": (torch.float32, "ieee", 2**-22),
    "TF32": (torch.float32, "tf32", 2**-11),
    "float16": (torch.float16, "ieee", 2**-11),
    "bfloat16": (torch.bfloat16, "ieee", 2**-8),
}


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size, stride", [(7, 2), (7, 1), (5, 1), (11, 4)], ids=["7x7/2", "7x7", "5x5", "11x11/4"])
def test_every_image(size, stride, precision, channels_last):
    dtype, fp32_precision, limit = PRECISIONS[precision]
    torch.backends.cudnn.conv.fp32_precision = fp32_precision
    x = image(9, 3, 224, 218, dtype=dtype, channels_last=channels_last)
    layer = nn.Conv2d(3, 64, size, stride, size // 2).to("cuda", dtype)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, size // 2)
    tritonnn.swap(layer, strict=True)
    with torch.no_grad():
        first = layer(x)
        assert worst_image(first, exact) < limit
        for _ in range(3):  # the same bits every time: no race
            assert torch.equal(layer(x), first)
