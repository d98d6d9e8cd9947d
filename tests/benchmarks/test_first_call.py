"""`benchmarks/first_call.py`: who runs on which cores, and with which caches."""

import json
import os

import pytest
import torch

from benchmarks import first_call


@pytest.fixture
def processes(monkeypatch) -> list:
    """Network, way, caches and cores of each process that was started, none of which runs."""
    started = []

    def measured(args, network, way, caches, cores):
        started.append((network, way, caches, list(cores)))
        return {"first_s": 2.0, "second_s": 0.1, "process_s": 9.0, "error": 0.0, "log": []}

    monkeypatch.setattr(first_call, "measured", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return started


@pytest.mark.parametrize("beside", [False, True])
def test_each_way_has_empty_caches_and_then_its_own(processes, tmp_path, beside):
    options = ["--networks", "resnet18", "vgg11", "--output", str(tmp_path / "found.json"), *["--beside"] * beside]
    with pytest.raises(SystemExit) as end:
        first_call.main(options)
    assert end.value.code == 0
    for way, cores in (("fuse", [0, 1, 2, 3]), ("compile", [4, 5, 6, 7])):
        own = [process for process in processes if process[1] == way]
        assert [network for network, *_ in own] == ["resnet18"] * 2 + ["vgg11"] * 2
        assert own[0][2] == own[1][2] != own[2][2], "the second process finds the caches of the first"
        assert all(process[3] == (cores if beside else list(range(8))) for process in own)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["gpu"] == "NVIDIA H100" and len(found["found"]) == 4 and found["found"][0]["cold"]["first_s"] == 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        first_call.main([])
    assert end.value.code == 2 and "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_counts_what_an_h100_would_compile_without_one(tmp_path, capsys):
    """AlexNet: its first layer from rows that are copied, 5x5 and 3x3 filters, pools and linear layers."""
    with pytest.raises(SystemExit) as end:
        first_call.main(["--count", "--networks", "alexnet", "--output", str(tmp_path / "found")])
    (found,) = json.loads((tmp_path / "found").read_text())["found"]
    kernels = {name: seconds for name, seconds in found.items() if name.endswith("_kernel")}
    assert {"padded_rows_kernel", "conv2d_pointers_forward_kernel", "max_pool2d_forward_kernel"} <= kernels.keys()
    assert any("tma" in name for name in kernels), "kernels of a Hopper GPU"
    number = sum(map(len, kernels.values()))
    assert 6 <= number <= 16 and all(min(seconds) > 0 for seconds in kernels.values())
    assert end.value.code == 0 and f"alexnet: {number} kernels" in capsys.readouterr().out


def test_a_network_that_cannot_be_counted_is_told(monkeypatch, capsys):
    monkeypatch.setattr(first_call, "measured", lambda *args: {"failed": "UserError: no such network", "process_s": 1})
    with pytest.raises(SystemExit) as end:
        first_call.main(["--count", "--networks", "nonet"])
    assert end.value.code == 1 and capsys.readouterr().out == "nonet: FAILED UserError: no such network\n"
