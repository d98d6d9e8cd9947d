"""The command `train.py`, from its options to its checkpoints."""

import csv
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import yaml
from helpers.ctrl_c import heed_ctrl_c, interrupt
from helpers.interpreter import needs_interpreter
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image
from torch.nn.functional import cross_entropy

import evaluate
import train
from lit_modules import command_line
from lit_modules.checkpoint import load_classifier, weights_digest
from lit_modules.command_line import UserError
from lit_modules.data import data_module_from_checkpoint

ROOT = Path(train.__file__).parent
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
DIGITS = ["--config", str(ROOT / "configs" / "digits.yaml"), "--evaluation=null", *QUIET]
EVALUATION = ["--evaluation=TritonEvaluation", "--evaluation.layers=relu"]
# Where there is a GPU, Triton's layers run nowhere else in this process.
WHERE_TRITON_RUNS = ["--trainer.accelerator=auto", "--trainer.devices=1"]
BRIEF = [*DIGITS, "--model.width=4", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def start(*args: str) -> subprocess.Popen:
    """train.py on CPUs, with kernels in Triton's interpreter."""
    command = [sys.executable, str(ROOT / "train.py"), *args]
    threads = {"OMP_NUM_THREADS": "1"}  # other tests run beside it, and threads that wait spin
    on_cpus = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    environment = {**os.environ, **on_cpus, "PYTHONUNBUFFERED": "1", **threads}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, preexec_fn=heed_ctrl_c, **pipes)


def metrics(version: int = 0, data: str = "digits") -> list[dict[str, str]]:
    with Path("logs", data, f"version_{version}", "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_digits_are_learnt_then_resumed_from_the_last_checkpoint():
    train.main([*DIGITS, "--trainer.max_epochs=3"])
    (best,) = Path("checkpoints/digits/version_0").glob("best*.ckpt")
    assert float(metrics()[-1]["test/top1"]) > 0.9
    assert list(Path("logs/digits/version_0").glob("events.out.tfevents.*"))
    checkpoint = load_classifier(best)[1]
    assert data_module_from_checkpoint(checkpoint).batch_size == 32

    train.main([*DIGITS, "--trainer.max_epochs=4", "--ckpt-path", "last"])
    assert {row["epoch"] for row in metrics(1) if row["val/loss"]} == {"3"}
    assert load_classifier("checkpoints/digits/version_1/last.ckpt")[1]["global_step"] == 4 * 40


class TestLast:
    """The first epoch is the best by this monitor, whatever the network learns."""

    FIRST_IS_BEST = ["--checkpoint.monitor=epoch", "--checkpoint.mode=min"]

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param(FIRST_IS_BEST, id="not among the best"),
            pytest.param(["--trainer.limit_val_batches=0"], id="no validation"),
            pytest.param(["--trainer.check_val_every_n_epoch=2"], id="validation every other epoch"),
        ],
    )
    def test_is_of_the_last_epoch(self, options):
        train.main([*BRIEF, "--trainer.max_epochs=3", *options])
        assert load_classifier("checkpoints/digits/version_0/last.ckpt")[1]["epoch"] == 2

    def test_a_resumed_run_goes_on_from_it_and_keeps_the_best_so_far(self):
        train.main([*BRIEF, "--trainer.max_epochs=2", *self.FIRST_IS_BEST])
        before = contents()
        train.main([*BRIEF, "--trainer.max_epochs=3", *self.FIRST_IS_BEST, "--ckpt-path=last"])
        assert before.items() <= contents().items()
        (first,) = Path("checkpoints/digits/version_0").glob("best-00*.ckpt")
        (best,) = Path("checkpoints/digits/version_1").glob("best*.ckpt")
        assert (best.name, best.read_bytes()) == (first.name, first.read_bytes())
        assert {row["epoch"] for row in metrics(1) if row["val/loss"]} == {"2"}
        assert load_classifier("checkpoints/digits/version_1/last.ckpt")[1]["epoch"] == 2
        with pytest.raises(UserError, match="version_1/last.ckpt is of the last of 3 epochs: nothing is left to train"):
            train.main([*BRIEF, "--trainer.max_epochs=3", "--ckpt-path", "checkpoints/digits/version_1"])

    def test_a_best_checkpoint_that_is_gone_is_not_missed(self):
        train.main([*BRIEF, "--trainer.max_epochs=2", *self.FIRST_IS_BEST])
        for path in Path("checkpoints/digits/version_0").glob("best*"):
            path.unlink()
        train.main([*BRIEF, "--trainer.max_epochs=3", *self.FIRST_IS_BEST, "--ckpt-path=last"])
        assert [path.name[:7] for path in Path("checkpoints/digits/version_1").glob("best*")] == ["best-02"]


