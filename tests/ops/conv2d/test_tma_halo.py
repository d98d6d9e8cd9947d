"""Convolution from tiles with a halo: what it can run, and its whole output against float64."""

import dataclasses

import pytest
import torch
import triton
from helpers.compare import image, tf32, worst_image
from helpers.halo_tiles import (
    HALF_4X4,
    HALF_8X8,
    HALF_64,
    HALF_128,
    HALF_BY_2,
    SEVERAL_IMAGES,
    TF32_4X4,
    TF32_8X8,
    TF32_64,
    TF32_128,
    TF32_BY_2,
    halo,
)
from helpers.operands import assert_graph_repeats
from helpers.problems import product
from torch import Tensor
from torch.nn import functional as F

from tritonnn.device.activation import ACTIVATIONS
from tritonnn.layers.fused.activation import activate
from tritonnn.ops.conv2d.dispatch import can_run, candidates, default_choice
from tritonnn.ops.conv2d.dispatch import run as run_choice
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms.tma_halo import TmaHaloConfig, depth_of_block
from tritonnn.ops.conv2d.forms.tma_halo.geometry import box_rows, first_row, part
from tritonnn.ops.conv2d.pack import block_diagonal, pack_weight
from tritonnn.ops.conv2d.problem import Choice, Product
from tritonnn.runtime import hardware


def misaligned_residual() -> Epilogue:
    residual = torch.empty(1024 * 32 * 32 * 64 + 1, dtype=torch.bfloat16, device="meta")[1:]
    return Epilogue(residual=residual.view(1024, 32, 32, 64).permute(0, 3, 1, 2))


def form(operands: Product) -> str:
    return default_choice(operands).config.form


F32, BY_2, DILATED = dict(dtype=torch.float32), dict(stride=(2, 2)), dict(padding=(2, 2), dilation=(2, 2))
CANNOT_RUN = {
    "stride 2, 31x31": BY_2 | dict(side=31),
    "stride 2 and 1": dict(stride=(2, 1)),
    "stride 3": dict(stride=(3, 3), side=33),
    "1x1": dict(taps=1),
    "5x5": dict(taps=5),
    "stride 2, padded by 2": BY_2 | dict(padding=(2, 2)),
    "dilation": DILATED,
    "strict float32": F32 | dict(input_precision="tf32x3"),
    "y is NCHW": dict(channels_last_y=False),
    "x is NCHW": dict(nchw=True),
    "misaligned x": dict(misaligned=True),
    "misaligned residual": dict(epilogue=misaligned_residual()),
}


