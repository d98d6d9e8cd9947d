"""Short sums without tensor cores: whole outputs against float64, in the interpreter or on a GPU."""

import pytest
import torch
from helpers.compare import worst_image
from helpers.operands import product_and_result

from tritonnn.ops.conv2d.dispatch import can_run, default_choice, run
from tritonnn.ops.conv2d.forms.direct import DirectForm, config_of
from tritonnn.ops.conv2d.problem import Choice, Product

LIMIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""The largest error of an image, relative to it."""
ONCE = (1, 1), (1, 1), (1, 1)
CASES = {
    "4 channels a group": (16, 16, 4, (3, 3), *ONCE),
    "stride 2, 3 channels a group to 4": (9, 12, 3, (3, 3), (2, 2), (1, 1), (1, 1)),
    "oblong, dilated, strided": (8, 24, 2, (5, 3), (2, 1), (2, 0), (1, 2)),
    "3 channels": (3, 16, 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": (20, 10, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
}
"""Channels of x and y, groups, filter, stride, padding, dilation."""


def product(case: str, channels_last: bool, dtype: torch.dtype) -> tuple[Product, torch.Tensor]:
    c, k, groups, taps, *window = CASES[case]
    return product_and_result(DirectForm(), (c, k), groups, taps, window, channels_last, dtype)


@pytest.mark.parametrize(("strip", "most_n"), [(1, 4), (4, 8), (7, 2)])
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, strip, most_n):
    operands, exact = product(case, False, torch.float32)
    N, K, P, Q = exact.shape
    choice = Choice(config_of(strip, most_n, N, P, Q, K // operands.groups))
    assert can_run(operands, choice)
    run(operands, choice)
    assert worst_image(operands.y, exact) < LIMIT[torch.float32]


@pytest.mark.parametrize(("channels_last", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_layouts_and_types(channels_last, dtype):
    operands, exact = product("4 channels a group", channels_last, dtype)
    N, K, P, Q = exact.shape
    run(operands, Choice(config_of(4, 4, N, P, Q, K // operands.groups)))
    assert worst_image(operands.y, exact) < LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_the_default_on_a_gpu(case, channels_last, dtype):
    operands, exact = product(case, channels_last, dtype)
    run(operands, default_choice(operands))
    assert worst_image(operands.y, exact) < LIMIT[dtype]


def test_a_program_has_channels_of_one_group():
    for group_k in (1, 2, 6, 8, 12, 16, 26, 48):
        for strip in (1, 4, 7):
            config = config_of(strip, 16, 64, 56, 56, group_k)
            assert group_k % config.BLOCK_N == 0 and config.STRIP * config.BLOCK_N <= 64
