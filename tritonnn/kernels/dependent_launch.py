"""CUDA's programmatic dependent launch: in a graph a kernel starts while the one before it ends, and waits for that.

Such a kernel touches no tensor before `wait_for_predecessor`, which each of its programs calls. The kernel before it
either did the same or was launched when all earlier ones had ended: so they have.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import tuned_blocks

_as_in_graphs = False


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


@contextmanager
def launches_as_in_graphs() -> Iterator[None]:
    """What is tried by the times of graphs is compiled for graphs only: outside them such launches are right too.

    Plans that others made do not count inside, nor those made inside for others.
    """
    global _as_in_graphs
    before, _as_in_graphs = _as_in_graphs, True
    tuned_blocks.generation += 1
    try:
        yield
    finally:
        _as_in_graphs = before
        tuned_blocks.generation += 1


def dependent_launch(x: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch on x: outside graphs the host's launches are so far apart that nothing would be gained."""
    if x.device.type != "cuda" or not (_as_in_graphs or torch.cuda.is_current_stream_capturing()):
        return {"DEPENDENT": False}
    if torch.version.hip or torch.cuda.get_device_capability(x.device) < (9, 0):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
