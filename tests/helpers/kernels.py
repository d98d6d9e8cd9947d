"""Kernels of all operations and their constants in launches that networks make, to be compiled for Hopper.

python tests/helpers/kernels.py    # with tests/ in the path, TRITON_INTERPRET=0: what they become, by name, as JSON
"""

import json
import sys

from triton.runtime import driver

from benchmarks.pose import Pose
from helpers.hopper import boxes_of, compiled
from tritonnn.device.layouts import LANES_ALONG_LAST

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
SLICED_K = FILTER | EPILOGUE | dict(C=64, K=64, LOST=0.0, ROUND_X=False, ONE_IMAGE=False, BLOCK_K=64)
SLICED_K |= dict(SPLITS=4, SLICES=2, BLOCK_M=16, BLOCK_N=16)
SLICED_K |= SHORTCUT
RESIDENT = FILTER | EPILOGUE | dict(C=128, K=128, INPUT_PRECISION="ieee", ROUND_X=False, ONE_IMAGE=True, BLOCK_M=16)
RESIDENT |= SHORTCUT | dict(LOST=0.0, Y_STEP=128, BLOCK_N=16, BLOCK_K=64, num_warps=8)
RESIDENT_1X1 = dict(C=64, R=1, S=1, PADDING_H=0, PADDING_W=0, HAS_SHORTCUT=False, num_warps=4)
RESIDENT_TF32X3 = dict(INPUT_PRECISION="tf32x3", SHORTCUT_PRECISION="tf32x3", BLOCK_K=32)
TMA = FILTER | EPILOGUE | dict(C=128, K=128, STRIDE=1, CHANNELS_LAST=True, SWAP_AB=True, FLUSH=8, SPLITS=1)
TMA |= dict(
    HAS_RESIDUAL=True, ROUND_X=False, TILE_N=1, TILE_P=4, TILE_Q=16, BLOCK_N=128, BLOCK_K=64, INPUT_PRECISION="ieee"
)

SPLIT_K = TMA | dict(SPLITS=4, C=512, K=512, BLOCK_N=64, num_stages=4)


def taps_of(constants: dict) -> dict:
    """The boxes of descriptors where blocks do not divide the channels: the weight is [R * S, K, C]."""
    tile, n, k = ([constants[f"TILE_{axis}"] for axis in "NPQ"], [constants["BLOCK_N"]], [constants["BLOCK_K"]])
    return {"descriptors": dict(x_desc=tile + k, weight_desc=[1, *n, *k], residual_desc=tile + n, y_desc=tile + n)}


