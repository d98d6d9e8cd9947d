"""Facts about the card, asked from the device, and on which cards and versions the kernels in Gluon were verified."""

import functools
from dataclasses import dataclass

import torch
import triton

GLUON_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
"""Versions of Triton with which results on a GPU of the kernels in Gluon were checked."""


@dataclass(frozen=True)
class Gpu:
    """What kernels are laid out for.

    capability: of CUDA, (0, 0) for the CPU of Triton's interpreter and for AMD's cards; multiprocessors: their number;
    shared_memory: bytes that one program may have.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def enough_programs(self) -> int:
        """The least number of programs that keeps most multiprocessors busy.

        98 are enough for 132: networks of 224x224 pixels come in tiles of 2 x 49. On one image in bfloat16 (H200) 98
        programs of large tiles are faster than 196, which come in one and a half rounds: 3x3, 256 channels of 56x56 9.5
        us for 11.0, the first layer of ResNet50 8.4 for 15.9.
        """
        return 7 * self.multiprocessors // 10

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors load boxes: Hopper and newer."""
        return self.capability >= (9, 0)

    @property
    def is_hopper(self) -> bool:
        """Whether it has wgmma, which no newer one has."""
        return self.capability == (9, 0)


LEAST_CAPABILITY = (8, 0)
"""The least CUDA capability: from it on a program has 99 KB of shared memory, TF32 and bfloat16, as tiles assume."""
INTERPRETER = Gpu((0, 0), 1, 2**16)
"""The interpreter runs one program after the other."""


@functools.lru_cache
def gpu(device: torch.device) -> Gpu:
    """The facts of a device; of the CPU those of Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Gpu(capability, properties.multi_processor_count, shared_memory)


@torch.compiler.assume_constant_result
def reason_against(device: torch.device) -> str | None:
    """Why kernels do not run on a device that Triton might compile for, or None."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    capability = gpu(device).capability
    if (0, 0) < capability < LEAST_CAPABILITY:
        return f"GPU of compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


def gluon_is_verified(device: torch.device) -> bool:
    """Whether the kernels in Gluon were checked with this version of Triton on GPUs like this one, of Hopper."""
    if triton.knobs.runtime.interpret or not triton.__version__.startswith(GLUON_VERSIONS):
        return False
    return gpu(device).is_hopper
