"""Convolution of few pixels from registers: where it is chosen, and its whole output against float64."""

import pytest
import torch
from helpers.compare import image, tf32, worst_image
from helpers.problems import product
from torch import Tensor
from torch.nn import functional as F
from tritonnn.kernels import conv2d, verified
from tritonnn.kernels.block_sizes import MOST_HELD, HeldBlocks, SplitBlocks, held_blocks, held_registers
from tritonnn.kernels.epilogue import Epilogue
from tritonnn.kernels.held_gemm import held_gemm
from tritonnn.kernels.product import Choice, Product, Shortcut

F32 = dict(dtype=torch.float32)
STRICT = F32 | dict(input_precision="tf32x3")
CHOSEN = {
    "64 channels": (dict(c=64, side=32), HeldBlocks(32, 64, 8)),
    "128 channels": (dict(c=128, side=16), HeldBlocks(16, 64, 8)),
    "256 channels": (dict(c=256, side=8), HeldBlocks(8, 64, 8)),
    "512 channels": (dict(c=512, side=4), HeldBlocks(8, 64, 8)),
    "stride 2": (dict(c=64, side=32, k=128, stride=(2, 2)), HeldBlocks(16, 64, 8)),
    "dilation": (dict(c=128, side=16, padding=(2, 2), dilation=(2, 2)), HeldBlocks(16, 64, 8)),
    "1x1": (dict(c=512, side=8, k=128, taps=1), HeldBlocks(8, 64, 8)),
    "1x1, 64 channels, stride 2": (dict(c=64, side=32, k=128, taps=1, stride=(2, 2)), HeldBlocks(16, 64, 4)),
    "1x1, eight images": (dict(n=8, c=64, side=32, k=128, taps=1, stride=(2, 2)), HeldBlocks(32, 64, 4)),
    "96 channels": (dict(c=96, side=16, k=96), HeldBlocks(8, 32, 8)),
    "strict float32": (STRICT | dict(c=128, side=16), HeldBlocks(16, 32, 8)),
    "TF32": (F32 | dict(c=256, side=8, round_x=True), HeldBlocks(8, 32, 8)),
}
OTHERS = {
    "NCHW": dict(c=128, side=16, nchw=True),
    "y is NCHW": dict(c=128, side=16, channels_last_y=False),
    "misaligned x": dict(c=128, side=16, misaligned=True),
    "float32 not on tensor cores": F32 | dict(c=128, side=16, input_precision="ieee"),
}
"""Of one image."""


@pytest.mark.usefixtures("on_hopper")
class TestChoice:
    @pytest.mark.parametrize("name", CHOSEN)
    def test_default_for_few_pixels(self, name):
        sizes, blocks = CHOSEN[name]
        operands = product(**dict(n=1) | sizes)
        choice = conv2d.default_choice(operands)
        assert choice == Choice(blocks, copies_x=False)
        assert conv2d.can_run(operands, choice)

    @pytest.mark.parametrize("name", OTHERS)
    def test_other_images_are_split(self, name):
        operands = product(n=1, **OTHERS[name])
        assert isinstance(conv2d.default_choice(operands).blocks, SplitBlocks)
        assert not conv2d.can_run(operands, Choice(CHOSEN["128 channels"][1], copies_x=False))

    def test_what_does_not_fit_the_registers_is_split(self):
        wide = product(n=1, c=512, side=4, **STRICT)
        assert isinstance(conv2d.default_choice(wide).blocks, SplitBlocks)
        assert not conv2d.can_run(wide, Choice(HeldBlocks(8, 32, 8), copies_x=False))

    def test_many_pixels(self):
        assert not isinstance(conv2d.default_choice(product(n=8, c=64, side=32)).blocks, HeldBlocks)

    @pytest.mark.parametrize("blocks", [HeldBlocks(48, 64, 4), HeldBlocks(16, 48, 4), HeldBlocks(16, 16, 8)], ids=str)
    def test_blocks_that_do_not_fit(self, blocks):
        assert not conv2d.can_run(product(n=1, c=128, side=16), Choice(blocks, copies_x=False))

    def test_another_triton(self, monkeypatch):
        monkeypatch.setattr(verified, "VERSIONS", "3.5.")
        assert isinstance(conv2d.default_choice(product(n=1, c=128, side=16)).blocks, SplitBlocks)


