"""Every layer on the GPU: its error against float64 is no larger than PyTorch's on the same input and flags.

The root mean square may be 1.05 times PyTorch's, the largest error, which is a matter of chance, 1.5 times.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from helpers.compare import image
from helpers.gpus import A100
from torch import nn

import tritonnn
from tritonnn.runtime import hardware, precision

IMAGES = 256
PHOTOS = 16
"""The batch of the layers that ResNet18 and ResNet50 have at 224x224."""
LAYERS = {
    "conv 3x3, 3 channels": (lambda: nn.Conv2d(3, 64, 3, padding=1, bias=False), (IMAGES, 3, 32, 32)),
    "conv 7x7, 3 channels": (lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), (PHOTOS, 3, 224, 224)),
    "conv 3x3, 64 channels": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (IMAGES, 64, 32, 32)),
    "conv 3x3/2, 64 channels": (lambda: nn.Conv2d(64, 128, 3, 2, padding=1, bias=False), (IMAGES, 64, 32, 32)),
    "conv 1x1/2, 64 channels": (lambda: nn.Conv2d(64, 128, 1, 2, bias=False), (IMAGES, 64, 32, 32)),
    "conv 3x3, 512 channels": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), (IMAGES, 512, 4, 4)),
    "batch norm, training": (lambda: nn.BatchNorm2d(64), (IMAGES, 64, 32, 32)),
    "batch norm, eval": (lambda: nn.BatchNorm2d(64).eval(), (IMAGES, 64, 32, 32)),
    "linear": (lambda: nn.Linear(512, 10), (IMAGES, 512)),
    "max pool": (lambda: nn.MaxPool2d(3, 1, 1), (IMAGES, 64, 32, 32)),
    "avg pool": (lambda: nn.AvgPool2d(4), (IMAGES, 512, 4, 4)),
    "adaptive avg pool": (lambda: nn.AdaptiveAvgPool2d(1), (IMAGES, 512, 7, 7)),
    "relu": (lambda: nn.ReLU(), (IMAGES, 64, 32, 32)),
    "conv 3x3, 64 channels, 56x56": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (PHOTOS, 64, 56, 56)),
    "conv 3x3/2, 128 channels, 56x56": (
        lambda: nn.Conv2d(128, 128, 3, 2, padding=1, bias=False),
        (PHOTOS, 128, 56, 56),
    ),
    "conv 3x3, 256 channels, 14x14": (lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (PHOTOS, 256, 14, 14)),
    "conv 3x3, 512 channels, 7x7": (lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False), (PHOTOS, 512, 7, 7)),
    "conv 1x1, 64 to 256 channels, 56x56": (lambda: nn.Conv2d(64, 256, 1, bias=False), (PHOTOS, 64, 56, 56)),
    "conv 1x1/2, 256 to 512 channels, 56x56": (lambda: nn.Conv2d(256, 512, 1, 2, bias=False), (PHOTOS, 256, 56, 56)),
    "conv 1x1, 1024 to 256 channels, 14x14": (lambda: nn.Conv2d(1024, 256, 1, bias=False), (PHOTOS, 1024, 14, 14)),
    "conv 1x1, 2048 to 512 channels, 7x7": (lambda: nn.Conv2d(2048, 512, 1, bias=False), (PHOTOS, 2048, 7, 7)),
    "batch norm, training, 112x112": (lambda: nn.BatchNorm2d(64), (PHOTOS, 64, 112, 112)),
    "batch norm, training, 2048 channels": (lambda: nn.BatchNorm2d(2048), (PHOTOS, 2048, 7, 7)),
    "batch norm, eval, 56x56": (lambda: nn.BatchNorm2d(256).eval(), (PHOTOS, 256, 56, 56)),
    "linear, 2048 to 1000": (lambda: nn.Linear(2048, 1000), (PHOTOS, 2048)),
    "max pool 3x3/2, 112x112": (lambda: nn.MaxPool2d(3, 2, 1), (PHOTOS, 64, 112, 112)),
    "adaptive avg pool, 2048 channels": (lambda: nn.AdaptiveAvgPool2d(1), (PHOTOS, 2048, 7, 7)),
    "relu, 56x56": (lambda: nn.ReLU(), (PHOTOS, 256, 56, 56)),
}
MODES = {
    "float32": (torch.float32, "ieee"),
    "TF32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
}


class Error(NamedTuple):
    """The largest error against float64 and the root mean square of all."""

    largest: float
    rms: float

    @classmethod
    def of(cls, y: torch.Tensor, exact: torch.Tensor) -> "Error":
        error = y.double() - exact
        return cls(float(error.abs().max()), float(error.square().mean().sqrt()))


def errors(name: str, mode: str, channels_last: bool) -> tuple[Error, Error, Error]:
    """Errors of PyTorch's layer, of the Triton layer, and of the exact result rounded to its type."""
    make, shape = LAYERS[name]
    dtype, fp32_precision = MODES[mode]
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = fp32_precision
    x = image(*shape, dtype=dtype, channels_last=channels_last and len(shape) == 4)
    layer = make().to("cuda", dtype)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        expected = copy.deepcopy(layer)(x)
        tritonnn.swap(layer, strict=True)
        actual = layer(x)
    return Error.of(expected, exact), Error.of(actual, exact), Error.of(exact.to(dtype), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_less_precise_than_pytorch(name, mode, channels_last):
    torch_error, triton_error, rounding = errors(name, mode, channels_last)
    assert triton_error.largest <= 1.5 * torch_error.largest
    # One and a half roundings of the result to float32 are as good as any order of summation gives.
    least = 1.5 * rounding.rms if MODES[mode][0] == torch.float32 else 0
    assert triton_error.rms <= max(1.05 * torch_error.rms, least)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e38, 1e-30])
