"""A classifier of every kind of layer and no more, for the tests of the evaluation."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lit_modules.triton_evaluation import TritonEvaluation

CLASSES = 6


class TinyClassifier(LightningModule):
    """Images [N, 3, 8, 8] to logits [N, 6]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)


def random_images(number: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (number,), generator=generator))


def loader(dataset: Dataset, **arguments) -> DataLoader:
    return DataLoader(dataset, batch_size=4, **arguments)


def evaluation_trainer(evaluation: TritonEvaluation, **arguments) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"devices": 1, "logger": False} | quiet
    return Trainer(callbacks=evaluation, **defaults | arguments)
