"""Trains ResNet18 with PyTorch's layers, then tests the best checkpoint with PyTorch's layers and with Triton's.

    python train.py                                      CIFAR-10
    python train.py --config configs/digits.yaml         embedded digits, seconds on a CPU
    python train.py --data ImageFolder --data.root DIR   any DIR/train/<class>/*, DIR/test/<class>/*
    python train.py --ckpt-path last                     resume

Checkpoints go to `checkpoints/<data>/`, TensorBoard and CSV logs to `logs/<data>/`. Every constructor argument and
every option of Lightning's Trainer can be set: see --help and --print_config.
"""

from lit_modules.command_line import UserError, interpret_triton_without_gpu, user_errors_in_one_line

interpret_triton_without_gpu()

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_modules.atomic_checkpoint import AtomicCheckpointIO
from lit_modules.checkpoint import load
from lit_modules.classifier import ImageClassifier
from lit_modules.data import ImageData
from lit_modules.triton_evaluation import TritonEvaluation

DEFAULT_CONFIG = str(Path(__file__).parent / "configs" / "cifar10.yaml")
TYPES_TRIED = re.compile(r"Does not validate.*?Errors:\s*- (.*?)\s*Given value type.*", re.DOTALL)


class TrainingCLI(LightningCLI):
    """LightningCLI with --ckpt_path, --checkpoint and --evaluation, and with folders named for the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ckpt_path", "--ckpt-path", type=str | None, help="Checkpoint to resume from, or 'last'.")
        parser.add_argument("--evaluation", type=TritonEvaluation | None, help="How to test in the end, or null.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "evaluation": {"class_path": "lit_modules.triton_evaluation.TritonEvaluation"},
                "checkpoint.filename": "best-{epoch:02d}-{val/top1:.4f}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.monitor": "val/top1",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
            }
        )
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse lists the types it tried: the cause is what a constructor objects to
            raise UserError(error.__cause__ or error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        name, config, checkpoint = self.datamodule.name, self.config_init.trainer, self.config_init.checkpoint
        root = Path(config.default_root_dir or ".")
        checkpoint.dirpath = checkpoint.dirpath or str(root / "checkpoints" / name)
        if config.logger in (None, True):
            tensorboard = TensorBoardLogger(root / "logs", name, default_hp_metric=False)
            kwargs["logger"] = [tensorboard, CSVLogger(root / "logs", name, tensorboard.version)]
        kwargs["plugins"] = [AtomicCheckpointIO(), *(config.plugins or [])]
        return super().instantiate_trainer(**kwargs)


def command_line(args: ArgsType = None) -> TrainingCLI:
    """The network, the data and the trainer that the command line asks for."""
    cli = TrainingCLI(
        ImageClassifier,
        ImageData,
        subclass_mode_data=True,
        trainer_defaults={"precision": "bf16-mixed" if torch.cuda.is_available() else "32-true", "benchmark": True},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"default_config_files": [DEFAULT_CONFIG], "exit_on_error": False, "allow_abbrev": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        run=False,
        args=args,
    )
    expected, actual = cli.model.network.image_size, cli.datamodule.image_size
    if expected != actual:
        raise UserError(f"the {cli.model.hparams.stem} stem takes images of {expected}, data.image_size is {actual}")
    return cli


def checkpoint_to_resume(cli: TrainingCLI) -> Path | None:
    """What --ckpt_path names, checked to fit the network. Raises UserError where there is none, or it does not fit."""
    if not cli.config.ckpt_path:
        return None
    path = Path(cli.config.ckpt_path)
    if path == Path("last"):
        folder = Path(cli.trainer.checkpoint_callback.dirpath)  # type: ignore[attr-defined]
        lasts = sorted(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
        if not lasts:
            raise UserError(f"there is no last checkpoint in {folder}/ to resume: train without --ckpt-path first")
        path = lasts[-1]
    try:
        cli.model.load_state_dict(load(path)["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} is of another architecture than the network to train") from error
    return path


def train(cli: TrainingCLI) -> None:
    """Fits, keeping the best and the last checkpoint. Raises UserError, saying what was kept, on Ctrl-C."""
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint_to_resume(cli), weights_only=True)
    except SystemExit:
        if not cli.trainer.interrupted:
            raise
        last = cli.trainer.checkpoint_callback.last_model_path  # type: ignore[attr-defined]
        kept = f"{last} is kept, resume with --ckpt-path last" if last else "there is no checkpoint yet"
        raise UserError(f"interrupted: {kept}") from None


def test(cli: TrainingCLI) -> None:
    """Tests the best checkpoint, with `TritonEvaluation` unless --evaluation is null."""
    if cli.config_init.evaluation:
        cli.trainer.callbacks.append(cli.config_init.evaluation)  # type: ignore[attr-defined]
    best = cli.trainer.checkpoint_callback.best_model_path  # type: ignore[attr-defined]
    cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=best or None, weights_only=True)


def main(args: ArgsType = None) -> None:
    """The command. Raises UserError: the command line, the data or the disk is at fault, or Ctrl-C was pressed."""
    warnings.filterwarnings("ignore", ".*(does not have many workers|exists and is not empty|treespec, LeafSpec).*")
    try:
        cli = command_line(args)
        train(cli)
        test(cli)
    except ArgumentError as error:
        raise UserError(TYPES_TRIED.sub(r"\1", str(error))) from error
    except (MisconfigurationException, OSError) as error:
        raise UserError(error) from error


if __name__ == "__main__":
    with user_errors_in_one_line():
        main()