@pytest.mark.parametrize("operand", ["input", "weight"])
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_strict_float32_keeps_special_values(name, operand, value):
    layer = nn.Conv2d(128, 16, 3, padding=1) if name == "conv2d" else nn.Linear(512, 16)
    layer, x = layer.to("cuda"), image(2, 128, 5, 5) if name == "conv2d" else image(4, 512)
    with torch.no_grad():
        for t in (x, layer.weight, layer.bias):
            t.uniform_(0.3, 0.9)
        alone = x if operand == "input" else layer.weight
        alone.zero_()
        alone.view(-1)[alone[0].numel() + alone[0].numel() // 2] = value
        layer.bias.zero_()
        expected = copy.deepcopy(layer).cpu().double()(x.cpu().double()).float()
        tritonnn.swap(layer, strict=True)
        torch.testing.assert_close(layer(x).cpu(), expected, rtol=2e-6, atol=0, equal_nan=True)
    assert (expected != 0).any()


@pytest.mark.gpu
def test_strict_float32_sums_of_infinities():
    layer = nn.Conv2d(128, 16, 1, bias=False, device="cuda")
    nn.init.uniform_(layer.weight, 0.3, 0.9)
    x = image(1, 128, 2, 2)
    x[0, 3, 0, 0], x[0, 100, 0, 0] = float("inf"), -float("inf")  # in other blocks of the reduction
    x[0, 3, 0, 1], x[0, 100, 0, 1] = -float("inf"), -float("inf")
    tritonnn.swap(layer, strict=True)
    y = layer(x)
    assert y[..., 0, 0].isnan().all() and y[..., 0, 1].isneginf().all() and y[..., 1, :].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1.5e-38])
def test_strict_float32_may_take_denormals_for_zero_but_no_more(value):
    layer = nn.Conv2d(64, 16, 1, bias=False, device="cuda")
    nn.init.uniform_(layer.weight, 0.3, 0.9)
    x = torch.zeros(1, 64, 2, 2, device="cuda")
    x[0, 5] = value
    exact = copy.deepcopy(layer).cpu().double()(x.cpu().double())
    tritonnn.swap(layer, strict=True)
    assert (layer(x).cpu().double() - exact).abs().max() <= torch.finfo(torch.float32).smallest_normal


TF32_LAYERS = {
    "conv2d": (lambda: nn.Conv2d(64, 16, 3, bias=False), lambda: torch.empty(64, 64, 9, 9)),
    "conv2d, channels_last": (
        lambda: nn.Conv2d(64, 16, 3, bias=False),
        lambda: torch.empty(64, 64, 9, 9).to(memory_format=torch.channels_last),
    ),
    "conv2d 1x1": (lambda: nn.Conv2d(512, 16, 1, bias=False), lambda: torch.empty(64, 512, 7, 7)),
    "linear": (lambda: nn.Linear(512, 16, bias=False), lambda: torch.empty(1024, 512)),
}


@pytest.fixture
def tf32() -> None:
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "value, nearest",
    {
        "up": (1 + 2**-11 + 2**-13, 1 + 2**-10),
        "down": (1 + 2**-11 - 2**-13, 1.0),
        "tie, down to even": (1 + 2**-11, 1.0),
        "tie, up to even": (1 + 3 * 2**-11, 1 + 2**-9),
        "negative": (-1 - 2**-11 - 2**-13, -1 - 2**-10),
    }.values(),
    ids=["up", "down", "tie, down to even", "tie, up to even", "negative"],
)
@pytest.mark.parametrize("operand", ["input", "weight"])
@pytest.mark.parametrize("name", TF32_LAYERS)
def test_tf32_rounds_to_nearest(name, operand, value, nearest, tf32):
    make, empty = TF32_LAYERS[name]
    layer, x = make().to("cuda"), empty().to("cuda").zero_()
    with torch.no_grad():
        layer.weight.zero_()
        x[:, 5] = value if operand == "input" else 1
        tap = layer.weight[:, 5] if name == "linear" else layer.weight[:, 5, 0, 0]
        tap.fill_(1 if operand == "input" else value)
        tritonnn.swap(layer, strict=True)
        y = layer(x)
    assert torch.equal(y, torch.full_like(y, nearest))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TF32_LAYERS)