@pytest.mark.usefixtures("on_hopper")
class TestChoice:
    def test_default_where_it_was_measured(self):
        assert default_choice(product()) == Choice(HALF_64) and can_run(product(), Choice(HALF_64))
        assert form(product(n=127)) == "tma"  # too few tiles

    def test_default_by_rule(self):
        """Elsewhere: where tiles lie mostly inside the images and keep the GPU busy; for few channels less so."""
        assert form(product(n=64, c=128, side=56, k=32)) == form(product(n=64, c=256, side=14)) == "tma_halo"
        assert form(product(n=64, c=512, side=7)) == form(product(n=1, c=256, side=28)) == "tma"

    @pytest.mark.parametrize("stride", [1, 2])
    def test_default_of_groups(self, stride):
        sizes = dict(n=64, c=440, side=14, groups=55, stride=(stride, stride))
        config, copies_x = default_choice(product(**sizes))
        assert config.form == "tma_halo" and config.BLOCK_N == 64 and not copies_x
        assert default_choice(product(**sizes, nchw=True)).copies_x  # into channels_last
        assert form(product(**sizes | dict(c=220, groups=2))) == "pointers"  # half of its products would be with zeros

    @pytest.mark.parametrize("name", CANNOT_RUN)
    def test_what_it_cannot_run(self, name):
        sizes = CANNOT_RUN[name]
        choice = Choice(HALF_64 if "dtype" not in sizes else TF32_64)
        assert not can_run(product(**sizes), choice) and default_choice(product(**sizes)) != choice

    @pytest.mark.parametrize("padding", [(0, 0), (0, 2)])
    def test_any_padding(self, padding):
        assert form(product(padding=padding)) == "tma_halo"

    def test_sizes_may_be_lists(self):
        """PyTorch's dispatcher gives strides, paddings and dilations as lists."""
        assert default_choice(product(stride=[1, 1], padding=[1, 1], dilation=[1, 1])) == Choice(HALF_64)

    def test_nchw_is_copied(self):
        assert default_choice(product(nchw=True)) == Choice(HALF_64, copies_x=True)

    @pytest.mark.parametrize("name", SEVERAL_IMAGES)
    def test_tiles_of_several_images_can_run(self, name):
        c, side = (256, 8) if "8x" in name else (512, 4)
        dtype = dict(dtype=torch.float32 if "TF32" in name else torch.float16)
        assert can_run(product(3, c, side, **dtype), Choice(SEVERAL_IMAGES[name]))

    def test_another_gpu_or_triton(self, monkeypatch):
        monkeypatch.setattr(hardware, "GLUON_VERSIONS", "3.5.")
        assert form(product()) == "tma" and not can_run(product(), Choice(HALF_64))
        monkeypatch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
        monkeypatch.setattr(hardware, "gpu", lambda device: hardware.Gpu((10, 0), 148, 232448))
        assert form(product()) != "tma_halo" and not can_run(product(), Choice(HALF_64))

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
    def test_sizes_that_do_not_fit_together(self, changes):
        """TMA would never be done, or lines not fit: such an entry of a table is passed over."""
        assert not can_run(product(), Choice(dataclasses.replace(HALF_64, **changes)))

    @pytest.mark.parametrize(
        "sizes, copies",
        {
            "64 channels": (DILATED | dict(side=48), False),
            "128 channels": (DILATED | dict(c=128, side=24), True),
            "256 channels": (DILATED | dict(c=256, side=14), True),
            "512 channels": (DILATED | dict(c=512, side=4), True),
            "64 to 128, stride 2": (BY_2 | dict(k=128, side=48, padding=(2, 2)), False),
            "128 to 256, stride 2": (BY_2 | dict(c=128, side=24, padding=(2, 2), k=256), False),
            "256 to 512, stride 2": (BY_2 | dict(c=256, side=12, padding=(2, 2), k=512), True),
        }.values(),
        ids=str,
    )
    def test_elsewhere_a_copy_rounds_x_where_it_takes_part_in_many_products(self, sizes, copies):
        config, copies_x = default_choice(product(**F32, **sizes, round_x=True))
        assert (config.form, config.SWAP_AB, copies_x) == ("tma", copies, copies)


