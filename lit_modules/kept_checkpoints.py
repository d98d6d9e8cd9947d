"""Which checkpoints a training keeps: the best by a metric, and that of the last epoch."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

LAST = "last.ckpt"


class BestCheckpoint(ModelCheckpoint):
    """Keeps the `save_top_k` best checkpoints by `monitor`.

    A training that is resumed into another folder goes on from the best so far, copied there as it starts: each folder
    is complete. (Lightning's own forgets the scores, so that the first epoch after the resumption would be the best.)
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "best-{epoch:02d}-{val/top1:.4f}",
        monitor: str = "val/top1",
        mode: str = "max",
        save_top_k: int = 1,
        auto_insert_metric_name: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dirpath,
            filename,
            monitor,
            save_last=False,  # `LastCheckpoint` does, also after an epoch that is none of the best
            save_top_k=save_top_k,
            mode=mode,
            auto_insert_metric_name=auto_insert_metric_name,
            **kwargs,
        )
        self._to_copy: dict[str, str] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = {path: str(Path(self.dirpath, Path(path).name)) for path in state_dict["best_k_models"]}
        if state_dict["dirpath"] != self.dirpath:
            if not here or not all(Path(path).is_file() for path in here):
                return  # moved or deleted: the best is that of the epochs to come
            self._to_copy = here
            state_dict = state_dict | {
                "dirpath": self.dirpath,
                "best_k_models": {here[path]: score for path, score in state_dict["best_k_models"].items()},
                "best_model_path": here[state_dict["best_model_path"]],
                "kth_best_model_path": here.get(state_dict["kth_best_model_path"], ""),
            }
        super().load_state_dict(state_dict)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            for source, target in self._to_copy.items():
                _copy(source, target)
        self._to_copy = {}


class LastCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint of the last finished epoch, `last.ckpt`, whatever its score."""

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(dirpath, Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False)

    def state_dict(self) -> dict[str, Any]:
        return {}


def _copy(source: str, target: str) -> None:
    """Whole or not at all."""
    part = Path(f"{target}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
