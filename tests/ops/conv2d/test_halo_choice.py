"""Where a convolution is made from tiles with a halo, and which."""

import pytest
import torch
import triton
from helpers.halo_tiles import (
    HALF_64,
    HALF_128,
    HALF_BY_2,
    ROUNDED_BY_2,
    SEVERAL_IMAGES,
    TF32_8X8,
    TF32_64,
    TF32_128,
    TF32_BY_2,
)
from helpers.problems import product
from tritonnn.kernels import conv2d, verified
from tritonnn.kernels.block_sizes import DescriptorBlocks, GemmBlocks, HaloBlocks, HeldBlocks, halo_blocks
from tritonnn.kernels.epilogue import Epilogue
from tritonnn.kernels.product import Choice


def misaligned_residual() -> Epilogue:
    residual = torch.empty(1024 * 32 * 32 * 64 + 1, dtype=torch.bfloat16)[1:]
    return Epilogue(residual=residual.view(1024, 32, 32, 64).permute(0, 3, 1, 2))


F32, BY_2 = dict(dtype=torch.float32), dict(stride=(2, 2))
CHOSEN = {
    "64 channels": (dict(), HALF_64),
    "64 channels, float16": (dict(dtype=torch.float16), HALF_64),
    "64 channels, 128 images": (dict(n=128), HALF_64),
    "128 channels": (dict(c=128, side=16), HALF_128),
    "64 channels, TF32": (F32, TF32_64),
    "64 channels, TF32, rounded on the way": (F32 | dict(round_x=True), TF32_64),
    "128 channels, TF32": (F32 | dict(c=128, side=16), TF32_128),
    "128 channels, TF32, rounded on the way": (F32 | dict(c=128, side=16, round_x=True), TF32_128),
    "128 channels, TF32, 128 images": (F32 | dict(n=128, c=128, side=16), TF32_128),
    "56x56": (dict(n=128, side=56), HALF_64),
    "56x56, TF32": (F32 | dict(n=128, side=56), TF32_64),
    "28x28, TF32, rounded on the way": (F32 | dict(n=128, c=128, side=28, round_x=True), TF32_128),
    "256 channels": (dict(c=256, side=8), HaloBlocks(4, 8, 8, 128, 64, 2, 5, True, False, 8, 1)),
    "256 channels, TF32": (F32 | dict(c=256, side=8), TF32_8X8),
    "256 channels, TF32, rounded on the way": (F32 | dict(c=256, side=8, round_x=True), TF32_8X8),
    "512 channels": (dict(c=512, side=4), HaloBlocks(16, 4, 4, 128, 64, 2, 4, True, False, 8, 1)),
    "64 to 128 channels by 2": (BY_2 | dict(c=64, k=128, side=32), HALF_BY_2),
    "64 to 128 by 2, TF32": (BY_2 | F32 | dict(c=64, k=128, side=32), TF32_BY_2),
    "64 to 128 by 2, TF32, rounded on the way": (
        BY_2 | F32 | dict(c=64, k=128, side=32, round_x=True, n=128),
        TF32_BY_2,
    ),
    "64 to 128 by 2, 56x56": (BY_2 | dict(c=64, k=128, side=56, n=128), HALF_BY_2),
    "128 to 256 by 2, 28x28, TF32": (BY_2 | F32 | dict(c=128, k=256, side=28, n=128), TF32_BY_2),
    "128 to 256 by 2, TF32, rounded on the way": (BY_2 | F32 | dict(c=128, k=256, side=16, round_x=True), ROUNDED_BY_2),
    "256 to 512 by 2, 14x14, TF32, rounded on the way": (
        BY_2 | F32 | dict(c=256, k=512, side=14, n=128, round_x=True),
        ROUNDED_BY_2,
    ),
    "256 to 512 by 2": (BY_2 | dict(c=256, k=512, side=8), HaloBlocks(16, 4, 4, 128, 64, 2, 5, True, True, 8, 1)),
    "a list of strides": (dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1]), HALF_64),
}
NOT_CHOSEN = {
    "too few tiles": (dict(n=127), DescriptorBlocks),
    "128 channels, 128 images": (dict(n=128, c=128, side=16), DescriptorBlocks),
    "one image": (dict(n=1), HeldBlocks),
    "64 to 128 channels": (dict(k=128), DescriptorBlocks),
    "256 channels, 128 images": (dict(n=128, c=256, side=8), DescriptorBlocks),
    "512 channels, TF32": (F32 | dict(c=512, side=4), DescriptorBlocks),
    "28x28": (dict(c=128, side=28), DescriptorBlocks),
    "28x28, TF32": (F32 | dict(c=128, side=28), DescriptorBlocks),
    "14x14": (dict(c=256, side=14), DescriptorBlocks),
    "64 to 64 channels by 2": (BY_2, DescriptorBlocks),
    "64 to 128 channels by 2, 128 images": (BY_2 | dict(c=64, k=128, n=128), DescriptorBlocks),
    "128 to 256 by 2, 28x28": (BY_2 | dict(c=128, k=256, side=28, n=128), DescriptorBlocks),
    "stride 2, 31x31": (dict(stride=(2, 2), side=31), GemmBlocks),
    "stride 2 and 1": (dict(stride=(2, 1)), GemmBlocks),
    "stride 3": (dict(stride=(3, 3), side=33), GemmBlocks),
    "1x1": (dict(taps=1), DescriptorBlocks),
    "5x5": (dict(taps=5), DescriptorBlocks),
    "no padding": (dict(side=34, padding=(0, 0)), DescriptorBlocks),
    "dilation": (dict(padding=(2, 2), dilation=(2, 2)), DescriptorBlocks),
    "groups": (dict(groups=2), GemmBlocks),
    "strict float32": (F32 | dict(input_precision="tf32x3"), DescriptorBlocks),
    "y is NCHW": (dict(channels_last_y=False), DescriptorBlocks),
    "misaligned x": (dict(misaligned=True), GemmBlocks),
}