SHAPES = {
    "64": (135, 64, 64, 32, 32),
    "128": (131, 128, 128, 16, 16),
    "64 to 192": (67, 64, 192, 16, 16),
    "128 to 64": (35, 128, 64, 32, 32),
    "32 to 64": (35, 32, 64, 32, 32),
    "56x56": (23, 64, 64, 56, 56),
    "28x28": (37, 128, 128, 28, 28),
    "14x14": (33, 256, 256, 14, 14),
    "7x9": (35, 64, 64, 7, 9),
    "8x8": (131, 256, 256, 8, 8),
    "8x8, whole tiles": (132, 256, 256, 8, 8),
    "7x7": (133, 128, 128, 7, 7),
    "4x4": (515, 512, 512, 4, 4),
    "4x4, whole tiles": (256, 512, 512, 4, 4),
    "8x4": (67, 64, 64, 8, 4),
    "5x4": (37, 32, 64, 5, 4),
}
"""N, C, K, H, W."""
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "TF32": (torch.float32, False),
    "TF32, rounded on the way": (torch.float32, True),
}
LIMIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-17}
"""The largest error of an image, relative to it: one rounding; in TF32 of the sums, for operands that are rounded."""
TRUNCATION = 2**-25
"""What an addition in the tensor core, of eight products in TF32, costs a sum on average: it cuts off."""
ROUNDED_Y = 2**-11
EPILOGUES = {
    "plain": (),
    "bias": ("bias",),
    "bias of x's type": ("bias of x's type",),
    "residual": ("residual",),
    "all": ("scale", "bias", "residual", "relu", "round_y"),
}
CASES = [
    ("64", "bf16", "plain"),
    ("64", "bf16", "bias of x's type"),
    ("64", "bf16", "all"),
    ("64", "fp16", "all"),
    ("64", "TF32", "plain"),
    ("64", "TF32", "residual"),
    ("64", "TF32", "all"),
    ("64", "TF32, rounded on the way", "bias"),
    ("64", "TF32, rounded on the way", "all"),
    ("128", "bf16", "plain"),
    ("128", "bf16", "residual"),
    ("128", "fp16", "all"),
    ("128", "TF32", "bias"),
    ("128", "TF32", "all"),
    ("128", "TF32, rounded on the way", "bias"),
    ("128", "TF32, rounded on the way", "all"),
    ("64 to 192", "bf16", "all"),
    ("64 to 192", "TF32, rounded on the way", "all"),
    ("128 to 64", "fp16", "bias"),
    ("128 to 64", "TF32", "bias"),
    ("32 to 64", "TF32", "all"),
    ("56x56", "bf16", "all"),
    ("56x56", "TF32", "plain"),
    ("56x56", "TF32, rounded on the way", "all"),
    ("28x28", "bf16", "all"),
    ("28x28", "TF32", "residual"),
    ("28x28", "TF32, rounded on the way", "plain"),
    ("14x14", "bf16", "bias"),
    ("14x14", "TF32, rounded on the way", "all"),
    ("7x9", "bf16", "all"),
    ("7x9", "TF32, rounded on the way", "all"),
    ("8x8", "bf16", "all"),
    ("8x8", "fp16", "plain"),
    ("8x8", "TF32", "bias"),
    ("8x8", "TF32", "all"),
    ("8x8", "TF32, rounded on the way", "plain"),
    ("8x8", "TF32, rounded on the way", "all"),
    ("8x8, whole tiles", "bf16", "residual"),
    ("8x8, whole tiles", "TF32, rounded on the way", "bias"),
    ("8x8, whole tiles", "TF32, rounded on the way", "residual"),
    ("7x7", "bf16", "all"),
    ("7x7", "TF32, rounded on the way", "all"),
    ("4x4", "bf16", "plain"),
    ("4x4", "fp16", "all"),
    ("4x4", "TF32", "residual"),
    ("4x4", "TF32, rounded on the way", "bias"),
    ("4x4", "TF32, rounded on the way", "all"),
    ("4x4, whole tiles", "bf16", "all"),
    ("4x4, whole tiles", "TF32, rounded on the way", "plain"),
    ("4x4, whole tiles", "TF32, rounded on the way", "all"),
]
CASES_OF_IMAGES = [
    ("8x8, 128 pixels", "8x8", "bf16", "all"),
    ("8x8, in a slot", "8x8", "bf16", "all"),
    ("8x8, in a slot", "8x8, whole tiles", "fp16", "plain"),
    ("4x4, 128 pixels", "4x4", "bf16", "all"),
    ("4x4, 64 channels", "4x4", "fp16", "residual"),
    ("TF32, 8x8, 128 pixels", "8x8", "TF32, rounded on the way", "bias"),
    ("TF32, 8x8, 128 pixels", "8x8, whole tiles", "TF32", "all"),
    ("TF32, 8x8, 256 channels", "8x8", "TF32, rounded on the way", "all"),
    ("TF32, 8x8, 256 channels", "8x8, whole tiles", "TF32, rounded on the way", "plain"),
    ("TF32, 4x4, 128 pixels", "4x4", "TF32, rounded on the way", "all"),
    ("TF32, 4x4, 256 channels", "4x4", "TF32, rounded on the way", "bias"),
    ("TF32, 4x4, 64 channels", "4x4, whole tiles", "TF32, rounded on the way", "residual"),
    ("TF32, 8x4", "8x4", "TF32", "all"),
    ("TF32, 8x4", "8x4", "TF32, rounded on the way", "bias"),
    ("TF32, 2x4", "5x4", "TF32", "bias"),
    ("TF32, 2x4", "5x4", "TF32, rounded on the way", "all"),
]
SHAPES_BY_2 = {
    "64 to 128 by 2": (35, 64, 128, 32, 32),
    "128 to 256 by 2": (35, 128, 256, 16, 16),
    "256 to 512 by 2": (67, 256, 512, 8, 8),
    "56x56 by 2": (23, 64, 128, 56, 56),
    "14x14 by 2": (35, 128, 128, 14, 14),
    "10x6 by 2": (37, 64, 128, 10, 6),
    "8x2 by 2": (37, 64, 128, 8, 2),
    "odd number of images by 2": (33, 128, 256, 16, 16),
    "whole tiles by 2": (32, 256, 512, 8, 8),
}
"""N, C, K, H, W, of which every other pixel is taken."""
CASES_BY_2 = [
    ((1, 8, 16, 128, 64, 2, 9, True, True, 8, 1), "64 to 128 by 2", "bf16", "all"),
    ((1, 8, 16, 128, 64, 2, 9, True, True, 8, 1), "10x6 by 2", "fp16", "plain"),
    ((1, 8, 16, 128, 64, 2, 2, True, True, 4, 2), "64 to 128 by 2", "fp16", "bias"),
    ((1, 8, 16, 128, 64, 3, 7, True, True, 8, 1), "128 to 256 by 2", "bf16", "residual"),
    ((1, 16, 16, 128, 64, 2, 5, True, True, 8, 1), "56x56 by 2", "bf16", "all"),
    ((1, 8, 16, 64, 64, 2, 4, True, True, 4, 2), "14x14 by 2", "bf16", "all"),
    ((1, 8, 16, 64, 64, 2, 9, True, False, 4, 1), "64 to 128 by 2", "bf16", "residual"),
    ((1, 4, 32, 128, 64, 2, 2, True, True, 4, 2), "56x56 by 2", "fp16", "plain"),
    ((2, 8, 8, 128, 64, 2, 2, True, True, 4, 2), "odd number of images by 2", "bf16", "all"),
    ((4, 8, 8, 128, 64, 2, 5, True, True, 8, 1), "128 to 256 by 2", "bf16", "bias"),
    ((8, 4, 4, 128, 64, 3, 7, True, True, 8, 1), "256 to 512 by 2", "bf16", "all"),
    ((16, 4, 4, 128, 64, 2, 5, True, True, 8, 1), "whole tiles by 2", "fp16", "residual"),
    ((1, 8, 16, 128, 32, 3, 7, False, False, 8, 1), "64 to 128 by 2", "TF32", "residual"),
    ((1, 8, 16, 128, 32, 3, 7, False, False, 8, 1), "64 to 128 by 2", "TF32, rounded on the way", "all"),
    ((1, 8, 16, 128, 32, 3, 7, False, False, 8, 1), "10x6 by 2", "TF32, rounded on the way", "bias"),
    ((1, 8, 16, 128, 32, 2, 2, False, False, 4, 2), "56x56 by 2", "TF32, rounded on the way", "plain"),
    ((1, 16, 16, 128, 32, 2, 5, False, False, 8, 1), "56x56 by 2", "TF32, rounded on the way", "all"),
    ((1, 16, 16, 128, 32, 2, 5, False, False, 8, 1), "64 to 128 by 2", "TF32", "all"),
    ((1, 4, 32, 128, 32, 3, 7, False, False, 8, 1), "56x56 by 2", "TF32, rounded on the way", "bias"),
    ((1, 8, 8, 64, 32, 3, 4, False, False, 4, 1), "8x2 by 2", "TF32, rounded on the way", "residual"),
    ((2, 8, 8, 256, 32, 3, 3, False, False, 8, 1), "odd number of images by 2", "TF32, rounded on the way", "all"),
    ((4, 8, 8, 128, 32, 2, 5, False, False, 8, 1), "128 to 256 by 2", "TF32, rounded on the way", "bias"),
    ((8, 4, 4, 256, 32, 3, 3, False, False, 8, 1), "256 to 512 by 2", "TF32, rounded on the way", "all"),
    ((8, 4, 4, 128, 32, 2, 2, False, False, 4, 2), "whole tiles by 2", "TF32, rounded on the way", "plain"),
    ((16, 4, 4, 128, 32, 2, 5, False, False, 8, 1), "256 to 512 by 2", "TF32", "all"),
]
GUARD = 4096


