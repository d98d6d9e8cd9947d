"""Convolutions as problems of tuning, and as operands without memory, of which nothing but the sizes counts."""

import torch

from tritonnn.device.activation import ACTIVATIONS
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms.pointers import PointersConfig
from tritonnn.ops.conv2d.forms.sliced_k import SlicedKConfig
from tritonnn.ops.conv2d.problem import Choice, Problem, Product
from tritonnn.ops.window import output_size


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
    "1x1 over every pixel": problem(128, 64, 32, 128, 1, **HALF),
    "64 channels, NCHW": problem(128, 64, 32, 64, channels_last_x=False, channels_last_y=False, **HALF),
    "3 channels, NCHW": problem(128, 3, 32, 64, channels_last_x=False, channels_last_y=False, **HALF),
    "7x7 of 3 channels": problem(128, 3, 224, 64, 7, stride=(2, 2), input_precision="tf32", round_x=True),
    "7x7, strict float32": problem(128, 3, 224, 64, 7, stride=(2, 2), input_precision="tf32x3", channels_last_x=False),
    "11x11, bfloat16": problem(128, 3, 224, 64, 11, stride=(4, 4), **HALF),
    "48 channels": problem(40, 48, 24, 80, **HALF),
    "groups": problem(8, 128, 16, 128, groups=2, **HALF),
    "8 channels a group, NCHW": problem(8, 64, 14, 64, groups=8, channels_last_x=False, channels_last_y=False),
    "TF32, rounded before": problem(128, 128, 16, 128, input_precision="tf32"),
    "TF32, to be rounded": problem(128, 128, 16, 128, input_precision="tf32", round_x=True),
    "TF32, NCHW": problem(128, 128, 16, 128, input_precision="tf32", round_x=True, channels_last_x=False),
    "strict float32": problem(128, 128, 16, 128, input_precision="tf32x3"),
    "strict float32, one image": problem(1, 128, 16, 128, input_precision="tf32x3"),
    "linear": problem(128, 512, 1, 10, 1, **HALF),
}


def pointers(block_m: int, block_n: int, block_k: int, num_warps: int = 4, num_stages: int = 1) -> PointersConfig:
    return PointersConfig(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages)


def sliced_k(
    splits: int, slices: int, block_m: int, block_n: int, block_k: int, num_warps: int = 4, num_stages: int = 1
) -> SlicedKConfig:
    return SlicedKConfig(
        SPLITS=splits,
        SLICES=slices,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )


SLICED = Choice(sliced_k(1, 4, 16, 16, 32))
POINTERS = Choice(pointers(64, 32, 32))
COPIED = Choice(pointers(128, 32, 64), copies_x=True)
DEFAULT = Choice(pointers(128, 32, 64))


def empty_image(n: int, c: int, h: int, w: int, dtype: torch.dtype, channels_last: bool, offset: int = 0):
    """[n, c, h, w] without memory, whose address is that many elements past a multiple of 16 bytes."""
    memory = torch.empty(n * c * h * w + offset, dtype=dtype, device="meta")[offset:]
    return memory.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else memory.view(n, c, h, w)


def product_of(p: Problem) -> Product:
    """Operands without memory that pose a problem."""
    x = empty_image(p.n, p.c, p.h, p.w, p.dtype, p.channels_last_x)
    y = empty_image(p.n, p.k, *p.output, p.dtype, p.channels_last_y)
    rows = (3 if p.input_precision == "tf32x3" else 1) * p.k
    packed = torch.empty(rows, p.r, p.s, p.c // p.groups, dtype=p.dtype, device="meta")
    added = {name: torch.empty(p.k, device="meta") for name in ("scale", "bias") if name in p.epilogue}
    if "residual" in p.epilogue:
        added["residual"] = torch.empty_like(y)
    activation = next((step for step in p.epilogue if step in ACTIVATIONS), "none")
    epilogue = Epilogue(**added, activation=activation, round_y="round_y" in p.epilogue)
    window = p.stride, p.padding, p.dilation
    return Product(x, packed, y, p.channels_last_y, *window, p.groups, p.input_precision, p.round_x, epilogue)


def product(
    n=1024, c=64, side=32, k=None, taps=3, dtype=torch.bfloat16, nchw=False, misaligned=False, **changes
) -> Product:
    """Operands without memory, of square images."""
    k = k or c
    x = empty_image(n, c, side, side, dtype, not nchw, offset=int(misaligned))
    window = {"stride": (1, 1), "padding": (taps // 2, taps // 2), "dilation": (1, 1), "groups": 1}
    window |= {name: changes.pop(name) for name in window if name in changes}
    p, q = (output_size(side, taps, *(window[name][i] for name in ("stride", "padding", "dilation"))) for i in (0, 1))
    y = empty_image(n, k, p, q, dtype, channels_last=True)
    packed = torch.empty(k, taps, taps, c // window["groups"], dtype=dtype, device="meta")
    precision = changes.pop("input_precision", "ieee" if dtype.itemsize == 2 else "tf32")
    made = Product(x, packed, y, True, *window.values(), precision, False, Epilogue())
    return made._replace(**changes)
