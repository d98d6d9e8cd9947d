"""What the compiler makes of the kernels for a Hopper GPU, read from the PTX: no GPU is needed to compile.

Two things once went wrong here that the interpreter does not show. With the image's size a constexpr, LLVM computed the
coordinates of pixels in pairs of 16-bit integers, and masks were wrong on an H200. With annotated strides, Triton no
longer saw that one of them is 1, and every load took one element: ten times slower.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from helpers.hopper import run

from tritonnn.runtime.capabilities import LANES_TAKE_LAST_DIMENSIONS, LOADS_BEFORE_PRODUCTS

FILTER = dict(R=3, S=3, STRIDE_H=1, STRIDE_W=1, PADDING_H=1, PADDING_W=1, DILATION_H=1, DILATION_W=1)
EPILOGUE = dict(HAS_SCALE=False, HAS_BIAS=False, HAS_RESIDUAL=False, ACTIVATION="relu", SLOPE=0.01, ROUND_Y=False)
EPILOGUE |= dict(DEPENDENT=True, scale_ptr=None, bias_ptr=None, residual_ptr=None)
POINTERS = FILTER | EPILOGUE | dict(ROUND_X=False, GROUPS=1, FLUSH=8, GROUP_M=8, BLOCK_M=128, BLOCK_N=64)
POINTERS |= dict(X_UNIT=1, Y_UNIT=1)
POINTERS |= dict(C=64, K=64, SPAN_TAPS=False, BLOCK_K=32, INPUT_PRECISION="ieee")
# ResNet18's first layer. Its rows' columns are elements; sizes that Triton knows nothing of are named.
FEW_CHANNELS = POINTERS | dict(
    C=32, R=7, S=1, STRIDE_H=2, STRIDE_W=8, PADDING_H=3, PADDING_W=0, BLOCK_K=32, x_stride_w=1
)
ODD = dict(odd=("M", "H", "W", "PIXELS", "Q"))
SHORTCUT = dict(
    HAS_SHORTCUT=True, HAS_SHORTCUT_SCALE=False, HAS_SHORTCUT_BIAS=False, SHORTCUT_C=64, ROUND_SHORTCUT=False
)
SHORTCUT |= dict(SHORTCUT_STRIDE_H=2, SHORTCUT_STRIDE_W=2, SHORTCUT_PRECISION="ieee")
SHORTCUT |= dict(shortcut_scale_ptr=None, shortcut_bias_ptr=None)
SLICED_K = FILTER | EPILOGUE | dict(C=64, K=64, ROUND_X=False, ONE_IMAGE=False, BLOCK_K=64)
SLICED_K |= dict(SPLITS=4, SLICES=2, BLOCK_M=16, BLOCK_N=16)
SLICED_K |= dict(
    HAS_SHORTCUT=True, HAS_SHORTCUT_SCALE=False, HAS_SHORTCUT_BIAS=False, SHORTCUT_C=64, ROUND_SHORTCUT=False
)
SLICED_K |= dict(SHORTCUT_STRIDE_H=2, SHORTCUT_STRIDE_W=2, SHORTCUT_PRECISION="ieee")
SLICED_K |= dict(shortcut_scale_ptr=None, shortcut_bias_ptr=None)
RESIDENT = FILTER | EPILOGUE | dict(C=128, K=128, INPUT_PRECISION="ieee", ROUND_X=False, ONE_IMAGE=True, BLOCK_M=16)
RESIDENT |= dict(
    HAS_SHORTCUT=True, HAS_SHORTCUT_SCALE=False, HAS_SHORTCUT_BIAS=False, SHORTCUT_C=64, ROUND_SHORTCUT=False
)
RESIDENT |= dict(SHORTCUT_STRIDE_H=2, SHORTCUT_STRIDE_W=2, SHORTCUT_PRECISION="ieee")
RESIDENT |= dict(shortcut_scale_ptr=None, shortcut_bias_ptr=None, Y_STEP=128, BLOCK_N=16, BLOCK_K=64, num_warps=8)
RESIDENT_1X1 = dict(C=64, R=1, S=1, PADDING_H=0, PADDING_W=0, HAS_SHORTCUT=False, num_warps=4)
RESIDENT_TF32X3 = dict(INPUT_PRECISION="tf32x3", SHORTCUT_PRECISION="tf32x3", BLOCK_K=32)
TMA = FILTER | EPILOGUE | dict(C=128, K=128, STRIDE=1, CHANNELS_LAST=True, SWAP_AB=True, FLUSH=8)
TMA |= dict(
    HAS_RESIDUAL=True, ROUND_X=False, TILE_N=1, TILE_P=4, TILE_Q=16, BLOCK_N=128, BLOCK_K=64, INPUT_PRECISION="ieee"
)


def taps_of(constants: dict) -> dict:
    """The boxes of descriptors where blocks do not divide the channels: the weight is [R * S, K, C]."""
    tile, n, k = ([constants[f"TILE_{axis}"] for axis in "NPQ"], [constants["BLOCK_N"]], [constants["BLOCK_K"]])
    return {"descriptors": dict(x_desc=tile + k, weight_desc=[1, *n, *k], residual_desc=tile + n, y_desc=tile + n)}


HALO = EPILOGUE | dict(HAS_RESIDUAL=True, ROUND_X=False, ROUND_AHEAD=False, WHOLE=True, MASKED=False, STRIDE=1)
HALO_64 = HALO | dict(C=64, K=64, N=None, TILE_N=1, TILE_P=8, TILE_Q=32, BLOCK_N=64, BLOCK_K=64, X_SLOTS=2, W_SLOTS=4)
HALO_64 |= dict(STAGED=True, IN_SLOT=True, num_warps=4)
IN_REGISTERS = dict(BLOCK_N=128, BLOCK_K=32, X_SLOTS=3, STAGED=False, IN_SLOT=False, num_warps=8)
HALO_128 = HALO | IN_REGISTERS | dict(C=128, K=128, N=None, TILE_N=1, TILE_P=16, TILE_Q=16, W_SLOTS=6)
HALO_8X8 = HALO | IN_REGISTERS | dict(C=256, K=256, TILE_N=4, TILE_P=8, TILE_Q=8, W_SLOTS=6)
HALO_4X4 = HALO | IN_REGISTERS | dict(C=512, K=512, TILE_N=16, TILE_P=4, TILE_Q=4, W_SLOTS=4)
AHEAD = dict(ROUND_X=True, ROUND_AHEAD=True)
HALO_BY_2 = HALO | dict(C=64, K=128, N=None, TILE_N=1, TILE_P=8, TILE_Q=16, BLOCK_N=128, BLOCK_K=64, STRIDE=2)
HALO_BY_2 |= dict(X_SLOTS=3, W_SLOTS=7, STAGED=True, IN_SLOT=True, num_warps=8)
MATMUL = EPILOGUE | dict(INPUT_PRECISION="ieee", ROUND_X=False, CHANNELS_LAST_X=True, CHANNELS_LAST_Y=True, FLUSH=0)
MATMUL |= dict(HAS_RESIDUAL=True, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, X_SLOTS=3, RESIDENT=0, num_warps=8)
MATMUL |= dict(X_SCALE="none", HAS_X_SHIFT=False, X_ACTIVATION="none", x_scale_ptr=None, x_shift_ptr=None)
MATMUL_GATED = MATMUL | dict(X_SCALE="gates", BLOCK_M=64, num_warps=4)
del MATMUL_GATED["x_scale_ptr"]
MATMUL_OF_NORM = MATMUL_GATED | dict(X_SCALE="channels", HAS_X_SHIFT=True, X_ACTIVATION="relu")
MATMUL_OF_NORM["types"] = dict(x_scale_ptr="*fp32", x_shift_ptr="*fp32")
del MATMUL_OF_NORM["x_shift_ptr"]
MATMUL_SPLIT = dict(INPUT_PRECISION="tf32x3", FLUSH=8, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4)
MATMUL_NCHW = dict(CHANNELS_LAST_X=False, CHANNELS_LAST_Y=False)
IN_UNITS = dict(odd=("K", "weight_stride_tap", *(f"{t}_stride_{d}" for t in "xy" for d in ("n", "h", "w", "pixel"))))
"""Sizes that are known to be multiples of 8 by how the kernel computes them."""
DIRECT = FILTER | EPILOGUE | dict(GROUP_C=8, GROUP_K=8, STRIP=7, BLOCK_M=128, BLOCK_N=8, num_warps=4)
DEPTHWISE = FILTER | EPILOGUE | dict(MULTIPLIER=1, STRIP=7, weight_stride_k=1, UNIT=1, LOOP=False, num_warps=4)
WIDE = DEPTHWISE | dict(LOOP=True, UNIT=8, BLOCK_M=8, BLOCK_C=64, odd=("M", "H", "W", "P", "Q", "strips_p"))
MAX_POOL = FILTER | dict(
    DEPENDENT=True,
    RETURN_INDICES=False,
    AS_TAPS=False,
    SIGNED_ZEROS=False,
    INDEX_0_OF_INFINITIES=False,
    indices_ptr=None,
)
MAX_POOL_ROWS = dict(PADDING_H=1, PADDING_W=1, STRIP=8, DEPENDENT=True, types=dict(taps_ptr="*u8"))
AVG_POOL = FILTER | dict(DEPENDENT=True, ADAPTIVE=False, COUNT_INCLUDE_PAD=True, DIVISOR_OVERRIDE=0)
LARGE_POOL = "ops.avg_pool2d:avg_pool2d_large_forward_kernel"
SUMS = dict(STEPS=32, UNROLL=4, AXIS=0 if LANES_TAKE_LAST_DIMENSIONS else 1)
WHOLE_IMAGES = AVG_POOL | dict(R=112, S=112, PADDING_H=0, PADDING_W=0, ADAPTIVE=True, WHOLE=True, UNROLL=4)
NORMALIZE = dict(DEPENDENT=True, INVERTED=False, HAS_WEIGHT=True, HAS_BIAS=True, HAS_RESIDUAL=False, RELU=False)
NORM_BACKWARD = dict(TRAINING=True, BY_INPUT=True, BY_OUTPUT=False, HAS_X=True, HAS_WEIGHT=True, HAS_BIAS=True)
NORM_BACKWARD |= dict(HAS_SECOND=False, DEPENDENT=True)
BACKWARD = FILTER | dict(C=128, K=128, GROUPS=1, INPUT_PRECISION="ieee")
GRADIENT_OF_WEIGHT = FILTER | dict(C=64, K=64, TAPS=3, TILES=3, STRIDE=1, SEGMENTS=2, TILE_N=1, TILE_P=2, TILE_Q=32)
GRADIENT_OF_WEIGHT |= dict(
    DEPENDENT=True, BLOCK_M=64, BLOCK_N=64, num_stages=3, descriptors=dict(g_desc=[64, 64], x_desc=[1, 2, 32, 64])
)
GRADIENT_WITH_HALO = dict(C=128, K=128, STRIDE=1, PADDING_H=1, PADDING_W=1, SEGMENTS=3, TILE_N=1, TILE_P=4, TILE_Q=16)
GRADIENT_WITH_HALO |= dict(SLOTS=3, DEPENDENT=True)
GRADIENT_OF_INPUT = FILTER | dict(C=128, K=128, TILE_N=1, TILE_P=8, TILE_Q=16, BLOCK_N=128, BLOCK_K=64, ROUND_G=False)
GRADIENT_OF_INPUT |= dict(
    descriptors=dict(g_desc=[1, 8, 16, 64], weight_desc=[128, 64], grad_x_desc=[1, 8, 1, 16, 128]), num_stages=3
)
BY_PIXELS, BY_CHANNELS = dict(BLOCK_M=1024, BLOCK_C=1), dict(BLOCK_M=16, BLOCK_C=64)
GATE = dict(GATES=True, HAS_SHIFT=False, shift_ptr=None, ACTIVATION="none", DEPENDENT=True, LANES=8, BLOCK=512)
GATE |= dict(odd=("VECTORS", "RUN", "STEP", "PER_IMAGE"))
GATE_KERNEL = "ops.scaled_image:scaled_image_forward_kernel"
LAST, FIRST = "channels_last", "contiguous"

KERNEL_OF = {
    form: f"ops.conv2d.forms.{module}:conv2d_{form}_forward_kernel"
    for form, module in {
        "pointers": "pointers",
        "sliced_k": "sliced_k",
        "in_registers": "in_registers",
        "tma": "tma",
        "tma_halo": "tma_halo.kernel",
        "depthwise": "depthwise",
        "direct": "direct",
        "matmul": "matmul",
    }.items()
}
"""By the form."""
KERNELS = {
    "conv2d, bfloat16": (
        KERNEL_OF["pointers"],
        "bf16",
        LAST,
        POINTERS | dict(BLOCK_K=64),
    ),
    "conv2d, TF32": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        POINTERS | dict(INPUT_PRECISION="tf32", ROUND_X=True),
    ),
    "conv2d, float32": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        POINTERS | dict(INPUT_PRECISION="tf32x3"),
    ),
    "conv2d, float32, one filter": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        POINTERS | dict(K=1, BLOCK_N=1, BLOCK_K=16),
    ),
    "conv2d, 3 channels": (
        KERNEL_OF["pointers"],
        "bf16",
        FIRST,
        POINTERS | dict(C=3, SPAN_TAPS=True),
    ),
    "conv2d, 3 channels, float32": (
        KERNEL_OF["pointers"],
        "fp32",
        FIRST,
        POINTERS | dict(C=3, SPAN_TAPS=True, BLOCK_K=16 if LOADS_BEFORE_PRODUCTS else 32),
    ),
    "conv2d, few channels, TF32": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        FEW_CHANNELS | ODD | dict(INPUT_PRECISION="tf32", num_stages=3),
    ),
    "conv2d, few channels, TF32, one stage": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        FEW_CHANNELS | ODD | dict(INPUT_PRECISION="tf32", num_stages=1),
    ),
    "conv2d, few channels, TF32, NCHW": (
        KERNEL_OF["pointers"],
        "fp32",
        FIRST,
        FEW_CHANNELS | dict(x_stride_c=1, odd=("H", "W", "Q"), INPUT_PRECISION="tf32"),
    ),
    "conv2d, few channels, float32": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        FEW_CHANNELS | ODD | dict(INPUT_PRECISION="tf32x3", BLOCK_M=64),
    ),
    "conv2d, few channels, bfloat16": (
        KERNEL_OF["pointers"],
        "bf16",
        LAST,
        FEW_CHANNELS | ODD,
    ),
    "padded rows": (
        "ops.conv2d.forms.few_channels:padded_rows_kernel",
        "fp32",
        FIRST,
        dict(C=3, PADDING=3, ROUND_TO_TF32=True, BLOCK_H=4, BLOCK_W=256, BLOCK_C=4, odd=("H", "W", "rows", "columns")),
    ),
    "conv2d, sliced-K": (
        KERNEL_OF["sliced_k"],
        "bf16",
        LAST,
        SLICED_K | dict(INPUT_PRECISION="ieee"),
    ),
    "conv2d, in registers": (
        KERNEL_OF["in_registers"],
        "bf16",
        LAST,
        RESIDENT,
    ),
    "conv2d, in registers, 256 channels": (
        KERNEL_OF["in_registers"],
        "bf16",
        LAST,
        RESIDENT | dict(C=256, K=256, Y_STEP=256, BLOCK_N=8),
    ),
    "conv2d, in registers, 1x1": (
        KERNEL_OF["in_registers"],
        "bf16",
        LAST,
        RESIDENT | RESIDENT_1X1,
    ),
    "conv2d, in registers, float32": (
        KERNEL_OF["in_registers"],
        "fp32",
        LAST,
        RESIDENT | RESIDENT_TF32X3,
    ),
    "conv2d, TMA": (KERNEL_OF["tma"], "bf16", LAST, TMA),
    "conv2d, TMA, 96 channels": (KERNEL_OF["tma"], "bf16", LAST, TMA | dict(C=96, num_stages=3) | taps_of(TMA)),
    "conv2d, TMA, TF32": (
        KERNEL_OF["tma"],
        "fp32",
        LAST,
        TMA | dict(INPUT_PRECISION="tf32", BLOCK_K=32),
    ),
    "conv2d, TMA, TF32, rounded": (
        KERNEL_OF["tma"],
        "fp32",
        LAST,
        TMA | dict(INPUT_PRECISION="tf32", BLOCK_K=32, SWAP_AB=False),
    ),
    "conv2d, TMA, TF32, rounded in shared memory": (
        KERNEL_OF["tma"],
        "fp32",
        LAST,
        TMA | dict(INPUT_PRECISION="tf32", BLOCK_K=32, ROUND_X=True, TILE_P=8, num_warps=8, num_stages=3),
    ),
    "conv2d, TMA, float32": (
        KERNEL_OF["tma"],
        "fp32",
        LAST,
        TMA | dict(INPUT_PRECISION="tf32x3", BLOCK_K=32, SWAP_AB=False),
    ),
    "conv2d, halo": (
        KERNEL_OF["tma_halo"],
        "bf16",
        LAST,
        HALO_64,
    ),
    "conv2d, halo, TF32": (
        KERNEL_OF["tma_halo"],
        "fp32",
        LAST,
        HALO_128,
    ),
    "conv2d, halo, TF32, rounded": (
        KERNEL_OF["tma_halo"],
        "fp32",
        LAST,
        HALO_64 | dict(BLOCK_K=32, STAGED=False, IN_SLOT=False, ROUND_X=True, HAS_RESIDUAL=False),
    ),
    "conv2d, halo, 8x8": (
        KERNEL_OF["tma_halo"],
        "bf16",
        LAST,
        HALO_8X8 | dict(BLOCK_K=64, X_SLOTS=2, W_SLOTS=5, STAGED=True),
    ),
    "conv2d, halo, 8x8, TF32, rounded": (
        KERNEL_OF["tma_halo"],
        "fp32",
        LAST,
        HALO_8X8 | AHEAD | dict(HAS_RESIDUAL=False),
    ),
    "conv2d, halo, 4x4, TF32, rounded, masked": (
        KERNEL_OF["tma_halo"],
        "fp32",
        LAST,
        HALO_4X4 | AHEAD | dict(MASKED=True),
    ),
    "conv2d, halo, stride 2": (
        KERNEL_OF["tma_halo"],
        "bf16",
        LAST,
        HALO_BY_2,
    ),
    "conv2d, halo, stride 2, TF32, rounded": (
        KERNEL_OF["tma_halo"],
        "fp32",
        LAST,
        HALO_BY_2 | IN_REGISTERS | AHEAD | dict(HAS_RESIDUAL=False),
    ),
    "conv2d, halo, stride 2, 4x4, TF32, rounded": (
        KERNEL_OF["tma_halo"],
        "fp32",
        LAST,
        HALO_4X4 | dict(STRIDE=2, TILE_N=8, BLOCK_N=256, X_SLOTS=2, ROUND_X=True, HAS_RESIDUAL=False),
    ),
    "conv2d, halo, groups": (
        KERNEL_OF["tma_halo"],
        "bf16",
        LAST,
        HALO_64 | dict(C=104, K=104, DEPTH=64, GROUP_C=8, GROUP_K=8, EXPAND=True, TILE_Q=16, W_SLOTS=9, MASKED=True),
    ),
    "conv2d, halo, TF32, NCHW": (
        KERNEL_OF["tma_halo"],
        "fp32",
        FIRST,
        HALO_128 | dict(CHANNELS_LAST=False, MASKED=True, HAS_RESIDUAL=False),
    ),
    "conv2d, matrix product": (KERNEL_OF["matmul"], "bf16", LAST, MATMUL),
    "conv2d, matrix product, resident": (KERNEL_OF["matmul"], "bf16", LAST, MATMUL | dict(RESIDENT=3, BLOCK_N=64)),
    "conv2d, matrix product, TF32, rounded, NCHW": (
        KERNEL_OF["matmul"],
        "fp32",
        FIRST,
        MATMUL | MATMUL_NCHW | dict(INPUT_PRECISION="tf32", ROUND_X=True, BLOCK_K=32),
    ),
    "conv2d, matrix product, float32": (KERNEL_OF["matmul"], "fp32", LAST, MATMUL | MATMUL_SPLIT),
    "conv2d, matrix product, float32, NCHW": (KERNEL_OF["matmul"], "fp32", FIRST, MATMUL | MATMUL_SPLIT | MATMUL_NCHW),
    "conv2d, matrix product, gates": (KERNEL_OF["matmul"], "bf16", LAST, MATMUL_GATED),
    "conv2d, matrix product, batch norm before": (KERNEL_OF["matmul"], "bf16", LAST, MATMUL_OF_NORM),
    "conv2d, direct, contiguous": (KERNEL_OF["direct"], "fp32", FIRST, DIRECT),
    "conv2d, depthwise": (
        KERNEL_OF["depthwise"],
        "bf16",
        LAST,
        DEPTHWISE | dict(BLOCK_M=16, BLOCK_C=64),
    ),
    "conv2d, depthwise, 72 channels": (
        KERNEL_OF["depthwise"],
        "bf16",
        LAST,
        DEPTHWISE | IN_UNITS | dict(UNIT=8, BLOCK_M=16, BLOCK_C=64),
    ),
    "conv2d, depthwise, 5x5": (KERNEL_OF["depthwise"], "bf16", LAST, WIDE | dict(R=5, S=5)),
    "conv2d, depthwise, 5x5, strided": (KERNEL_OF["depthwise"], "bf16", LAST, WIDE | dict(R=5, S=5, STRIDE_H=2)),
    "conv2d, depthwise, 7x7": (KERNEL_OF["depthwise"], "bf16", LAST, WIDE | dict(R=7, S=7)),
    "conv2d, 24 channels": (
        KERNEL_OF["pointers"],
        "bf16",
        LAST,
        POINTERS | IN_UNITS | dict(C=24, K=24, X_UNIT=8, Y_UNIT=8, BLOCK_N=32, BLOCK_K=32),
    ),
    "conv2d, depthwise, contiguous": (
        KERNEL_OF["depthwise"],
        "fp32",
        FIRST,
        DEPTHWISE | dict(BLOCK_M=128, BLOCK_C=1),
    ),
    "max_pool2d": ("ops.max_pool2d:max_pool2d_forward_kernel", "bf16", LAST, MAX_POOL | BY_CHANNELS),
    "max_pool2d, contiguous": ("ops.max_pool2d:max_pool2d_forward_kernel", "bf16", FIRST, MAX_POOL | BY_PIXELS),
    "max_pool2d, rows": (
        "ops.max_pool2d_rows:max_pool2d_rows_forward_kernel",
        "bf16",
        LAST,
        MAX_POOL_ROWS | BY_CHANNELS | dict(INDEX_0_OF_INFINITIES=False),
    ),
    "avg_pool2d": ("ops.avg_pool2d:avg_pool2d_forward_kernel", "fp32", LAST, AVG_POOL | BY_CHANNELS),
    "avg_pool2d, contiguous": ("ops.avg_pool2d:avg_pool2d_forward_kernel", "fp32", FIRST, AVG_POOL | BY_PIXELS),
    "avg_pool2d, whole images": (LARGE_POOL, "bf16", LAST, WHOLE_IMAGES | dict(SPLITS=8, BLOCK_W=64, BLOCK_C=64)),
    "avg_pool2d, whole images, contiguous": (
        LARGE_POOL,
        "fp32",
        FIRST,
        WHOLE_IMAGES | dict(SPLITS=1, BLOCK_W=1024, BLOCK_C=1, partial_ptr=None, semaphores_ptr=None),
    ),
    "batch_norm2d": ("ops.batch_norm2d:batch_norm2d_normalize_kernel", "bf16", LAST, NORMALIZE | BY_CHANNELS),
    "batch_norm2d, contiguous": (
        "ops.batch_norm2d:batch_norm2d_normalize_kernel",
        "bf16",
        FIRST,
        NORMALIZE | BY_PIXELS,
    ),
    "channels_last": (
        "ops.conv2d.pack:channels_last_kernel",
        "fp32",
        FIRST,
        dict(ROUND_TO_TF32=True, SPLIT=False, BLOCK_M=64, BLOCK_C=64),
    ),
    "relu": ("ops.relu:relu_forward_kernel", "bf16", FIRST, dict(BLOCK=2048)),
    "gradient of relu": ("ops.relu_backward:relu_backward_kernel", "bf16", FIRST, dict(BLOCK=2048)),
    "batch_norm2d, statistics": (
        "ops.batch_norm2d:batch_norm2d_partial_statistics_kernel",
        "bf16",
        LAST,
        BY_CHANNELS | dict(STEPS=8, DEPENDENT=True),
    ),
    "batch_norm2d, statistics, contiguous": (
        "ops.batch_norm2d:batch_norm2d_partial_statistics_kernel",
        "bf16",
        FIRST,
        BY_PIXELS | dict(STEPS=8, DEPENDENT=True),
    ),
    "gradient of batch_norm2d": (
        "ops.batch_norm2d_backward:batch_norm2d_backward_input_kernel",
        "bf16",
        LAST,
        NORM_BACKWARD | BY_CHANNELS,
    ),
    "gradient of batch_norm2d, sums": (
        "ops.channel_sums:channel_sums_partial_kernel",
        "bf16",
        LAST,
        NORM_BACKWARD | BY_CHANNELS | SUMS,
    ),
    "gradient of batch_norm2d, sums, contiguous": (
        "ops.channel_sums:channel_sums_partial_kernel",
        "bf16",
        FIRST,
        NORM_BACKWARD | BY_PIXELS | SUMS,
    ),
    "gradient of max_pool2d": (
        "ops.max_pool2d_backward:max_pool2d_backward_kernel",
        "bf16",
        LAST,
        FILTER | BY_CHANNELS | dict(BY_TAPS=True, types=dict(indices_ptr="*u8")),
    ),
    "gradient of max_pool2d, rows": (
        "ops.max_pool2d_rows:max_pool2d_rows_backward_kernel",
        "bf16",
        LAST,
        MAX_POOL_ROWS | BY_CHANNELS,
    ),
    "gradient of avg_pool2d": (
        "ops.avg_pool2d_backward:avg_pool2d_backward_kernel",
        "bf16",
        LAST,
        AVG_POOL | BY_CHANNELS | dict(ROWS=3, COLUMNS=3, DEPENDENT=False),
    ),
    "gradient of the weight": (
        "ops.conv2d.backward.weight:conv2d_backward_weight_kernel",
        "bf16",
        LAST,
        BACKWARD | dict(STEPS=64, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_stages=3),
    ),
    "gradient of the weight, tiles of several taps": (
        "ops.conv2d.backward.weight:conv2d_backward_weight_kernel",
        "bf16",
        LAST,
        BACKWARD | dict(C=64, K=64, STEPS=64, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_stages=3),
    ),
    "gradient of the weight, TMA": (
        "ops.conv2d.backward.weight_tma:conv2d_backward_weight_tma_kernel",
        "bf16",
        LAST,
        GRADIENT_OF_WEIGHT,
    ),
    "gradient of the weight, halo": (
        "ops.conv2d.backward.weight_halo:conv2d_backward_weight_halo_kernel",
        "bf16",
        LAST,
        GRADIENT_WITH_HALO,
    ),
    "gradient of the weight, halo, strided": (
        "ops.conv2d.backward.weight_halo:conv2d_backward_weight_halo_kernel",
        "bf16",
        LAST,
        GRADIENT_WITH_HALO | dict(STRIDE=2, SLOTS=2),
    ),
    "gradient of the input, TMA": (
        "ops.conv2d.backward.input_tma:conv2d_backward_input_tma_kernel",
        "bf16",
        LAST,
        GRADIENT_OF_INPUT,
    ),
    "layer_norm": (
        "ops.layer_norm:layer_norm_forward_kernel",
        "bf16",
        LAST,
        dict(HAS_WEIGHT=True, HAS_BIAS=True, DEPENDENT=True, BLOCK_M=32, BLOCK_C=128),
    ),
    # Sizes in vectors of eight are no multiples of 16.
    "scaled_image": (GATE_KERNEL, "bf16", LAST, GATE | dict(CHANNELS_LAST=True)),
    "scaled_image, contiguous": (GATE_KERNEL, "bf16", FIRST, GATE | dict(CHANNELS_LAST=False)),
}
OF_FEW_CHANNELS = [name for name in KERNELS if "conv2d, few channels" in name]
ON_TENSOR_CORES = ["conv2d, bfloat16", "conv2d, TF32", "conv2d, float32", "conv2d, 3 channels", *OF_FEW_CHANNELS]
ON_TENSOR_CORES += ["gradient of the weight", "gradient of the weight, tiles of several taps"]
BY_TAPS = [name for name in KERNELS if "conv2d, TMA" in name]
COMPUTED_OPERANDS = ["conv2d, TF32", "conv2d, float32", "conv2d, few channels, float32", *BY_TAPS[3:]]
COMPUTED_OPERANDS += ["conv2d, matrix product, float32", "conv2d, matrix product, float32, NCHW"]
COMPUTED_OPERANDS += ["conv2d, matrix product, gates", "conv2d, matrix product, batch norm before"]
COMPUTED_OPERANDS += ["gradient of the weight, halo", "gradient of the weight, halo, strided"]
"""Kernels that compute or transpose x in registers, from which, or from one place of shared memory, tensor cores read
it."""
WITH_HALO = [name for name in KERNELS if "halo" in name and "gradient" not in name]
PRODUCTS = [name for name in KERNELS if "matrix product" in name]
RESIDENT_KERNELS = [name for name in KERNELS if "in registers" in name]
GRADIENTS_BY_TMA = [name for name in KERNELS if "gradient" in name and "TMA" in name]
GRADIENTS_WITH_HALO = ["gradient of the weight, halo", "gradient of the weight, halo, strided"]
BY_TMA = BY_TAPS + WITH_HALO + PRODUCTS + GRADIENTS_BY_TMA + GRADIENTS_WITH_HALO
FEW_PIXELS = ["conv2d, sliced-K", *RESIDENT_KERNELS]
ROUNDS = [
    *[name for name in WITH_HALO if "rounded" in name],
    *[name for name in PRODUCTS if "32" in name],
    "conv2d, TF32",
    "conv2d, float32",
    "conv2d, in registers, float32",
    "conv2d, few channels, float32",
    "padded rows",
    *BY_TAPS[3:],
]
WIDE_FILTERS = {"conv2d, depthwise, 5x5": 168, "conv2d, depthwise, 5x5, strided": 232, "conv2d, depthwise, 7x7": 224}
"""Depthwise kernels whose threads take 8 bytes of channels, and the most registers of a thread that leave a
multiprocessor as many programs as when all columns were unrolled."""
GATHERS = [
    "conv2d, 3 channels",
    "conv2d, 3 channels, float32",
    "max_pool2d, contiguous",
    "avg_pool2d, contiguous",
    "channels_last",
    "padded rows",
]
GATHERS += ["conv2d, depthwise, contiguous", "conv2d, direct, contiguous", *WIDE_FILTERS]
"""Kernels that read neighbouring pixels, one by one."""
REDUCTIONS = ["batch_norm2d, statistics", "batch_norm2d, statistics, contiguous", "gradient of batch_norm2d, sums"]
REDUCTIONS += ["gradient of batch_norm2d, sums, contiguous"]
FEW_OUTPUTS = [
    "conv2d, float32, one filter",
    "avg_pool2d, whole images",
    "avg_pool2d, whole images, contiguous",
    "conv2d, depthwise, contiguous",
    "conv2d, direct, contiguous",
    *REDUCTIONS,
    *WIDE_FILTERS,
]
"""Kernels of which a thread has one output, a column of them, or 8 bytes of a column's channels."""


