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


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decoded images go to a folder of the tests."""
    os.environ.setdefault("TRITONNN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def on_hopper() -> Iterator[None]:
    """Forms and configurations are chosen as on an H100 with the Triton for which kernels were verified."""
    from helpers.gpus import H100, posing

    with posing(H100):
        yield


@pytest.fixture
def hopper() -> None:
    """Skips where kernels in Gluon were not verified."""
    from tritonnn.runtime.hardware import GLUON_VERSIONS, gluon_is_verified

    if not gluon_is_verified(torch.device("cuda", 0)):
        pytest.skip(f"needs a Hopper GPU and Triton {GLUON_VERSIONS}")


@pytest.fixture
def tables_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No tables but those of the test; gives the folder of the user's."""
    from tritonnn.ops.conv2d import tables

    monkeypatch.setenv("TRITONNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.forget()
    yield tmp_path / "cache"
    tables.forget()
