"""Compiling ahead: what a call needs is found without a launch, and compiled by others before the call."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from helpers.compare import image
from helpers.hopper import run
from helpers.trained import small, trained
from torch import nn

import tritonnn
from benchmarks.pose import Pose
from tritonnn.compile_ahead import Kernel, compile_ahead, kernels_of
from tritonnn.compile_swapped import calls_of_swapped, compile_swapped
from tritonnn.ops.conv2d.forms.pointers import conv2d_pointers_forward_kernel
from tritonnn.ops.conv2d.pack import channels_last_kernel
from tritonnn.runtime.dependent_launch import dependent_launch, launches_as_in_graphs

POINTERS, RELU = "conv2d_pointers_forward_kernel", "relu_forward_kernel"
OF_CONVOLUTIONS = [
    POINTERS,
    "conv2d_tma_forward_kernel",
    "conv2d_tma_halo_forward_kernel",
    "conv2d_in_registers_forward_kernel",
    "conv2d_sliced_k_forward_kernel",
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
    of_others = told["of others"]
    assert of_others.pop("every kernel") == [RELU], "those of this package are noted where all are asked for"
    assert of_others == {"noted": [], "asked": ["foreign_forward_kernel", RELU, POINTERS], "put back": True}


def test_plans_that_were_made_meanwhile_are_forgotten(told):
    assert told["plans forgotten"] == 2, "once for each time that kernels were noted"


def test_keys_are_the_same_in_every_process():
    """Then Triton finds on disk what another process compiled; 3.6 mixes in what was asked for before."""
    modules = "tritonnn.ops.conv2d.forms.pointers", "tritonnn.device.arithmetic"
    assert run(__file__, "keys", *modules) == run(__file__, "keys", *reversed(modules))


def test_after_ctrl_c_nothing_more_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    monkeypatch.setattr("tritonnn.compile_ahead.MOST_THREADS", 1)
    compiler = mock.Mock(preload=mock.Mock(side_effect=lambda specialization: time.sleep(0.01)))
    kernels = [Kernel(compiler, str(i)) for i in range(100)]
    monkeypatch.setattr("tritonnn.compile_ahead.kernels_of", lambda *call: kernels)
    with pytest.raises(KeyboardInterrupt):
        compile_ahead([None], mock.Mock(side_effect=KeyboardInterrupt))
    assert 0 < compiler.preload.call_count < 50


def test_two_threads_that_note_kernels_leave_no_hook_behind():
    """The second one begins when the first has put back what was there, also where it asks earlier."""
    first_notes, first_may_end = threading.Event(), threading.Event()
    before = triton.knobs.runtime.jit_cache_hook
    first = threading.Thread(target=kernels_of, args=(lambda: first_notes.set() or first_may_end.wait(5),))
    second = threading.Thread(target=kernels_of, args=(lambda: None,))
    first.start()
    first_notes.wait(5)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    first_may_end.set()
    first.join()
    second.join()
    assert triton.knobs.runtime.jit_cache_hook is before


def test_two_threads_that_launch_as_in_graphs_leave_nothing_behind(on_hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, second, x = launches_as_in_graphs(), launches_as_in_graphs(), SimpleNamespace(device=torch.device("cuda", 0))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dependent_launch(x)["DEPENDENT"]
    second.__exit__(None, None, None)
    assert not dependent_launch(x)["DEPENDENT"]


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


def test_a_swapped_network_tells_each_kind_of_layer_once():
    """It may be compiled for before it is swapped; it is left as it is, and gives what it gave."""
    layers = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4)
    model, x, ran = trained(nn.Sequential(*layers), torch.float64), image(1, 4, 6, 6, dtype=torch.float64), []
    calls = calls_of_swapped(model, x)
    hook = nn.modules.module.register_module_forward_hook(lambda layer, args, y: ran.append((type(layer), y.shape)))
    with hook:
        for call in calls:
            call()
    kinds = tritonnn.TritonConv2d, tritonnn.TritonReLU, tritonnn.TritonBatchNorm2d
    assert ran == [(kind, x.shape) for kind in kinds]
    assert [type(layer) for layer in model] == [type(layer) for layer in layers]
    expected = model(x)
    with tritonnn.swapped(model):
        assert len(calls_of_swapped(model, x, layers="conv2d")) == 1 and type(model[0]) is tritonnn.TritonConv2d
        assert torch.allclose(model(x), expected)
    model[4].train()
    assert len(calls_of_swapped(model, x)) == 2, "in training mode a call would change the batch norm"


@pytest.mark.gpu
@pytest.mark.parametrize("in_graphs", [False, True])
def test_a_swapped_network_compiles_nothing_afterwards(tmp_path, monkeypatch, in_graphs):
    """Neither kernels nor their launchers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layers = nn.Conv2d(24, 40, 3), nn.BatchNorm2d(40), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(40, 16, 1)
    model = trained(nn.Sequential(*layers), torch.bfloat16)
    x = image(3, 24, 15, 15, dtype=torch.bfloat16, channels_last=True)
    compile_swapped(model, x, in_graphs=in_graphs)
    files = len(list(tmp_path.iterdir()))
    with torch.no_grad(), tritonnn.swapped(model), launches_as_in_graphs() if in_graphs else nullcontext():
        model(x)
    assert files == len(list(tmp_path.iterdir())) > 0


