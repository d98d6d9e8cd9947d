"""Every layer on the GPU: its error against float64 is at most 1.5 times PyTorch's on the same input and flags."""

import copy

import pytest
import torch
from compare import image
from torch import nn

import tritonnn
from tritonnn import precision

IMAGES = 256
LAYERS = {
    "conv 3x3, 3 channels": (lambda: nn.Conv2d(3, 64, 3, padding=1, bias=False), (IMAGES, 3, 32, 32)),
    "conv 7x7, 3 channels": (lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), (16, 3, 224, 224)),
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
}
MODES = {
    "float32": (torch.float32, "ieee"),
    "TF32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
}


def errors(name: str, mode: str, channels_last: bool) -> tuple[float, float]:
    """Largest |error| against float64 of PyTorch's layer and of the Triton layer."""
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
    return tuple(float((y.double() - exact).abs().max()) for y in (expected, actual))


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_less_precise_than_pytorch(name, mode, channels_last):
    torch_error, triton_error = errors(name, mode, channels_last)
    assert triton_error <= 1.5 * torch_error


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38, 1e-30])
def test_strict_float32_keeps_special_values(value):
    layer = nn.Conv2d(16, 16, 1, bias=False, device="cuda")
    nn.init.constant_(layer.weight, 0.5)
    x = torch.zeros(1, 16, 2, 2, device="cuda")
    x[0, 3, 1, 1] = value
    expected = layer(x)
    tritonnn.swap(layer, strict=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("flag", ["ieee", "tf32"])
def test_switches_for_convolution_and_matmul_are_two(flag, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x = torch.empty(0, device="meta")
    cuda = type("Tensor", (), {"dtype": torch.float32, "device": torch.device("cuda", 0)})()
    torch.backends.cudnn.conv.fp32_precision = flag
    expected = "tf32" if flag == "tf32" else "tf32x3"
    assert precision.convolution_input_precision(cuda, 576) == expected
    assert precision.matmul_input_precision(cuda, 576) == "tf32x3"
    assert precision.convolution_input_precision(cuda, 27) == "tf32x3"
    assert precision.convolution_input_precision(x, 576) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = flag
    assert precision.matmul_input_precision(cuda, 576) == expected


if __name__ == "__main__":  # python tests/test_precision.py: the table of the errors
    for switch in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        switch.fp32_precision = "ieee"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: largest error against float64, PyTorch / Triton")
    print("| layer | format | " + " | ".join(MODES) + " |\n|---|---|" + "---|" * len(MODES))
    for layer_name, (_, layer_shape) in LAYERS.items():
        for last in (False, True)[: len(layer_shape) - 2 or 1]:
            cells = ["{:.1e} / {:.1e}".format(*errors(layer_name, mode, last)) for mode in MODES]
            print(f"| {layer_name} | {'channels_last' if last else 'contiguous'} | " + " | ".join(cells) + " |")
