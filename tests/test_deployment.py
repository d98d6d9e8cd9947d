"""Swapped and fused networks leave the process: saved, exported, traced; and ONNX, which says what to do instead."""

import io
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import DEVICE
from torch import Tensor, nn
from trained import trained

import tritonnn

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize("way", PAGE["WAYS"])
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


LOAD = """
import sys, torch
network, images, expected = torch.load(sys.argv[1], weights_only=False)
import tritonnn
assert isinstance(network, tritonnn.FusedNetwork), type(network)
for _ in range(3):  # on a GPU the third call replays a CUDA graph
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
"""


def test_a_fused_network_is_loaded_in_a_new_process(tmp_path):
    fast = tritonnn.fuse(network(), cuda_graph=True)
    torch.save((fast, images(), fast(images())), tmp_path / "fused.pt")
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "fused.pt"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
