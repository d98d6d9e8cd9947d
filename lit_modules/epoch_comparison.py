"""Curves over training: the validations of PyTorch's and of Triton's layers, on the same weights and batches."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import tritonnn
from lit_modules import dashboard
from lit_modules.evaluation_result import Epoch
from lit_modules.side import Side
from lit_modules.trees import batch_size, mapped

SIDES = dashboard.RUNS[:2]


class EpochComparison:
    """Makes every `every`-th validation of a training again, on a copy of the module with each kind of layers.

    What the training itself logs and does is left alone.

    Args:
        epochs: where what is found is put, as in the TensorBoard runs, from epoch to epoch.
        layers: what to swap, as in `tritonnn.swap`.
        every: epochs from one comparison to the next.
        interpreter: whether Triton's steps are timed also where it runs in its interpreter.
    """

    def __init__(self, epochs: list[Epoch], layers: str | Sequence[str], every: int, interpreter: bool) -> None:
        self.epochs, self.layers, self.every, self.interpreter = epochs, layers, every, interpreter
        self._sides: dict[str, Side] = {}
        self._ms: dict[str, list[float]] = {}
        self._size = 0
        self._writers: dict[str, SummaryWriter] = {}

    def start(self, trainer: Trainer, module: LightningModule, memory_format: torch.memory_format) -> None:
        """Before a validation."""
        self._sides, self._ms, self._size = {}, {side: [] for side in SIDES}, 0
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every:
            return
        context = trainer.precision_plugin.forward_context
        with _only_what_can_be_copied(module):
            self._sides = {side: Side(module, trainer, "validate", context, memory_format) for side in SIDES}
        for side in self._sides.values():
            tritonnn.restore(side.module)
        tritonnn.swap(self._sides["triton"].module, self.layers)

    def add(self, batch: Any, indices: tuple[int, ...], device: torch.device) -> None:
        """A batch, as the module's own step has found it."""
        self._size = max(self._size, batch_size(batch))
        for name, side in self._sides.items():
            own = mapped(torch.clone, batch)
            _wait_for(device)
            start = time.perf_counter()
            side.step(own, indices)
            _wait_for(device)
            self._ms[name].append((time.perf_counter() - start) * 1e3 / batch_size(batch))

    def end(self, trainer: Trainer, folder: Path | None) -> None:
        """After the validation; called on all processes, of which the first writes."""
        if not self._sides:
            return
        metrics = {name: side.metrics() for name, side in self._sides.items()}
        timed = [side for side in SIDES if self.interpreter or side == "pytorch" or torch.cuda.is_available()]
        # The least by sample: the first batch of all waits for kernels to be compiled, and the last may be smaller.
        ms = {side: min(self._ms[side]) * self._size for side in timed if self._ms[side]}
        self._sides = {}
        epoch = Epoch(trainer.current_epoch, metrics, ms)
        self.epochs[:] = [*(before for before in self.epochs if before.epoch < epoch.epoch), epoch]
        if folder is not None and trainer.is_global_zero:
            for side in SIDES:
                if side not in self._writers:  # one file: TensorBoard may read those of one second in another order
                    self._writers[side] = SummaryWriter(str(folder / side))
                dashboard.write_epochs(self._writers[side], [epoch], side)
                self._writers[side].flush()

    def close(self) -> None:
        """After the training."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _only_what_can_be_copied(module: nn.Module) -> Iterator[None]:
    """Puts attributes aside that belong to the training alone, such as a recorded step, and cannot be copied."""
    aside = {}
    for name, value in vars(module).items():
        if not name.startswith("_trainer") and name not in ("_modules", "_parameters", "_buffers"):
            try:
                copy.deepcopy(value, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
            except Exception:  # whatever it says to being copied
                aside[name] = value
    vars(module).update(dict.fromkeys(aside))
    try:
        yield
    finally:
        vars(module).update(aside)
