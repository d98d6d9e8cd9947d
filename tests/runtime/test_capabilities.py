"""What is private to Triton and PyTorch: an unknown version of a part turns it off, and the numbers stay right."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import numpy
import pytest
import torch
import triton
from helpers.compare import DEVICE, image
from helpers.gpus import H100
from torch import nn
from torch.autograd import forward_ad
from triton.compiler.compiler import CompiledKernel
from triton.runtime import jit
from triton.tools.tensor_descriptor import TensorDescriptor

import tritonnn
from tritonnn import compile_ahead
from tritonnn.fusion import cuda_graphs
from tritonnn.ops.conv2d.forms import ORDER
from tritonnn.runtime import cache_keys, capabilities, hardware, launch_plan


@pytest.fixture(autouse=True)
def checked_anew() -> Iterator[None]:
    capabilities.forget()
    yield
    capabilities.forget()


class LaunchedOtherwise:
    def __call__(self, grid, stream, function, *args): ...


@dataclasses.dataclass
class DescriptorWithAnOffset(TensorDescriptor):
    offset: int = 0


def preload_of_several(self, specializations, threads): ...


def a_launcher_with_other_arguments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("triton.backends.nvidia.driver.CudaLauncher", LaunchedOtherwise)


def a_kernel_without_run(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(CompiledKernel, "run")


def knobs_without_hooks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton.knobs, "runtime", object())


def knobs_without_instrumentation(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(triton.knobs, "compilation")


class LauncherThatDoesMore:
    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        self.launch(gridX, gridY, gridZ, stream, function, *args)
        self.count()


def a_launcher_that_does_more(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("triton.backends.nvidia.driver.CudaLauncher", LauncherThatDoesMore)


def recording_with_more_checks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.autograd.Function, "apply", classmethod(lambda cls, *args: cls.check(args)))


def a_descriptor_with_another_field(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(capabilities, "TensorDescriptor", DescriptorWithAnOffset)


def preloading_of_several_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jit.JITFunction, "preload", preload_of_several)


def keys_that_are_methods(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jit.JITCallable, "cache_key", lambda self: "")


def no_stack_of_modes(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(torch._C, "_len_torch_dispatch_stack")


def no_level_of_forward_mode(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(forward_ad, "_current_level")


def workspaces_that_stay(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(torch._C, "_cuda_clearCublasWorkspaces")


UNKNOWN = [
    ("launches", a_launcher_with_other_arguments),
    ("launches", a_kernel_without_run),
    ("launches", knobs_without_hooks),
    ("launches", knobs_without_instrumentation),
    ("descriptors", a_descriptor_with_another_field),
    ("launchers", a_launcher_that_does_more),
    ("recording", recording_with_more_checks),
    ("preloading", preloading_of_several_kernels),
    ("cache keys", keys_that_are_methods),
    ("watchers", no_stack_of_modes),
    ("watchers", no_level_of_forward_mode),
    ("workspaces", workspaces_that_stay),
]


def test_all_parts_are_known_here(monkeypatch):
    monkeypatch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
    assert capabilities.notes() == []


@pytest.mark.parametrize("part, change", UNKNOWN, ids=[change.__name__ for _, change in UNKNOWN])
def test_an_unknown_version_of_a_part_turns_it_off_with_a_note(part, change):
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        assert not capabilities.knows(part)
        assert any(note.startswith(f"{part} of ") for note in capabilities.notes())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    return nn.Sequential(*layers).eval().to(DEVICE)


@pytest.mark.parametrize("part", capabilities.CHECKS)
def test_without_a_part_the_numbers_are_the_same_and_the_reports_say_so(part, monkeypatch):
    """Swapped, fused, differentiated and under torch.func."""
    x, pytorch, swapped = torch.randn(2, 4, 8, 8, device=DEVICE), network(), network()
    monkeypatch.setitem(capabilities.CHECKS, part, (lambda: False, "it is done otherwise"))
    report = tritonnn.swap(swapped)
    fused = tritonnn.fuse(network())
    for said in (str(report), str(fused.report)):
        assert said.count("it is done otherwise") == 1
    expected, actual = pytorch(x), swapped(x)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(swapped[0].weight.grad, pytorch[0].weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected)
        torch.testing.assert_close(torch.func.vmap(swapped)(x[:, None]), expected[:, None])


def test_no_plan_is_made_of_unknown_launches(monkeypatch):
    tensors = [image(4)]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert launch_plan.can_record(tensors)
    for part in ("launches", "watchers"):
        capabilities.forget()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(capabilities.CHECKS, part, (lambda: False, ""))
            assert not launch_plan.can_record(tensors)


def test_unknown_watchers_are_expected_at_every_call(monkeypatch):
    monkeypatch.setitem(capabilities.CHECKS, "watchers", (lambda: False, ""))
    assert not launch_plan.plain_eager()


def test_kernels_are_not_compiled_ahead_by_unknown_means(monkeypatch):
    monkeypatch.setitem(capabilities.CHECKS, "preloading", (lambda: False, ""))
    compile_ahead.compile_ahead([pytest.fail], pytest.fail)


def test_cache_keys_of_unknown_kind_are_left_alone(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setitem(capabilities.CHECKS, "cache keys", (lambda: False, ""))
    monkeypatch.delattr(jit, "JITCallable")
    cache_keys.settle_cache_keys()


def test_graphs_are_not_captured_where_workspaces_stay(monkeypatch):
    x = torch.randn(2)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cuda_graphs.can_be_captured([x])
    capabilities.forget()
    monkeypatch.setitem(capabilities.CHECKS, "workspaces", (lambda: False, ""))
    assert not cuda_graphs.can_be_captured([x])


def test_allocations_of_an_unknown_kind_are_pytorchs_own(monkeypatch):
    monkeypatch.setattr(
        torch._C._dynamo.guards, "_empty_strided_cuda", lambda *of: torch.empty(2, 1, dtype=of[2]), raising=False
    )
    assert capabilities.empty_strided("cuda") is None


@pytest.mark.parametrize(
    "of_triton, of_numpy, runs",
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.1", "3.0.1", False), ("3.7.1", "2.4.6", True)],
)
def test_the_interpreter_names_the_numpy_that_it_fails_with(of_triton, of_numpy, runs, monkeypatch):
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    capabilities.check_interpreter.cache_clear()
    try:
        if runs:
            capabilities.check_interpreter()
        else:
            with pytest.raises(RuntimeError, match=rf"triton {of_triton}.*numpy {of_numpy}.*numpy<2.4"):
                capabilities.check_interpreter()
    finally:
        capabilities.check_interpreter.cache_clear()


def test_kernels_in_gluon_need_a_version_that_they_were_checked_with(monkeypatch):
    monkeypatch.setattr(hardware, "gpu", lambda device: H100)
    monkeypatch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert hardware.gluon_is_verified(torch.device("cuda", 0))
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert not hardware.gluon_is_verified(torch.device("cuda", 0))
    assert any("triton 4.0.0" in note for note in capabilities.notes())


GONE = {
    ("tma_halo", "matmul"): "from triton.experimental.gluon import language as gl\n"
    "for name in ('barrier', 'thread_barrier'): vars(gl).pop(name, None)",
    ("in_registers",): "from triton.experimental.gluon.language.nvidia import ampere; del ampere.mma_v2",
}
"""Forms to what takes away a part of Gluon that they need: the barrier, a product."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("forms", GONE, ids=" ".join)
def test_without_a_part_of_gluon_the_other_forms_are_left(forms):
    """They still compute, in a process without that part."""
    code = (
        f"import os, sys; os.environ['TRITON_INTERPRET'] = '1'; import triton; {GONE[forms]}\n"
        "import torch, tritonnn; from tritonnn.ops.conv2d.forms import FORMS\n"
        "print([form.name for form in FORMS], tritonnn.TritonConv2d(2, 3, 3)(torch.ones(1, 2, 4, 4)).shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"{[name for name in ORDER if name not in forms]} torch.Size([1, 3, 2, 2])\n"
    assert run.stdout == said, run.stderr
