"""The persistent matrix product of filters of one tap: what it can run, and its whole output against float64."""

import math

import pytest
import torch
from helpers.compare import image, tf32, worst_image
from helpers.gpus import A100, H100, posing
from helpers.problems import product
from torch.nn import functional as F

from tritonnn.ops.conv2d.dispatch import can_run, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms import BY_NAME
from tritonnn.ops.conv2d.forms.matmul_tiles import MatmulConfig, shared_memory
from tritonnn.ops.conv2d.pack import pack_weight
from tritonnn.ops.conv2d.problem import Choice, Product
from tritonnn.ops.conv2d.prologue import Prologue


def config(
    block_m: int,
    block_n: int,
    block_k: int,
    slots: int,
    num_warps: int,
    programs: int,
    resident: bool = False,
    rest_n: int = 0,
) -> MatmulConfig:
    return MatmulConfig(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        X_SLOTS=slots,
        RESIDENT=resident,
        num_warps=num_warps,
        PROGRAMS=programs,
        REST_N=rest_n,
    )


HALF, SINGLE = config(128, 64, 64, 3, 4, 2), config(64, 64, 32, 3, 4, 2)
F32 = dict(dtype=torch.float32)
FITS = {
    "1x1": dict(taps=1),
    "channels that no block divides": dict(taps=1, c=104, k=40),
    "a linear layer": dict(taps=1, n=1000, side=1, k=1000),
    "strict float32": F32 | dict(taps=1, input_precision="tf32x3"),
    "NCHW": F32 | dict(taps=1, nchw=True),
}
DOES_NOT_FIT = {
    "3x3": dict(),
    "stride 2": dict(taps=1, stride=(2, 2)),
    "padding": dict(taps=1, padding=(1, 1)),
    "groups": dict(taps=1, groups=2),
    "channels of no 16 bytes": dict(taps=1, c=60),
    "10 classes": dict(taps=1, k=10),
    "misaligned": dict(taps=1, misaligned=True),
    "no tensor cores": F32 | dict(taps=1, input_precision="ieee"),
    "7x7 in NCHW": F32 | dict(taps=1, nchw=True, side=7),
}


@pytest.mark.parametrize("case", FITS)
def test_what_it_runs(case):
    form = BY_NAME["matmul"]
    with posing(H100):
        assert form.fits(product(**FITS[case]))
    with posing(A100):
        assert not form.fits(product(**FITS[case]))


@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_what_it_does_not_run(case):
    with posing(H100):
        assert not BY_NAME["matmul"].fits(product(**DOES_NOT_FIT[case]))


def test_configurations_fit_shared_memory():
    operands = product(taps=1)
    with posing(H100):
        assert can_run(operands, Choice(HALF))
        assert not can_run(operands, Choice(HALF, copies_x=True))
        assert not can_run(operands, Choice(config(128, 256, 64, 5, 8, 1)))
    assert shared_memory(HALF, 2, 4, False) == 2 * (2 * (3 * (128 + 64) * 64 + 128 * 64) + 1024)
    of_96 = config(128, 64, 64, 3, 4, 2, rest_n=32)
    assert shared_memory(of_96, 2, 4, False) == 2 * (2 * (3 * (128 + 96) * 64 + 128 * 96) + 1024)
    resident = config(128, 64, 64, 3, 4, 2, resident=True)
    assert shared_memory(resident, 2, 4, False) == 2 * (2 * (3 * 128 * 64 + 4 * 64 * 64 + 128 * 64) + 1024)