def stride_of(shape: str) -> int:
    return 2 if shape in SHAPES_BY_2 else 1


def usual_config(x: Tensor, K: int, stride: int) -> TmaHaloConfig:
    dtype, side = x.dtype, max(x.shape[2:])
    if stride == 2:
        return HALF_BY_2 if dtype.itemsize == 2 else TF32_BY_2
    if side <= 8 and K % 128 == 0:
        configs = (HALF_4X4, TF32_4X4) if side <= 4 else (HALF_8X8, TF32_8X8)
        return configs[dtype == torch.float32]
    if K % 128 == 0:
        return HALF_128 if dtype.itemsize == 2 else TF32_128
    return HALF_64 if dtype.itemsize == 2 else TF32_64


def launch(x: Tensor, packed: Tensor, y: Tensor, round_x: bool, epilogue: Epilogue, config: TmaHaloConfig) -> None:
    """Fills y; the stride is that which the sizes of x and y tell."""
    input_precision, stride = "tf32" if x.dtype == torch.float32 else "ieee", x.shape[2] // y.shape[2]
    window = (stride, stride), (1, 1), (1, 1)
    product = Product(x, packed, y, True, *window, 1, input_precision, round_x, epilogue)
    assert can_run(product, Choice(config))
    run_choice(product, Choice(config))


