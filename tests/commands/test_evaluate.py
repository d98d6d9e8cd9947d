"""evaluate.py as its users call it: what it prints, where it writes, and with what status it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.ctrl_c import heed_ctrl_c, interrupt
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import evaluate
import tritonnn
from lit_modules.checkpoint import weights_digest
from lit_modules.classifier import ImageClassifier
from lit_modules.data import Digits
from lit_modules.evaluation_result import EvaluationResult

QUICK = ["--limit-test-batches", "1", "--batch-size", "8", "--no-latency"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow network after one batch of the digits."""
    path = tmp_path_factory.mktemp("training") / "best.ckpt"
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_checkpointing=False, **quiet)
    trainer.fit(ImageClassifier(width=2), datamodule=Digits(batch_size=64))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(autouse=True)
def unchanged_benchmark() -> Iterator[None]:
    """The Trainer sets the flag for the whole process."""
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(argument) for argument in arguments])
    return exit.value.code


def test_all_layers_pass(folder, checkpoint, capsys):
    assert status("--ckpt-path", checkpoint, *QUICK) == 0
    output = capsys.readouterr().out
    assert "all 8 predictions identical" in output
    assert "tensorboard --logdir logs/digits/evaluation_0" in output
    written = json.loads((folder / "logs/digits/evaluation_0/results.json").read_text())
    assert written["proof"]["samples"] == written["batch_size"] == 8
    assert written["latency"] is None
    assert (folder / "logs/digits/evaluation_0/results.md").read_text().startswith("# Triton layers: all: PASS")


def test_a_second_evaluation_goes_to_a_folder_of_its_own(folder, checkpoint):
    for _ in range(2):
        assert status("--ckpt-path", checkpoint, "--triton-layers", "none", *QUICK) == 0
    assert sorted(path.name for path in (folder / "logs/digits").iterdir()) == ["evaluation_0", "evaluation_1"]


def test_the_fused_network_is_one_more_row(folder, checkpoint, capsys):
    assert status("--ckpt-path", checkpoint, "--triton-layers", "relu", "--fuse", *QUICK) == 0
    output = capsys.readouterr().out
    assert "PASS relu: all 8 predictions identical" in output and "PASS fused: all 8 predictions identical" in output
    assert "fused: runs 9 conv2d + batch_norm2d + relu, 8 conv2d + batch_norm2d + residual + relu" in output
    written = json.loads((folder / "logs/digits/evaluation_0/results.json").read_text())
    assert written["triton_layers"] == "relu, fused"
    assert [variant["fused"] for variant in written["proof"]["variants"]] == [False, True]


@pytest.fixture
def run(folder: Path, checkpoint: Path) -> Path:
    """The folder of a run."""
    run = folder / "checkpoints/digits/version_3"
    run.mkdir(parents=True)
    (run / "best-00-0.5.ckpt").write_bytes(checkpoint.read_bytes())
    (run / "last.ckpt").write_bytes(checkpoint.read_bytes())
    return run


@pytest.mark.parametrize("named", [[], ["checkpoints/digits"], ["checkpoints/digits/version_3"]], ids=len)
def test_the_best_checkpoint_of_a_run_is_taken_and_named(run, named, capsys):
    options = [option for folder in named for option in ("--ckpt-path", folder)]
    assert status(*options, "--triton-layers", "relu", "linear", "--log-dir", "here", *QUICK) == 0
    best = "checkpoints/digits/version_3/best-00-0.5.ckpt"
    assert f"Evaluating {best}, of the latest run in " in capsys.readouterr().err
    written = json.loads(Path("here/results.json").read_text())
    assert written["triton_layers"] == "relu linear" and written["checkpoint"]["path"] == best


def test_which_weights_were_proved_stands_everywhere(run, checkpoint, capsys):
    best = run.relative_to(Path.cwd()) / "best-00-0.5.ckpt"  # short: the terminal's table wraps long paths
    assert (
        status("--ckpt-path", best, "--triton-layers", "relu", "--log-dir", "here", "--precision", "bf16-true", *QUICK)
        == 0
    )
    digest = weights_digest(torch.load(checkpoint, weights_only=True)["state_dict"])
    written = json.loads(Path("here/results.json").read_text())
    assert written["checkpoint"] == {"path": str(best), "epoch": 1, "weights": digest}
    for page in (capsys.readouterr().out, Path("here/results.md").read_text()):
        assert digest in page and best.name in page
    events = EventAccumulator("here/triton").Reload()
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    parameters = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert (parameters["10 weights"].string_value, parameters["08 checkpoint"].string_value) == (digest, str(best))