PRECISIONS = {
    "bfloat16": (torch.bfloat16, "ieee", False),
    "TF32": (torch.float32, "tf32", False),
    "TF32, to be rounded": (torch.float32, "tf32", True),
    "strict float32": (torch.float32, "tf32x3", False),
}
LIMIT = {"bfloat16": 2**-8, "TF32": 2**-11, "TF32, to be rounded": 2**-11, "strict float32": 2**-22}
SIZES = {
    "sizes that no block divides": (9, 200, 12, 17, 152),
    "a long reduction": (3, 1160, 8, 8, 40),
    "many tiles": (130, 24, 28, 28, 136),
}
"""Images, channels, rows, columns, channels of y."""


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", [False, True], ids=["plain", "epilogue"])
@pytest.mark.parametrize("resident", [False, True], ids=["", "resident"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_image(sizes, precision, channels_last, resident, epilogue):
    chosen = HALF if precision == "bfloat16" else SINGLE
    if resident:
        chosen = config(chosen.BLOCK_M, chosen.BLOCK_N, chosen.BLOCK_K, 2, 4, 1, resident=True)
    check(chosen, sizes, precision, channels_last, channels_last, epilogue)


RESTS = {
    "128 and 32": dict(block_m=128, block_n=128, rest_n=32, num_warps=8),
    "128 and 64": dict(block_m=64, block_n=128, rest_n=64, num_warps=4),
    "64 and 16": dict(block_m=128, block_n=64, rest_n=16, num_warps=4),
    "32 and 16, two warps wide": dict(block_m=64, block_n=32, rest_n=16, num_warps=8),
}


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", [False, True], ids=["plain", "epilogue"])
@pytest.mark.parametrize("resident", [False, True], ids=["", "resident"])
@pytest.mark.parametrize("channels_last_y", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", ["bfloat16", "TF32"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rest", RESTS)
def test_tiles_of_channels_that_are_no_power_of_2(rest, sizes, precision, channels_last_y, resident, epilogue):
    block_k = 64 if precision == "bfloat16" else 32
    chosen = config(**RESTS[rest], block_k=block_k, slots=2, programs=1, resident=resident)
    check(chosen, sizes, precision, True, channels_last_y, epilogue)


def check(
    chosen: MatmulConfig, sizes: str, precision: str, channels_last: bool, channels_last_y: bool, epilogue: bool
) -> None:
    """The whole output against float64, and against itself."""
    n, c, h, w, k = SIZES[sizes]
    dtype, input_precision, round_x = PRECISIONS[precision]
    x = image(n, c, h, w, dtype=dtype, channels_last=channels_last)
    if precision == "TF32":
        x = tf32(x)
    weight = image(k, c, 1, 1, dtype=dtype) / math.sqrt(c)
    exact = F.conv2d(x.double(), weight.double())
    y = torch.empty_like(image(*exact.shape, dtype=dtype, channels_last=channels_last_y)).fill_(float("nan"))
    steps = Epilogue()
    if epilogue:
        scale, bias = image(k), image(k)
        residual = torch.empty_like(y).copy_(image(*exact.shape, dtype=dtype))
        exact = exact * scale.double()[:, None, None] + bias.double()[:, None, None] + residual.double()
        exact = exact.relu()
        steps = Epilogue(scale, bias, residual, "relu")
    packed = pack_weight(weight, input_precision)
    window = (1, 1), (0, 0), (1, 1), 1
    operands = Product(x, packed, y, channels_last_y, *window, input_precision, round_x, steps)
    form = BY_NAME["matmul"]
    if not form.fits(operands) or not form.takes(operands, Choice(chosen)):
        pytest.skip("the form does not take it: rows of no 16 bytes, or too large a weight")
    run(operands, Choice(chosen))
    assert worst_image(y, exact) < LIMIT[precision]
    first = y.clone()
    for _ in range(3):  # the same bits every time: no race
        run(operands, Choice(chosen))
        assert torch.equal(y, first)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [False, True], ids=["", "resident"])
@pytest.mark.parametrize("gates", [True, False], ids=["gates", "batch norm"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_prologue_on_some_channels_of_an_image(sizes, precision, gates, resident):
    """x is the middle of a wider image, whose other channels are no numbers."""
    n, c, h, w, k = SIZES[sizes]
    dtype, input_precision, _ = PRECISIONS[precision]
    wide = image(n, c + 16, h, w, dtype=dtype, channels_last=True).fill_(float("nan"))
    x = wide[:, 8 : c + 8].copy_(image(n, c, h, w, dtype=dtype))
    weight = image(k, c, 1, 1, dtype=dtype) / math.sqrt(c)
    scale, shift = (image(n, c, dtype=dtype), None) if gates else (image(c), image(c))
    exact = scale.double().view(-1, c, 1, 1) * x.double()
    exact = exact if gates else (exact + shift.double().view(-1, 1, 1)).relu()
    exact = F.conv2d(exact, weight.double())
    y = torch.empty_like(image(*exact.shape, dtype=dtype, channels_last=True)).fill_(float("nan"))
    prologue = Prologue(scale, shift, "none" if gates else "relu")
    window = (1, 1), (0, 0), (1, 1), 1
    packed, round_x = pack_weight(weight, input_precision), input_precision == "tf32"
    operands = Product(x, packed, y, True, *window, input_precision, round_x, Epilogue(), prologue=prologue)
    chosen = HALF if dtype.itemsize == 2 else SINGLE
    if resident:
        chosen = config(64, 64, chosen.BLOCK_K, 2, 4, 1, resident=True)
    form = BY_NAME["matmul"]
    assert form.fits(operands)
    if not form.takes(operands, Choice(chosen)):
        pytest.skip("too large a weight")
    run(operands, Choice(chosen))
    assert worst_image(y, exact) < 2 * LIMIT[precision]  # the operand is rounded too
    first = y.clone()
    for _ in range(3):
        run(operands, Choice(chosen))
        assert torch.equal(y, first)
