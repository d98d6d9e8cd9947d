"""What the page on many machines promises and two processes can show; its table; the measurement of a start."""

import argparse
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from benchmarks import start
from examples import evaluate_sharded
from examples.load_test import random_jpeg
from tritonnn.command.networks import build

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
NETWORK = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a network that can be imported here and in other processes."""
    (tmp_path / "network_to_scale.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    yield tmp_path
    sys.modules.pop("network_to_scale", None)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_two_processes_count_each_of_seven_images_once(folder):
    for i in range(7):
        file = folder / "data" / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random_jpeg(16, i))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(ROOT / "examples" / "evaluate_sharded.py"), "network_to_scale:Tiny", "--data", str(folder / "data")]
    options = ["--size=16", "--dtype=float32", "--batch-size=2"]
    run = subprocess.run([*torchrun, *script, *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    model, data = build("network_to_scale:Tiny"), ImageFolder(str(folder / "data"), ToTensor())
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        right = sum(int(model(((x - mean) / std)[None]).argmax()) == label for x, label in data)
    assert 0 < right < 7
    counts = {"images": 7, "PyTorch right": right, "fused right": right, "differing": 0}
    assert run.stdout.splitlines()[-1] == f"{counts} in 2 processes"


def test_without_torchrun_the_example_says_so(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["evaluate_sharded.py", "torchvision:resnet18", "--data=."])
    with pytest.raises(SystemExit) as ended:
        evaluate_sharded.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: start this with torchrun, as --help shows\n"


def test_the_start_of_a_process_is_measured_by_stages(folder):
    args = argparse.Namespace(network="network_to_scale:Tiny", size=8, dtype="float32", batch=[1, 2])
    seconds = start.measure(args, "fused", folder / "caches")
    assert list(seconds) == [*start.STAGES, "process"]
    assert 0 < sum(seconds[stage] for stage in start.STAGES) < seconds["process"]
    assert re.fullmatch(r"\| cold( \| \d+\.\d){7} \|", start.row("cold", seconds))


def test_the_table_of_the_page_is_what_its_command_writes():
    page = (ROOT / "docs" / "scale.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "scale_table.py"))["table"]() in page
