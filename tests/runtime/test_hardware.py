"""Facts of the card are asked from the device: no other file of the library has a number of an H100 in it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from helpers.compare import DEVICE
from helpers.gpus import A100, H100

import tritonnn
from tritonnn.layers import layer
from tritonnn.runtime import hardware
from tritonnn.runtime.hardware import INTERPRETER, Gpu, gluon_is_verified

CUDA = torch.device("cuda", 0)
LIBRARY = Path(tritonnn.__file__).parent


@pytest.fixture
def card(monkeypatch):
    """A device of these properties, as PyTorch tells of it."""

    def pose(gpu: Gpu, hip: str | None = None, **other) -> None:
        properties = dict(multi_processor_count=gpu.multiprocessors, shared_memory_per_block=49152)
        properties |= dict(shared_memory_per_block_optin=gpu.shared_memory) | other
        properties = {name: value for name, value in properties.items() if value is not None}
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    hardware.gpu.cache_clear()
    yield pose
    hardware.gpu.cache_clear()


@pytest.mark.parametrize("gpu", [H100, A100, Gpu((12, 0), 170, 101376)], ids=lambda gpu: str(gpu.capability))
def test_facts_are_those_of_the_device(gpu, card):
    card(gpu)
    assert hardware.gpu(CUDA) == gpu
    assert gpu.is_hopper == (gpu is H100)


def test_a_card_of_amd_has_no_capability_of_cuda(card):
    card(Gpu((9, 0), 304, 65536), hip="6.4", shared_memory_per_block_optin=None, shared_memory_per_block=65536)
    assert hardware.gpu(CUDA) == Gpu((0, 0), 304, 65536)


def test_the_cpu_is_the_interpreters():
    assert hardware.gpu(torch.device("cpu")) == INTERPRETER


def test_where_kernels_in_gluon_are_verified(card, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
    card(H100)
    assert gluon_is_verified(CUDA)
    monkeypatch.setattr(hardware, "GLUON_VERSIONS", "3.5.")
    assert not gluon_is_verified(CUDA)
    monkeypatch.setattr(hardware, "GLUON_VERSIONS", triton.__version__)
    hardware.gpu.cache_clear()
    card(Gpu((10, 0), 148, 232448))
    assert not gluon_is_verified(CUDA)


def test_no_other_file_has_a_number_of_an_h100():
    """Multiprocessors, outputs by the thousand of each, shared memory. What is measured may stand in a docstring."""
    number = re.compile(r"\b(132|132_?000|2 ?\*\* ?17|131_?072|232_?448|227 ?\* ?1024)\b")
    found = []
    for path in LIBRARY.rglob("*.py"):
        if path.name != "hardware.py":
            code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
            found += [f"{path.name}: {match[0]}" for match in number.finditer(code)]
    assert not found


@pytest.mark.parametrize(
    "capability, reason",
    [((7, 5), "GPU of compute capability 7.5, below 8.0"), ((8, 0), None), ((12, 0), None), ((0, 0), None)],
)
def test_layers_fall_back_on_gpus_that_are_too_old(capability, reason, monkeypatch):
    """(0, 0) is AMD's."""
    monkeypatch.setattr(hardware, "gpu", lambda device: hardware.Gpu(capability, 40, 64 * 1024))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.reason_against(torch.device("cuda", 0)) == reason
    assert hardware.reason_against(torch.device("cpu")) is None
    monkeypatch.setattr(layer, "reason_against", lambda device: reason)
    linear = tritonnn.TritonLinear(2, 3, device=DEVICE)
    y = linear(torch.ones(1, 2, device=DEVICE))
    assert y.shape == (1, 3) and dict(linear.fallbacks) == ({reason: 1} if reason else {})