def run(
    x: Tensor, weight: Tensor, round_x: bool, epilogue: Epilogue, config: TmaHaloConfig | None = None, stride: int = 1
) -> Tensor:
    """y, in the middle of memory of which nothing else may be written."""
    (N, _, H, W), K = x.shape, weight.shape[0]
    P, Q = H // stride, W // stride
    memory = torch.full((N * K * P * Q + 2 * GUARD,), float("nan"), dtype=x.dtype, device=x.device)
    y = memory[GUARD:-GUARD].view(N, P, Q, K).permute(0, 3, 1, 2)
    packed = pack_weight(weight, "tf32" if x.dtype == torch.float32 else "ieee")
    launch(x, packed, y, round_x, epilogue, config or usual_config(x, K, stride))
    assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()
    return y


def convolved(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """The result in float64, of operands rounded to TF32 if they are float32; zeros are padded, and multiplied."""
    x, weight = (tf32(t) if t.dtype == torch.float32 else t for t in (x, weight))
    return F.conv2d(F.pad(x.double(), (1, 1, 1, 1)), weight.double(), stride=stride)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestOnAGpu:
    def operands(self, shape: str, precision: str) -> tuple[Tensor, Tensor, bool]:
        """x, weight, and whether x is to be rounded."""
        (N, C, K, H, W), (dtype, round_x) = (SHAPES | SHAPES_BY_2)[shape], PRECISIONS[precision]
        x = image(N, C, H, W, dtype=dtype, channels_last=True)
        if precision == "TF32":
            x = tf32(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weight = image(K, C, 3, 3, dtype=dtype) / (9 * C) ** 0.5
        return x, weight, round_x

    @pytest.mark.parametrize("shape, precision, epilogue", CASES, ids=str)
    def test_every_image(self, shape, precision, epilogue):
        self.check(shape, precision, epilogue)

    @pytest.mark.parametrize("tiles, shape, precision, epilogue", CASES_OF_IMAGES, ids=str)
    def test_tiles_of_several_images(self, tiles, shape, precision, epilogue):
        self.check(shape, precision, epilogue, SEVERAL_IMAGES[tiles])

    @pytest.mark.parametrize("sizes, shape, precision, epilogue", CASES_BY_2, ids=str)
    def test_stride_2(self, sizes, shape, precision, epilogue):
        self.check(shape, precision, epilogue, halo(*sizes))

    def check(self, shape: str, precision: str, epilogue: str, config: TmaHaloConfig | None = None) -> None:
        """The whole output against float64, and against itself."""
        x, weight, round_x = self.operands(shape, precision)
        steps, K, stride = EPILOGUES[epilogue], weight.shape[0], stride_of(shape)
        exact = convolved(x, weight, stride)
        scale = 1 + image(K).abs() if "scale" in steps else None
        bias_types = {"bias": torch.float32, "bias of x's type": x.dtype}
        bias = next((image(K, dtype=dtype) for step, dtype in bias_types.items() if step in steps), None)
        residual = image(*exact.shape, dtype=x.dtype, channels_last=True) if "residual" in steps else None
        round_y = "round_y" in steps and x.dtype == torch.float32
        for added, combine in ((scale, torch.mul), (bias, torch.add)):
            exact = exact if added is None else combine(exact, added.double()[:, None, None])
        exact = exact if residual is None else exact + residual.double()
        exact = exact.relu() if "relu" in steps else exact
        settings = Epilogue(scale, bias, residual, "relu" if "relu" in steps else "none", round_y)
        y = run(x, weight, round_x, settings, config, stride)
        limit = LIMIT[x.dtype]
        if x.dtype == torch.float32:
            limit = ROUNDED_Y if round_y else max(limit, weight[0].numel() / 8 * TRUNCATION)
        assert worst_image(y, exact) < limit
        if round_y:
            assert torch.equal(tf32(y), y)
        for _ in range(3):  # the same bits every time: no race
            assert torch.equal(run(x, weight, round_x, settings, config, stride), y)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("shape, precision", [("64", "bf16"), ("8x8", "TF32"), ("64 to 128 by 2", "fp16")])
    def test_activations(self, shape, precision, activation):
        """y is staged in shared memory or stored from registers."""
        x, weight, round_x = self.operands(shape, precision)
        bias, stride = 4 * image(weight.shape[0]), stride_of(shape)
        y = run(x, weight, round_x, Epilogue(None, bias, None, activation, slope=0.2), stride=stride)
        exact = convolved(x, weight, stride) + bias.double()[:, None, None]
        limit = max(LIMIT[x.dtype], weight[0].numel() / 8 * TRUNCATION)
        assert worst_image(y, activate(exact, activation, 0.2)) < limit

    @pytest.mark.parametrize("shape", ["64", "128", "56x56", "64 to 128 by 2"])
    @pytest.mark.parametrize("precision", ["bf16", "TF32", "TF32, rounded on the way"])
    def test_nan_and_infinity(self, shape, precision):
        """NaN and infinity in x, and in the weight, times the zeros of the padding."""
        x, weight, round_x = self.operands(shape, precision)
        last, stride = x.shape[2] - 1, stride_of(shape)
        x[0, 5, 0, 0], x[1, 0, 7, 8], x[1, 1, last, last] = float("nan"), float("inf"), -float("inf")
        x[-1, 5, 8, 15], x[-1, -1, last, 0] = float("nan"), float("inf")
        y = run(x, weight, round_x, Epilogue(activation="relu"), stride=stride)
        expected = convolved(x, weight, stride).relu()
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isposinf(), expected.isposinf())
        x = self.operands(shape, precision)[0]
        weight[3, 0, 0, 0], weight[5, 1, 2, 1] = float("inf"), -float("inf")
        y, expected = run(x, weight, round_x, Epilogue(), stride=stride), convolved(x, weight, stride)
        assert y[:, 3, 0].isnan().all()
        assert y[:, 5, -1].isnan().all() or stride == 2  # nothing is padded below
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isposinf(), expected.isposinf()) and torch.equal(y.isneginf(), expected.isneginf())

    @pytest.mark.parametrize("shape", ["8x8", "4x4"])
    @pytest.mark.parametrize("precision", ["bf16", "TF32", "TF32, rounded on the way"])
    def test_images_of_a_tile_are_apart(self, shape, precision):
        x, weight, round_x = self.operands(shape, precision)
        expected = run(x, weight, round_x, Epilogue())
        spoilt = [0, 3, 21, len(x) - 1]
        x[spoilt] = float("nan")
        y = run(x, weight, round_x, Epilogue())
        kept = [i for i in range(len(x)) if i not in spoilt]
        assert y[spoilt].isnan().all() and torch.equal(y[kept], expected[kept])

    @pytest.mark.parametrize("n", [1, 2, 33])
    @pytest.mark.parametrize("shape", ["128", "8x8", "4x4"])
    def test_few_tiles(self, shape, n):
        x, weight, _ = self.operands(shape, "bf16")
        assert worst_image(run(x[:n], weight, False, Epilogue()), convolved(x[:n], weight)) < LIMIT[x.dtype]

    @pytest.mark.parametrize(
        "shape, precision", [("64", "bf16"), ("128", "bf16"), ("64", "TF32"), ("8x8", "bf16"), ("4x4", "TF32")]
    )
    def test_dependent_launches(self, shape, precision):
        x, weight, _ = self.operands(shape, precision)
        packed = pack_weight(weight, "tf32" if x.dtype == torch.float32 else "ieee")
        config, images = usual_config(x, weight.shape[0], 1), [x, torch.empty_like(x), torch.empty_like(x)]

        def chain() -> None:
            for i in range(6):
                source, y = images[0] if i == 0 else images[1 + i % 2], images[2 - i % 2]
                launch(source, packed, y, False, Epilogue(residual=images[0], round_y=True), config)

        rounded = tf32 if precision == "TF32" else torch.clone
        assert_graph_repeats(chain, images, lambda: rounded(torch.randn_like(x)))


