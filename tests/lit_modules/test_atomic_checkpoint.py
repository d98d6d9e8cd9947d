"""Checkpoints that are written beside the training: in order, whole, and none that is overtaken."""

import errno
from pathlib import Path
from threading import Event

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_modules.atomic_checkpoint import BackgroundCheckpointIO


class SlowDisk:
    """Writing waits until `released`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released, self.begun, self.written = Event(), Event(), []
        write = TorchCheckpointIO.save_checkpoint

        def save_checkpoint(io, checkpoint, path, storage_options=None):
            self.begun.set()
            assert self.released.wait(30)
            self.written.append(Path(path).name)
            write(io, checkpoint, path, storage_options)

        monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", save_checkpoint)


@pytest.fixture
def disk(monkeypatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_what_is_saved_is_the_state_at_the_call(tmp_path, disk):
    io, state = BackgroundCheckpointIO(), {"weights": torch.ones(3), "epoch": 1}
    io.save_checkpoint({"state": state}, tmp_path / "last.ckpt")
    state["weights"].add_(1)
    state["epoch"] = 2
    disk.released.set()
    loaded = io.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["state"]
    assert loaded["weights"].tolist() == [1, 1, 1] and loaded["epoch"] == 1


def test_checkpoints_that_are_overtaken_are_not_written(tmp_path, disk):
    io = BackgroundCheckpointIO()
    io.save_checkpoint({"epoch": 0}, tmp_path / "last.ckpt")
    assert disk.begun.wait(30)
    for epoch in range(1, 4):
        io.save_checkpoint({"epoch": epoch}, tmp_path / f"best-{epoch}.ckpt")
        io.save_checkpoint({"epoch": epoch}, tmp_path / "last.ckpt")
        if epoch > 1:
            io.remove_checkpoint(tmp_path / f"best-{epoch - 1}.ckpt")
    disk.released.set()
    io.teardown()
    assert disk.written == ["last.ckpt.part", "last.ckpt.part", "best-3.ckpt.part"]
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "best-3.ckpt"}
    assert io.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 3


def test_an_earlier_best_is_there_until_the_next_is_written(tmp_path, disk):
    io = BackgroundCheckpointIO()
    disk.released.set()
    io.save_checkpoint({}, tmp_path / "best-0.ckpt")
    io.load_checkpoint(tmp_path / "best-0.ckpt", weights_only=True)
    disk.begun.clear(), disk.released.clear()
    io.save_checkpoint({}, tmp_path / "best-1.ckpt")
    io.remove_checkpoint(tmp_path / "best-0.ckpt")
    assert disk.begun.wait(30)
    assert (tmp_path / "best-0.ckpt").exists()
    disk.released.set()
    io.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["best-1.ckpt"]


def test_an_error_is_raised_in_the_end_and_nothing_after_it_is_removed(tmp_path, monkeypatch):
    io = BackgroundCheckpointIO()
    io.save_checkpoint({}, tmp_path / "best-0.ckpt")
    io.load_checkpoint(tmp_path / "best-0.ckpt", weights_only=True)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    io.save_checkpoint({}, tmp_path / "best-1.ckpt")
    io.remove_checkpoint(tmp_path / "best-0.ckpt")
    with pytest.raises(OSError, match="No space left"):
        io.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["best-0.ckpt"]
