"""Compiling ahead: what a call needs is found without a launch, and compiled by others before the call."""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from helpers.compare import image
from helpers.hopper import Hopper, run
from helpers.trained import small, trained
from torch import nn
from tritonnn.compile_ahead import Kernel, compile_ahead, kernels_of
from tritonnn.kernels.channels_last import channels_last_kernel
from tritonnn.kernels.dependent_launch import launches_as_in_graphs
from tritonnn.kernels.implicit_gemm import implicit_gemm_forward_kernel

import tritonnn

GEMM, RELU = "implicit_gemm_forward_kernel", "relu_forward_kernel"
OF_CONVOLUTIONS = [
    GEMM,
    "descriptor_gemm_forward_kernel",
    "halo_gemm_forward_kernel",
    "held_gemm_forward_kernel",
    "split_gemm_forward_kernel",
]


@pytest.fixture(scope="module")
def told() -> dict:
    return run(__file__, "posing")


def test_a_call_tells_what_it_needs_and_launches_nothing(told):
    assert told["kernels"] == OF_CONVOLUTIONS


def test_a_call_compiles_nothing_afterwards(told):
    assert sorted(told["compiled ahead"]) == sorted(OF_CONVOLUTIONS) and told["compiled later"] == []
    assert told["advanced"] == [5] * 5


def test_an_error_of_the_compiler_is_left_to_the_launch(told):
    assert told["advanced past an error"] == [1]


def test_others_are_left_alone(told):
    """Kernels of others, other threads, and a hook that was there before."""
    assert told["of others"] == {"noted": [], "asked": ["foreign_gemm_forward_kernel", RELU, RELU], "put back": True}


def test_plans_that_were_made_meanwhile_are_forgotten(told):
    assert told["generations"] == 1


def test_keys_are_the_same_in_every_process():
    """So that Triton finds on disk what another process compiled; 3.6 mixes in what was asked for before."""
    assert run(__file__, "keys", "implicit_gemm", "arithmetic") == run(__file__, "keys", "arithmetic", "implicit_gemm")


def test_after_ctrl_c_nothing_more_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    monkeypatch.setattr("tritonnn.compile_ahead.MOST_THREADS", 1)
    compiler = mock.Mock(preload=mock.Mock(side_effect=lambda specialization: time.sleep(0.01)))
    kernels = [Kernel(compiler, str(i)) for i in range(100)]
    monkeypatch.setattr("tritonnn.compile_ahead.kernels_of", lambda call: kernels)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead([None], mock.Mock(side_effect=KeyboardInterrupt))
    assert 0 < compiler.preload.call_count < 50


def test_layers_give_zeros():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True))
    x, seen = image(1, 3, 6, 6), []
    layers.to(x.device)
    with tritonnn.swapped(layers):
        kernels_of(lambda: seen.extend((*layers(x), x + 1)))
        pooled, indices, of_pytorch = seen
        assert not pooled.any() and not indices.any() and torch.equal(of_pytorch, x + 1)
        assert all(part.any() for part in layers(x))


def test_a_fused_network_gives_zeros_and_stays_right():
    model, x, seen = small(), image(2, 4, 6, 6, dtype=torch.float64), []
    network = tritonnn.fuse(model)
    with torch.no_grad():
        kernels_of(lambda: seen.append(network(x)))
        assert seen[0].shape == model(x).shape and not seen[0].any()
        assert torch.allclose(network(x), model(x))


@pytest.mark.gpu
def test_a_network_runs_right_afterwards(tmp_path, monkeypatch):
    """Without compiling, and with the weights that it packed while its convolutions were noted and not launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in channels_last_kernel, implicit_gemm_forward_kernel:
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    model = trained(nn.Sequential(nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3)), torch.float32)
    x = image(8, 24, 12, 12, channels_last=True)
    network, compiled, advanced = tritonnn.fuse(model), [], []
    with torch.no_grad():
        assert {kernel.function.__name__ for kernel in kernels_of(partial(network, x))} == {GEMM}
        compile_ahead([partial(network, x)], advanced.append)
        monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **of: compiled.append(of["src"].name))
        y, expected = network(x), model.double()(x.double())
    assert advanced and not compiled
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_a_network_that_ran_is_compiled_anew_for_graphs(tmp_path, monkeypatch):
    """The plans of its calls, whose kernels are others, do not hide what is needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    network = tritonnn.fuse(trained(nn.Sequential(nn.Conv2d(40, 24, 3)), torch.float32))
    x, compiled, advanced = image(8, 40, 12, 12), [], []
    with torch.no_grad():
        for _ in range(2):
            network(x)
        with launches_as_in_graphs():
            compile_ahead([partial(network, x)], advanced.append)
            monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **of: compiled.append(of["src"].name))
            network(x)
    assert advanced and not any(name.endswith("_gemm_forward_kernel") for name in compiled)


@triton.jit
def foreign_gemm_forward_kernel(x_ptr):
    pass


def keys(*modules: str) -> dict:
    """The kernels' keys, those of these modules asked for first."""
    import importlib

    from triton.runtime.jit import JITCallable

    found = {}
    for module in map(importlib.import_module, (f"tritonnn.kernels.{name}" for name in modules)):
        found |= {name: f.cache_key for name, f in vars(module).items() if isinstance(f, JITCallable)}
    return found


def posing() -> dict:
    """On a CPU that poses as a Hopper GPU: kernels are compiled and not launched."""
    import tempfile

    from tritonnn.kernels import tuned_blocks

    launch = triton.JITFunction.run
    triton.JITFunction.run = lambda *args, warmup, **options: launch(*args, warmup=True, **options)
    triton.runtime.driver.set_active(Hopper())
    generation = tuned_blocks.generation
    told = {"of others": kernels_of_others(), "generations": tuned_blocks.generation - generation}
    compiled = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        mock.patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.device"),
        mock.patch("tritonnn.kernels.halo_gemm.multiprocessors", lambda device: 132),
    ):
        calls = convolutions()
        told["kernels"] = [kernel.function.__name__ for call in calls for kernel in kernels_of(call)]
        triton.knobs.compilation.listener = lambda **of: compiled.append(of["src"].name)
        advanced = told["advanced"] = []
        compile_ahead(calls, advanced.append)
        told["compiled ahead"] = compiled.copy()
        for call in calls:
            call()
        told["compiled later"] = compiled[5:]
        advanced = told["advanced past an error"] = []
        kernel = Kernel(implicit_gemm_forward_kernel, "{}")
        with mock.patch("tritonnn.compile_ahead.kernels_of", lambda call: [kernel, kernel]):
            compile_ahead([None], advanced.append)
    return told


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

    noted = kernels_of(call)
    put_back, runtime.jit_cache_hook = runtime.jit_cache_hook is before, None
    return {"noted": noted, "asked": asked, "put back": put_back}


def convolutions() -> list[Callable[[], None]]:
    """One in each form."""
    from problems import problem
    from tritonnn.candidates import HALO_TILES
    from tritonnn.kernels.block_sizes import DescriptorBlocks, GemmBlocks, HaloBlocks, HeldBlocks, SplitBlocks
    from tritonnn.kernels.conv2d import run_gemm
    from tritonnn.kernels.product import Choice
    from tritonnn.trial import operands

    tile = HALO_TILES[2, 1][0]
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
    print(json.dumps({"posing": posing, "keys": keys}[sys.argv[1]](*sys.argv[2:])))
