"""Blocks that were measured are the default: what `tritonnn.tune` found on an H100 holds where no table does."""

import pytest
import torch
from helpers.problems import product
from tritonnn.kernels.block_sizes import DescriptorBlocks, GemmBlocks, SplitBlocks
from tritonnn.kernels.conv2d import default_choice
from tritonnn.kernels.product import Choice

F32 = dict(dtype=torch.float32)
STRICT = F32 | dict(input_precision="tf32x3")
STRIDE_2 = dict(stride=(2, 2))
DEFAULTS = {
    "no tensor cores": (
        F32 | dict(n=128, c=3, side=32, k=64, input_precision="ieee"),
        GemmBlocks(128, 64, 32, 4, 3),
    ),
    "no tensor cores, groups": (
        F32 | dict(n=128, c=24, side=32, k=256, input_precision="ieee", groups=2),
        GemmBlocks(128, 64, 32, 4, 3),
    ),
    "two programs a multiprocessor": (
        STRIDE_2 | dict(n=256, c=128, side=16, k=256),
        DescriptorBlocks(2, 8, 8, 128, 64, True, 4, 3),
    ),
    "one program a multiprocessor": (
        STRIDE_2 | dict(n=128, c=128, side=16, k=256),
        DescriptorBlocks(2, 8, 8, 128, 64, True, 4, 4),
    ),
    "fewer": (STRIDE_2 | dict(n=64, c=128, side=16, k=256), DescriptorBlocks(1, 8, 8, 128, 64, True, 4, 4)),
    "strict float32, two programs a multiprocessor": (
        STRICT | dict(n=256, c=512, side=4),
        DescriptorBlocks(4, 4, 4, 128, 32, False, 4, 3),
    ),
    "strict float32, one program a multiprocessor": (
        STRICT | dict(n=128, c=512, side=4),
        DescriptorBlocks(4, 4, 4, 64, 32, False, 4, 4),
    ),
    "few classes": (dict(n=8, c=512, side=1, k=10, taps=1), SplitBlocks(1, 8, 16, 8, 64, 8, 2)),
    "few classes, strict float32": (
        STRICT | dict(n=8, c=512, side=1, k=10, taps=1),
        SplitBlocks(1, 8, 16, 16, 32, 8, 3),
    ),
    "more classes": (dict(n=8, c=512, side=1, k=100, taps=1), SplitBlocks(1, 8, 16, 16, 64, 8, 2)),
}


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", DEFAULTS)
def test_default(name):
    sizes, blocks = DEFAULTS[name]
    assert default_choice(product(**sizes)) == Choice(blocks, copies_x=False)