WINDOWS = {
    "8 channels a group, of 104": (9, 104, 28, 28, 104, 13, 1, (1, 1)),
    "stride 2": (9, 104, 28, 28, 104, 13, 2, (1, 1)),
    "4 channels a group": (9, 128, 15, 14, 128, 32, 1, (1, 1)),
    "24 channels a group": (20, 96, 14, 14, 96, 4, 1, (1, 1)),
    "7x7": (130, 440, 7, 7, 440, 55, 1, (1, 1)),
    "3 channels of x for 6 of y": (9, 24, 30, 30, 48, 8, 1, (1, 1)),
    "channels that no block divides": (9, 80, 14, 14, 200, 1, 1, (1, 1)),
    "few channels of y": (9, 128, 30, 20, 32, 1, 1, (1, 1)),
    "no padding": (9, 64, 30, 34, 96, 1, 1, (0, 0)),
    "no padding, one tile": (9, 64, 18, 18, 128, 1, 1, (0, 0)),
    "no padding, several images": (20, 128, 10, 10, 128, 1, 1, (0, 0)),
    "no padding, stride 2": (9, 64, 32, 36, 128, 1, 2, (0, 0)),
    "no padding, several images, stride 2": (20, 128, 18, 18, 128, 1, 2, (0, 0)),
    "padded by 1 and 0, stride 2": (9, 64, 32, 34, 128, 1, 2, (1, 0)),
    "padded by 2 and 0": (9, 64, 30, 34, 64, 1, 1, (2, 0)),
    "padded by 4": (9, 64, 12, 10, 64, 1, 1, (4, 4)),
    "8 channels a group, no padding": (9, 104, 28, 30, 104, 13, 1, (0, 0)),
    "8 channels a group, stride 2, no padding": (9, 104, 30, 32, 104, 13, 2, (0, 0)),
}
"""Images, channels, rows, columns, channels of y, groups, stride, padding."""


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("precision", ["bf16", "TF32, rounded on the way"])
@pytest.mark.parametrize("case", WINDOWS)
def test_groups_ends_of_channels_and_paddings(case, precision, channels_last):
    """Every candidate, with an epilogue, against float64 and itself."""
    n, c, h, w, k, groups, stride, padding = WINDOWS[case]
    dtype, input_precision = (torch.bfloat16, "ieee") if precision == "bf16" else (torch.float32, "tf32")
    x = image(n, c, h, w, dtype=dtype, channels_last=channels_last)
    weight = image(k, c // groups, 3, 3, dtype=dtype) / (c // groups) ** 0.5
    scale, bias = 1 + image(k).abs(), image(k)
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding, 1, groups)
    residual = image(*exact.shape, dtype=dtype, channels_last=channels_last)
    exact = exact * scale.double()[:, None, None] + bias.double()[:, None, None] + residual.double()
    y = torch.empty_like(residual)
    epilogue = Epilogue(scale, bias, residual, "relu")
    packed = pack_weight(weight, input_precision)
    window = (stride, stride), padding, (1, 1), groups
    operands = Product(x, packed, y, channels_last, *window, input_precision, precision != "bf16", epilogue)
    choices = [c for c in candidates(operands, hardware.gpu(x.device)) if c.config.form == "tma_halo"]
    if not choices:
        pytest.skip("the form has no candidates: mostly beside the images, or rows of no 16 bytes")
    for choice in choices:
        for _ in range(2):
            y.fill_(float("nan"))
            run_choice(operands, choice)
            assert worst_image(y, exact.relu()) < (LIMIT[dtype] if precision == "bf16" else 2**-11), choice


