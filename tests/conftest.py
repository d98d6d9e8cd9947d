"""Where the tests run: on a GPU if there is one, in Triton's interpreter otherwise."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

# PyTorch's suites call this when imported: no flag of a backend could be set any more, as Lightning does.
torch.backends.disable_global_flags = lambda: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def strict_float32() -> Iterator[None]:
    """Neither side computes float32 in TF32 unless the test says so."""
    flags = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "ieee"
    torch.manual_seed(0)
    yield
    for flag, precision in zip(flags, before):
        flag.fp32_precision = precision
