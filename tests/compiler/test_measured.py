"""What was measured of chains is kept, for this GPU and these versions."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tritonnn.compiler import backend, choice, measured
from tritonnn.compiler.measured import Times, add, measuring_alone, read


def test_times_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "folder" / "times.jsonl"
    assert read(path) == {}
    add(path, "Kind(3x3)", Times(1.5, 2.25))
    with path.open("a") as file:
        file.write('{"kind": 3}\n[1]\n{"kind": "Kind(1x1)", "ours_us": 2, "theirs_us": 1}\n{"kind": "Kind(')
    assert read(path) == {"Kind(3x3)": (1.5, 2.25), "Kind(1x1)": (2.0, 1.0)}
    assert [times.ours_is_no_slower for times in read(path).values()] == [True, False]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    add(tmp_path / "file" / "times.jsonl", "kind", Times(1, 2))


def test_other_sources_have_another_file(tmp_path, monkeypatch):
    """What a kernel of another version took says nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setenv("TRITONNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measured, "PACKAGE", tmp_path)
    paths = []
    for text in ("BLOCK = 1", "BLOCK = 2", "BLOCK = 1"):
        (tmp_path / "kernel.py").write_text(text)
        measured._digest.cache_clear()
        paths.append(measured.path_of(torch.device("cuda", 0)))
    measured._digest.cache_clear()
    assert paths[0] == paths[2] != paths[1] and paths[0].is_relative_to(tmp_path)


def test_on_a_cpu_nobody_waits():
    with measuring_alone(torch.device("cpu")), measuring_alone(torch.device("cpu")):
        pass


def test_one_process_at_a_time_measures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    lock = tmp_path / "chains" / "GPU-1.lock"
    lock.parent.mkdir()
    other = f"import fcntl, sys, time; f = open({str(lock)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{other}; print(flush=True); time.sleep(0.3)"], stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        start = time.perf_counter()
        with measuring_alone(torch.device("cuda", 0)):
            assert time.perf_counter() - start > 0.2


@pytest.mark.gpu
def test_what_is_known_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONNN_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 1)).cuda().requires_grad_(False)
    x, known, measure, seen = torch.randn(8, 16, 20, 20, device="cuda"), [], choice._measured, []
    monkeypatch.setattr(choice, "_measured", lambda trial: seen.append(trial) or measure(trial))
    for _ in range(2):
        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(model, backend=backend)(x)
        known.append(read(measured.path_of(x.device)))
    assert len(seen) == 2 and len(known[0]) == 2 and known[0] == known[1]
