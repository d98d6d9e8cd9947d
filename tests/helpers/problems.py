"""Convolutions as problems of tuning, and as operands of which nothing but the sizes counts."""

import torch
from tritonnn.candidates import Gpu
from tritonnn.kernels.block_sizes import GemmBlocks, SplitBlocks
from tritonnn.kernels.epilogue import Epilogue
from tritonnn.kernels.product import Choice, Problem, Product
from tritonnn.kernels.window import output_size

H200 = Gpu(132, 232448)


def problem(n=2, c=64, size=8, k=32, taps=3, **changes) -> Problem:
    window = (1, 1), (taps // 2, taps // 2), (1, 1)
    plain = Problem(n, c, size, size, k, taps, taps, *window, 1, torch.float32, "ieee", False, True, True, ())
    return plain._replace(**changes)


HALF, BY_2 = dict(dtype=torch.bfloat16), dict(stride=(2, 2))
PROBLEMS = {
    "bfloat16, 1024 images": problem(1024, 64, 32, 64, **HALF),
    "bfloat16, 512 channels": problem(128, 512, 4, 512, **HALF, epilogue=("bias", "residual", "relu")),
    "bfloat16, 128 channels": problem(512, 128, 16, 128, **HALF),
    "56x56": problem(32, 64, 56, 64, **HALF, epilogue=("bias", "residual", "relu")),
    "28x28, TF32": problem(33, 128, 28, 128, input_precision="tf32", round_x=True, epilogue=("bias", "residual")),
    "8x8": problem(135, 256, 8, 256, **HALF, epilogue=("bias", "residual", "relu")),
    "7x7, TF32": problem(67, 512, 7, 512, input_precision="tf32", round_x=True, epilogue=("residual",)),
    "4x4, TF32": problem(519, 512, 4, 512, input_precision="tf32", round_x=True, epilogue=("bias",)),
    "by 2": problem(513, 64, 32, 128, **BY_2, **HALF, epilogue=("bias", "relu")),
    "by 2, 64 channels": problem(128, 64, 32, 64, **BY_2, **HALF),
    "by 2, TF32": problem(131, 64, 32, 128, **BY_2, input_precision="tf32", round_x=True),
    "by 2, to 28x28, TF32": problem(33, 64, 56, 128, **BY_2, input_precision="tf32", round_x=True, epilogue=("bias",)),
    "by 2, to 7x7, TF32": problem(131, 256, 14, 512, **BY_2, input_precision="tf32"),
    "by 2, to 4x4": problem(515, 256, 8, 512, **BY_2, **HALF),
    "one image": problem(1, 256, 8, 512, **BY_2, **HALF),
    "1x1": problem(128, 64, 32, 128, 1, stride=(2, 2), **HALF),
    "64 channels, NCHW": problem(128, 64, 32, 64, channels_last_x=False, channels_last_y=False, **HALF),
    "3 channels, NCHW": problem(128, 3, 32, 64, channels_last_x=False, channels_last_y=False, **HALF),
    "7x7 of 3 channels": problem(128, 3, 224, 64, 7, stride=(2, 2), input_precision="tf32", round_x=True),
    "7x7, strict float32": problem(128, 3, 224, 64, 7, stride=(2, 2), input_precision="tf32x3", channels_last_x=False),
    "11x11, bfloat16": problem(128, 3, 224, 64, 11, stride=(4, 4), **HALF),
    "48 channels": problem(40, 48, 24, 80, **HALF),
    "groups": problem(8, 128, 16, 128, groups=2, **HALF),
    "TF32, rounded before": problem(128, 128, 16, 128, input_precision="tf32"),
    "TF32, to be rounded": problem(128, 128, 16, 128, input_precision="tf32", round_x=True),
    "TF32, NCHW": problem(128, 128, 16, 128, input_precision="tf32", round_x=True, channels_last_x=False),
    "strict float32": problem(128, 128, 16, 128, input_precision="tf32x3"),
    "strict float32, one image": problem(1, 128, 16, 128, input_precision="tf32x3"),
    "linear": problem(128, 512, 1, 10, 1, **HALF),
}

SPLIT = Choice(SplitBlocks(1, 4, 16, 16, 32, 4, 1), False)
POINTERS = Choice(GemmBlocks(64, 32, 32, 4, 1), False)
COPIED = Choice(GemmBlocks(128, 32, 64, 4, 1), True)
DEFAULT = Choice(GemmBlocks(128, 32, 64, 4, 1), False)


def product(
    n=1024, c=64, side=32, k=None, taps=3, dtype=torch.bfloat16, nchw=False, misaligned=False, **changes
) -> Product:
    """Operands that were never written: nothing but their sizes counts."""
    k = k or c
    x = torch.empty(n * side * side * c + 1, dtype=dtype)[int(misaligned) :][: n * side * side * c]
    x = x.view(n, c, side, side) if nchw else x.view(n, side, side, c).permute(0, 3, 1, 2)
    window = {"stride": (1, 1), "padding": (taps // 2, taps // 2), "dilation": (1, 1), "groups": 1}
    window |= {name: changes.pop(name) for name in window if name in changes}
    p, q = (output_size(side, taps, *(window[name][i] for name in ("stride", "padding", "dilation"))) for i in (0, 1))
    y = torch.empty(n, p, q, k, dtype=dtype).permute(0, 3, 1, 2)
    packed = torch.empty(k, taps, taps, c // window["groups"], dtype=dtype)
    precision = changes.pop("input_precision", "ieee" if dtype.itemsize == 2 else "tf32")
    made = Product(x, packed, y, True, *window.values(), precision, False, Epilogue())
    return made._replace(**changes)
