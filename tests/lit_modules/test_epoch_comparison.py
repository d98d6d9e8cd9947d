"""Validations during a training, made again with PyTorch's and with Triton's layers."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_classifier import TinyClassifier, loader, random_images
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.functional import cross_entropy

import tritonnn
from lit_modules.triton_evaluation import TritonEvaluation


class Trained(TinyClassifier):
    """Learns, and validates what it has learned; a recorded step, as of a CUDA graph, cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = (number for number in range(3))
        self.validations: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.validations.append(len(images))
        self.log("val/top1", (logits.argmax(1) == labels).float().mean())
        self.log("val/loss", cross_entropy(logits, labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    evaluation: TritonEvaluation, epochs: int, checkpoint: Path | None = None, **arguments
) -> tuple[Trainer, Trained]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "devices": 1}
    trainer = Trainer(max_epochs=epochs, callbacks=evaluation, **quiet | {"enable_checkpointing": False} | arguments)
    module = Trained()
    trainer.fit(module, loader(random_images(8)), loader(random_images(10)), ckpt_path=checkpoint)
    return trainer, module


def curve(folder: Path, run: str, name: str) -> list[tuple[int, float]]:
    points = EventAccumulator(str(folder / run)).Reload().Scalars(f"2_training/{name} after each epoch")
    return [(point.step, pytest.approx(point.value, rel=1e-6)) for point in points]


def test_both_sides_are_what_the_training_logs(tmp_path):
    logged = []

    class Watched(TritonEvaluation):
        def on_validation_epoch_end(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking:
                logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    evaluation = Watched(every_n_epochs=1, log_dir=tmp_path, latency=False)
    _, module = fit(evaluation, 3)
    epochs = evaluation.epochs
    assert [epoch.epoch for epoch in epochs] == [0, 1, 2]
    for epoch, expected in zip(epochs, logged, strict=True):
        for side in ("pytorch", "triton"):
            assert epoch.metrics[side] == pytest.approx(expected, rel=1e-5)
    assert len({epoch.metrics["pytorch"]["val/loss"] for epoch in epochs}) == 3  # it learns
    for side in ("pytorch", "triton"):
        assert curve(tmp_path, side, "loss") == [(e.epoch, e.metrics[side]["val/loss"]) for e in epochs]
        assert len(list((tmp_path / side).glob("events*"))) == 1  # of several, TensorBoard may miss some
    assert module.validations == 2 * [4] + 3 * [4, 4, 2]  # copies do not touch it
    assert next(module.recorded) == 0


def test_every_second_epoch(tmp_path):
    evaluation = TritonEvaluation(every_n_epochs=2, log_dir=tmp_path)
    fit(evaluation, 5)
    assert [epoch.epoch for epoch in evaluation.epochs] == [1, 3]


def test_triton_is_swapped_in_on_its_side_only(tmp_path, monkeypatch):
    right = tritonnn.TritonLinear.forward
    monkeypatch.setattr(tritonnn.TritonLinear, "forward", lambda self, x: 2 * right(self, x))
    evaluation = TritonEvaluation(every_n_epochs=1, log_dir=tmp_path)
    fit(evaluation, 1)
    (epoch,) = evaluation.epochs
    assert epoch.metrics["triton"]["val/loss"] != pytest.approx(epoch.metrics["pytorch"]["val/loss"], rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("interpreter", "sides"), [(False, {"pytorch"}), (True, {"pytorch", "triton"})])
def test_the_interpreter_is_timed_only_if_asked(tmp_path, interpreter, sides):
    evaluation = TritonEvaluation(every_n_epochs=1, log_dir=tmp_path, time_interpreter=interpreter)
    fit(evaluation, 1)
    assert evaluation.epochs[0].batch_ms.keys() == sides


def test_curves_go_on_when_a_training_is_resumed(tmp_path):
    first = TritonEvaluation(every_n_epochs=1, log_dir=tmp_path / "logs")
    trainer, _ = fit(first, 2, enable_checkpointing=True, default_root_dir=tmp_path)
    path = tmp_path / "checkpoint.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"]
    second = TritonEvaluation(every_n_epochs=1, log_dir=tmp_path / "logs")
    fit(second, 3, path)
    assert second.epochs[:2] == first.epochs and len(second.epochs) == 3
    later = TritonEvaluation(latency=False)
    Trainer(callbacks=later, devices=1, logger=False, enable_progress_bar=False).test(
        TinyClassifier(), loader(random_images(4)), ckpt_path=path, verbose=False
    )
    assert later.result.epochs == first.epochs


def test_the_evaluation_afterwards_has_the_curves(tmp_path):
    evaluation = TritonEvaluation("all", every_n_epochs=1, log_dir=tmp_path, latency=False)
    trainer, module = fit(evaluation, 2)
    module.recorded = None
    trainer.test(module, loader(random_images(4)), verbose=False)
    assert evaluation.result.epochs == evaluation.epochs
    assert len(curve(tmp_path, "triton", "top1")) == 2
    assert "Validations during training" in (tmp_path / "results.md").read_text()


def test_an_epoch_of_no_length_is_an_error():
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1 or None, got 0"):
        TritonEvaluation(every_n_epochs=0)
