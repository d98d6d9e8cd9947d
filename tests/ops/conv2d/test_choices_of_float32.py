"""Which form, tile and copy float32 has where several are near each other: the rules, one case of each, on an H100."""

import pytest
import torch
from helpers.gpus import A100, H100, posing
from helpers.problems import problem, product_of

from tritonnn.ops.conv2d.dispatch import default_choice
from tritonnn.ops.conv2d.forms.tma_tiles import best_box

TF32 = dict(input_precision="tf32", round_x=True)
NCHW = dict(channels_last_x=False, channels_last_y=False)
STRICT = dict(input_precision="tf32x3")
ROW_OF_7 = dict(r=1, s=7, padding=(0, 3))
NO_PADDING = dict(padding=(0, 0))
CHOICES = {
    "a box of pixels of many images": (
        problem(64, 128, 17, 128, **ROW_OF_7, **TF32, **NCHW),
        "pointers 64x128x32",
        True,
    ),
    "the last block half empty": (problem(64, 192, 17, 192, **ROW_OF_7, **TF32, **NCHW), "pointers 128x64x32", True),
    "it, with x in channels_last": (problem(64, 160, 17, 160, **ROW_OF_7, **TF32), "pointers 128x64x32", False),
    "it, and x in many products": (problem(64, 160, 14, 320, **TF32), "pointers 128x64x32", True),
    "the last block not full": (problem(64, 96, 14, 208, **TF32, **NCHW), "pointers 128x64x32", True),
    "one block, not full": (problem(64, 64, 35, 96, **TF32, **NCHW), "pointers 64x128x32", True),
    "a box of 8 neighbours": (problem(64, 192, 7, 384, **TF32, **NCHW), "tma 16x1x8x128x32", True),
    "the last block half empty, tiles with a halo": (problem(64, 48, 56, 192, **TF32), "tma_halo 1x8x32x64x32", False),
    "few channels": (problem(64, 24, 112, 24, **TF32), "pointers 64x32x32", False),
    "few channels, strict": (problem(64, 16, 55, 64, **STRICT, **NCHW), "pointers 64x64x16", True),
    "few filters of 3 channels": (problem(64, 3, 224, 24, stride=(2, 2), **TF32), "pointers 128x32x32", False),
    "they, in NCHW": (problem(64, 3, 224, 32, stride=(2, 2), **NCHW), "direct 4x128x16", False),
    "they, of one image": (problem(1, 3, 112, 32, stride=(2, 2), **NCHW), "pointers 32x32x32", False),
    "few filters, one tap": (problem(64, 48, 56, 24, 1, **NCHW), "direct 4x128x8", False),
    "one tap, few filters in TF32": (problem(64, 480, 14, 16, 1, **TF32, **NCHW), "matmul 128x32x32", False),
    "one tap, x read often": (problem(64, 1024, 7, 2048, 1, **TF32, **NCHW), "pointers 64x128x32", True),
    "one tap, x read often, stride 2": (
        problem(64, 1024, 14, 2048, 1, stride=(2, 2), **TF32, **NCHW),
        "pointers 64x128x32",
        True,
    ),
    "one tap, x read often, a long sum": (problem(64, 2048, 7, 1024, 1, **TF32, **NCHW), "tma 32x1x8x128x32", True),
    "one tap, x in channels_last": (problem(64, 104, 28, 208, 1, **TF32), "matmul 128x64x32", False),
    "one tap, a long sum in NCHW": (
        problem(64, 960, 14, 160, 1, **TF32, **NCHW),
        "matmul 128x64x32, 4 warps, 6 slots",
        False,
    ),
    "64 rows": (problem(64, 25088, 1, 4096, 1, **STRICT), "matmul 64x32x32", False),
    "64 rows, few outputs": (problem(64, 440, 1, 1000, 1, **STRICT), "matmul 64x32x32", False),
    "64 rows, few tiles": (problem(64, 52, 1, 440, 1, **STRICT), "pointers 16x64x32", False),
    "groups": (problem(64, 440, 7, 440, groups=55, **STRICT), "pointers 64x16x32", False),
}
"""The problem, how its choice in words begins, and whether x is copied."""


@pytest.mark.parametrize("case", CHOICES)
def test_what_is_chosen(case):
    given, words, copies_x = CHOICES[case]
    with posing(H100):
        choice = default_choice(product_of(given))
    assert str(choice).startswith(f"{words},") and choice.copies_x is copies_x


def test_groups_count_among_the_programs_on_any_card():
    with posing(A100):
        choice = default_choice(product_of(problem(64, 440, 7, 440, groups=55, dtype=torch.bfloat16)))
    assert choice.config.BLOCK_M == 128


@pytest.mark.parametrize("output", [(64, 7, 7), (64, 55, 55), (1, 5, 3), (1024, 27, 27)], ids=str)
def test_a_box_of_neighbours(output):
    n, p, q = best_box(*output, 64, 8)
    assert n * p * q == 64 and p * q >= 8
