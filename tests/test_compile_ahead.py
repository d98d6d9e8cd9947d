"""Compiling ahead: what a call needs is found without a launch, compiled elsewhere, and found again on disk.

Without a GPU a process that poses as one finds the kernels, and compiles them once more itself.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from compare import image
from torch import nn
from trained import small, trained
from triton.backends.compiler import GPUTarget

import tritonnn
from tritonnn import compile_ahead
from tritonnn.compile_ahead import Compilers, Kernel
from tritonnn.kernels.channels_last import channels_last_kernel
from tritonnn.kernels.implicit_gemm import implicit_gemm_forward_kernel

HOPPER = GPUTarget("cuda", 90, 32)
RELU = "tritonnn.kernels.relu", "relu_forward_kernel"
GEMM = "implicit_gemm_forward_kernel"


def ignored(total: int) -> None:
    pass


@pytest.fixture
def target(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.runtime.driver, "_active", compile_ahead._Target(HOPPER))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


class TestCompilers:
    @pytest.fixture(autouse=True)
    def noted(self, target, monkeypatch):
        """The calls are what they need."""
        monkeypatch.setattr(compile_ahead, "kernels_of", lambda call: call)

    def test_an_error_is_told_and_the_process_goes_on(self):
        told = []
        with Compilers() as compilers:
            for kernel in Kernel(*RELU, "{}"), Kernel("tritonnn.nowhere", "kernel", "{}"):
                told += compilers.compile_for([[kernel, kernel]], ignored)
        assert [reason.partition(":")[0] for reason in told] == ["KeyError", "ModuleNotFoundError"]

    @pytest.mark.parametrize("work", ["import os; os._exit(1)", "import sys; sys.stdin.buffer.read(1)"])
    def test_compilers_that_end_are_told(self, work, monkeypatch):
        monkeypatch.setattr(compile_ahead, "WORK", work)
        with Compilers() as compilers:
            for _ in range(2):
                (told,) = compilers.compile_for([[Kernel(*RELU, "{}" * 10**5) for i in range(3)]], ignored)
                assert "the compilers ended" in told

    def test_a_compiler_that_crashes_ends_them(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "crashing.py").write_text("import os\nos.abort()")
        monkeypatch.syspath_prepend(tmp_path)
        with Compilers() as compilers:
            told = compilers.compile_for([[Kernel("crashing", "kernel", "{}")]], ignored)
        assert told and "process pool was terminated" in told[0]

    def test_none_can_start(self, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with Compilers() as compilers:
            (told,) = compilers.compile_for([[Kernel(*RELU, "{}")]], ignored)
        assert "No such file" in told

    def test_none_starts_for_nothing_and_none_stays(self, monkeypatch):
        with Compilers() as compilers:
            assert compilers.compile_for([[]], ignored) == [] and compilers._process is None
        with pytest.raises(KeyboardInterrupt), Compilers() as compilers:
            compilers._send(Kernel(*RELU, "{}"))
            raise KeyboardInterrupt
        assert compilers._process.returncode == 0


@pytest.fixture(scope="module")
def found() -> dict:
    """What `main` says of itself in a process without the interpreter."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join((str(root), str(root / "tests")))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_call_tells_what_it_needs_and_launches_nothing(found):
    assert found["kernels"] == [
        GEMM,
        "descriptor_gemm_forward_kernel",
        "halo_gemm_forward_kernel",
        "held_gemm_forward_kernel",
        "split_gemm_forward_kernel",
    ]


def test_what_was_compiled_elsewhere_is_found_on_disk(found):
    assert found["told"] == [] and found["advanced"] == [5] * 5
    assert found["hits"] == [True] * 5


def test_others_are_left_alone(found):
    """Kernels of others, other threads, and a hook that was there before."""
    assert found["of others"] == {
        "noted": [],
        "asked": ["foreign_gemm_forward_kernel", *[RELU[1]] * 2],
        "put back": True,
    }


def test_plans_that_were_made_meanwhile_are_forgotten(found):
    assert found["generations"] == 1


def test_layers_give_zeros():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True))
    x, seen = image(1, 3, 6, 6), []
    with tritonnn.swapped(layers):
        compile_ahead.kernels_of(lambda: seen.extend((*layers(x), x + 1)))
        pooled, indices, of_pytorch = seen
        assert not pooled.any() and not indices.any() and torch.equal(of_pytorch, x + 1)
        assert all(part.any() for part in layers(x))


