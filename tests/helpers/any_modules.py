"""Small LightningModules for many tasks, as people write them, and batches for them."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import JaccardIndex, MeanSquaredError, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelF1Score,
)

SIZE, SAMPLES, CLASSES = 8, 10, 5


class Samples(Dataset):
    """`make(generator)` for each of ten samples, seeded by its index."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.make(torch.Generator().manual_seed(index), index)


def batches(module: "AnyModule") -> DataLoader:
    return DataLoader(Samples(module.sample), batch_size=4)


def image(generator: torch.Generator, channels: int = 3) -> Tensor:
    return torch.randn(channels, SIZE, SIZE, generator=generator)


def label(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(CLASSES, shape, generator=generator)


def features(channels: int = 3, width: int = 8) -> nn.Sequential:
    """Images to [N, width]."""
    layers = nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network[1].running_mean.normal_(0, 0.2)
    network[1].running_var.uniform_(0.5, 2)
    return network


class AnyModule(LightningModule):
    """A network of convolutions and a head, in `make`, after the seed; `sample` is one of its data set."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make()

    def make(self) -> None:
        self.backbone = features()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.backbone(images))

    @staticmethod
    def sample(generator: torch.Generator, index: int) -> Any:
        return image(generator), label(generator)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.evaluate(batch, "test")

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.evaluate(batch, "val")

    def evaluate(self, batch: Any, stage: str) -> Any:
        raise NotImplementedError


class DictBatch(AnyModule):
    """A batch and an output that are dictionaries; the step takes things out of the batch."""

    def make(self) -> None:
        super().make()
        self.metrics = MetricCollection(
            {"acc": MulticlassAccuracy(CLASSES), "f1": MulticlassF1Score(CLASSES)}, prefix="metrics/"
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        return {"features": features, "logits": self.head(features)}

    @staticmethod
    def sample(generator, index):
        return {"name": f"image {index}", "id": index % 3, "image": image(generator), "label": label(generator)}

    def evaluate(self, batch, stage):
        outputs = self(batch.pop("image").mul_(2))
        self.metrics.update(outputs["logits"], batch["label"])
        self.log(f"{stage}/loss", F.cross_entropy(outputs["logits"], batch["label"]))
        self.log_dict(self.metrics)


class ThreeTuple(AnyModule):
    """Images, the index of each, and its label: two integers, of which the step computes with one."""

    @staticmethod
    def sample(generator, index):
        return image(generator), index % 4, label(generator)

    def evaluate(self, batch, stage):
        images, _, labels = batch
        self.log(f"{stage}/loss", F.cross_entropy(self(images), labels), batch_size=len(labels))


@dataclass
class Pair:
    left: Tensor
    right: Tensor
    score: Tensor


class SeveralInputs(AnyModule):
    """Two images by name, of which one is optional, in a dataclass; outputs are a dataclass, a tuple and a list."""

    def make(self) -> None:
        self.backbone = features()
        self.head = nn.Linear(16, 1)
        self.error = MeanSquaredError()

    def forward(self, left: Tensor, *, right: Tensor | None = None) -> Any:
        a, b = self.backbone(left), self.backbone(right)
        score = self.head(torch.cat([a, b], 1)).squeeze(1)
        return Pair(a, b, score), (score, [a - b])

    @staticmethod
    def sample(generator, index):
        return image(generator), image(generator), torch.randn((), generator=generator)

    def evaluate(self, batch, stage):
        left, right, target = batch
        pair, _ = self(left, right=right)
        self.error.update(pair.score, target)
        self.log(f"{stage}/mse", self.error)


class Segmentation(AnyModule):
    """Logits [N, C, H, W] and masks [N, 1, H, W] in which 255 is to be ignored."""

    def make(self) -> None:
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)
        )
        self.iou = JaccardIndex("multiclass", num_classes=CLASSES, ignore_index=255)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.network(images)}

    @staticmethod
    def sample(generator, index):
        mask = label(generator, 1, SIZE, SIZE).to(torch.uint8)
        mask[:, 0] = 255
        return image(generator), mask

    def evaluate(self, batch, stage):
        images, mask = batch
        mask = mask.squeeze(1).long()
        logits = self(images)["out"]
        self.iou.update(logits, mask)
        self.log(f"{stage}/loss", F.cross_entropy(logits, mask, ignore_index=255))
        self.log(f"{stage}/iou", self.iou)


class MultiLabel(AnyModule):
    def make(self) -> None:
        super().make()
        self.f1 = MultilabelF1Score(CLASSES)

    @staticmethod
    def sample(generator, index):
        return image(generator), torch.randint(2, (CLASSES,), generator=generator)

    def evaluate(self, batch, stage):
        images, labels = batch
        logits = self(images)
        self.f1.update(logits, labels)
        self.log(f"{stage}/bce", F.binary_cross_entropy_with_logits(logits, labels.float()))
        self.log(f"{stage}/f1", self.f1)


class Regression(AnyModule):
    """Collects its outputs, logs at the end of the epoch, and draws random numbers."""

    def make(self) -> None:
        super().make()
        self.predicted: list[Tensor] = []

    @staticmethod
    def sample(generator, index):
        return image(generator), torch.randn(CLASSES, generator=generator)

    def on_test_epoch_start(self):
        self.predicted = []

    on_validation_epoch_start = on_test_epoch_start

    def evaluate(self, batch, stage):
        images, target = batch
        self.predicted.append(self(images + 0.1 * torch.randn_like(images)))
        self.log(f"{stage}/worst", F.l1_loss(self.predicted[-1], target), reduce_fx="max")

    def on_test_epoch_end(self):
        predicted = torch.cat(self.predicted)
        assert len(predicted) == SAMPLES
        self.log("spread", predicted.std())

    on_validation_epoch_end = on_test_epoch_end


class OneLogit(AnyModule):
    """Binary, one logit a sample."""

    def make(self) -> None:
        self.backbone = features()
        self.head = nn.Linear(8, 1)
        self.accuracy, self.auroc = BinaryAccuracy(), BinaryAUROC()

    @staticmethod
    def sample(generator, index):
        return image(generator), torch.tensor(index % 2)

    def evaluate(self, batch, stage):
        images, labels = batch
        logits = self(images).squeeze(1)
        for metric in (self.accuracy, self.auroc):
            metric.update(logits, labels)
        self.log(f"{stage}/loss", F.binary_cross_entropy_with_logits(logits, labels.float()))
        self.log(f"{stage}/accuracy", self.accuracy)
        self.log(f"{stage}/auroc", self.auroc)


class WithoutForward(AnyModule):
    """The step calls parts of the module, one of them twice, and a loss without weights."""

    forward = LightningModule.forward

    def make(self) -> None:
        self.net = nn.Module()
        self.net.backbone, self.net.head = features(), nn.Linear(8, CLASSES)
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = MulticlassAccuracy(CLASSES)

    def evaluate(self, batch, stage):
        images, labels = batch
        y = self.net.backbone(images) + self.net.backbone(images.flip(3))
        logits = self.net.head(y)
        self.log(f"{stage}/loss", self.loss(logits, labels))
        self.accuracy(logits, labels)
        self.log(f"{stage}/accuracy", self.accuracy)


MODULES = [
    DictBatch,
    ThreeTuple,
    SeveralInputs,
    Segmentation,
    MultiLabel,
    Regression,
    OneLogit,
    WithoutForward,
]
