"""PyTorch's CNN layers on Triton kernels: swap them in, prove that nothing changed but the speed."""

from .compile_swapped import compile_swapped
from .fusion.fuse import FusedNetwork, fuse
from .fusion.report import FusionReport
from .fusion.training import TrainingReport, fuse_for_training
from .layers.avg_pool2d import TritonAdaptiveAvgPool2d, TritonAvgPool2d
from .layers.batch_norm2d import TritonBatchNorm2d
from .layers.conv2d import TritonConv2d
from .layers.linear import TritonLinear
from .layers.max_pool2d import TritonMaxPool2d
from .layers.relu import TritonReLU
from .runtime.cache_keys import settle_cache_keys
from .swap import KINDS, SwapReport, kind_of, restore, swap, swapped
from .tuning.tune import TuningReport, tune

__version__ = "0.1.0"

__all__ = [
    "KINDS",
    "FusedNetwork",
    "FusionReport",
    "SwapReport",
    "TrainingReport",
    "TritonAdaptiveAvgPool2d",
    "TritonAvgPool2d",
    "TritonBatchNorm2d",
    "TritonConv2d",
    "TritonLinear",
    "TritonMaxPool2d",
    "TritonReLU",
    "TuningReport",
    "__version__",
    "compile_swapped",
    "fuse",
    "fuse_for_training",
    "kind_of",
    "restore",
    "swap",
    "swapped",
    "tune",
]

settle_cache_keys()
