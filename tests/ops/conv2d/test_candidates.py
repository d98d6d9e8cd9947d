"""Candidates of tuning: few, of every form that may be the fastest, and such that the GPU and the product take."""

import math

import pytest
import torch
from helpers.problems import H200, PROBLEMS
from tritonnn.candidates import Gpu, candidates
from tritonnn.kernels import conv2d
from tritonnn.kernels.block_sizes import DescriptorBlocks, GemmBlocks, HaloBlocks, HeldBlocks, RowBlocks, SplitBlocks
from tritonnn.kernels.epilogue import Epilogue
from tritonnn.kernels.product import Choice, Problem, Product

ANY = Choice(GemmBlocks(16, 16, 16, 4, 1), False)


def fits(p: Problem) -> bool:
    """Whether descriptors could fetch the images."""
    on_tensor_cores = p.dtype.itemsize == 2 or p.input_precision != "ieee"
    return on_tensor_cores and p.groups == 1 and p.c * p.dtype.itemsize % 128 == 0


def fits_with_halo(p: Problem) -> bool:
    """Whether boxes with a halo could be fetched."""
    shape = (p.r, p.s, p.k % 64, p.channels_last_y) == (3, 3, 0, True)
    return fits(p) and shape and p.stride in ((1, 1), (2, 2)) and p.input_precision != "tf32x3"


def fits_registers(p: Problem) -> bool:
    """Whether images could be read into registers."""
    return (p.dtype.itemsize == 2 or p.input_precision != "ieee") and p.groups == 1 and p.channels_last_x


def tried(name: str, gpu: Gpu = H200) -> list[Choice]:
    p = PROBLEMS[name]
    return candidates(p, ANY, fits(p), fits_with_halo(p), fits_registers(p), gpu)


pytestmark = pytest.mark.usefixtures("blocks_of_a_gpu")


