"""CUDA's programmatic dependent launch: in a graph a kernel starts while the one before it ends, and waits for its end.

Such a kernel touches no tensor before `wait_for_predecessor` (device/dependent_launch.py), which each of its programs
calls. By induction all earlier kernels have finished then: the kernel before it either waited in the same way, or was
launched after they had finished.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import hardware, launch_plan

_lock = threading.Lock()
_blocks = 0
"""How many blocks of `launches_as_in_graphs` are under way, in all threads."""


@contextmanager
def launches_as_in_graphs() -> Iterator[None]:
    """Compiles and launches kernels as in CUDA graphs, also outside of them, where such launches are right too.

    Tuning times graphs, and so has no use for the other compilation. Launch plans made outside are not used inside, and
    the other way round.
    """
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(blocks: int) -> None:
    global _blocks
    with _lock:
        _blocks += blocks
        launch_plan.forget_plans()


def dependent_launch(x: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch on x. Outside graphs the host's launches are so far apart that nothing would be gained."""
    if x.device.type != "cuda" or not (_blocks or torch.cuda.is_current_stream_capturing()):
        return {"DEPENDENT": False}
    if hardware.gpu(x.device).capability < (9, 0):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