def compiled_ptx(path: str, dtype: str, memory_format: str, constants: dict) -> str:
    """The PTX of a kernel for tensors of `dtype`, sizes and strides multiples of 16 but for the stride 1, and `odd`.

    Triton finds that out for itself when it launches, unless an argument's type is annotated.
    """
    import importlib

    import triton.language as tl
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, _, name = path.partition(":")
    kernel = getattr(importlib.import_module(f"tritonnn.{module}"), name)
    assert not [p.name for p in kernel.params if "stride" in p.name and p.annotation_type], "annotated strides"
    names, odd, descriptors = kernel.arg_names, constants.get("odd", ()), constants.get("descriptors")
    special = constants.get("types", {})
    ones = ("stride_c", "stride_k") if memory_format == "channels_last" else ("stride_w", "stride_pixel")
    types_of_sums = dict(ACC=tl.float32, LANE=tl.float32, INDEX=tl.int32, OFFSET=tl.int32)
    constants = {name: 1 for name in names if name.endswith(ones)} | types_of_sums | constants
    launched = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name in names}
    types = {
        "eps": "fp64",
        "semaphores_ptr": "*i32",
        "indices_ptr": "*i64",
        "inverse_of_pixels": "fp32",
        "inverse_of_q": "fp32",
    } | {name: "*fp32" for name in ("mean_ptr", "var_ptr", "partial_ptr", "coefficients_ptr", "inverse_ptr")}
    types |= special
    if descriptors:
        types |= {name: f"tensordesc<{dtype}{box}>" for name, box in descriptors.items()}
    elif "RESIDENT" in constants:
        types |= matmul_types(dtype, constants)
    elif "SLOTS" in constants:
        types |= gradient_with_halo_types(dtype, constants)
    elif "W_SLOTS" in constants:
        c, k = constants["C"], constants["K"]
        constants = dict(CHANNELS_LAST=True, EXPAND=False, DEPTH=c, GROUP_C=c, GROUP_K=k) | constants
        types |= halo_types(dtype, constants)
    elif "TILE_N" in constants:
        tile, n, k = (
            [constants[size] for size in sizes]
            for sizes in (("TILE_N", "TILE_P", "TILE_Q"), ("BLOCK_N",), ("BLOCK_K",))
        )
        boxes = {"x_desc": tile + k, "weight_desc": n + k, "residual_desc": tile + n, "y_desc": tile + n}
        types |= {name: f"tensordesc<{dtype}{box}>" for name, box in boxes.items()}
    types |= {name: f"*{dtype}" for name in names if name.endswith("_ptr") and name not in types}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if (signature[name] == "i32" and name not in odd) or signature[name].startswith("*")
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source(kernel, signature, constexprs=values, attrs=attributes)
    options = {"num_warps": 4} | launched
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def matmul_types(dtype: str, constants: dict) -> dict[str, str]:
    """The types of the descriptors."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    m, n, k = (constants[f"BLOCK_{name}"] for name in "MNK")
    x = [1, m, k] if constants["CHANNELS_LAST_X"] else [1, k, m]
    y = [1, m, n] if constants["CHANNELS_LAST_Y"] else [1, n, m]
    boxes = {"x_desc": x, "weight_desc": [n, k], "y_desc": y, "residual_desc": y}
    bits = 32 if dtype == "fp32" else 16
    return {name: f"tensordesc<{dtype}{box},{NVMMASharedLayout(128, bits, len(box))!r}>" for name, box in boxes.items()}


def halo_types(dtype: str, constants: dict) -> dict[str, str]:
    """The types of the descriptors, and of the pointers that y and the residual are where they are not staged."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    images, rows, columns, n, k = (constants[size] for size in ("TILE_N", "TILE_P", "TILE_Q", "BLOCK_N", "BLOCK_K"))
    y = [rows, images, columns, n] if constants["STAGED"] else None
    x, edge = [rows, 1, images, columns, k], [3 - constants["STRIDE"], 1, images, columns, k]
    weight = None if constants["EXPAND"] else [n, 1, k]
    boxes = {"x_desc": x, "edge_desc": edge, "weight_desc": weight, "y_desc": y, "residual_desc": y}
    bits = 32 if dtype == "fp32" else 16
    return {
        name: f"tensordesc<{dtype}{box},{NVMMASharedLayout(128, bits, len(box))!r}>" if box else f"*{dtype}"
        for name, box in boxes.items()
    }


