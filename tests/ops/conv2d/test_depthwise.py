"""Depthwise convolution in strips of rows: whole outputs against float64 in the interpreter or on a GPU."""

import pytest
import torch
from helpers.compare import DEVICE, image, worst_image
from helpers.operands import product_and_result
from torch.nn import functional as F

from tritonnn.ops.conv2d.dispatch import can_run, default_choice, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms.depthwise import DepthwiseForm, config_of, default_config
from tritonnn.ops.conv2d.problem import Choice, Product
from tritonnn.runtime.hardware import Gpu

LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""The largest error of an image, relative to it."""
ONCE = (1, 1), (1, 1), (1, 1)
CASES = {
    "3x3": (8, 1, (3, 3), *ONCE),
    "stride 2": (8, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "5x5, two filters a channel": (6, 2, (5, 5), (1, 1), (2, 2), (1, 1)),
    "oblong, dilated, strided": (8, 1, (5, 3), (2, 1), (2, 0), (1, 2)),
    "7x7": (4, 3, (7, 7), (1, 1), (3, 3), (1, 1)),
    "dilated rows": (8, 1, (3, 3), (1, 1), (2, 2), (2, 2)),
    "1x1": (20, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
}
"""Channels, filters of each, filter, stride, padding, dilation."""


def product(case: str, channels_last: bool, dtype: torch.dtype) -> tuple[Product, torch.Tensor]:
    c, multiplier, taps, *window = CASES[case]
    return product_and_result(DepthwiseForm(), (c, c * multiplier), c, taps, window, channels_last, dtype)


@pytest.mark.parametrize("strip", [1, 4, 7])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, channels_last, strip):
    operands, exact = product(case, channels_last, torch.float32)
    N, K, P, Q = exact.shape
    choice = Choice(config_of(strip, N, P, Q, K, 4, channels_last, 8))
    assert can_run(operands, choice)
    run(operands, choice)
    assert worst_image(operands.y, exact) < LIMIT[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_types(dtype):
    operands, exact = product("stride 2", True, dtype)
    N, K, P, Q = exact.shape
    run(operands, Choice(config_of(4, N, P, Q, K, dtype.itemsize, True, 16)))
    assert worst_image(operands.y, exact) < LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_the_default_on_a_gpu(case, channels_last, dtype):
    operands, exact = product(case, channels_last, dtype)
    run(operands, default_choice(operands))
    assert worst_image(operands.y, exact) < LIMIT[dtype]


def test_large_filters_are_not_unrolled():
    x, weight = image(1, 2, 40, 40), image(2, 1, 31, 31)
    y = torch.full((1, 2, 10, 10), float("nan"), device=DEVICE)
    packed = DepthwiseForm().pack(weight, "ieee")
    operands = Product(x, packed, y, False, (1, 1), (0, 0), (1, 1), 2, "ieee", False, Epilogue())
    choice = default_choice(operands)
    assert not choice.config.UNROLLED
    assert not can_run(operands, Choice(config_of(4, 1, 10, 10, 2, 4, False, 8)))
    run(operands, choice)
    assert worst_image(y, F.conv2d(x.double(), weight.double(), groups=2)) < 1e-5


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("n", "side", "k", "stride"), [(64, 56, 144, 1), (1, 7, 960, 1), (1, 7, 8, 1), (64, 112, 32, 1), (8, 28, 240, 2)]
)
def test_default_strips_fill_the_gpu(n, side, k, stride, channels_last):
    """The longest ones that give every multiprocessor a program; the shortest where none do."""
    gpu = Gpu((9, 0), 132, 232448)
    config = default_config(n, side, side, k, stride, 2, channels_last, gpu)
    strips = n * -(-side // config.STRIP) * side
    programs = -(-strips // config.BLOCK_M) * -(-k // config.BLOCK_C)
    assert programs >= gpu.multiprocessors or config.STRIP == 1
    assert config.STRIP <= 2 or channels_last or stride == 1
