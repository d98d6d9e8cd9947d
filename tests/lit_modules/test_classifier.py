"""The LightningModule: its metrics, its optimizer, and checkpoints that load without running code."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lit_modules.classifier import ImageClassifier, accuracies, one_cycle

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


@pytest.mark.parametrize("steps, warmup", [(200, 0.2), (40, 0.3), (7, 0.5), (10, 0.999)])
def test_the_schedule_is_pytorchs_one_cycle(steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = OneCycleLR(optimizer, 0.4, steps, pct_start=warmup, cycle_momentum=False)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [one_cycle(step, steps, warmup, 0.4) for step in range(steps)] == rates


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_a_schedule_of_any_length_trains(steps, warmup):
    rates = [one_cycle(step, steps, warmup) for step in range(steps + 1)]
    assert all(0 <= rate <= 1 for rate in rates) and max(rates[:-1]) > 0


def test_five_steps_are_trained_of_which_one_would_be_the_warm_up(tmp_path):
    fit = trainer(tmp_path, max_epochs=5, limit_train_batches=1, enable_checkpointing=False)
    fit.fit(ImageClassifier(width=4), loader())  # a warm-up of 0.2: OneCycleLR divides by zero
    assert fit.global_step == 5


def test_a_rate_that_was_found_is_the_schedules(tmp_path):
    class Finder(Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.hparams.lr = 0.123
            trainer.optimizers[0].param_groups[0]["lr"] = 7.0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = []
    fit = trainer(tmp_path, max_epochs=5, enable_checkpointing=False, callbacks=Finder())
    fit.fit(ImageClassifier(width=4, lr=0.01), loader())
    assert rates == [one_cycle(step, 10, 0.2, 0.123) for step in range(10)]


def test_a_training_without_end_has_no_schedule(tmp_path):
    with pytest.raises(MisconfigurationException, match="set trainer.max_epochs"):
        trainer(tmp_path, max_epochs=-1, enable_checkpointing=False).fit(ImageClassifier(width=4), loader())


@pytest.mark.parametrize("batch_size", [2, 7])
def test_a_training_is_not_resumed_with_epochs_of_another_length(tmp_path, batch_size):
    first = trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    first.fit(ImageClassifier(width=4), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="made 4 steps in 2 epochs, this training makes"):
        second.fit(ImageClassifier(width=4), loader(batch_size), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("width", 0),
        ("num_classes", 1),
        ("in_channels", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("warmup", 2.0),
        ("momentum", 0.0),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("label_smoothing", 2.0),
        ("triton_layers", "conv3d"),
    ],
)
def test_argument_out_of_range(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must be .*, got {value}$"):
        ImageClassifier(**{argument: value})


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


def test_a_graph_that_cannot_be_recorded_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="model.cuda_graph needs a CUDA GPU"):
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(
            ImageClassifier(width=4, cuda_graph=True), loader()
        )


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"cuda_graph": True}, {"compile": True, "cuda_graph": True}], ids=str)
def test_a_recorded_training_is_the_eager_one(tmp_path, options):
    weights = []
    for arguments in ({"cuda_graph": False, "compile": False}, options):
        torch.manual_seed(0)
        classifier = ImageClassifier(width=8, lr=0.01, **arguments)
        fit = trainer(tmp_path, "gpu", max_epochs=10, enable_checkpointing=False)
        fit.fit(classifier, loader())  # a last batch of three
        assert fit.global_step == 20
        weights.append({name: tensor.cpu() for name, tensor in classifier.state_dict().items()})
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=2e-2, atol=2e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
@pytest.mark.parametrize(
    "layers, kinds",
    [
        ("relu", {"TritonReLU"}),
        (["relu", "linear"], {"TritonReLU", "TritonLinear"}),
        ("fused", {f"Triton{kind}" for kind in ("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "AvgPool2d", "Linear")}),
    ],
    ids=["one kind", "two kinds", "fused"],
)
def test_training_on_tritons_layers_leaves_pytorchs(tmp_path, layers, kinds):
    class Spy(ImageClassifier):
        def forward(self, images):
            seen.append({type(module).__name__ for module in self.network.modules()})
            return super().forward(images)

    seen = []
    torch.manual_seed(0)
    classifier = Spy(width=4, lr=0.01, triton_layers=layers)
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    fit.fit(classifier, loader())
    assert all({kind for kind in found if kind.startswith("Triton")} == kinds for found in seen)
    assert "forward" not in vars(classifier.network)
    fit.test(classifier, loader(), verbose=False)
    assert not any(kind.startswith("Triton") for kind in seen[-1])

    torch.manual_seed(0)
    plain = ImageClassifier(width=4, lr=0.01)
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(plain, loader())
    assert classifier.state_dict().keys() == plain.state_dict().keys()
    for p, q in zip(classifier.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