def gradient_with_halo_types(dtype: str, constants: dict) -> dict[str, str]:
    """The types of the descriptors."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    images, rows, columns = (constants[size] for size in ("TILE_N", "TILE_P", "TILE_Q"))
    rest = [images, columns, 64]
    boxes = {"g_desc": [rows, *rest], "x_desc": [rows, 1, *rest], "edge_desc": [3 - constants["STRIDE"], 1, *rest]}
    return {name: f"tensordesc<{dtype}{box},{NVMMASharedLayout(128, 16, len(box))!r}>" for name, box in boxes.items()}


@pytest.fixture(scope="module")
def ptx() -> dict[str, str]:
    """PTX by the name of the kernel, compiled in a process without the interpreter."""
    return run(__file__)


@pytest.mark.parametrize("name", KERNELS)
def test_no_pairs_of_16_bit_integers(name, ptx):
    assert not re.search(r"\.[su]16x2", ptx[name])


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in BY_TMA + FEW_PIXELS + FEW_OUTPUTS])
def test_stores_take_16_bytes(name, ptx):
    assert re.search(r"st\.global\.v4\.b32", ptx[name])


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in GATHERS + BY_TMA])
def test_loads_take_16_bytes(name, ptx):
    assert re.search(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global", ptx[name])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_lanes_add_up_their_pixels_alone(name, ptx):
    """In the loop no thread waits for another: what is exchanged there costs more than what is loaded."""
    code = ptx[name].partition("ld.global.v4")[2]
    loop = code[: re.search(r"bra\s+\$L__BB", code).start()]
    assert loop.count("ld.global.v4.b32") >= 3 and not re.search(r"shfl|bar\.sync|\.shared", loop)


@pytest.mark.parametrize("name", OF_FEW_CHANNELS)
def test_windows_are_loaded_16_bytes_at_a_time_and_all_fits_the_registers(name, ptx, tmp_path):
    """Both operands: ahead of time into shared memory or, with one stage, through registers. No bias is loaded here."""
    loads = re.findall(r"cp\.async\.c\w\.shared\.global [^;]*?, (0x\d+)|ld\.global[\w.:]*?\.(v\d|b\d+)\b", ptx[name])
    assert {size for pair in loads for size in pair if size} == {"v4" if "one stage" in name else "0x10"}
    assert "0 bytes spill stores" in assembled(ptx[name], tmp_path)


@pytest.mark.parametrize("name", GRADIENTS_BY_TMA)
def test_tensor_cores_read_gradients_from_where_tma_brought_them(name, ptx, tmp_path):
    """While the products of one step run, those of the step before may still be running."""
    assert "cp.async.bulk.tensor.4d.shared" in ptx[name]
    loop = ptx[name].partition("wgmma.mma_async")[2].partition("wgmma.wait_group.sync.aligned 0")[0]
    assert "ldmatrix" not in ptx[name] and "st.shared" not in loop
    assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])[0] != "0"
    assert "0 bytes spill stores" in assembled(ptx[name], tmp_path)


@pytest.mark.parametrize("name", ["conv2d, 3 channels", "conv2d, 3 channels, float32"])
def test_few_channels_fit_the_registers(name, ptx, tmp_path):
    """With 32 products a step Triton 3.9 spilled 5.6 KB a thread of the second: ResNet18 took half as long again."""
    said = assembled(ptx[name], tmp_path)
    assert "0 bytes spill stores" in said and int(re.search(r"Used (\d+) registers", said)[1]) > 32


@pytest.mark.parametrize("name", WIDE_FILTERS)
def test_columns_of_wide_filters_are_a_loop_that_loads_the_next_one(name, ptx, tmp_path):
    """Of each column rows and weights are loaded once, 8 bytes at a time, before the column before is multiplied.

    Triton's time to compile grows with the cube of loads and products: a 7x7 filter took 6 times as long unrolled.
    """
    constants, code = KERNELS[name][3], re.sub(r"\t//.*", "", ptx[name])
    loop = code[: code.rindex("bra")].rpartition("$L__BB")[2].partition("\n")[2]
    rows = (constants["STRIP"] - 1) * constants["STRIDE_H"] + constants["R"]
    assert re.findall(r"ld\.global[\w.]*", loop) == ["ld.global.v2.b32"] * (rows + constants["R"])
    assert 0 < loop.count("fma.rn.f32") <= 4 * constants["STRIP"] * constants["R"]
    assert code.count("ld.global") == 2 * (rows + constants["R"]) and "shared" not in loop
    said = assembled(ptx[name], tmp_path)
    if triton.__version__.startswith("3.6."):  # the assembler of Triton 3.9 takes more for both
        assert "0 bytes spill stores" in said
        assert int(re.search(r"Used (\d+) registers", said)[1]) <= WIDE_FILTERS[name]


@pytest.mark.parametrize("name", GRADIENTS_WITH_HALO)
def test_gradients_are_transposed_on_their_way_to_registers_and_all_fits_there(name, ptx, tmp_path):
    """64 x 64 of a gradient in four loads; the sums of three products of it stay where they are."""
    assert ptx[name].count("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16") == 4
    assert "cp.async.bulk.tensor.5d.shared" in ptx[name] and not re.search(r"(ld|st)\.shared", ptx[name])
    assert ptx[name].count("wgmma.mma_async") == 12
    said = assembled(ptx[name], tmp_path)
    assert "0 bytes spill stores" in said and "serializ" not in said


@pytest.mark.parametrize("name", ["conv2d, TMA", "conv2d, TMA, 96 channels"])
def test_tensor_cores_read_both_operands_from_where_tma_brought_them(name, ptx):
    """A weight in registers would be overwritten while the products of the step before still read it."""
    loop = ptx[name].partition("wgmma.mma_async")[2].partition("wgmma.wait_group.sync.aligned 0")[0]
    assert not re.search(r"ldmatrix|(ld|st)\.shared", loop)
    assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])[0] == "1"


@pytest.mark.parametrize("name", BY_TAPS + WITH_HALO + PRODUCTS)
def test_tma_brings_the_tiles(name, ptx):
    dimensions = 3 if name in PRODUCTS else 4
    assert f"cp.async.bulk.tensor.{5 if name in WITH_HALO else dimensions}d.shared" in ptx[name]
    staged = KERNELS[name][3].get("STAGED", True)
    assert (f"cp.async.bulk.tensor.{dimensions}d.global" in ptx[name]) == staged


@pytest.mark.parametrize("name", COMPUTED_OPERANDS)
def test_a_product_of_computed_operands_is_awaited(name, ptx):
    """Otherwise the next step overwrites the registers that the tensor core still reads, as it did on an H200."""
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])) == {"0"}


@pytest.mark.parametrize("name", ON_TENSOR_CORES + BY_TMA)
def test_products_run_on_the_tensor_cores(name, ptx):
    assert "wgmma.mma_async" in ptx[name]


@pytest.mark.parametrize("name", [name for name in WITH_HALO if "NCHW" not in name] + PRODUCTS[:2])
def test_products_overlap_and_all_fits_the_registers(name, ptx, tmp_path):
    waits = {"0", "1", "3"} if "groups" in name else {"0", "1"}  # a weight that stays is not waited for
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx[name])) == waits
    said = assembled(ptx[name], tmp_path)
    assert "0 bytes spill stores" in said and "serializ" not in said


@pytest.mark.parametrize("name", RESIDENT_KERNELS)
def test_all_is_loaded_before_the_first_product(name, ptx, tmp_path):
    """16 bytes at a time, as operands of the tensor cores, and behind the wait; nothing of it leaves the registers."""
    assembled(ptx[name], tmp_path)
    machine_code = subprocess.run(
        [disassembler(), tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    steps = re.findall(r"ACQBULK|LDG\.E\.128|HMMA|STL|LDL", machine_code.stdout)
    order = [step for step, before in zip(steps, [None, *steps]) if step != before]
    assert order == ["ACQBULK", "LDG.E.128", "HMMA"]
    c = KERNELS[name][3]
    size = 4 if "float32" in name else 2
    reductions = c["R"] * c["S"] * c["C"], c["HAS_SHORTCUT"] * c["SHORTCUT_C"]
    blocks = sum(math.ceil(reduction / (c["BLOCK_K"] * c["num_warps"])) for reduction in reductions)
    vectors = blocks * c["BLOCK_K"] * (c["BLOCK_M"] + c["BLOCK_N"]) * size // 16
    assert steps.count("LDG.E.128") == vectors / 32


@pytest.mark.parametrize("name", [name for name, (*_, constants) in KERNELS.items() if constants.get("DEPENDENT")])
def test_dependent_launches_touch_no_tensor_before_they_waited(name, ptx):
    first = re.search(r"(ld|st)\.global|cp\.async|griddepcontrol\.wait", ptx[name])
    assert first[0] == "griddepcontrol.wait"
    assert "griddepcontrol.launch_dependents" in ptx[name]


@pytest.mark.parametrize("name", ROUNDS)
def test_rounding_to_tf32_is_one_instruction(name, ptx):
    assert "cvt.rn.tf32.f32" in ptx[name] and "cvt.rna" not in ptx[name]


def assembled(ptx: str, folder: Path) -> str:
    """What the assembler says of a kernel: registers, spills, warnings."""
    (folder / "kernel.ptx").write_text(ptx)
    command = ptxas(), "-arch=sm_90a", "-v", folder / "kernel.ptx", "-o", folder / "kernel.cubin"
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def ptxas() -> Path:
    """The assembler that Triton takes for Hopper."""
    from triton.backends.nvidia.compiler import get_ptxas

    return Path(get_ptxas(90).path)


def disassembler() -> Path:
    return ptxas().with_name("nvdisasm")


if __name__ == "__main__":
    from helpers.hopper import Hopper
    from triton.runtime import driver

    driver.set_active(Hopper())
    json.dump({name: compiled_ptx(*arguments) for name, arguments in KERNELS.items()}, sys.stdout)
