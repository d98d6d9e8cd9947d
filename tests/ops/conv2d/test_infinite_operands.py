"""Infinity and NaN in one weight or one pixel, in each form, where blocks of channels and taps end with zeros.

Zero times infinity is NaN: what fills up a block has to be zero in both operands. The padding of an image is multiplied
as in PyTorch in float64, so that there an infinite weight gives NaN.
"""

import pytest
import torch
from helpers.compare import DEVICE, image
from helpers.problems import pointers, sliced_k
from torch.nn import functional as F

from tritonnn.ops.conv2d.backward.weight import run as run_gradient_of_weight
from tritonnn.ops.conv2d.dispatch import can_run, form_of, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms import depthwise, direct, few_channels
from tritonnn.ops.conv2d.forms.tma_tiles import config_of
from tritonnn.ops.conv2d.problem import Choice, Product
from tritonnn.ops.excitation import _launch as excite
from tritonnn.ops.pooled_linear import _launch as pool_and_multiply

INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
VALUES = {
    "infinite weight": (INF, None),
    "NaN weight": (NAN, None),
    "infinite pixel": (None, -INF),
    "NaN pixel": (None, NAN),
}
"""What one weight and one pixel are."""
TMA, SPLIT = config_of((2, 4, 8), 32, 16, True, 4, 1), config_of((2, 4, 8), 32, 16, False, 4, 1)
ONE_TAP = config_of((2, 4, 8), 32, 32, True, 4, 1)
ROWS = few_channels.FewChannelsConfig(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=1)
LARGE = depthwise.DepthwiseConfig(UNROLLED=False, STRIP=1, BLOCK_M=64, BLOCK_C=8, num_warps=4)
FORMS = {
    "TMA, nine taps": (TMA, 24, 1, (3, 3), "ieee"),
    "TMA, TF32, nine taps": (TMA, 20, 1, (3, 3), "tf32"),
    "TMA, TF32 in registers": (SPLIT, 20, 1, (3, 3), "tf32"),
    "TMA, float32": (SPLIT, 20, 1, (3, 3), "tf32x3"),
    "TMA, seven in a row": (TMA, 24, 1, (1, 7), "ieee"),
    "TMA, one tap": (ONE_TAP, 24, 1, (1, 1), "ieee"),
    "pointers": (pointers(64, 16, 16), 21, 1, (3, 3), "ieee"),
    "pointers, float32": (pointers(64, 16, 16), 21, 1, (3, 3), "tf32x3"),
    "pointers over taps": (pointers(64, 16, 32), 5, 1, (3, 3), "ieee"),
    "pointers, groups": (pointers(64, 16, 16), 34, 2, (3, 3), "ieee"),
    "pointers, one filter": (pointers(64, 1, 16), 21, 1, (3, 3), "ieee"),
    "sliced-K": (sliced_k(2, 4, 64, 16, 16), 48, 1, (3, 3), "ieee"),
    "sliced-K, float32": (sliced_k(2, 4, 64, 16, 16), 48, 1, (3, 3), "tf32x3"),
    "few channels, four columns": (ROWS, 3, 1, (3, 4), "ieee"),
    "direct": (direct.config_of(4, 4, 2, 5, 7, 12), 3, 1, (3, 3), "ieee"),
    "depthwise": (depthwise.config_of(4, 2, 5, 7, 12, 4, True, 8), 12, 12, (3, 3), "ieee"),
    "depthwise, tap by tap": (LARGE, 12, 12, (3, 3), "ieee"),
}
"""Configuration, channels, groups, rows and columns of the filter, precision."""


def same_specials(y: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether NaN and infinities stand in the same places, and what is finite is close."""
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    return all(torch.equal(kind(y), kind(exact)) for kind in kinds) and torch.allclose(
        y.nan_to_num(0, 0, 0).double(), exact.nan_to_num(0, 0, 0), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", FORMS)
def test_blocks_end_with_zeros_in_both_operands(name, value):
    config, c, groups, taps, input_precision = FORMS[name]
    if config.form == "tma" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    of_weight, of_pixel = VALUES[value]
    K = 1 if getattr(config, "BLOCK_N", 0) == 1 else 12
    x, weight = image(2, c, 5, 7, channels_last=True), image(K, c // groups, *taps)
    if of_weight is not None:
        weight[K // 2, 0, taps[0] // 2, taps[1] // 2] = of_weight  # behind the last channel of the tap before
    if of_pixel is not None:
        x[1, -1, 2, 3] = of_pixel
    padding = taps[0] // 2, taps[1] // 2
    exact = F.conv2d(x.double(), weight.double(), None, 1, padding, 1, groups)
    y = torch.full_like(exact, NAN, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    choice, window = Choice(config), ((1, 1), padding, (1, 1), groups)
    packed = form_of(choice).pack(weight, input_precision)
    product = Product(x, packed, y, True, *window, input_precision, input_precision == "tf32", Epilogue())
    assert config.form == "tma" or can_run(product, choice)
    run(product, choice)
    assert not exact.isfinite().all() and same_specials(y, exact)


@pytest.mark.parametrize("value", VALUES)
def test_gradient_of_a_weight(value):
    """Of 21 channels and 45 pixels a group, in blocks of powers of 2."""
    of_g, of_pixel = VALUES[value]
    x, g = image(1, 21, 5, 9, channels_last=True), image(1, 12, 5, 9, channels_last=True)
    if of_g is not None:
        g[0, 3, 2, 2] = of_g
    if of_pixel is not None:
        x[0, 0, 2, 5] = of_pixel
    weight = image(12, 21, 3, 3).double()
    window = (1, 1), (1, 1), (1, 1)
    exact = torch.ops.aten.convolution_backward(
        g.double(), x.double(), weight, None, *window, False, (0, 0), 1, (False, True, False)
    )[1]
    actual = torch.empty_like(exact, dtype=x.dtype)
    run_gradient_of_weight(g, x, actual, window, 1, "ieee")
    assert not exact.isfinite().all() and same_specials(actual, exact)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("sizes", [(20, 6, 12), (33, 5, 33)], ids=str)
def test_squeeze_and_excitation(sizes, value):
    """Sigmoids of infinities are finite: of channels that are none nothing may reach them."""
    (C, S, K), (of_weight, of_pixel) = sizes, VALUES[value]
    x, weight1, weight2 = image(2, C, 1, 1), image(S, C), image(K, S)
    if of_weight is not None:
        weight1[S - 1, 2] = of_weight
    if of_pixel is not None:
        x[1, 3] = of_pixel
    y = excite(x, weight1, None, weight2, None, "relu", 0.0, "sigmoid", 0.0)
    exact = (x.double().flatten(1) @ weight1.double().T).relu()
    exact = (exact @ weight2.double().T).sigmoid()
    assert same_specials(y.flatten(1), exact)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("outputs", [1, 20])
def test_pooled_linear(outputs, value):
    of_weight, of_pixel = VALUES[value]
    x, weight = image(2, 21, 3, 5), image(outputs, 21)
    if of_weight is not None:
        weight[outputs // 2, 20] = of_weight
    if of_pixel is not None:
        x[1, 20, 2, 4] = of_pixel
    exact = x.double().mean((2, 3)) @ weight.double().T
    assert same_specials(pool_and_multiply(x, weight, None), exact)
