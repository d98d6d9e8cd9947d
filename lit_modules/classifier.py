"""The LightningModule: ResNet18 trained as a classifier, with torchmetrics for what it is worth."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_modules.resnet import ResNet18, Stem

Batch = tuple[Tensor, Tensor]


def accuracies(num_classes: int) -> MetricCollection:
    """top1 and top5 (top-`num_classes` below five classes) of logits [N, num_classes] and labels [N], as fractions."""
    return MetricCollection(
        {
            f"top{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro", validate_args=False)
            for k in (1, 5)
        }
    )


class MeanLoss(MeanMetric):
    """The mean of losses [N], summed in float64 also in a module that is half precision; a NaN makes it NaN."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")
        self.set_dtype(torch.float64)

    def _apply(self, fn: Callable[[Tensor], Tensor], *arguments: Any) -> nn.Module:
        return super()._apply(lambda tensor: fn(tensor).double(), *arguments)


class ImageClassifier(LightningModule):
    """ResNet18 trained by SGD with Nesterov momentum on a one-cycle schedule.

    Args:
        stem, width, num_classes, in_channels: see `ResNet18`.
        lr: peak learning rate, for the data module's batch size.
        warmup: fraction of the training in which the rate rises from `lr` / 25 to `lr`; then it falls to zero.
        momentum: of SGD.
        weight_decay: of convolution and linear weights; biases and batch norms have none.
        label_smoothing: of the training loss, from 0 to 1; validation and test use the plain cross entropy.
        channels_last: train on GPUs in the channels_last memory format; afterwards the network is contiguous. Never on
            a CPU, where PyTorch 2.11's backward of a strided 1x1 convolution writes out of bounds in that format.
    """

    hparams: Any  # with the constructor's arguments as attributes

    def __init__(
        self,
        stem: Stem = "cifar",
        width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        lr: float = 0.4,
        warmup: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.1,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = ResNet18(stem, width, num_classes, in_channels)
        self.memory_format = torch.contiguous_format
        self.train_metrics = accuracies(num_classes).clone(prefix="train/")
        self.val_metrics = accuracies(num_classes).clone(prefix="val/")
        self.test_metrics = accuracies(num_classes).clone(prefix="test/")
        self.val_loss = MeanLoss()
        self.test_loss = MeanLoss()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of normalised images [N, in_channels, S, S]."""
        return self.network(images)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.hparams.channels_last and self.trainer.strategy.root_device.type == "cuda":
            self._use(torch.channels_last)

    def teardown(self, stage: str) -> None:
        self._use(torch.contiguous_format)

    def _use(self, memory_format: torch.memory_format) -> None:
        self.memory_format = memory_format
        self.network.to(memory_format=memory_format)  # type: ignore[call-overload]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images.contiguous(memory_format=self.memory_format))
        loss = cross_entropy(logits, labels, label_smoothing=self.hparams.label_smoothing)
        self.train_metrics.update(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val/loss", self.val_loss, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test/loss", self.test_loss, self.test_metrics)

    def _evaluate(self, batch: Batch, loss_name: str, mean_loss: MeanLoss, metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images.contiguous(memory_format=self.memory_format))
        mean_loss.update(cross_entropy(logits.float(), labels, reduction="none"))
        metrics.update(logits, labels)
        self.log(loss_name, mean_loss, prog_bar=True)
        self.log_dict(metrics, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        hparams = self.hparams
        decayed = [m.weight for m in self.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        rest = [p for p in self.network.parameters() if all(p is not weight for weight in decayed)]
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": hparams.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=hparams.lr,
            momentum=hparams.momentum,
            nesterov=True,
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=hparams.lr,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=hparams.warmup,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run follows the schedule of its own length, so that `max_epochs` may be raised."""
        for scheduler in checkpoint.get("lr_schedulers", []):
            for key in ("total_steps", "_schedule_phases"):
                scheduler.pop(key, None)
