"""The command `train.py`, from its options to its checkpoints."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image
from torch.nn.functional import cross_entropy

import train
from lit_modules.checkpoint import load_classifier
from lit_modules.command_line import UserError
from lit_modules.data import data_module_from_checkpoint

ROOT = Path(train.__file__).parent
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
DIGITS = ["--config", str(ROOT / "configs" / "digits.yaml"), "--evaluation=null", *QUIET]
BRIEF = [*DIGITS, "--model.width=4", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def start(*args: str) -> subprocess.Popen:
    """train.py on CPUs, with kernels in Triton's interpreter."""
    command = [sys.executable, str(ROOT / "train.py"), *args]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}  # other tests run beside it
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, preexec_fn=heed_ctrl_c, **pipes)


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so does what that starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def metrics(version: int = 0, data: str = "digits") -> list[dict[str, str]]:
    with Path("logs", data, f"version_{version}", "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_digits_are_learnt_then_resumed_from_the_last_checkpoint():
    train.main([*DIGITS, "--trainer.max_epochs=3"])
    (best,) = Path("checkpoints/digits").glob("best*.ckpt")
    assert float(metrics()[-1]["test/top1"]) > 0.9
    assert list(Path("logs/digits/version_0").glob("events.out.tfevents.*"))
    checkpoint = load_classifier(best)[1]
    assert data_module_from_checkpoint(checkpoint).batch_size == 32

    train.main([*DIGITS, "--trainer.max_epochs=4", "--ckpt-path", "last"])
    assert {row["epoch"] for row in metrics(1) if row["val/loss"]} == {"3"}
    assert load_classifier("checkpoints/digits/last.ckpt")[1]["global_step"] == 4 * 40


def test_print_config_shows_what_would_run(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main([*DIGITS, "--model.lr=0.1", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert exit.value.code == 0
    assert config["data"]["class_path"] == "lit_modules.data.Digits"
    assert config["model"]["width"] == 16 and config["model"]["lr"] == 0.1


def test_help_lists_every_argument(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    help = capsys.readouterr().out
    assert exit.value.code == 0
    for option in (
        "--ckpt_path",
        "--evaluation",
        "--data",
        "--model.width",
        "--trainer.devices",
        "--checkpoint.dirpath",
    ):
        assert option in help


def test_bare_command_is_cifar10():
    cli = train.command_line(QUIET)
    assert cli.datamodule.name == "cifar10" and cli.trainer.max_epochs == 90


@pytest.mark.parametrize("name", ["cifar10", "cifar10_224", "digits"])
def test_shipped_config_is_accepted(name):
    cli = train.command_line(["--config", str(ROOT / "configs" / f"{name}.yaml"), *QUIET])
    assert cli.datamodule.name == name


@pytest.mark.parametrize(
    "args, message",
    [
        ([*DIGITS, "--trainer.max_epoch=1"], "--trainer.max_epoch"),
        ([*DIGITS, "--data.batchsize=1"], "Option 'batchsize' is not accepted"),
        (["--config", "absent.yaml"], "absent.yaml"),
        ([*DIGITS, "--data.batch_size=0"], "batch_size must be at least 1, got 0"),
        ([*DIGITS, "--model.stem=imagenet"], "imagenet stem takes images of 224, data.image_size is 32"),
        ([*QUIET, "--data=ImageFolder", "--data.root=absent"], "absent has no folder train/"),
        ([*DIGITS, "--evaluation=TritonEvaluation", "--evaluation.layers=conv3d"], "unknown kind of layer 'conv3d'"),
        ([*DIGITS, "--ckpt-path=last"], "there is no last checkpoint in checkpoints/digits/"),
        ([*DIGITS, "--ckpt-path=absent.ckpt"], "absent.ckpt"),
        ([*DIGITS, "--trainer.devices=0"], "devices"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value.split()[-1],
)
def test_wrong_input_is_a_users_error_and_writes_nothing(args, message):
    Path("checkpoints/digits").mkdir(parents=True)
    Path("checkpoints/digits/best-00.ckpt").write_bytes(b"an earlier run's")
    before = contents()
    with pytest.raises(UserError, match=message):
        train.main(args)
    assert contents() == before


def test_wrong_option_ends_the_command_with_one_line():
    process = start("--trainer.max_epoch", "3")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.splitlines() == ["error: unrecognized arguments: --trainer.max_epoch 3"]


def test_checkpoint_of_another_architecture_is_not_resumed():
    train.main(BRIEF)
    before = contents()
    with pytest.raises(UserError, match="last.ckpt is of another architecture"):
        train.main([*BRIEF, "--model.width=8", "--ckpt-path=last"])
    assert contents() == before


def test_log_folder_that_cannot_be_made():
    Path("logs").write_text("a file")
    with pytest.raises(UserError, match="logs"):
        train.main(BRIEF)
    assert Path("logs").read_text() == "a file"


def test_full_disk_leaves_the_earlier_checkpoint(monkeypatch):
    def write_a_part(self, checkpoint, path, storage_options=None):
        Path(path).write_bytes(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    train.main(BRIEF)
    before = {path: path.read_bytes() for path in Path("checkpoints").rglob("*.*")}
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", write_a_part)
    with pytest.raises(UserError, match="No space left on device.*checkpoints/digits"):
        train.main([*BRIEF, "--trainer.max_epochs=2", "--ckpt-path=last"])
    assert {path: path.read_bytes() for path in Path("checkpoints").rglob("*.*")} == before


def test_ctrl_c_keeps_the_last_checkpoint_and_says_where():
    process = start(*DIGITS, "--model.width=4", "--trainer.max_epochs=1000")
    last = Path("checkpoints/digits/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert stderr.splitlines()[-1] == f"error: interrupted: {last} is kept, resume with --ckpt-path last"
    assert "Traceback" not in stderr
    assert load_classifier(last)[0].hparams.width == 4


def test_two_processes_train_and_count_every_test_image_once():
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 7)):  # 7 on two ranks: a padding sampler would count 8
        for name in ("cat", "dog"):
            Path("pets", split, name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(Path("pets", split, "cat" if i % 3 else "dog", f"{i}.png"))
    data = [
        "--data=ImageFolder",
        "--data.root=pets",
        "--data.batch_size=2",
        "--data.num_workers=0",
        "--data.val_fraction=0.3",
    ]
    parallel = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    evaluation = ["--evaluation.layers=relu", "--evaluation.latency=false"]
    process = start(*QUIET, *data, *parallel, *evaluation, "--model.width=4", "--model.lr=0.01")
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr

    (best,) = Path("checkpoints/pets").glob("best*.ckpt")
    classifier, checkpoint = load_classifier(best)
    loader = data_module_from_checkpoint(checkpoint, batch_size=7)
    loader.setup("test")
    ((images, labels),) = loader.test_dataloader()
    with torch.no_grad():
        logits = classifier.eval()(images)
    tested = metrics(data="pets")[-1]
    assert float(tested["test/loss"]) == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    assert float(tested["test/top1"]) == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert json.loads(Path("logs/pets/version_0/results.json").read_text())["proof"]["samples"] == 7
