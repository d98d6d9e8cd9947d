"""Facts about GPUs, and a way to choose forms as if this machine had one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import triton

from benchmarks.pose import H100 as H100
from tritonnn.runtime import capabilities, hardware
from tritonnn.runtime.hardware import Gpu

A100 = Gpu((8, 0), 108, 166912)
RTX_5090 = Gpu((12, 0), 170, 101376)


@contextmanager
def posing(gpu: Gpu) -> Iterator[None]:
    """Forms and configurations are chosen as on that GPU with Triton 3.6, of whose descriptors none rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "interpret", False)
        patch.setattr(hardware, "gpu", lambda device: gpu)
        patch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
        patch.setattr(capabilities, "ROUNDS_ON_LOAD", ())
        yield