def test_each_run_has_a_number_for_its_checkpoints_and_its_logs():
    Path("logs/digits/version_4").mkdir(parents=True)
    train.main(BRIEF)
    train.main([*BRIEF, "--trainer.logger=false"])
    train.main(BRIEF)
    assert sorted(path.name for path in Path("checkpoints/digits").iterdir()) == ["version_5", "version_6", "version_7"]
    assert sorted(path.name for path in Path("logs/digits").iterdir()) == ["version_4", "version_5", "version_7"]
    assert not Path("config.yaml").exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="as it is"),
        pytest.param(
            [
                "--trainer.callbacks+=ModelCheckpoint",
                "--trainer.callbacks.save_last=true",
                "--trainer.callbacks+=LearningRateMonitor",
            ],
            id="callbacks that write",
        ),
        pytest.param([*EVALUATION, "--evaluation.budget_s=0", *WHERE_TRITON_RUNS], id="evaluation"),
    ],
)
def test_a_dry_run_leaves_no_trace(options):
    train.main(BRIEF)
    before = contents(), list(Path().rglob("*"))
    train.main([*BRIEF, "--trainer.fast_dev_run=true", "--data.batch_size=2", *options])
    assert (contents(), list(Path().rglob("*"))) == before


class TestWithOtherCallbacks:
    def test_a_learning_rate_that_is_found_is_used(self):
        finder = ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=20"]
        train.main([*BRIEF, *finder, "--trainer.limit_train_batches=20", "--trainer.log_every_n_steps=1"])
        found = load_classifier("checkpoints/digits/version_0/last.ckpt")[0].hparams.lr
        assert found != 0.05
        assert max(float(row["train/lr"]) for row in metrics() if row["train/lr"]) == pytest.approx(found)

    @pytest.fixture(autouse=True)
    def what_is_tested_is_said(self, caplog):
        caplog.set_level(logging.INFO, "lightning.pytorch")

    def test_the_test_is_of_the_runs_best_beside_another_checkpoint_callback(self, caplog):
        other = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=other"]
        train.main([*BRIEF, *other])
        assert list(Path("other").iterdir())
        assert "Testing checkpoints/digits/version_0/best-00" in caplog.text

    @pytest.mark.parametrize(
        "options, logs",
        [
            pytest.param([*BRIEF, "--trainer.enable_checkpointing=false"], True, id="enable_checkpointing"),
            pytest.param(
                [
                    *("--data=Digits", "--data.num_workers=0", "--evaluation=null", "--trainer.barebones=true"),
                    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--model.width=4"),
                    *("--trainer.accelerator=cpu", "--data.batch_size=32"),
                ],
                False,
                id="barebones",
            ),
        ],
    )
    def test_without_checkpoints_the_network_is_tested_as_it_is(self, options, logs, caplog):
        train.main(options)
        assert "Testing the network as it is in the end: no checkpoint was kept" in caplog.text
        assert not Path("checkpoints").exists() and Path("logs").exists() == logs


