"""Convolution of few pixels from registers: what it can run, and its whole output against float64."""

import pytest
import torch
import triton
from helpers.compare import image, tf32, worst_image
from helpers.gpus import H100
from helpers.operands import assert_graph_repeats
from helpers.problems import product
from torch import Tensor
from torch.nn import functional as F

from tritonnn.device.activation import ACTIVATIONS
from tritonnn.layers.fused.activation import activate
from tritonnn.ops.conv2d.dispatch import can_run, default_choice, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms.in_registers import MOST_REGISTERS, InRegistersConfig, default_config
from tritonnn.ops.conv2d.problem import Choice, Product, Shortcut
from tritonnn.runtime import hardware

F32 = dict(dtype=torch.float32)
STRICT = F32 | dict(input_precision="tf32x3")


def in_registers(block_n: int, block_k: int, num_warps: int) -> Choice:
    return Choice(InRegistersConfig(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps))


def form(operands: Product) -> str:
    return default_choice(operands).config.form


USUAL = in_registers(16, 64, 8)
OTHERS = {
    "NCHW": dict(c=128, side=16, nchw=True),
    "y is NCHW": dict(c=128, side=16, channels_last_y=False),
    "misaligned x": dict(c=128, side=16, misaligned=True),
    "float32 not on tensor cores": F32 | dict(c=128, side=16, input_precision="ieee"),
}
"""Convolutions of one image, by what `product` takes."""


@pytest.mark.usefixtures("on_hopper")
class TestChoice:
    def test_default_for_few_pixels(self):
        operands = product(n=1, c=128, side=16)
        assert default_choice(operands) == USUAL and can_run(operands, USUAL)

    @pytest.mark.parametrize("name", OTHERS)
    def test_other_images_are_sliced(self, name):
        operands = product(n=1, **OTHERS[name])
        assert form(operands) == "sliced_k" and not can_run(operands, USUAL)

    def test_what_does_not_fit_the_registers_is_sliced(self):
        wide = product(n=1, c=512, side=4, **STRICT)
        assert form(wide) == "sliced_k" and not can_run(wide, in_registers(8, 32, 8))

    def test_a_misaligned_residual(self):
        residual = torch.empty(16 * 16 * 128 + 1, dtype=torch.bfloat16, device="meta")[1:]
        epilogue = Epilogue(residual=residual.view(1, 16, 16, 128).permute(0, 3, 1, 2))
        odd = product(n=1, c=128, side=16, epilogue=epilogue)
        assert form(odd) == "sliced_k" and not can_run(odd, USUAL)

    def test_many_pixels(self):
        assert form(product(n=8, c=64, side=32)) != "in_registers"

    @pytest.mark.parametrize("sizes", [(48, 64, 4), (16, 48, 4), (16, 16, 8)], ids=str)
    def test_configurations_that_do_not_fit(self, sizes):
        assert not can_run(product(n=1, c=128, side=16), in_registers(*sizes))

    def test_another_triton_or_gpu(self, monkeypatch):
        operands = product(n=1, c=128, side=16)
        monkeypatch.setattr(hardware, "GLUON_VERSIONS", "3.5.")
        assert form(operands) == "sliced_k" and not can_run(operands, USUAL)
        monkeypatch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
        monkeypatch.setattr(hardware, "gpu", lambda device: hardware.Gpu((10, 0), 148, 232448))
        assert form(operands) == "sliced_k" and not can_run(operands, USUAL)


