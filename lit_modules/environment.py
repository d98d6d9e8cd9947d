"""What a result was measured on and with."""

import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
import triton
from torch import nn


def environment(device: torch.device) -> dict[str, str]:
    """Names of the device and versions, the command and the date."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "triton runs": "on the GPU" if on_gpu else "in its interpreter: times are no measure of speed",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "not used",
        "lightning": version("lightning"),  # to import it takes a second
        "python": platform.python_version(),
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def flags() -> dict[str, str]:
    """PyTorch's switches that decide precision and choice of algorithm."""
    return {
        "tf32 in convolution": _yes(torch.backends.cudnn.conv.fp32_precision == "tf32"),
        "tf32 in matmul": _yes(torch.backends.cuda.matmul.fp32_precision == "tf32"),
        "cudnn.benchmark": _yes(torch.backends.cudnn.benchmark),
        "deterministic": _yes(torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic),
    }


def is_exact(model: nn.Module, device: torch.device) -> bool:
    """Whether the model computes in fp32 or fp64 throughout: no autocast, no half parameters, no TF32 on a GPU."""
    if torch.is_autocast_enabled(device.type):
        return False
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not dtypes <= {torch.float32, torch.float64}:
        return False
    tf32 = "tf32" in (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    return device.type != "cuda" or not tf32 or dtypes == {torch.float64}


def resolution(model: nn.Module, device: torch.device) -> float:
    """The relative distance of two neighbouring numbers in the coarsest type in which the model computes."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        types.add(torch.get_autocast_dtype(device.type))
    coarsest = max((torch.finfo(dtype).eps for dtype in types), default=torch.finfo(torch.float32).eps)
    return coarsest if is_exact(model, device) else max(coarsest, 2.0**-10)  # TF32


@contextmanager
def strict_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


def _yes(switch: bool) -> str:
    return "on" if switch else "off"