@pytest.mark.parametrize(("k", "groups", "group_c"), [(104, 13, 8), (128, 32, 4), (96, 4, 24), (64, 2, 16), (48, 8, 3)])
def test_the_weight_of_groups_is_a_block_diagonal(k, groups, group_c):
    group_k, block_n = k // groups, 64
    packed = image(k, 3, 3, group_c)
    depth = depth_of_block(group_c, group_k, k, block_n, 32)
    expected = torch.zeros(k, 3, 3, depth, device=packed.device)
    for row in range(k):
        first = (row // group_k - row // block_n * block_n // group_k) * group_c
        expected[row, :, :, first : first + group_c] = packed[row]
    assert depth % 32 == 0 and torch.equal(block_diagonal(packed, group_k, block_n, depth), expected)


@pytest.mark.parametrize("tile_p", [2, 8, 16])
class TestRowsOfABox:
    def test_each_row_of_the_filter_finds_its_own(self, tile_p):
        above_and_below = list(range(-1, tile_p + 1))
        odd, even = list(range(-1, 2 * tile_p, 2)), list(range(0, 2 * tile_p, 2))
        for stride, box in {1: above_and_below, 2: odd + even}.items():
            assert len(box) == box_rows(tile_p, stride)
            for r in range(3):
                first = first_row(r, tile_p, stride)
                assert box[first : first + tile_p] == [stride * p + r - 1 for p in range(tile_p)]

    def test_its_parts_are_all_of_it(self, tile_p):
        for stride in (1, 2):
            parts = [part(i, tile_p, stride) for i in range(3)]
            assert all(rows & (rows - 1) == 0 for _, rows in parts)
            covered = [row for first, rows in parts for row in range(first, first + rows)]
            assert sorted(covered) == list(range(box_rows(tile_p, stride)))
