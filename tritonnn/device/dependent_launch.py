"""The kernel's side of CUDA's programmatic dependent launch (see runtime/dependent_launch.py)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Until the kernel before this one has ended and its results can be seen."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def start_successor(DEPENDENT: tl.constexpr):
    """The next kernel may take multiprocessors that are free. Called early it would take those of this kernel."""
    if DEPENDENT:
        gdc_launch_dependents()