def test_a_log_folder_that_is_used_again_holds_the_last_evaluation_only(folder, checkpoint):
    (folder / "here/pytorch").mkdir(parents=True)
    (folder / "here/pytorch/mine.txt").write_text("mine")
    assert status("--ckpt-path", checkpoint, "--triton-layers", "relu", "--log-dir", "here", *QUICK) == 0
    assert status("--ckpt-path", checkpoint, "--triton-layers", "none", "--log-dir", "here", *QUICK) == 0
    assert json.loads(Path("here/results.json").read_text())["triton_layers"] == "none"
    files = {path.relative_to("here").as_posix().partition(".out.")[0] for path in Path("here").rglob("*")}
    assert files == {"results.json", "results.md", "pytorch", "pytorch/mine.txt", "pytorch/events"}
    assert len(list(Path("here/pytorch").glob("events*"))) == 1


def test_what_swaps_nothing_proves_nothing(folder, checkpoint, capsys):
    assert status("--ckpt-path", checkpoint, "--triton-layers", "none", "--log-dir", "here", *QUICK) == 0
    assert "nothing was swapped, so nothing was proved" in capsys.readouterr().out
    assert "PASS" not in Path("here/results.md").read_text()


def test_data_with_other_classes(folder, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(Digits, "num_classes", 3)
    assert status("--ckpt-path", checkpoint, *QUICK) == 2
    assert capsys.readouterr().err.endswith("best.ckpt tells 10 classes apart, the data has 3\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_by_autocast_needs_a_gpu(folder, capsys):
    assert status("--precision", "16-mixed") == 2
    assert "on a CPU PyTorch has bf16-mixed" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["loading", "timing"])
def test_ctrl_c_ends_with_130_and_writes_nothing(folder, checkpoint, moment):
    command = [sys.executable, "-u", evaluate.__file__, "--ckpt-path", checkpoint, *QUICK[:-1]]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=folder, preexec_fn=heed_ctrl_c, **pipes)
    if moment == "timing":
        errors = interrupt(process, once="Timing")
        assert (process.returncode, errors.splitlines()[-1]) == (130, "error: interrupted: nothing was written")
    else:
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.splitlines()[-1]) == (-signal.SIGINT, "error: interrupted")
    assert "Traceback" not in errors
    assert not list(folder.iterdir())


def test_a_wrong_layer_ends_with_1(folder, checkpoint, monkeypatch, capsys):
    right = tritonnn.TritonLinear.forward
    monkeypatch.setattr(tritonnn.TritonLinear, "forward", lambda self, x: -right(self, x))
    assert status("--ckpt-path", checkpoint, *QUICK) == 1
    assert "FAIL all: 8 of 8 predictions differ" in capsys.readouterr().out
    assert json.loads((folder / "logs/digits/evaluation_0/results.json").read_text())["proof"]["passed"] is False


def test_the_options_reach_the_evaluation(folder, checkpoint):
    options = ["--triton-layers", "relu", "--precision", "bf16-mixed", "--channels-last", "--log-dir", "here"]
    assert status("--ckpt-path", checkpoint, *options, *QUICK) == 0
    written = json.loads((folder / "here/results.json").read_text())
    assert (written["precision"], written["memory_format"]) == ("bf16-mixed", "channels_last")
    assert written["proof"]["exact"] is False


