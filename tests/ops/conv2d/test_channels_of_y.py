"""Convolutions that fill some channels of a wider image: what the forms write there, and what they leave alone."""

import pytest
import torch
from helpers import problems
from helpers.compare import image, tf32
from torch.nn import functional as F

from tritonnn.ops.conv2d.dispatch import can_run, candidates, default_choice, form_of, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.problem import Choice, Product
from tritonnn.runtime import hardware

SMALL = {
    "one tap": (2, 16, 5, 4, 8, 1, 1, 1),
    "nine taps": (2, 8, 5, 4, 16, 3, 1, 1),
    "stride 2": (1, 8, 6, 4, 8, 3, 2, 1),
    "depthwise": (2, 8, 5, 4, 8, 3, 1, 8),
}
LARGE = {
    "matrix product": (40, 64, 28, 30, 96, 1, 1, 1),
    "nine taps, 32 channels": (40, 128, 28, 28, 32, 3, 1, 1),
    "nine taps": (40, 64, 14, 14, 192, 3, 1, 1),
    "nine taps, stride 2": (40, 64, 28, 28, 128, 3, 2, 1),
    "one image": (1, 64, 14, 14, 64, 3, 1, 1),
    "1x1, stride 2": (40, 64, 28, 28, 128, 1, 2, 1),
    "groups": (40, 64, 14, 14, 64, 3, 1, 8),
}
"""Images, channels, rows, columns, output channels, taps a side, stride, groups."""


def product(n, c, h, w, k, r, stride, groups, dtype, first, more) -> tuple[Product, torch.Tensor]:
    x, weight = image(n, c, h, w, dtype=dtype, channels_last=True), image(k, c // groups, r, r, dtype=dtype)
    if dtype == torch.float32:
        x, weight = tf32(x), tf32(weight)
    window = (stride, stride), (r // 2, r // 2), (1, 1)
    bias = image(k)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *window, groups).relu()
    wide = image(n, first + k + more, *exact.shape[2:], dtype=dtype, channels_last=True).fill_(float("nan"))
    precision = "tf32" if dtype == torch.float32 else "ieee"
    packed = weight.permute(0, 2, 3, 1).contiguous()
    y = wide[:, first : first + k]
    epilogue = Epilogue(None, bias, None, "relu")
    return Product(x, packed, y, True, *window, groups, precision, False, epilogue), exact


def check(operands: Product, exact: torch.Tensor, choice) -> None:
    y, k, n = operands.y, exact.shape[1], len(exact)
    wide = y._base
    wide.fill_(float("nan"))
    weight = operands.packed.permute(0, 3, 1, 2)
    run(operands._replace(packed=form_of(choice).pack(weight, operands.input_precision)), choice)
    limit = {torch.bfloat16: 2**-8, torch.float32: 2**-10}[y.dtype]
    assert (y.double() - exact).norm() / exact.norm() < limit, choice
    assert int(wide.isnan().sum()) == wide.numel() - k * n * exact.shape[2] * exact.shape[3], choice


@pytest.mark.parametrize("case", SMALL)
def test_some_channels(case):
    operands, exact = product(*SMALL[case], torch.float32, 3, 2)
    check(operands, exact, default_choice(operands))


def of_forms(operands: Product) -> dict[str, Choice]:
    """The first candidate of each form."""
    choices = [c for c in candidates(operands, hardware.gpu(operands.x.device)) if can_run(operands, c)]
    return {choice.config.form: choice for choice in reversed(choices)}


@pytest.mark.usefixtures("on_hopper")
def test_which_forms_hopper_has_for_some_channels():
    """Of whole 16 bytes, and of any: the test below runs them on a GPU."""
    found = {}
    for channels in ((8, 16), (3, 1)):
        for n, c, h, _, k, r, stride, groups in LARGE.values():
            first, more = channels
            sizes = dict(n=n, c=c, side=h, k=k, taps=r, stride=(stride, stride), groups=groups)
            operands = problems.product(**sizes)
            wide = torch.empty(n, *operands.y.shape[2:], first + k + more, dtype=torch.bfloat16, device="meta")
            y = wide.permute(0, 3, 1, 2)[:, first : first + k]
            found.setdefault(channels, set()).update(of_forms(operands._replace(y=y)))
    few = {"in_registers", "sliced_k"}
    assert list(found.values()) == [{"matmul", "tma_halo", "tma", "pointers"} | few, {"pointers"} | few]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [(8, 16), (0, 64), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_every_form_fills_some_channels(case, dtype, channels):
    """By the first candidate of each."""
    operands, exact = product(*LARGE[case], dtype, *channels)
    choices = of_forms(operands)
    assert "pointers" in choices, "which takes all operands"
    for choice in choices.values():
        check(operands, exact, choice)