HALO = EPILOGUE | dict(HAS_RESIDUAL=True, ROUND_X=False, ROUND_AHEAD=False, WHOLE=True, MASKED=False, STRIDE=1)
HALO |= dict(PADDING_H=1, PADDING_W=1)
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
MATMUL_REST = MATMUL | dict(REST_N=32)
MATMUL |= dict(REST_N=0, rest_desc=None, rest_residual_desc=None, rest_y_desc=None)
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
SUMS = dict(STEPS=32, UNROLL=4, AXIS=0 if LANES_ALONG_LAST.value else 1)
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
    "conv2d, bfloat16": (KERNEL_OF["pointers"], "bf16", LAST, POINTERS | dict(BLOCK_K=64)),
    "conv2d, TF32": (KERNEL_OF["pointers"], "fp32", LAST, POINTERS | dict(INPUT_PRECISION="tf32", ROUND_X=True)),
    "conv2d, float32": (KERNEL_OF["pointers"], "fp32", LAST, POINTERS | dict(INPUT_PRECISION="tf32x3")),
    "conv2d, 1x1, stride 2, contiguous": (
        KERNEL_OF["pointers"],
        "bf16",
        FIRST,
        POINTERS | dict(BLOCK_K=64, R=1, S=1, STRIDE_H=2, STRIDE_W=2, PADDING_H=0, PADDING_W=0),
    ),
    "conv2d, float32, one filter": (KERNEL_OF["pointers"], "fp32", LAST, POINTERS | dict(K=1, BLOCK_N=1, BLOCK_K=16)),
    "conv2d, 3 channels": (KERNEL_OF["pointers"], "bf16", FIRST, POINTERS | dict(C=3, SPAN_TAPS=True)),
    "conv2d, 3 channels, float32": (KERNEL_OF["pointers"], "fp32", FIRST, POINTERS | dict(C=3, SPAN_TAPS=True)),
    "conv2d, 3 channels, float32, channels_last": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        POINTERS | dict(C=3, SPAN_TAPS=True),
    ),
    "conv2d, 3 channels, float32, bias": (
        KERNEL_OF["pointers"],
        "fp32",
        LAST,
        {name: POINTERS[name] for name in POINTERS if name != "bias_ptr"} | dict(C=3, SPAN_TAPS=True, HAS_BIAS=True),
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
    "conv2d, few channels, bfloat16": (KERNEL_OF["pointers"], "bf16", LAST, FEW_CHANNELS | ODD),
    "padded rows": (
        "ops.conv2d.forms.few_channels:padded_rows_kernel",
        "fp32",
        FIRST,
        dict(C=3, PADDING=3, ROUND_TO_TF32=True, BLOCK_H=4, BLOCK_W=256, BLOCK_C=4, odd=("H", "W", "rows", "columns")),
    ),
    "conv2d, sliced-K": (KERNEL_OF["sliced_k"], "bf16", LAST, SLICED_K | dict(INPUT_PRECISION="ieee")),
    "conv2d, sliced-K, float32": (
        KERNEL_OF["sliced_k"],
        "fp32",
        LAST,
        SLICED_K | dict(INPUT_PRECISION="tf32x3", C=512, K=512, HAS_SHORTCUT=False, BLOCK_K=32),
    ),
    "conv2d, in registers": (KERNEL_OF["in_registers"], "bf16", LAST, RESIDENT),
    "conv2d, in registers, 256 channels": (
        KERNEL_OF["in_registers"],
        "bf16",
        LAST,
        RESIDENT | dict(C=256, K=256, Y_STEP=256, BLOCK_N=8),
    ),
    "conv2d, in registers, 1x1": (KERNEL_OF["in_registers"], "bf16", LAST, RESIDENT | RESIDENT_1X1),
    "conv2d, in registers, float32": (KERNEL_OF["in_registers"], "fp32", LAST, RESIDENT | RESIDENT_TF32X3),
    "conv2d, TMA": (KERNEL_OF["tma"], "bf16", LAST, TMA),
    "conv2d, TMA, 96 channels": (KERNEL_OF["tma"], "bf16", LAST, TMA | dict(C=96, num_stages=3) | taps_of(TMA)),
    "conv2d, TMA, TF32": (KERNEL_OF["tma"], "fp32", LAST, TMA | dict(INPUT_PRECISION="tf32", BLOCK_K=32)),
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
    "conv2d, split-K by boxes": (KERNEL_OF["tma"], "bf16", LAST, SPLIT_K),
    "conv2d, split-K by boxes, eight": (KERNEL_OF["tma"], "bf16", LAST, SPLIT_K | dict(SPLITS=8)),
    "conv2d, split-K by boxes, 128 channels": (
        KERNEL_OF["tma"],
        "bf16",
        LAST,
        SPLIT_K | dict(TILE_P=8, BLOCK_N=128, num_warps=8),
    ),
    "conv2d, split-K by boxes, 256 pixels": (
        KERNEL_OF["tma"],
        "bf16",
        LAST,
        SPLIT_K | dict(TILE_P=16, BLOCK_N=128, num_warps=8, num_stages=3),
    ),
    "conv2d, split-K by boxes, NCHW": (
        KERNEL_OF["tma"],
        "bf16",
        LAST,
        SPLIT_K | dict(CHANNELS_LAST=False, HAS_RESIDUAL=False, descriptors=boxes_of(SPLIT_K) | {"y_desc": None}),
    ),
    "conv2d, split-K by boxes, TF32": (
        KERNEL_OF["tma"],
        "fp32",
        LAST,
        SPLIT_K | dict(INPUT_PRECISION="tf32", BLOCK_K=32),
    ),
    "conv2d, split-K by boxes, TF32, rounded": (
        KERNEL_OF["tma"],
        "fp32",
        LAST,
        SPLIT_K | dict(INPUT_PRECISION="tf32", BLOCK_K=32, SWAP_AB=False),
    ),
    "conv2d, split-K by boxes, float32": (
        KERNEL_OF["tma"],
        "fp32",
        LAST,
        SPLIT_K | dict(INPUT_PRECISION="tf32x3", BLOCK_K=32, SWAP_AB=False, BLOCK_N=128, num_stages=3),
    ),
    "conv2d, halo": (KERNEL_OF["tma_halo"], "bf16", LAST, HALO_64),
    "conv2d, halo, TF32": (KERNEL_OF["tma_halo"], "fp32", LAST, HALO_128),
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
    "conv2d, halo, stride 2": (KERNEL_OF["tma_halo"], "bf16", LAST, HALO_BY_2),
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
    "conv2d, matrix product, 160 channels": (KERNEL_OF["matmul"], "bf16", LAST, MATMUL_REST),
    "conv2d, matrix product, 96 channels, NCHW y": (
        KERNEL_OF["matmul"],
        "fp16",
        LAST,
        MATMUL_REST | dict(CHANNELS_LAST_Y=False, HAS_RESIDUAL=False, BLOCK_N=64, num_warps=4),
    ),
    "conv2d, matrix product, 192 channels, resident": (
        KERNEL_OF["matmul"],
        "bf16",
        LAST,
        MATMUL_REST | dict(REST_N=64, RESIDENT=3, X_SLOTS=2),
    ),
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
    "conv2d, depthwise": (KERNEL_OF["depthwise"], "bf16", LAST, DEPTHWISE | dict(BLOCK_M=16, BLOCK_C=64)),
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
    "conv2d, depthwise, contiguous": (KERNEL_OF["depthwise"], "fp32", FIRST, DEPTHWISE | dict(BLOCK_M=128, BLOCK_C=1)),
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
        "ops.batch_norm2d_statistics:batch_norm2d_partial_statistics_kernel",
        "bf16",
        LAST,
        BY_CHANNELS | dict(STEPS=8, DEPENDENT=True),
    ),
    "batch_norm2d, statistics, contiguous": (
        "ops.batch_norm2d_statistics:batch_norm2d_partial_statistics_kernel",
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
    "gradient of the weight, float32": (
        "ops.conv2d.backward.weight:conv2d_backward_weight_kernel",
        "fp32",
        LAST,
        BACKWARD | dict(INPUT_PRECISION="tf32x3", STEPS=64, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=3),
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
"""By what they are of: the kernel, the type of its tensors, their memory format, and its constants.

Tables of constants also name what is none of the kernel's: num_warps and num_stages, `odd` sizes, which are no
multiples of 16, `types` of arguments, and boxes of `descriptors`.
"""


if __name__ == "__main__":
    driver.set_active(Pose())
    json.dump({name: compiled(*arguments) for name, arguments in KERNELS.items()}, sys.stdout)
