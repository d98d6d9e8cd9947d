"""The kernel's side of CUDA's programmatic dependent launch (see runtime/dependent_launch.py)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Waits until the kernel before this one has ended and its results can be read."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def start_successor(DEPENDENT: tl.constexpr):
    """Lets the next kernel start on free multiprocessors. Called too early, it gives away what this kernel needs."""
    if DEPENDENT:
        gdc_launch_dependents()
