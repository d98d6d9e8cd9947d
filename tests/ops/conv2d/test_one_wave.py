"""Products of which each multiprocessor has one tile are computed by pointers, whose programs begin to load sooner."""

import pytest
from helpers.gpus import A100, H100, posing
from helpers.problems import HALF, problem, product_of

from tritonnn.ops.conv2d.dispatch import default_choice
from tritonnn.ops.conv2d.forms.pointers import one_wave

ONE_TAP = {
    "1,024 channels of 14x14": problem(1, 1024, 14, 1024, 1, **HALF),
    "512 to 256 channels of 28x28": problem(1, 512, 28, 256, 1, **HALF),
    "with a stride": problem(1, 512, 28, 1024, 1, **HALF, stride=(2, 2)),
}
GROUPS = {
    "16 channels a group": problem(1, 512, 14, 512, **HALF, groups=32),
    "32 channels a group": problem(1, 1024, 7, 1024, **HALF, groups=32),
}
OTHERS = {
    "two tiles a multiprocessor": problem(3, 512, 28, 256, 1, **HALF),
    "few tiles": problem(1, 1024, 7, 512, 1, **HALF),
    "a long reduction": problem(64, 4096, 1, 4096, 1, **HALF),
    "several taps": problem(1, 512, 28, 256, **HALF),
    "8 channels a group": problem(1, 256, 28, 256, **HALF, groups=32),
    "64 channels a group": problem(8, 128, 16, 128, **HALF, groups=2),
    "float32": problem(1, 1024, 14, 1024, 1, input_precision="tf32", round_x=True),
    "NCHW": problem(1, 1024, 14, 1024, 1, **HALF, channels_last_x=False),
}


@pytest.mark.parametrize("name", ONE_TAP | GROUPS)
def test_nearly_every_multiprocessor_has_one_program(name):
    p = (ONE_TAP | GROUPS)[name]
    with posing(H100):
        product = product_of(p)
        choice, config = default_choice(product), one_wave(product)
    assert choice.config == config
    programs = p.programs(config.BLOCK_M, config.BLOCK_N)
    assert H100.enough_programs <= programs <= H100.multiprocessors


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not(name):
    with posing(H100):
        assert one_wave(product_of(OTHERS[name])) is None


def test_where_no_form_loads_by_tma_nothing_changes():
    with posing(A100):
        assert all(one_wave(product_of(p)) is None for p in (ONE_TAP | GROUPS).values())