class TestOtherNetworks:
    NETWORKS = """
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

class Fixed(Tiny):
    def __init__(self, **_):
        super().__init__(7)

ready = Tiny(10)
"""

    @pytest.fixture(autouse=True)
    def networks(self, in_an_empty_folder, monkeypatch):
        Path("networks_of_mine.py").write_text(self.NETWORKS)
        monkeypatch.syspath_prepend(Path.cwd())
        yield
        sys.modules.pop("networks_of_mine", None)

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("networks_of_mine.Tiny", id="class path"),
            pytest.param("torchvision.models.squeezenet1_1", id="torchvision"),
            pytest.param("timm/mobilenetv3_small_050", id="timm"),
        ],
    )
    def test_are_trained_and_evaluated_from_their_checkpoint(self, name, capsys):
        if name.startswith("timm"):
            pytest.importorskip("timm")
        train.main([*BRIEF, "--model", name, "--trainer.max_epochs=1"])
        with pytest.raises(SystemExit) as exit:
            evaluate.main(["--no-latency", "--batch-size=8", "--limit-test-batches=1", "--log-dir=here"])
        assert exit.value.code == 0, capsys.readouterr()
        written = json.loads(Path("here/results.json").read_text())
        assert written["parameters"]["network"] == name and written["proof"]["variants"][0]["swapped"]["conv2d"] >= 1

    @pytest.mark.parametrize(
        "name, message",
        [
            ("nix", "'nix' names no network: it may be torchvision:NAME"),
            ("torchvision.models.resnet19", "torchvision has no network 'resnet19': did you mean resnet18"),
            ("networks_of_mine.Tinny", "networks_of_mine has no Tinny: did you mean Tiny"),
            (
                "networks_of_mine.ready",
                "networks_of_mine.ready cannot be made with num_classes 10: .* a network already",
            ),
            ("torch.nn.Flatten", "torch.nn.Flatten cannot be made with num_classes 10: TypeError"),
            (
                "networks_of_mine.Fixed",
                r"networks_of_mine.Fixed gives \[2, 7\] for 2 images, expected logits \[2, 10\]",
            ),
            ("torchvision.models.inception_v3", "does not take images of 32x32: .*data.image_size is 32"),
        ],
        ids=lambda value: value.split()[0],
    )
    def test_what_cannot_be_trained_is_a_users_error(self, name, message):
        with pytest.raises(UserError, match=message):
            train.main([*BRIEF, f"--model={name}"])

    def test_the_recipe_for_photographs(self):
        for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
            Path("pets", folder).mkdir(parents=True)
        config = ["--config", str(ROOT / "configs" / "photos_224.yaml"), "--data.root=pets"]
        model = train.command_line([*config, "--model=torchvision.models.shufflenet_v2_x0_5", *QUIET]).model
        assert model.hparams.network == "torchvision.models.shufflenet_v2_x0_5"
        assert model.network(torch.zeros(2, 3, 224, 224)).shape == (2, 2)

    def test_is_evaluated_after_another_optimizer(self):
        train.main([*BRIEF, "--optimizer=Adam", *EVALUATION, "--evaluation.latency=false", *WHERE_TRITON_RUNS])
        assert json.loads(Path("logs/digits/version_0/results.json").read_text())["proof"]["passed"]

    def test_another_optimizer_and_schedule(self):
        own = ["--optimizer=AdamW", "--optimizer.lr=0.01", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
        train.main([*BRIEF, *own, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"])
        rates = [float(row["train/lr"]) for row in metrics() if row["train/lr"]]
        assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])
        train.main([*BRIEF, *own, "--trainer.max_epochs=3", "--ckpt-path=last"])
        assert load_classifier("checkpoints/digits/version_1/last.ckpt")[1]["epoch"] == 2
        for others in ([], ["--optimizer=SGD", "--optimizer.lr=0.1"]):
            with pytest.raises(UserError, match="no state of this optimizer and schedule"):
                train.main([*BRIEF, *others, "--trainer.max_epochs=4", "--ckpt-path=checkpoints/digits/version_1"])


def test_a_callback_whose_default_is_no_plain_value():
    train.main([*BRIEF, "--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"])
    config = yaml.safe_load(Path("logs/digits/version_0/config.yaml").read_text())
    assert config["trainer"]["callbacks"][0]["init_args"] == {
        "duration": "00:01:00:00",
        "interval": "step",
        "verbose": True,
    }


def test_what_is_said_about_the_interpreter_is_not_printed_into_a_config(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # so that what the command sets is undone, too
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    command_line.start_command()
    output, errors = capsys.readouterr()
    assert output == "" and "Triton's interpreter" in errors


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
        "--optimizer",
        "--lr_scheduler",
    ):
        assert option in help
    assert train.__doc__ in help.partition("options:")[0]
    assert train.__doc__.count("    python train.py") >= 3


def test_every_option_of_ours_has_a_text(capsys):
    for command in (["--help"], ["--evaluation.help"]):
        with pytest.raises(SystemExit):
            train.main(command)
        entries = re.split(r"\n(?=  -)", capsys.readouterr().out)
        ours = re.compile(r"  --(model|checkpoint|ckpt|evaluation|optimizer|lr_scheduler|layers|inputs|labels)\b")
        texts = [entry for entry in entries if ours.match(entry)]
        assert texts
        for entry in texts:
            text = entry.strip().partition("(type:")[0].split("\n", 1)[-1]
            assert re.search(r"[a-z]{2,} [a-z]", re.sub(r"^\s*--\S+ \S+", "", text)), entry


def test_bare_command_is_cifar10():
    cli = train.command_line(QUIET)
    assert cli.datamodule.name == "cifar10" and cli.trainer.max_epochs == 70


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
        ([*DIGITS, "--model.lr=-1"], "lr must be more than 0, and finite, got -1.0"),
        ([*DIGITS, "--model.width=0"], "width must be at least 1, got 0"),
        ([*DIGITS, "--model.warmup=2"], "warmup must be from 0 to 1, got 2.0"),
        ([*DIGITS, "--model.in_channels=1"], 'must be given via "data.in_channels"'),
        ([*DIGITS, "--data=Foo"], "data must be one of CIFAR10, ImageFolder, Digits, or the import path of"),
        ([*DIGITS, "--trainer.max_epochs=-1"], "set trainer.max_epochs or trainer.max_steps"),
        ([*DIGITS, "--trainer.precision=16-mixed"], "16-mixed needs a GPU: on a CPU PyTorch has bf16-mixed"),
        ([*DIGITS, "--ckpt-path=last", "--trainer.fast_dev_run=true"], "leave --ckpt-path out"),
        ([*DIGITS, "--ckpt-path=checkpoints"], "there is no last checkpoint in checkpoints/"),
        ([*DIGITS, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"], "--lr_scheduler goes with an --optimizer"),
        ([*DIGITS, "--optimizer=SGD", "--optimizer.lr=-1"], "Invalid learning rate: -1"),
        ([*DIGITS, "--checkpoint.mode=best"], "`mode` can be min, max but got best"),
        ([*DIGITS, "--checkpoint.dirpath=checkpoints/digits/best-00.ckpt"], "File exists: .*best-00.ckpt"),
        ([*DIGITS, "--seed_everything=-1"], "seed_everything must be from 0 to 4294967295, got -1"),
        ([*DIGITS, "--trainer.limit_train_batches=0"], "trainer.limit_train_batches is 0, which trains nothing"),
        ([*DIGITS, "--trainer.max_epochs=0"], "trainer.max_epochs is 0, which trains nothing"),
        ([*DIGITS, "--trainer.max_steps=0"], "trainer.max_steps is 0, which trains nothing"),
        ([*DIGITS, "--trainer.max_time=00:00:00:00"], "trainer.max_time is 0, which trains nothing"),
        ([*DIGITS, "--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches must be at least 1, got 0"),
        ([*DIGITS, "--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch must be at least 1, got 0"),
        ([*DIGITS, "--trainer.val_check_interval=0"], "trainer.val_check_interval must be more than 0, got 0"),
        ([*DIGITS, "--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val must not be negative, got -1"),
        ([*DIGITS, "--trainer.min_epochs=9"], "min_epochs must be at most trainer.max_epochs, got 9 and 5"),
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


@pytest.mark.parametrize(
    "options, epochs",
    [
        (["--trainer.fast_dev_run=true", "--trainer.max_epochs=0", "--trainer.limit_train_batches=0"], 0),
        (["--trainer.overfit_batches=2", "--trainer.limit_train_batches=0"], 1),
    ],
    ids=["fast_dev_run", "overfit_batches"],
)
def test_an_option_that_replaces_what_trains_nothing_trains(options, epochs):
    train.main([*BRIEF, *options])
    assert len(list(Path("checkpoints").rglob("last.ckpt"))) == epochs  # a dry run keeps none


def test_without_batches_to_test_there_is_a_training_alone(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        train.main([*BRIEF, *EVALUATION, *WHERE_TRITON_RUNS, "--trainer.limit_test_batches=0"])
    assert "Testing nothing: trainer.limit_test_batches is 0" in caplog.messages
    assert list(Path("checkpoints").rglob("last.ckpt")) and not list(Path("logs").rglob("results.json"))


def test_an_interval_longer_than_an_epoch_is_a_users_error():
    with pytest.raises(UserError, match="`val_check_interval` .3. must be less than or equal to the number"):
        train.main([*BRIEF, "--trainer.val_check_interval=3"])


def test_a_training_that_has_made_its_steps_is_not_resumed():
    train.main(BRIEF)
    for end, message in (("max_steps=2", "of the last of 2 steps"), ("max_epochs=1", "of the last of 1 epochs")):
        with pytest.raises(UserError, match=f"last.ckpt is {message}: nothing is left to train, raise trainer.max_"):
            train.main([*BRIEF, "--trainer.max_epochs=3", f"--trainer.{end}", "--ckpt-path=last"])


def test_a_cpu_without_the_interpreter_is_refused_before_the_training(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UserError, match="the Trainer runs on cpu: leave the accelerator to it, or set TRITON"):
        train.main([*BRIEF, *EVALUATION])
    assert contents() == {}


def test_wrong_option_ends_the_command_with_one_line():
    process = start("--trainer.max_epoch", "3")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.splitlines() == ["error: unrecognized arguments: --trainer.max_epoch 3"]


def test_checkpoint_of_another_architecture_is_not_resumed():
    train.main(BRIEF)
    before = contents()
    with pytest.raises(UserError, match="last.ckpt is of another architecture .*: width 4, not 8"):
        train.main([*BRIEF, "--model.width=8", "--ckpt-path=last"])
    assert contents() == before


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.batch_size=64"], "was trained with data.batch_size 32, this is 64"),
        (["--trainer.limit_train_batches=3"], "made 2 steps in 1 epochs, this training makes 3 an epoch"),
    ],
)
def test_a_training_with_epochs_of_another_length_is_not_resumed(options, message):
    train.main(BRIEF)
    before = list(Path("checkpoints").rglob("*"))
    with pytest.raises(UserError, match=message):
        train.main([*BRIEF, "--trainer.max_epochs=2", "--ckpt-path=last", *options])
    assert list(Path("checkpoints").rglob("*")) == before


def test_weights_alone_are_not_resumed():
    train.main([*BRIEF, "--checkpoint.save_weights_only=true"])
    (best,) = Path("checkpoints/digits/version_0").glob("best*.ckpt")
    with pytest.raises(UserError, match="can be evaluated, but not resumed"):
        train.main([*BRIEF, "--trainer.max_epochs=2", "--ckpt-path", str(best)])


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
    before = contents()
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", write_a_part)
    with pytest.raises(UserError, match="No space left on device.*checkpoints/digits"):
        train.main([*BRIEF, "--trainer.max_epochs=2", "--ckpt-path=last"])
    assert before.items() <= contents().items()
    assert not list(Path("checkpoints").rglob("*.part"))


def test_ctrl_c_keeps_the_last_checkpoint_and_says_where():
    process = start(*DIGITS, "--model.width=4", "--trainer.max_epochs=1000")
    last = Path("checkpoints/digits/version_0/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == f"error: interrupted: {last} is kept, resume with --ckpt-path last"
    assert "Traceback" not in stderr
    assert load_classifier(last)[0].hparams.width == 4


@needs_interpreter
def test_ctrl_c_in_the_test_says_what_is_kept():
    process = start(*BRIEF, *EVALUATION, "--trainer.limit_test_batches=1", "--data.batch_size=8")
    stderr = interrupt(process, once="Timing")
    assert process.returncode == 130, stderr
    (best,) = Path("checkpoints/digits/version_0").glob("best*.ckpt")
    assert stderr.splitlines()[-1] == f"error: interrupted: {best} is kept"
    assert "Traceback" not in stderr
    assert not {path.name for path in Path("logs").rglob("*")} & {"results.json", "results.md", "pytorch", "triton"}


@needs_interpreter
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
    evaluation = ["--evaluation.layers=relu", "--evaluation.budget_s=0", "--evaluation.time_interpreter=true"]
    process = start(*QUIET, *data, *parallel, *evaluation, "--model.width=4", "--model.lr=0.01")
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert stdout.count("Proving: ") == stdout.count("Timing each layer") == 1

    (best,) = Path("checkpoints/pets/version_0").glob("best*.ckpt")
    classifier, checkpoint = load_classifier(best)
    assert checkpoint["global_step"] == 5  # of 11 images two make a step, one on each process
    loader = data_module_from_checkpoint(checkpoint, batch_size=7)
    loader.setup("test")
    ((images, labels),) = loader.test_dataloader()
    with torch.no_grad():
        logits = classifier.eval()(images)
    tested = metrics(data="pets")[-1]
    assert float(tested["test/loss"]) == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    assert float(tested["test/top1"]) == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    results = json.loads(Path("logs/pets/version_0/results.json").read_text())
    assert results["proof"]["samples"] == 7
    assert results["latency"]["networks"]["relu"]
    assert Path(results["checkpoint"]["path"]) == best.resolve()
    assert results["checkpoint"]["weights"] == weights_digest(checkpoint["state_dict"])
