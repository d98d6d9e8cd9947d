"""The LightningModule: a network trained as a classifier, with torchmetrics for what it is worth."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import tritonnn
from lit_modules.networks import RESNET18, classification_network
from lit_modules.resnet import Stem
from lit_modules.training_step import Compute, GraphedStep, classification

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
    """A network, ResNet18 unless told otherwise, trained by SGD with Nesterov momentum on a one-cycle schedule.

    Args:
        stem: of resnet18: "cifar" for images of 32x32, "imagenet" for 224x224.
        width: of resnet18: channels of the first stage.
        num_classes: number of logits, at least two; the data's.
        in_channels: channels of the images; the data's.
        lr: peak learning rate, for the data module's batch size; more than 0.
        warmup: fraction of the training in which the rate rises from `lr` / 25 to `lr`; then it falls to zero.
        momentum: of SGD, more than 0 and less than 1.
        weight_decay: of convolution and linear weights, not negative; biases and batch norms have none.
        label_smoothing: of the training loss, from 0 to 1; validation and test use the plain cross entropy.
        channels_last: train on GPUs in the channels_last memory format; afterwards the network is contiguous. Never on
            a CPU, where PyTorch 2.11's backward of a strided 1x1 convolution writes out of bounds in that format.
        triton_layers: train on Triton's layers: "none", "all", kinds of layers, or "fused" for all, where batch norms
            take the sum and the ReLU after them (`tritonnn.fuse_for_training`). Checkpoints are the same.
        compile: train on what `torch.compile` makes of network and loss. That takes longer than it saves in a training
            of a minute.
        cuda_graph: record forward and backward pass of a step as a CUDA graph, which the CPU launches at once; None
            does where it can: on a GPU, without accumulated gradients, in a precision that scales no loss.
        network: "resnet18", torchvision.models.NAME, timm/NAME, or package.module.Class with an argument num_classes.

    Raises:
        ValueError: an argument is out of its range.
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
        triton_layers: str | list[str] = "none",
        compile: bool = False,
        cuda_graph: bool | None = None,
        network: str = RESNET18,
    ) -> None:
        super().__init__()
        _check("width", width, width >= 1, "at least 1")
        _check("num_classes", num_classes, num_classes >= 2, "at least 2")
        _check("in_channels", in_channels, in_channels >= 1, "at least 1")
        _check("lr", lr, 0 < lr < math.inf, "more than 0, and finite")
        _check("warmup", warmup, 0 <= warmup <= 1, "from 0 to 1")
        _check("momentum", momentum, 0 < momentum < 1, "more than 0 and less than 1")
        _check("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0, and finite")
        _check("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "from 0 to 1")
        kinds = [triton_layers] if isinstance(triton_layers, str) else triton_layers
        known = triton_layers in ("none", "all", "fused") or kinds and set(kinds) <= set(tritonnn.KINDS)
        _check("triton_layers", triton_layers, known, f"none, all, fused or any of {', '.join(tritonnn.KINDS)}")
        self.save_hyperparameters()
        self.network = classification_network(network, num_classes, in_channels, stem, width)
        self.memory_format = torch.contiguous_format
        self._step: Compute | None = None
        self._graphed = False
        self.val_metrics = accuracies(num_classes).clone(prefix="val/")
        self.test_metrics = accuracies(num_classes).clone(prefix="test/")
        self.val_loss = MeanLoss()
        self.test_loss = MeanLoss()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of normalised images [N, in_channels, S, S], without those of auxiliary heads."""
        logits = self.network(images)
        return logits[0] if self.training and isinstance(logits, tuple) else logits

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.hparams.channels_last and self._on_gpu():
            self._use(torch.channels_last)
        if self.hparams.triton_layers == "fused":
            tritonnn.fuse_for_training(self.network)
        elif self.hparams.triton_layers != "none":
            tritonnn.swap(self.network, layers=self.hparams.triton_layers)

    def teardown(self, stage: str) -> None:
        if self._graphed:
            self.zero_grad()  # they lie in the graph's memory, which is free then
        self._step, self._graphed = None, False
        if self.hparams.triton_layers != "none":
            tritonnn.restore(self.network)
        self._use(torch.contiguous_format)

    def _use(self, memory_format: torch.memory_format) -> None:
        self.memory_format = memory_format
        self.network.to(memory_format=memory_format)  # type: ignore[call-overload]

    def _on_gpu(self) -> bool:
        return self.trainer.strategy.root_device.type == "cuda"

    def _make_step(self) -> None:
        hparams, reason = self.hparams, self._why_no_graph()
        if hparams.cuda_graph and reason:
            raise MisconfigurationException(f"model.cuda_graph {reason}")
        self._graphed = not reason if hparams.cuda_graph is None else hparams.cuda_graph
        compute = classification(self.forward, hparams.label_smoothing)
        if not self._graphed:
            self._step = torch.compile(compute, dynamic=False) if hparams.compile else compute
        else:
            parameters = [p for p in self.parameters() if p.requires_grad]
            self._step = GraphedStep(compute, parameters, self.memory_format, hparams.compile, bool(hparams.cuda_graph))
            if isinstance(self.trainer.model, DistributedDataParallel):
                self.trainer.model.require_backward_grad_sync = False  # the step averages gradients,
                torch._dynamo.config.optimize_ddp = False  # so that there is no need to cut the network in buckets

    def _why_no_graph(self) -> str:
        """Why no CUDA graph can hold a step of this training; "" where one can."""
        trainer = self.trainer
        if not self._on_gpu():
            return "needs a CUDA GPU"
        if trainer.accumulate_grad_batches != 1:
            return "does not go with trainer.accumulate_grad_batches"
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return "does not go with trainer.precision 16-mixed, which scales the loss by what it was before"
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            return "does not go with trainer.sync_batchnorm"
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            return f"does not go with trainer.strategy {type(trainer.strategy).__name__}"
        return ""

    def on_train_epoch_start(self) -> None:
        self._hits, self._seen = torch.zeros(2, dtype=torch.int64, device=self.device), 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        if not self._graphed:
            images = images.contiguous(memory_format=self.memory_format)
        loss, hits = self._step(images, labels)
        self._hits += hits
        self._seen += len(labels)
        every = self.trainer.log_every_n_steps
        if self.trainer.is_last_batch or every and (self.trainer.global_step + 1) % every == 0:
            self.log("train/loss", loss.detach())
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self._graphed:  # else the step has done it
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self._graphed:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_epoch_end(self) -> None:
        if self._seen:
            for name, share in zip(("train/top1", "train/top5"), self._hits / self._seen):
                self.log(name, share, sync_dist=True)

    def on_validation_start(self) -> None:
        if self._graphed and distributed.is_available() and distributed.is_initialized():
            for buffer in self.network.buffers():  # each process has batch statistics of its own
                if buffer.is_floating_point():
                    distributed.all_reduce(buffer, distributed.ReduceOp.AVG)

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
        # A rate of 1, which the schedule multiplies: so it follows `lr` also where that is found or changed later.
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": hparams.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=1.0,
            momentum=hparams.momentum,
            nesterov=True,
            fused=self._on_gpu() and getattr(self.trainer.precision_plugin, "scaler", None) is None,
        )
        self.steps = self.trainer.estimated_stepping_batches
        if math.isinf(self.steps):
            raise MisconfigurationException("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        scheduler = LambdaLR(optimizer, lambda step: one_cycle(step, int(self.steps), hparams.warmup, hparams.lr))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Puts the rate where the schedule has it, which finders of rates and batch sizes and a resumption do not.

        Raises:
            MisconfigurationException: a resumed training has epochs of another length, and the schedule counts steps;
                or `cuda_graph` was asked for where no graph can hold a step.
        """
        if self._step is None:
            self._make_step()
        trainer, scheduler = self.trainer, self.lr_schedulers()
        if not isinstance(scheduler, LambdaLR) or trainer.fast_dev_run or math.isinf(trainer.num_training_batches):
            return  # a learning rate finder's trial, or epochs of no length
        self.steps = trainer.estimated_stepping_batches
        for group, rate in zip(self.optimizers().param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = rate(scheduler.last_epoch)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        done, epochs = trainer.global_step, trainer.current_epoch
        if not epochs * steps <= done <= (epochs + 1) * steps:
            raise MisconfigurationException(
                f"the checkpoint made {done} steps in {epochs} epochs, this training makes {steps} an epoch: resume "
                "with the batch size, devices and limits of the first part"
            )


def one_cycle(step: int, steps: int, warmup: float, lr: float = 1.0) -> float:
    """The learning rate: a cosine from `lr` / 25 to `lr` over `warmup` of the steps, then one to `lr` / 250,000.

    That is `torch.optim.lr_scheduler.OneCycleLR`, which divides by zero where a phase has no step.
    """
    peak, last, least = max(warmup * steps - 1, 0.0), steps - 1, lr / 25 / 1e4
    if step < peak:
        return _cosine(lr / 25, lr, step / peak)
    if peak < last:
        return _cosine(lr, least, min((step - peak) / (last - peak), 1.0))
    return lr


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * share) + 1)


def _check(name: str, value: Any, holds: Any, may_be: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {may_be}, got {value}")