@pytest.mark.parametrize("name", PROBLEMS)
def test_they_are_few_and_the_default_is_first(name):
    choices = tried(name)
    assert choices[0] == ANY
    assert 4 <= len(choices) <= 16 and len(set(choices)) == len(choices)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_product_takes_each(name, monkeypatch):
    p = PROBLEMS[name]
    monkeypatch.setattr(conv2d, "fits_descriptors", lambda *_: fits(p))
    monkeypatch.setattr(conv2d, "fits_halo", lambda *_: fits_with_halo(p))
    monkeypatch.setattr(conv2d, "fits_held", lambda _: fits_registers(p))
    x = torch.empty(1, p.c, p.h, p.w, dtype=p.dtype)
    x = x.contiguous(memory_format=torch.channels_last if p.channels_last_x else torch.contiguous_format)
    y, packed = torch.empty(1, p.k, *p.output), torch.empty(p.k, p.r, p.s, p.c // p.groups)
    settings = p.stride, p.padding, p.dilation, p.groups, p.input_precision, p.round_x, Epilogue()
    product = Product(x, packed, y, p.channels_last_y, *settings)
    assert all(conv2d.can_run(product, choice) for choice in tried(name))


@pytest.mark.parametrize("shared_memory", [232448, 101376, 49152])
@pytest.mark.parametrize("name", PROBLEMS)
def test_sizes(name, shared_memory):
    p = PROBLEMS[name]
    (usual,) = tried(name, Gpu(132, 0))[1:]  # the default of the form, whatever the memory
    for choice in tried(name, Gpu(132, shared_memory)):
        sizes = choice.blocks._asdict()
        if isinstance(choice.blocks, HaloBlocks):
            continue
        sizes.pop("SWAPPED", None)
        stages = sizes.pop("num_stages", 0)
        assert all(size & (size - 1) == 0 for size in sizes.values())
        assert sizes["BLOCK_N"] <= max(64, 2 * p.k // p.groups - 1)
        if not isinstance(choice.blocks, GemmBlocks | RowBlocks):
            assert p.c % sizes["BLOCK_K"] == 0
        rows = math.prod(size for name, size in sizes.items() if name.startswith("TILE")) * sizes.get("BLOCK_M", 1)
        block_k = sizes.get("BLOCK_K", 128 // p.dtype.itemsize)
        step = sizes.get("SLICES", 1) * (rows + sizes["BLOCK_N"]) * block_k
        assert choice in (ANY, usual) or stages * step * p.dtype.itemsize <= shared_memory


@pytest.mark.parametrize("shared_memory", [232448, 101376, 49152])
@pytest.mark.parametrize(
    "name",
    [
        "bfloat16, 128 channels",
        "56x56",
        "28x28, TF32",
        "8x8",
        "7x7, TF32",
        "4x4, TF32",
        "TF32, rounded before",
        *["by 2", "by 2, 64 channels", "by 2, TF32", "by 2, to 28x28, TF32", "by 2, to 7x7, TF32", "by 2, to 4x4"],
    ],
)
def test_sizes_of_tiles_with_a_halo(name, shared_memory):
    p = PROBLEMS[name]
    tiles = [c.blocks for c in tried(name, Gpu(132, shared_memory)) if isinstance(c.blocks, HaloBlocks)]
    assert bool(tiles) == (shared_memory == 232448)
    for blocks in tiles:
        row, weight = blocks.TILE_N * blocks.TILE_Q, blocks.BLOCK_N * 128
        rows = blocks.TILE_P + 2 if p.stride == (1, 1) else 2 * blocks.TILE_P + 1
        box, y = rows * row * 128, blocks.TILE_P * row * blocks.BLOCK_N * p.dtype.itemsize
        slots = blocks.X_SLOTS * box + blocks.W_SLOTS * weight + y * (blocks.STAGED and not blocks.IN_SLOT)
        assert blocks.PROGRAMS * (slots + 1024) <= shared_memory + 1024
        covered = [-(-side // size) * size for side, size in zip((p.n, *p.output), blocks)]
        assert math.prod(covered) <= p.pixels * 4 / 3
        assert blocks.TILE_N == 1 or covered[1:] == list(blocks[1:3])
        assert p.k % blocks.BLOCK_N == 0 and blocks.BLOCK_K * p.dtype.itemsize == 128
        assert y <= box or not blocks.IN_SLOT


def test_forms():
    forms = {name: {type(choice.blocks) for choice in tried(name)[1:]} for name in PROBLEMS}
    assert forms["bfloat16, 1024 images"] == {HaloBlocks, DescriptorBlocks, GemmBlocks}
    assert forms["1x1"] == {DescriptorBlocks, GemmBlocks}
    assert forms["one image"] == {HeldBlocks, SplitBlocks, DescriptorBlocks, GemmBlocks}
    assert forms["groups"] == forms["3 channels, NCHW"] == {GemmBlocks}
    assert forms["7x7 of 3 channels"] == forms["11x11, bfloat16"] == {RowBlocks, GemmBlocks}


@pytest.mark.parametrize("name", ["7x7 of 3 channels", "7x7, strict float32", "11x11, bfloat16"])
def test_rows_come_through_each_cache(name):
    stages = {choice.blocks.num_stages for choice in tried(name) if isinstance(choice.blocks, RowBlocks)}
    assert 1 in stages and max(stages) > 1


def test_tf32_is_rounded_on_the_way_or_by_a_copy():
    descriptors = [choice for choice in tried("TF32, to be rounded") if isinstance(choice.blocks, DescriptorBlocks)]
    assert {(choice.blocks.SWAPPED, choice.copies_x) for choice in descriptors} == {
        (False, False),
        (True, False),
        (True, True),
    }


@pytest.mark.parametrize("name", ["64 channels, NCHW", "TF32, NCHW"])
def test_nchw_is_copied_for_descriptors(name):
    choices = [choice for choice in tried(name) if isinstance(choice.blocks, DescriptorBlocks)]
    assert choices and all(choice.copies_x for choice in choices)