@pytest.mark.usefixtures("on_hopper")
class TestChoice:
    @pytest.mark.parametrize("name", CHOSEN)
    def test_default_where_it_was_measured(self, name):
        sizes, blocks = CHOSEN[name]
        choice = conv2d.default_choice(product(**sizes))
        assert choice == Choice(blocks, copies_x=False)
        assert conv2d.can_run(product(**sizes), choice)

    @pytest.mark.parametrize("name", NOT_CHOSEN)
    def test_another_default_elsewhere(self, name):
        sizes, form = NOT_CHOSEN[name]
        choice = conv2d.default_choice(product(**sizes))
        assert type(choice.blocks) is form
        assert conv2d.can_run(product(**sizes), choice)

    @pytest.mark.parametrize("name", SEVERAL_IMAGES)
    def test_tiles_of_several_images_can_run(self, name):
        c, side = (256, 8) if "8x" in name else (512, 4)
        dtype = dict(dtype=torch.float32 if "TF32" in name else torch.float16)
        assert conv2d.can_run(product(3, c, side, **dtype), Choice(SEVERAL_IMAGES[name], copies_x=False))

    def test_nchw_is_copied(self):
        nchw = product(nchw=True)
        assert conv2d.default_choice(nchw) == Choice(HALF_64, copies_x=True)
        assert not conv2d.can_run(nchw, Choice(HALF_64, copies_x=False))

    def test_a_misaligned_residual(self):
        odd = product(epilogue=misaligned_residual())
        assert isinstance(conv2d.default_choice(odd).blocks, GemmBlocks)
        assert not conv2d.can_run(odd, Choice(HALF_64, copies_x=False))

    def test_another_gpu_or_triton(self, monkeypatch):
        monkeypatch.setattr(verified, "VERSIONS", "3.5.")
        assert isinstance(conv2d.default_choice(product()).blocks, DescriptorBlocks)
        monkeypatch.setattr(verified, "VERSIONS", triton.__version__)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        assert not isinstance(conv2d.default_choice(product()).blocks, HaloBlocks)

    @pytest.mark.parametrize(
        "name",
        [
            "stride 2, 31x31",
            "stride 2 and 1",
            "stride 3",
            "1x1",
            "5x5",
            "no padding",
            "dilation",
            "groups",
            "strict float32",
        ],
    )
    def test_what_it_cannot_run(self, name):
        sizes, _ = NOT_CHOSEN[name]
        blocks = HALF_64 if "dtype" not in sizes else TF32_64
        assert not conv2d.can_run(product(**sizes), Choice(blocks, copies_x=False))

    @pytest.mark.parametrize(
        "changes",
        [
            dict(BLOCK_K=32),
            dict(BLOCK_N=128),
            dict(X_SLOTS=1),
            dict(W_SLOTS=1),
            dict(STAGED=False),
            dict(TILE_Q=4),
            dict(TILE_N=2**17),
            dict(num_warps=2),
        ],
        ids=str,
    )
    def test_blocks_that_do_not_fit_together(self, changes):
        """The copy engine would never be done, or lines not fit: such an entry of a table is passed over."""
        assert not conv2d.can_run(product(), Choice(HALF_64._replace(**changes), copies_x=False))

    @pytest.mark.parametrize(
        "sizes, copies",
        {
            "64 channels": (dict(side=48), False),
            "128 channels": (dict(c=128, side=24), True),
            "256 channels": (dict(c=256, side=14), True),
            "512 channels": (dict(c=512, side=4), True),
            "64 to 128, stride 2": (BY_2 | dict(k=128, side=48), False),
            "128 to 256, stride 2": (BY_2 | dict(c=128, side=24, k=256), False),
            "256 to 512, stride 2": (BY_2 | dict(c=256, side=12, k=512), True),
        }.values(),
        ids=str,
    )
    def test_a_copy_rounds_x_where_it_takes_part_in_many_products(self, sizes, copies):
        choice = conv2d.default_choice(product(**F32, **sizes, round_x=True))
        assert isinstance(choice.blocks, DescriptorBlocks)
        assert (choice.copies_x, choice.blocks.SWAPPED) == (copies, copies)


@pytest.mark.parametrize("n, fits", [(127, False), (128, True)])
def test_enough_tiles(n, fits):
    assert (halo_blocks(n, 32, 32, 64, 64, 1, 2, False) is not None) is fits
