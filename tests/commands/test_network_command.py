"""The command `python -m tritonnn NETWORK`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tritonnn
from tritonnn.__main__ import main
from tritonnn.command.networks import UserError, build, calibrate, random_images
from tritonnn.command.proof import prove

ROOT = Path(tritonnn.__file__).parents[1]
NETWORKS = """
import torch
from torch import nn

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.GELU(),
            nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )

class Named(Small):
    def forward(self, x):
        return {"masks": [x.sigmoid(), super().forward(x)], "names": ["a"]}

class Overflowing(Small):
    def forward(self, x):
        return super().forward(x) / 0

class Broken(nn.Module):
    def __init__(self):
        raise OSError("no weights\\nhere")

class Counting(Small):
    def forward(self, x):
        return super().forward(x).argmax(1)

ready = Small()
number = 3
"""


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    (tmp_path / "networks_of_mine.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("networks_of_mine", None)


SMALL = ["networks_of_mine:Small", "--batch=3", "--size=8"]


def test_a_network_of_ones_own_is_swapped_fused_and_proven(capsys):
    assert main([*SMALL, "--fuse"]) == 0
    out = capsys.readouterr().out
    assert "swapped to Triton: 1 avg_pool2d, 1 batch_norm2d, 2 conv2d, 1 linear, 1 relu" in out
    assert "stayed PyTorch: 6, 7, 8 and 1 more: no Triton layer for Tanh" in out
    assert "fused: 1 conv2d + batch_norm2d + relu" in out
    assert out.count("3 of 3") == 2 and out.rstrip().endswith("PASS")
    if not torch.cuda.is_available():
        assert "No times" in out and "Milliseconds" not in out


def test_kinds_memory_format_and_type(capsys):
    assert main([*SMALL, "--layers", "conv2d", "relu", "--channels-last", "--dtype=bf16"]) == 0
    out = capsys.readouterr().out
    assert "swapped to Triton: 2 conv2d, 1 relu" in out
    assert "stayed PyTorch: 12: linear was not asked for" in out
    assert "images of 3x1x8x8 in bf16, channels_last" in out and "the fused network" not in out


def test_outputs_that_are_not_logits(capsys):
    assert main(["networks_of_mine:Named", "--batch=1", "--size=8", "--fuse"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1" not in out and "over 1 image, relative" in out and "PASS" in out


def test_without_a_gpu_the_command_finds_the_interpreter_and_the_network_in_this_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tritonnn", *SMALL]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "PASS" in run.stdout


MISTAKES = {
    "none": ([], "the following arguments are required: NETWORK"),
    "no such form": (["resnet18"], "it may be torchvision:NAME, timm/NAME or package.module:Class"),
    "torchvision": (["torchvision:resnet19"], "torchvision has no network 'resnet19': did you mean resnet18"),
    "detector": (["torchvision:ssd300_vgg16"], "is a detector"),
    "module": (["no_such_module.networks:Net"], "there is no module no_such_module.networks"),
    "class": (["networks_of_mine:Smal"], "networks_of_mine has no Smal: did you mean Small"),
    "no network": (["networks_of_mine:number"], "is no torch.nn.Module"),
    "makes none": (["builtins:dict"], "makes none, but dict"),
    "arguments": (["torch.nn:Linear"], "torch.nn:Linear cannot be made without arguments: TypeError"),
    "its own error": (["networks_of_mine:Broken"], "OSError: no weights here"),
    "batch": ([*SMALL, "--batch=0"], "argument --batch: '0' is no positive whole number"),
    "size": ([*SMALL, "--size=2"], "another --size?"),
    "type": ([*SMALL, "--dtype=int8"], "argument --dtype: invalid choice"),
    "kind": ([*SMALL, "--layers=conv3d"], "argument --layers: invalid choice"),
    "graph": ([*SMALL, "--cuda-graph"], "add --fuse"),
    "not finite": (["networks_of_mine:Overflowing", "--size=8"], "is not finite"),
    "nothing to compare": (["networks_of_mine:Counting", "--size=8"], "has no floating-point tensor"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_graphs_need_a_gpu(capsys):
    assert main([*SMALL, "--fuse", "--cuda-graph"]) == 2
    assert "--cuda-graph needs a CUDA GPU" in capsys.readouterr().err


def test_timm(capsys):
    pytest.importorskip("timm")
    assert main(["timm/mobilenetv3_small_050", "--size=32"]) == 0
    assert main(["timm/mobilenetv3_smal_050"]) == 2
    assert "did you mean mobilenetv3_small_050" in capsys.readouterr().err


def test_weights_are_seeded_and_batch_norms_have_the_statistics_of_the_images():
    images = random_images(build("networks_of_mine:Small"), 16, 8)
    models = [build("networks_of_mine:Small") for _ in range(2)]
    for model in models:
        calibrate(model, images)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    conv, norm = models[0][0], models[0][1]
    torch.testing.assert_close(norm.running_mean, conv(images).mean((0, 2, 3)))
    assert norm.weight.std() > 0 and norm.momentum == 0.1 and not norm.training


def test_the_proof_fails_where_it_should():
    torch.manual_seed(0)
    model, images = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)).eval(),
        torch.randn(20, 3, 8, 8),
    )

    def passes(network, strict=True, model=model, images=images) -> bool:
        with torch.no_grad():
            return prove(model, {"other": network}, images, strict).passed

    assert passes(model)
    assert not passes(lambda x: model(x) * (1 + 1e-5))
    assert not passes(lambda x: model(x).index_fill(0, torch.tensor([19]), torch.nan))
    assert not passes(lambda x: model(x)[:, :9])
    half, half_images = model.bfloat16(), images.bfloat16()
    assert passes(lambda x: half(x), strict=False, images=half_images)
    assert not passes(lambda x: half(x) * 1.03, strict=False, images=half_images)


def test_what_the_model_itself_refuses_is_the_users_error():
    with pytest.raises(UserError, match="does not take images of 2x3x4x4"):
        prove(nn.Conv2d(4, 4, 1), {}, torch.randn(2, 3, 4, 4), True)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"tritonnn {tritonnn.__version__}\n"


@pytest.mark.gpu
def test_times_on_a_gpu(capsys):
    arguments = ["--batch=8", "--size=64", "--dtype=bf16", "--fuse", "--cuda-graph", "--channels-last"]
    assert main(["torchvision:resnet18", *arguments]) == 0
    out = capsys.readouterr().out
    assert "Milliseconds for 8 images" in out and "GPU alone" in out
