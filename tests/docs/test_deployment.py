"""Swapped and fused networks leave the process: saved, exported, traced; and ONNX, which says what to do instead."""

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.compare import DEVICE
from helpers.trained import trained
from torch import Tensor, nn

import tritonnn

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
PAGE = runpy.run_path(str(ROOT / "docs" / "deployment.py"))


@pytest.fixture(autouse=True)
def strict_float32_by_the_older_switch() -> Iterator[None]:
    """torch.export reads the older switch, which is an error where only the newer ones were set."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


class Residual(nn.Module):
    """An inplace ReLU, a sum, and a pool before the linear layer: images [N, 3, H, W] to [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)))


def network(kind: str = "PyTorch") -> nn.Module:
    torch.manual_seed(0)
    model = trained(Residual(), torch.float32)
    if kind == "fused":
        return tritonnn.fuse(model)
    if kind == "swapped":
        tritonnn.swap(model)
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("way", [way for way in PAGE["WAYS"] if "AOTInductor" not in way])  # which has a test below
@pytest.mark.parametrize("fused", [False, True], ids=["swapped", "fused"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_ways_of_the_page(way, fused):
    assert PAGE["check"](network(), PAGE["WAYS"][way], fused, images()) == "yes"


@torch.no_grad()
def test_the_page_tells_what_does_not_work():
    check = PAGE["check"]
    assert check(network(), lambda model, x: lambda x: model(x) * 1.01, True, images()).startswith("wrong by")
    assert check(network(), lambda model, x: torch.jit.script(model), False, images()).startswith("no: ")


def run_python(code: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_code_of_the_page_runs_as_printed_in_two_processes(tmp_path):
    save, load, _ = CODE
    run_python(save, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(re.findall(r"[a-z]+\.pt2?\b", load))
    run_python(load, tmp_path)


@torch.no_grad()
def test_a_loaded_network_captures_its_cuda_graphs_anew():
    fast, x = tritonnn.fuse(network(), cuda_graph=True), images()
    expected = [fast(x) for _ in range(3)][-1]
    loaded = PAGE["saved"](fast, x)
    assert isinstance(loaded, tritonnn.FusedNetwork) and str(loaded.report) == str(fast.report)
    for _ in range(3):
        assert torch.equal(loaded(x), expected)


PACKAGE_OF_A_TRITON_KERNEL = """
import torch
import triton
import triton.language as tl

@triton.jit
def twice(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)

@torch.library.triton_op("packaged::twice", mutates_args={})
def doubled(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    torch.library.wrap_triton(twice)[((x.numel() + 1023) // 1024,)](x, y, x.numel(), BLOCK=1024)
    return y

class Twice(torch.nn.Module):
    def forward(self, x):
        return doubled(x.relu())

x = torch.randn(4, 8, device="cuda")
with torch.no_grad():
    program = torch.export.export(Twice(), (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path="twice.pt2")
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), 2 * x.relu())
"""


@pytest.fixture(scope="module")
def aotinductor(tmp_path_factory) -> None:
    """Skips where PyTorch cannot load a package with a Triton kernel of no matter whom: some die of a signal there."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "package.py").write_text(PACKAGE_OF_A_TRITON_KERNEL)  # whose source Triton reads
    run = subprocess.run([sys.executable, "package.py"], cwd=folder, capture_output=True, text=True)
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or [""])[-1] if run.returncode > 0 else f"signal {-run.returncode}"
        pytest.skip(f"AOTInductor loads no package with a Triton kernel here: {last}")


@pytest.mark.gpu
@pytest.mark.usefixtures("aotinductor")
def test_the_code_of_the_page_for_a_gpu_runs_as_printed(tmp_path):
    run_python(CODE[2], tmp_path)


@pytest.mark.parametrize("kind", ["swapped", "fused"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_asks_for_pytorchs_layers(kind):
    with pytest.raises(RuntimeError, match="ONNX has no Triton kernels: restore the model first"):
        torch.onnx.export(network(kind), (images(),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("kind", ["swapped", "fused"])
def test_onnx_through_export_asks_for_pytorchs_layers(kind):
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="restore the model first"):
        torch.onnx.export(network(kind), (images(),), io.BytesIO(), dynamo=True, verbose=False)


def test_onnx_of_a_restored_network():
    pytest.importorskip("onnx")
    model, file = network("swapped"), io.BytesIO()
    tritonnn.restore(model)
    torch.onnx.export(model, (images(),), file, dynamo=False)
    assert file.getvalue()


@pytest.mark.gpu
@pytest.mark.usefixtures("aotinductor")
@pytest.mark.parametrize("kind", ["swapped", "fused"])
def test_an_aotinductor_package_with_any_batch(kind, tmp_path):
    """Some minutes of a C++ compiler: on a GPU only."""
    any_batch = {0: torch.export.Dim("batch")}
    shapes = ((any_batch,),) if kind == "fused" else (any_batch,)
    with torch.no_grad():
        program = torch.export.export(network(kind), (images(2),), dynamic_shapes=shapes)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        actual = torch._inductor.aoti_load_package(path)(images(5))
        torch.testing.assert_close(actual, network()(images(5)), rtol=1e-4, atol=1e-5)
