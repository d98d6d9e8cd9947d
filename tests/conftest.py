"""Where the tests run: on a GPU if there is one, in Triton's interpreter otherwise."""

import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def blocks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are chosen as on a GPU, not as for the interpreter; nothing of it is remembered."""
    import triton
    from tritonnn.kernels import conv2d, implicit_gemm

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for module in (conv2d, implicit_gemm):
        for name, function in list(vars(module).items()):
            if hasattr(function, "cache_info"):
                monkeypatch.setattr(module, name, function.__wrapped__)


@pytest.fixture
def on_hopper(blocks_of_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms and blocks are chosen as on an H100 or H200 with the Triton for which kernels were verified."""
    import triton
    from tritonnn.kernels import verified

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(verified, "VERSIONS", triton.__version__)


@pytest.fixture
def hopper() -> None:
    """Skips where kernels in Gluon were not verified."""
    from tritonnn.kernels.verified import VERSIONS, gluon_is_verified

    if not gluon_is_verified(torch.device("cuda", 0)):
        pytest.skip(f"needs a Hopper GPU and Triton {VERSIONS}")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No tables but those of the test; the folder of the user's."""
    from tritonnn.kernels import tuned_blocks

    monkeypatch.setenv("TRITONNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned_blocks, "SHIPPED", tmp_path / "shipped")
    tuned_blocks.forget()
    yield tmp_path / "cache"
    tuned_blocks.forget()
