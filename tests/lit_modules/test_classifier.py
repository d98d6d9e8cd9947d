"""The LightningModule: its metrics, its optimizer, and checkpoints that load without running code."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_modules.classifier import ImageClassifier, accuracies

IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(7)


def trainer(folder, accelerator: str = "cpu", **arguments) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def loader(batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size)


@pytest.mark.parametrize("num_classes, top5", [(10, 0.75), (3, 1.0)])
def test_accuracies_are_shares_of_the_samples(num_classes, top5):
    logits = torch.arange(num_classes).float().expand(4, -1)  # ranks the classes from the last to the first
    labels = torch.tensor([num_classes - 1, num_classes - 1, num_classes - 2, 0])
    metrics = accuracies(num_classes)
    metrics.update(logits, labels)
    assert {name: value.item() for name, value in metrics.compute().items()} == {"top1": 0.5, "top5": top5}


def test_loss_and_accuracy_weigh_samples_not_batches(tmp_path):
    classifier = ImageClassifier(width=4)
    (metrics,) = trainer(tmp_path).test(classifier, loader(), verbose=False)  # batches of 4 and 3
    with torch.no_grad():
        logits = classifier.eval()(IMAGES)
    assert metrics["test/loss"] == pytest.approx(cross_entropy(logits, LABELS).item(), rel=1e-5)
    assert metrics["test/top1"] == pytest.approx((logits.argmax(1) == LABELS).float().mean().item())


def test_losses_of_a_network_in_bfloat16_are_not_summed_in_it(tmp_path):
    class Spy(ImageClassifier):
        def forward(self, images):
            logits.append(super().forward(images))
            return logits[-1]

    logits = []
    (metrics,) = trainer(tmp_path, precision="bf16-true").test(Spy(width=4), loader(batch_size=1), verbose=False)
    assert logits[0].dtype == torch.bfloat16
    assert metrics["test/loss"] == pytest.approx(cross_entropy(torch.cat(logits).double(), LABELS).item(), rel=1e-6)


def test_a_loss_that_is_no_number_shows(tmp_path):
    images = IMAGES.clone()
    images[0] = torch.nan  # of the first batch; the second is fine
    data = DataLoader(TensorDataset(images, LABELS), batch_size=4)
    (metrics,) = trainer(tmp_path).test(ImageClassifier(width=4), data, verbose=False)
    assert math.isnan(metrics["test/loss"])


def test_only_convolution_and_linear_weights_decay(tmp_path):
    classifier = ImageClassifier(width=4, weight_decay=0.1)
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    fit.fit(classifier, loader())
    decayed, rest = fit.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2, 4} and {p.dim() for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(classifier.parameters()))


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=NEEDS_GPU)])
def test_channels_last_is_for_training_on_a_gpu_only(tmp_path, accelerator):
    class Spy(ImageClassifier):
        def forward(self, images):
            seen.append((self.training, images.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(images)

    seen = []
    classifier = Spy(width=4)
    fit = trainer(tmp_path, accelerator, max_epochs=1, enable_checkpointing=False)
    fit.fit(classifier, loader())
    assert all(p.is_contiguous() for p in classifier.parameters())
    fit.test(classifier, loader(), verbose=False)
    assert seen == [(True, accelerator == "gpu")] * 2 + [(False, False)] * 2


def test_checkpoint_loads_weights_only_and_a_resumed_run_may_be_longer(tmp_path):
    first = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    first.fit(ImageClassifier(width=4, lr=0.01), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")

    restored = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert restored.hparams.width == 4 and restored.hparams.lr == 0.01

    second = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    second.fit(restored, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    uninterrupted = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    uninterrupted.fit(ImageClassifier(width=4, lr=0.01), loader())
    resumed, whole = (fit.lr_scheduler_configs[0].scheduler for fit in (second, uninterrupted))
    assert second.current_epoch == 3
    assert resumed.last_epoch == whole.last_epoch == 6
    assert resumed.get_last_lr() == whole.get_last_lr()
