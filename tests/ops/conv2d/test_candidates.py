"""Candidates of tuning: few, of every form that may be the fastest, and such that the GPU and the product take."""

import math

import pytest
from helpers.gpus import A100, H100, posing
from helpers.problems import PROBLEMS, product_of

from tritonnn.ops.conv2d.dispatch import can_run, candidates, default_choice
from tritonnn.ops.conv2d.forms.tma_halo import shared_memory
from tritonnn.ops.conv2d.problem import Choice
from tritonnn.runtime.hardware import Gpu

WITH_HALO = [
    "bfloat16, 128 channels",
    "56x56",
    "28x28, TF32",
    "8x8",
    "7x7, TF32",
    "4x4, TF32",
    "TF32, rounded before",
    "by 2",
    "by 2, 64 channels",
    "by 2, TF32",
    "by 2, to 28x28, TF32",
    "by 2, to 7x7, TF32",
    "by 2, to 4x4",
]
LITTLE_MEMORY = Gpu((9, 0), 132, 49152)
MEMORIES = [H100, Gpu((9, 0), 132, 101376), LITTLE_MEMORY]


def tried(name: str, gpu: Gpu = H100) -> list[Choice]:
    return candidates(product_of(PROBLEMS[name]), gpu)


def forms(name: str, gpu: Gpu = H100) -> set[str]:
    return {choice.config.form for choice in tried(name, gpu)}


@pytest.mark.usefixtures("on_hopper")
class TestOnHopper:
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_they_are_few_and_the_default_is_first(self, name):
        choices = tried(name)
        assert choices[0] == default_choice(product_of(PROBLEMS[name]))
        assert 3 <= len(choices) <= 16 and len(set(choices)) == len(choices)

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_the_product_takes_each(self, name):
        product = product_of(PROBLEMS[name])
        assert all(can_run(product, choice) for choice in tried(name))

    @pytest.mark.parametrize("gpu", MEMORIES, ids=lambda gpu: str(gpu.shared_memory))
    @pytest.mark.parametrize("name", PROBLEMS)
    def test_operands_fit_shared_memory(self, name, gpu):
        """All stages of them, but for the default and for that of pointers, which is tried whatever the memory."""
        p, default = PROBLEMS[name], tried(name)[0]
        assumed = {default, *tried(name, Gpu((9, 0), 132, 0))}
        for choice in set(tried(name, gpu)) - assumed:
            sizes = choice.config.constants
            if choice.config.form == "tma_halo":
                assert shared_memory(choice.config, p.dtype.itemsize, p.stride[0]) <= gpu.shared_memory
                continue
            rows = math.prod(size for name, size in sizes.items() if name.startswith("TILE")) * sizes.get("BLOCK_M", 1)
            block_k = sizes.get("BLOCK_K", 128 // p.dtype.itemsize)
            step = sizes.get("SLICES", 1) * (rows + sizes["BLOCK_N"]) * block_k * p.dtype.itemsize
            assert sizes.get("num_stages", 0) * step <= gpu.shared_memory

    @pytest.mark.parametrize("name", PROBLEMS)
    def test_tiles_are_no_wider_than_the_output(self, name):
        p = PROBLEMS[name]
        assert all(c.config.constants["BLOCK_N"] <= max(64, 2 * p.k // p.groups - 1) for c in tried(name)[1:])

    @pytest.mark.parametrize("name", WITH_HALO)
    def test_tiles_with_a_halo_lie_mostly_inside_the_images(self, name):
        p = PROBLEMS[name]
        tiles = [choice.config for choice in tried(name) if choice.config.form == "tma_halo"]
        assert tiles
        for config in tiles:
            sizes = config.TILE_N, config.TILE_P, config.TILE_Q
            covered = [-(-side // size) * size for side, size in zip((p.n, *p.output), sizes)]
            assert math.prod(covered) <= p.pixels * 4 / 3
            assert config.TILE_N == 1 or covered[1:] == list(sizes[1:])

    @pytest.mark.parametrize("name", WITH_HALO)
    def test_tiles_with_a_halo_need_much_shared_memory(self, name):
        assert "tma_halo" not in {choice.config.form for choice in tried(name, LITTLE_MEMORY)[1:]}

    def test_forms(self):
        assert forms("bfloat16, 1024 images") == {"tma_halo", "tma", "pointers"}
        assert forms("1x1") == {"tma", "pointers"}
        assert forms("1x1 over every pixel") == {"matmul", "tma", "pointers"}
        assert forms("one image") == {"in_registers", "sliced_k", "tma", "pointers"}
        assert forms("groups") == {"tma_halo", "pointers"}
        assert forms("3 channels, NCHW") == {"direct", "pointers"}
        assert forms("7x7 of 3 channels") == forms("11x11, bfloat16") == {"few_channels", "pointers"}

    @pytest.mark.parametrize("name", ["7x7 of 3 channels", "7x7, strict float32", "11x11, bfloat16"])
    def test_few_channels_come_through_each_cache(self, name):
        stages = {choice.config.num_stages for choice in tried(name) if choice.config.form == "few_channels"}
        assert 1 in stages and max(stages) > 1

    def test_tf32_is_rounded_on_the_way_or_by_a_copy(self):
        choices = [choice for choice in tried("TF32, to be rounded")[1:] if choice.config.form == "tma"]
        orders = {(choice.config.SWAP_AB, choice.copies_x) for choice in choices}
        assert orders == {(False, False), (True, False), (True, True)}

    @pytest.mark.parametrize("name", ["64 channels, NCHW", "TF32, NCHW"])
    def test_nchw_is_copied_for_tma(self, name):
        choices = [choice for choice in tried(name) if choice.config.form == "tma"]
        assert choices and all(choice.copies_x for choice in choices)


@pytest.mark.parametrize("name", PROBLEMS)
def test_another_gpu_has_those_of_its_own(name):
    with posing(A100):
        product, choices = product_of(PROBLEMS[name]), tried(name, A100)
        assert forms(name, A100) <= {"few_channels", "sliced_k", "direct", "pointers"}
        assert len(choices) > 1 and all(can_run(product, choice) for choice in choices)