@pytest.fixture
def products_in_float32():
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    ("switch", "states"), [("on", ["on", "on"]), ("off", ["off", "off"]), ("default", ["on", "off"])]
)
def test_tf32_in_convolutions_and_products(folder, checkpoint, switch, states, products_in_float32):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    options = ["--triton-layers", "none", "--tf32", switch, "--log-dir", "here"]
    assert status("--ckpt-path", checkpoint, *options, *QUICK) == 0
    flags = json.loads((folder / "here/results.json").read_text())["flags"]
    assert [flags["tf32 in convolution"], flags["tf32 in matmul"]] == states
    # Lightning asks this on a GPU, once a process: PyTorch refuses where its older and newer switches differ.
    assert torch.get_float32_matmul_precision() == ("high" if switch == "on" else "highest")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--triton-layers", "conv3d"],
            f"'conv3d': expected all, none, each, or one or more of {', '.join(tritonnn.KINDS)}",
            id="kind",
        ),
        pytest.param(["--triton-layers", "all", "conv2d"], "'all' stands alone", id="all and a kind"),
        pytest.param(["--triton-layers"], "expected at least one argument", id="no kind"),
        pytest.param(["--triton-layer", "all"], "unrecognized arguments: --triton-layer", id="misspelt option"),
        pytest.param(["--batch-size", "0"], "batch_size", id="batch size 0"),
        pytest.param(["--limit-test-batches", "0"], "limit_test_batches", id="no batches"),
        pytest.param(["--precision", "fp8"], "'32-true'", id="precision"),
        pytest.param(["--tf32", "maybe"], "'default', 'on', 'off'", id="tf32"),
        pytest.param(["--cuda-graph"], "add --fuse", id="graph of what is not fused"),
        pytest.param([], "no checkpoint below checkpoints/ yet: run train.py first", id="no checkpoint yet"),
        pytest.param(["--ckpt-path", "nix.ckpt"], "there is no checkpoint nix.ckpt", id="absent checkpoint"),
        pytest.param(["--ckpt-path", "empty"], "no checkpoint below empty/", id="folder without a checkpoint"),
        pytest.param(["--ckpt-path", "text.ckpt"], "text.ckpt is not a checkpoint", id="not a checkpoint"),
        pytest.param(["--log-dir", "text.ckpt"], "--log-dir text.ckpt is a file", id="a file to log to"),
    ],
)
def test_wrong_use_is_one_line_and_ends_with_2(folder, capsys, arguments, message):
    (folder / "text.ckpt").write_text("text")
    (folder / "empty").mkdir()
    assert status(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert {path.name for path in folder.rglob("*")} == {"empty", "text.ckpt"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_graph_needs_a_gpu(folder, capsys):
    assert status("--fuse", "--cuda-graph") == 2
    assert "--cuda-graph needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu(folder, checkpoint, capsys):
    assert status("--ckpt-path", checkpoint, "--tune", *QUICK) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --tune needs a CUDA GPU")
    assert not list(folder.iterdir())


@pytest.mark.gpu
def test_tuning_comes_before_the_proof(folder, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("TRITONNN_CACHE_DIR", str(folder / "cache"))
    assert status("--ckpt-path", checkpoint, "--tune", "--fuse", *QUICK) == 0
    output = capsys.readouterr().out
    assert " convolutions tuned in " in output and output.index("Tuning: ") < output.index("Predictions on")
    assert len(list((folder / "cache").iterdir())) == 1


def test_digits_have_no_folder_to_move(folder, checkpoint, capsys):
    assert status("--ckpt-path", checkpoint, "--data-root", "elsewhere") == 2
    assert "root" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_log_folder_that_cannot_be_made(folder, checkpoint, capsys):
    (folder / "taken").write_text("mine")
    assert status("--ckpt-path", checkpoint, "--log-dir", "taken/here", *QUICK) == 2
    assert "taken" in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "taken").read_text() == "mine"


def test_a_full_disk_after_the_proof(folder, checkpoint, monkeypatch, capsys):
    def full(self: EvaluationResult, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(EvaluationResult, "write_json", full)
    assert status("--ckpt-path", checkpoint, *QUICK) == 2
    output, errors = capsys.readouterr()
    assert "all 8 predictions identical" in output
    assert "No space left on device" in errors.splitlines()[-1]


def test_the_command_itself(folder):
    command = [sys.executable, Path(evaluate.__file__), "--triton-layers", "conv3d"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    *notices, error = process.stderr.splitlines()
    assert "avg_pool2d, batch_norm2d, conv2d, linear, max_pool2d, relu" in error
    assert len(notices) == int(not torch.cuda.is_available())
    assert all("Triton's interpreter" in line for line in notices)