@pytest.mark.gpu
def test_a_network_runs_right_afterwards(tmp_path, monkeypatch):
    """It runs without compiling, with the weights packed while its convolutions were noted and not launched.

    Pixels of 18 channels take 72 bytes, which no descriptor reads.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in channels_last_kernel, conv2d_pointers_forward_kernel:
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    model = trained(nn.Sequential(nn.Conv2d(18, 18, 3), nn.ReLU(), nn.Conv2d(18, 18, 3)), torch.float32)
    x = image(8, 18, 12, 12, channels_last=True)
    network, compiled, advanced = tritonnn.fuse(model), [], []
    with torch.no_grad():
        assert {kernel.function.__name__ for kernel in kernels_of(partial(network, x))} == {POINTERS}
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
    assert advanced and not any(name.startswith("conv2d_") for name in compiled)


@triton.jit
def foreign_forward_kernel(x_ptr):
    pass


def keys(*modules: str) -> dict:
    """The kernels' keys, those of these modules asked for first."""
    import importlib

    from triton.runtime.jit import JITCallable

    found = {}
    for module in map(importlib.import_module, modules):
        found |= {name: f.cache_key for name, f in vars(module).items() if isinstance(f, JITCallable)}
    return found


def posing() -> dict:
    """On a CPU that poses as a Hopper GPU: kernels are compiled and not launched."""
    import tempfile

    from helpers.gpus import H100

    from tritonnn.runtime import hardware

    launch = triton.JITFunction.run
    triton.JITFunction.run = lambda *args, warmup, **options: launch(*args, warmup=True, **options)
    triton.runtime.driver.set_active(Pose())
    with mock.patch("tritonnn.compile_ahead.forget_plans") as forget_plans:
        told = {"of others": kernels_of_others(), "plans forgotten": forget_plans.call_count}
    compiled = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
        mock.patch.object(hardware, "gpu", lambda device: H100),
        mock.patch("torch.cuda.current_device", lambda: 0),
        mock.patch("torch.cuda.device"),
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
        kernel = Kernel(conv2d_pointers_forward_kernel, "{}")
        with mock.patch("tritonnn.compile_ahead.kernels_of", lambda *call: [kernel, kernel]):
            compile_ahead([None], advanced.append)
    return told


def kernels_of_others() -> dict:
    from tritonnn.ops.relu import relu_forward_kernel

    runtime, asked, x, convolution = triton.knobs.runtime, [], torch.zeros(16), convolutions()[0]
    runtime.jit_cache_hook = before = lambda **told: asked.append(told["fn"].name) or True

    def relu() -> None:
        relu_forward_kernel[(1,)](x, x, 16, ACC=tl.float32, BLOCK=16)

    def call() -> None:
        foreign_forward_kernel[(1,)](x)
        relu()
        thread = threading.Thread(target=convolution)
        thread.start()
        thread.join()

    noted, every = kernels_of(call), kernels_of(relu, every_kernel=True)
    put_back, runtime.jit_cache_hook = runtime.jit_cache_hook is before, None
    names = [kernel.function.__name__ for kernel in every]
    return {"noted": noted, "asked": asked, "put back": put_back, "every kernel": names}


def convolutions() -> list[Callable[[], None]]:
    """One in each form."""
    from helpers.halo_tiles import HALF_64
    from helpers.problems import pointers, problem, sliced_k

    from tritonnn.ops.conv2d.dispatch import run
    from tritonnn.ops.conv2d.forms.in_registers import InRegistersConfig
    from tritonnn.ops.conv2d.forms.tma_tiles import config_of
    from tritonnn.ops.conv2d.problem import Choice
    from tritonnn.tuning.harness import operands

    half = dict(c=64, k=64, dtype=torch.bfloat16)
    many, few = problem(n=8, size=32, **half), problem(n=1, size=4, **half)
    products = [
        (many, pointers(64, 64, 64, num_stages=3)),
        (many, config_of((1, 4, 16), 64, 64, swap_ab=True, num_warps=4, num_stages=3)),
        (many, HALF_64),
        (few, InRegistersConfig(BLOCK_N=16, BLOCK_K=64, num_warps=8)),
        (few, sliced_k(1, 4, 16, 16, 64, num_stages=3)),
    ]
    device = torch.device("cpu")
    return [partial(run, operands(of, device)[0], Choice(config)) for of, config in products]


if __name__ == "__main__":
    print(json.dumps({"posing": posing, "keys": keys}[sys.argv[1]](*sys.argv[2:])))