@pytest.mark.parametrize("channels, element_size", [(64, 2), (128, 2), (256, 2), (512, 2), (64, 4), (128, 4), (256, 4)])
def test_registers(channels, element_size):
    """What each thread loads: its parts of 16 pixels and of BLOCK_N channels, in 4 bytes each."""
    pixels = (2048 // channels) ** 2
    blocks = held_blocks(pixels, channels, channels, 9, element_size)
    operands = (16 + blocks.BLOCK_N) * 9 * channels * element_size
    assert operands / 4 <= 32 * blocks.num_warps * held_registers(blocks, 9 * channels, element_size)
    assert held_registers(blocks, 9 * channels, element_size) <= MOST_HELD


SHAPES = {
    "64": dict(c=64, size=(32, 32)),
    "128": dict(c=128, size=(16, 16)),
    "256": dict(c=256, size=(8, 8)),
    "512": dict(c=512, size=(4, 4)),
    "64 to 128, stride 2": dict(c=64, k=128, size=(32, 32), stride=(2, 2)),
    "256 to 512, stride 2": dict(c=256, k=512, size=(8, 8), stride=(2, 2)),
    "three images, 5x7": dict(n=3, c=128, k=64, size=(5, 7)),
    "one pixel": dict(c=256, size=(1, 1)),
    "wide stride, no padding": dict(n=2, c=64, size=(17, 12), stride=(3, 2), padding=(0, 0)),
    "dilation": dict(c=128, size=(11, 13), padding=(2, 3), dilation=(2, 3)),
    "1x1": dict(n=2, c=512, k=128, size=(7, 7), taps=(1, 1), padding=(0, 0)),
    "1x1, 64 channels, stride 2": dict(c=64, k=128, size=(32, 32), taps=(1, 1), stride=(2, 2), padding=(0, 0)),
    "1x1, 32 channels": dict(n=3, c=32, k=8, size=(5, 7), taps=(1, 1), padding=(0, 0)),
    "3x5": dict(c=64, k=24, size=(9, 9), taps=(3, 5), padding=(1, 2)),
    "96 channels": dict(c=96, size=(14, 14)),
}
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee", 2**-8),
    "fp16": (torch.float16, "ieee", 2**-11),
    "TF32": (torch.float32, "tf32", 2**-17),
    "strict float32": (torch.float32, "tf32x3", 2**-21),
}
"""Type, precision of the products and the largest error of an image, relative to it."""
GUARD = 4096