def test_tf32_is_unbiased(name, tf32):
    """Operands between 1 and 2, cut off instead of rounded, make every product 7e-4 too small."""
    make, empty = TF32_LAYERS[name]
    layer, x = make().to("cuda"), empty().to("cuda").uniform_(1, 2)
    nn.init.uniform_(layer.weight, 1, 2)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        tritonnn.swap(layer, strict=True)
        bias = ((layer(x).double() - exact) / exact).mean()
    assert bias.abs() < 2e-5


# What cuDNN computes in float32 although TF32 is allowed: (C, K, filter, arguments), images

FLOAT32_IN_CUDNN = {
    "2 to 64, 1x1": ((2, 64, 1), {}, (16, 56)),
    "3 to 64, 1x1": ((3, 64, 1), {}, (16, 56)),
    "6 to 128, 1x1": ((6, 128, 1), {}, (32, 14)),
    "64 to 1, 1x1": ((64, 1, 1), {}, (32, 14)),
    "50 to 66, 1x1": ((50, 66, 1), {}, (32, 14)),
    "1 to 16, 5x5": ((1, 16, 5), {"padding": 2}, (32, 28)),
    "4 to 1, 5x5": ((4, 1, 5), {}, (32, 28)),
    "3 to 64, 3x3": ((3, 64, 3), {"padding": 1}, (16, 56)),
    "3 to 32, 3x3/2": ((3, 32, 3), {"padding": 1, "stride": 2}, (32, 28)),
    "5 to 66, 3x3": ((5, 66, 3), {"padding": 1}, (32, 14)),
    "64 to 3, 3x3": ((64, 3, 3), {"padding": 1}, (32, 28)),
    "24 to 20, 5x5": ((24, 20, 5), {"padding": 2}, (2, 9)),
    "in 2 groups": ((8, 32, 3), {"padding": 1, "groups": 2}, (32, 28)),
    "16 to 32, 1x1": ((16, 32, 1), {}, (128, 32)),
    "4 to 4, 3x3": ((4, 4, 3), {"padding": 1}, (128, 32)),
    "4 to 48, 3x3/2": ((4, 48, 3), {"padding": 1, "stride": 2}, (16, 112)),
    "3 to 32, 7x7/2": ((3, 32, 7), {"padding": 3, "stride": 2}, (16, 112)),
    "in 2 groups of 6 channels": ((12, 64, 3), {"padding": 1, "groups": 2}, (128, 32)),
    "in 4 groups, 1x1": ((256, 256, 1), {"groups": 4}, (32, 28)),
    "in 10 groups": ((40, 30, 3), {"padding": 1, "groups": 10}, (2, 9)),
    "in 10 groups of 64 filters": ((40, 640, 3), {"padding": 1, "groups": 10}, (32, 28)),
    "in 32 groups": ((32, 64, 3), {"padding": 1, "groups": 32}, (32, 28)),
}
TF32_IN_CUDNN = {
    "64 to 64, 3x3": ((64, 64, 3), {"padding": 1}, (1, 32)),
    "512 to 512, 3x3": ((512, 512, 3), {"padding": 1}, (1, 4)),
    "3 to 64, 3x3": ((3, 64, 3), {"padding": 1}, (64, 32)),
    "3 to 32, 3x3/2": ((3, 32, 3), {"padding": 1, "stride": 2}, (32, 224)),
    "64 to 64, 1x1": ((64, 64, 1), {}, (2, 9)),
    "64 to 128, 1x1/2": ((64, 128, 1), {"stride": 2}, (16, 56)),
    "1024 to 256, 1x1": ((1024, 256, 1), {}, (16, 14)),
    "in 4 groups": ((256, 256, 3), {"padding": 1, "groups": 4}, (32, 28)),
    "in 32 groups of 4": ((128, 128, 3), {"padding": 1, "groups": 32}, (8, 56)),
    "16 to 96, 1x1": ((16, 96, 1), {}, (16, 112)),
    "32 to 192, 1x1": ((32, 192, 1), {}, (64, 28)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FLOAT32_IN_CUDNN)
def test_no_less_precise_than_pytorch_where_cudnn_does_without_tf32(case, channels_last, tf32):
    arguments, keywords, (N, H) = FLOAT32_IN_CUDNN[case]
    x = image(N, arguments[0], H, H, channels_last=channels_last)
    layer = nn.Conv2d(*arguments, bias=False, device="cuda", **keywords)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        expected = Error.of(layer(x), exact)
        tritonnn.swap(layer, strict=True)
        actual = Error.of(layer(x), exact)
    assert actual.rms <= max(1.05 * expected.rms, 1.5 * Error.of(exact.float(), exact).rms)


class OnGpu:
    """Looks like x on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype, self.shape, self.stride, self.dim, self.numel = x.dtype, x.shape, x.stride, x.dim, x.numel


def chosen(case: tuple, channels_last: bool) -> str:
    """The precision of the convolution of such a case on a GPU."""
    (C, K, R), keywords, (N, H) = case
    P = (H + 2 * keywords.get("padding", 0) - R) // keywords.get("stride", 1) + 1
    x = torch.empty(N, C, H, H, device="meta")
    weight = torch.empty(K, C // keywords.get("groups", 1), R, R, device="meta")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    return precision.convolution_input_precision(OnGpu(x), weight, N * P * P)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpu", lambda device: A100 if device.type == "cuda" else hardware.INTERPRETER)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", FLOAT32_IN_CUDNN)
def test_float32_where_cudnn_does_without_tf32(case, channels_last, tf32, ampere):
    (C, K, R), keywords, _ = FLOAT32_IN_CUDNN[case]
    groups = keywords.get("groups", 1)
    products, filters = C // groups * R * R, K // groups
    strict = "ieee" if products <= 48 or (filters < 8 and products <= 256) else "tf32x3"
    assert chosen(FLOAT32_IN_CUDNN[case], channels_last) == strict


@pytest.mark.parametrize("case", TF32_IN_CUDNN)
def test_tf32_where_it_saves_time(case, tf32, ampere):
    assert chosen(TF32_IN_CUDNN[case], channels_last=True) == "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert chosen(TF32_IN_CUDNN[case], channels_last=True) != "tf32"


@pytest.mark.parametrize(
    ("case", "expected"),
    {
        "much work": (((256, 512, 1), {}, (64, 28)), "tf32"),
        "less": (((256, 128, 1), {}, (2, 28)), "tf32x3"),
        "every other pixel": (((64, 384, 1), {"stride": 2}, (64, 28)), "tf32x3"),
        "few filters": (((144, 24, 1), {}, (64, 56)), "tf32x3"),
    }.values(),
    ids=str,
)
def test_one_tap_of_nchw_is_in_tf32_where_it_is_much_work(case, expected, tf32, ampere):
    assert chosen(case, channels_last=False) == expected


@pytest.mark.parametrize("flag", ["ieee", "tf32"])
def test_switches_for_convolution_and_matmul_are_two(flag, ampere):
    def weight(C: int) -> torch.Tensor:
        return torch.empty(64, C, 3, 3, device="meta")

    cuda = OnGpu(image(2, 64, 4, 4))
    torch.backends.cudnn.conv.fp32_precision = flag
    expected = "tf32" if flag == "tf32" else "tf32x3"
    assert precision.convolution_input_precision(cuda, weight(64), 32) == expected
    assert precision.convolution_input_precision(cuda, weight(8), 32) == "tf32x3"
    assert precision.convolution_input_precision(cuda, weight(3), 32) == "ieee"
    assert precision.convolution_input_precision(torch.empty(2, 64, 4, 4, device="meta"), weight(64), 32) == "ieee"
    assert precision.convolution_allows_tf32(cuda) == (flag == "tf32")
    long, short = (torch.empty(64, C, device="meta") for C in (576, 64))
    assert precision.matmul_input_precision(cuda, long) == "tf32x3"
    torch.backends.cuda.matmul.fp32_precision = flag
    assert precision.matmul_input_precision(cuda, long) == expected
    assert precision.matmul_input_precision(cuda, short) == "tf32x3"


if __name__ == "__main__":  # python tests/layers/test_precision.py: the tables of the errors
    for switch in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        switch.fp32_precision = "ieee"
    rows = [
        (name, "x".join(map(str, shape)), last, [errors(name, mode, last) for mode in MODES])
        for name, (_, shape) in LAYERS.items()
        for last in (False, True)[: len(shape) - 2 or 1]
    ]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: error against float64, PyTorch / Triton")
    for kind, title in {"rms": "Root mean square", "largest": "Largest"}.items():
        print(
            f"\n{title}\n\n| layer | input | format | " + " | ".join(MODES) + " |\n|---|---|---|" + "---|" * len(MODES)
        )
        for name, shape, last, cells in rows:
            numbers = [f"{getattr(pytorch, kind):.1e} / {getattr(own, kind):.1e}" for pytorch, own, _ in cells]
            print(f"| {name} | {shape} | {'channels_last' if last else 'contiguous'} | " + " | ".join(numbers) + " |")