@pytest.mark.parametrize("channels, element_size", [(64, 2), (128, 2), (256, 2), (512, 2), (64, 4), (128, 4), (256, 4)])
def test_registers(channels, element_size):
    """What each thread loads: its parts of 16 pixels and of BLOCK_N channels, in 4 bytes each."""
    pixels = (2048 // channels) ** 2
    config = default_config(pixels, channels, channels, 9, element_size, H100)
    operands = (16 + config.BLOCK_N) * 9 * channels * element_size
    assert operands / 4 <= 32 * config.num_warps * config.registers([9 * channels], element_size)
    assert config.registers([9 * channels], element_size) <= MOST_REGISTERS


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

    def config(self) -> InRegistersConfig | None:
        k, c, *taps = self.weight.shape
        pixels = self.exact()[:, 0].numel()
        gpu = hardware.gpu(self.x.device)
        return default_config(pixels, k, c, taps[0] * taps[1], self.dtype.itemsize, gpu)

    def rounded(self, t: Tensor) -> Tensor:
        return (tf32(t) if self.precision == "tf32" else t).double()

    def exact(self) -> Tensor:
        y = F.conv2d(self.rounded(self.x), self.rounded(self.weight), None, *self.window)
        scale, bias, residual, activation, _, slope = self.epilogue
        y = y if scale is None else y * scale.double()[:, None, None]
        if self.shortcut:
            z, second, second_scale, second_bias, stride, *_ = self.shortcut
            added = F.conv2d(self.rounded(z), self.rounded(second).permute(0, 3, 1, 2), stride=stride)
            y += second_scale.double()[:, None, None] * added + second_bias.double()[:, None, None]
        y = y if bias is None else y + bias.double()[:, None, None]
        y = y if residual is None else y + residual.double()
        return activate(y, activation, slope)

    def product(self, x: Tensor, weight: Tensor, y: Tensor) -> Product:
        rounds = self.precision == "tf32"
        return Product(x, weight, y, True, *self.window, 1, self.precision, rounds, self.epilogue, self.shortcut)

    def __call__(self) -> Tensor:
        N, K, P, Q = self.exact().shape
        memory = torch.full((N * P * Q * K + 2 * GUARD,), float("nan"), dtype=self.dtype, device=self.x.device)
        y = memory[GUARD:-GUARD].view(N, P, Q, K).permute(0, 3, 1, 2)
        weight = self.weight.permute(0, 2, 3, 1).contiguous()
        run(self.product(self.x, weight, y), Choice(self.config()))
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
        if convolution.config() is None:
            assert (shape, convolution.dtype) == ("512", torch.float32)
            return
        convolution.check()

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("shape", ["64", "256", "three images, 5x7", "3x5"])
    def test_epilogue(self, shape, precision):
        convolution = Convolution(precision, **SHAPES[shape])
        _, K, _, _ = exact = convolution.exact().shape
        residual = image(*exact, dtype=convolution.dtype, channels_last=True)
        convolution.epilogue = Epilogue(1 + image(K).abs(), image(K), residual, "relu")
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
        convolution.epilogue = Epilogue(1 + image(K).abs(), image(K), activation="relu")
        convolution.check()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("precision", ["bf16", "strict float32"])
    def test_activations(self, precision, activation):
        convolution = Convolution(precision, **SHAPES["three images, 5x7"])
        convolution.epilogue = Epilogue(None, 4 * image(64), activation=activation, slope=0.2)
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
        convolution.epilogue = Epilogue(activation="relu")
        y, expected = convolution(), convolution.exact()
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isposinf(), expected.isposinf())

    @pytest.mark.parametrize("shape, precision", [("64", "bf16"), ("256", "bf16"), ("128", "strict float32")])
    def test_dependent_launches(self, shape, precision):
        convolution = Convolution(precision, **SHAPES[shape])
        choice, weight = Choice(convolution.config()), convolution.weight.permute(0, 2, 3, 1).contiguous()
        images = [convolution.x, torch.empty_like(convolution.x), torch.empty_like(convolution.x)]
        convolution.epilogue = Epilogue(residual=images[0])

        def chain() -> None:
            for i in range(24):
                x, y = images[0] if i == 0 else images[1 + i % 2], images[2 - i % 2]
                run(convolution.product(x, weight, y), choice)

        assert_graph_repeats(chain, images, lambda: torch.randn_like(convolution.x))


class TestWholeReductions:
    def test_a_single_row_of_tiles_may_be_narrow(self):
        """Its weight is read once, however narrow tiles are; of more rows the weight would be read often."""
        assert default_config(1, 4096, 4096, 1, 2, H100).BLOCK_N == 8
        assert default_config(17, 4096, 4096, 1, 2, H100) is None

    def test_those_of_a_shortcut_are_in_registers_too(self):
        alone = default_config(49, 2048, 1024, 1, 2, H100)
        beside = default_config(49, 2048, 1024, 1, 2, H100, shortcut_c=1024)
        assert alone.num_warps == 4 and beside.num_warps == 8
        assert beside.registers([1024, 1024], 2) <= MOST_REGISTERS < alone.registers([1024, 1024], 2)
        assert default_config(49, 2048, 1024, 1, 2, H100, shortcut_c=2048) is None