class Convolution:
    """Operands, and what the kernel makes of them between two guards."""

    def __init__(self, precision, c, size, n=1, k=None, taps=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)):
        self.dtype, self.precision, self.limit = PRECISIONS[precision]
        self.window = stride, padding, dilation
        k = k or c
        self.x = image(n, c, *size, dtype=self.dtype, channels_last=True)
        self.weight = image(k, c, *taps, dtype=self.dtype) / (c * taps[0] * taps[1]) ** 0.5
        self.epilogue, self.shortcut = Epilogue(), None

    def blocks(self) -> HeldBlocks:
        k, c, *taps = self.weight.shape
        pixels = self.exact()[:, 0].numel()
        return held_blocks(pixels, k, c, taps[0] * taps[1], self.dtype.itemsize)

    def rounded(self, t: Tensor) -> Tensor:
        return (tf32(t) if self.precision == "tf32" else t).double()

    def exact(self) -> Tensor:
        y = F.conv2d(self.rounded(self.x), self.rounded(self.weight), None, *self.window)
        scale, bias, residual, relu, _ = self.epilogue
        y = y if scale is None else y * scale.double()[:, None, None]
        if self.shortcut:
            z, second, second_scale, second_bias, stride, *_ = self.shortcut
            added = F.conv2d(self.rounded(z), self.rounded(second).permute(0, 3, 1, 2), stride=stride)
            y += second_scale.double()[:, None, None] * added + second_bias.double()[:, None, None]
        y = y if bias is None else y + bias.double()[:, None, None]
        y = y if residual is None else y + residual.double()
        return y.relu() if relu else y

    def product(self, x: Tensor, weight: Tensor, y: Tensor) -> Product:
        rounds = self.precision == "tf32"
        return Product(x, weight, y, True, *self.window, 1, self.precision, rounds, self.epilogue, self.shortcut)

    def __call__(self) -> Tensor:
        N, K, P, Q = self.exact().shape
        memory = torch.full((N * P * Q * K + 2 * GUARD,), float("nan"), dtype=self.dtype, device=self.x.device)
        y = memory[GUARD:-GUARD].view(N, P, Q, K).permute(0, 3, 1, 2)
        weight = self.weight.permute(0, 2, 3, 1).contiguous()
        held_gemm(self.product(self.x, weight, y), self.blocks())
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()
        return y

    def check(self) -> None:
        y = self()
        assert worst_image(y, self.exact()) < self.limit
        for _ in range(3):  # the same bits every time: no race
            assert torch.equal(self(), y)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestOnAGpu:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_against_float64(self, shape, precision):
        convolution = Convolution(precision, **SHAPES[shape])
        if convolution.blocks() is None:
            assert (shape, convolution.dtype) == ("512", torch.float32)
            return
        convolution.check()

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("shape", ["64", "256", "three images, 5x7", "3x5"])
    def test_epilogue(self, shape, precision):
        convolution = Convolution(precision, **SHAPES[shape])
        _, K, _, _ = exact = convolution.exact().shape
        residual = image(*exact, dtype=convolution.dtype, channels_last=True)
        convolution.epilogue = Epilogue(1 + image(K).abs(), image(K), residual, True, False)
        convolution.check()

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("shape, channels", [("128", 64), ("256", 128), ("96 channels", 64)])
    def test_shortcut(self, shape, channels, precision):
        convolution = Convolution(precision, **SHAPES[shape])
        K, dtype, (H, W) = convolution.weight.shape[0], convolution.dtype, SHAPES[shape]["size"]
        z = image(1, channels, 2 * H, 2 * W, dtype=dtype, channels_last=True)
        second = image(K, 1, 1, channels, dtype=dtype) / channels**0.5
        rounds = convolution.precision == "tf32"
        convolution.shortcut = Shortcut(z, second, 1 + image(K).abs(), image(K), (2, 2), convolution.precision, rounds)
        convolution.epilogue = Epilogue(1 + image(K).abs(), image(K), None, True, False)
        convolution.check()

    def test_rounds_its_output(self):
        convolution = Convolution("TF32", **SHAPES["128"])
        convolution.epilogue = Epilogue(round_y=True)
        y = convolution()
        assert torch.equal(tf32(y), y) and worst_image(y, convolution.exact()) < 2**-11

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("shape", ["64", "256"])
    def test_nan_and_infinity(self, shape, precision):
        convolution = Convolution(precision, **SHAPES[shape])
        x, last = convolution.x, convolution.x.shape[2] - 1
        x[0, 5, 0, 0], x[0, 1, 3, 4], x[0, -1, last, 2] = float("nan"), float("inf"), -float("inf")
        convolution.epilogue = Epilogue(relu=True)
        y, expected = convolution(), convolution.exact()
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isposinf(), expected.isposinf())

    @pytest.mark.parametrize("shape, precision", [("64", "bf16"), ("256", "bf16"), ("128", "strict float32")])
    def test_dependent_launches(self, shape, precision):
        """In a graph each convolution may start before the one ends whose y it reads."""
        convolution = Convolution(precision, **SHAPES[shape])
        blocks, weight = convolution.blocks(), convolution.weight.permute(0, 2, 3, 1).contiguous()
        images = [convolution.x, torch.empty_like(convolution.x), torch.empty_like(convolution.x)]
        convolution.epilogue = Epilogue(residual=images[0])

        def chain() -> None:
            for i in range(24):
                x, y = images[0] if i == 0 else images[1 + i % 2], images[2 - i % 2]
                held_gemm(convolution.product(x, weight, y), blocks)

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(5):
            images[0].copy_(torch.randn_like(convolution.x))
            chain()
            expected = images[1].clone()
            images[1].fill_(float("nan"))
            images[2].fill_(float("nan"))
            graph.replay()
            assert torch.equal(images[1], expected)