def test_a_fused_network_gives_zeros_and_stays_right():
    model, x, seen = small(), image(2, 4, 6, 6, dtype=torch.float64), []
    network = tritonnn.fuse(model)
    with torch.no_grad():
        compile_ahead.kernels_of(lambda: seen.append(network(x)))
        assert seen[0].shape == model(x).shape and not seen[0].any()
        assert torch.allclose(network(x), model(x))


@pytest.mark.gpu
def test_a_network_runs_right_afterwards(tmp_path, monkeypatch):
    """From disk, and with the weights that it packed while its convolutions were noted and not launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in channels_last_kernel, implicit_gemm_forward_kernel:
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    model = trained(nn.Sequential(nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3)), torch.float32)
    x = image(8, 24, 12, 12, channels_last=True)
    network, hits = tritonnn.fuse(model), []
    with torch.no_grad(), Compilers() as compilers:
        assert {kernel.name for kernel in compile_ahead.kernels_of(partial(network, x))} == {GEMM}
        assert compilers.compile_for([partial(network, x)], ignored) == []
        monkeypatch.setattr(
            triton.knobs.compilation, "listener", lambda **told: hits.append((told["src"].name, told["cache_hit"]))
        )
        y, expected = network(x), model.double()(x.double())
    assert hits and set(hits) == {(GEMM, True)}
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-5


@triton.jit
def foreign_gemm_forward_kernel(x_ptr):
    pass


class Posing(compile_ahead._Target):
    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    """On a CPU that poses as a Hopper GPU: kernels are compiled and not launched."""
    import tempfile

    from tritonnn.kernels import tuned_blocks

    run = triton.JITFunction.run
    triton.JITFunction.run = lambda *args, warmup, **options: run(*args, warmup=True, **options)
    triton.runtime.driver.set_active(Posing(HOPPER))
    generation = tuned_blocks.generation
    of_others = kernels_of_others()
    told = {"of others": of_others, "generations": tuned_blocks.generation - generation}
    hits = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        mock.patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
        mock.patch("tritonnn.kernels.halo_gemm.multiprocessors", lambda device: 132),
        Compilers() as compilers,
    ):
        calls = convolutions()
        told["kernels"] = [kernel.name for call in calls for kernel in compile_ahead.kernels_of(call)]
        advanced = []
        told |= {"told": compilers.compile_for(calls, advanced.append), "advanced": advanced}
        triton.knobs.compilation.listener = lambda **of: hits.append(of["cache_hit"])
        for call in calls:
            call()
    print(json.dumps(told | {"hits": hits}))


def kernels_of_others() -> dict:
    import threading

    from tritonnn.kernels.relu import relu_forward_kernel

    runtime, asked, x = triton.knobs.runtime, [], torch.zeros(16)
    runtime.jit_cache_hook = before = lambda **told: asked.append(told["fn"].name) or True

    def relu() -> None:
        relu_forward_kernel[(1,)](x, x, 16, ACC=tl.float32, BLOCK=16)

    def call() -> None:
        foreign_gemm_forward_kernel[(1,)](x)
        relu()
        with mock.patch("tritonnn.compile_ahead.CONVOLUTIONS", ""):
            thread = threading.Thread(target=relu)
            thread.start()
            thread.join()

    noted = compile_ahead.kernels_of(call)
    put_back, runtime.jit_cache_hook = runtime.jit_cache_hook is before, None
    return {"noted": noted, "asked": asked, "put back": put_back}


def convolutions() -> list[Callable[[], None]]:
    from problems import problem

    from tritonnn.candidates import HALO_TILES
    from tritonnn.kernels.block_sizes import DescriptorBlocks, GemmBlocks, HaloBlocks, HeldBlocks, SplitBlocks
    from tritonnn.kernels.conv2d import run_gemm
    from tritonnn.kernels.product import Choice
    from tritonnn.trial import operands

    tile = HALO_TILES[2][0]
    half = dict(c=64, k=64, dtype=torch.bfloat16)
    many, few = problem(n=8, size=32, **half), problem(n=1, size=4, **half)
    products = [
        (many, GemmBlocks(64, 64, 64, 4, 3)),
        (many, DescriptorBlocks(1, 4, 16, 64, 64, True, 4, 3)),
        (many, HaloBlocks(*tile[:4], 64, *tile[4:])),
        (few, HeldBlocks(16, 64, 8)),
        (few, SplitBlocks(1, 4, 16, 16, 64, 4, 3)),
    ]
    device = torch.device("cpu")
    return [partial(run_gemm, operands(of, device)[0], Choice(blocks, copies_x=False)) for of, blocks in products]


if __name__ == "__main__":
    main()
