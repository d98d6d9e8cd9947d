"""Where kernels in Gluon, which is experimental, may run: where their results were checked."""

import torch
import triton

VERSIONS = "3.6."
"""Of Triton."""


def gluon_is_verified(device: torch.device) -> bool:
    """Whether the kernels in Gluon were checked with this version of Triton on GPUs like this one, of Hopper."""
    if triton.knobs.runtime.interpret or not triton.__version__.startswith(VERSIONS):
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)
