"""Trains a network with PyTorch's layers, then tests the best checkpoint with PyTorch's layers and with Triton's.

    python train.py                                       ResNet18 on CIFAR-10
    python train.py --config configs/digits.yaml          on embedded digits, seconds on a CPU
    python train.py --config configs/photos_224.yaml --data.root DIR --model timm/mobilenetv3_small_100
                                                          any network and DIR/train/<class>/*, DIR/test/<class>/*
    python train.py --ckpt-path last                      resume the latest run, or name a run's folder

--model is resnet18, torchvision.models.NAME, timm/NAME, or package.module.Class with an argument num_classes.

Each run has a number N: its checkpoints go to `checkpoints/<data>/version_N/`, TensorBoard and CSV logs to
`logs/<data>/version_N/`. Every constructor argument and every option of Lightning's Trainer can be set: see --help and
--print_config.
"""

from lit_modules.command_line import (
    UserError,
    interrupted_is_an_error,
    start_command,
    user_errors_in_one_line,
)

start_command()

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_modules.atomic_checkpoint import BackgroundCheckpointIO
from lit_modules.checkpoint import check_architecture, last_of, load
from lit_modules.classifier import ImageClassifier
from lit_modules.data import ImageData
from lit_modules.kept_checkpoints import LAST, BestCheckpoint, LastCheckpoint
from lit_modules.run_folder import claimed, present
from lit_modules.training_cli import (
    HelpFormatter,
    check_image_size,
    check_trainer,
    describe_model,
    named_networks,
    resumes,
    val_check_interval_is_an_option,
)
from lit_modules.triton_evaluation import TritonEvaluation

DEFAULT_CONFIG = str(Path(__file__).parent / "configs" / "cifar10.yaml")
TYPES_TRIED = re.compile(r"Does not validate.*?Errors:\s*- (.*?)\s*Given value type.*", re.DOTALL)

EXPECTED_WARNINGS = (
    "does not have many workers",
    "exists and is not empty",
    "treespec, LeafSpec",
    "configure_optimizers. will be overridden",
    "LightningCLI's args parameter",
)


class TrainingCLI(LightningCLI):
    """LightningCLI with --ckpt_path, --checkpoint and --evaluation, and with folders named for the data and the run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path", "--ckpt-path", type=str | None, help="Checkpoint or run's folder to resume from, or 'last'."
        )
        parser.add_argument("--evaluation", type=TritonEvaluation | None, help="How to test in the end, or null.")
        parser.add_class_arguments(BestCheckpoint, "checkpoint", sub_configs=True)
        evaluation = {"class_path": "lit_modules.triton_evaluation.TritonEvaluation", "init_args": {"budget_s": 0.02}}
        parser.set_defaults({"evaluation": evaluation})  # evaluate.py takes longer to time, and is more exact
        describe_model(parser)
        for name in ("num_classes", "in_channels"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        seed = self.config.seed_everything
        if not isinstance(seed, bool) and not 0 <= (seed or 0) < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")

    @property
    def best(self) -> BestCheckpoint:
        return self.config_init.checkpoint

    @property
    def kept(self) -> str:
        """The best checkpoint of the run, or the last where none was scored, or "" where none was kept."""
        return self.best.best_model_path or self.last.best_model_path

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse lists the types it tried: the cause is what a constructor objects to
            raise UserError(error.__cause__ or error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, still without the loggers and folders of its run."""
        config = self.config_init.trainer
        self.last = LastCheckpoint()
        StrategyRegistry.register("ddp", DDPStrategy, override=True, gradient_as_bucket_view=True, static_graph=True)
        kwargs["plugins"] = [BackgroundCheckpointIO(), *_listed(config.plugins)]
        if config.enable_checkpointing is not False and not config.barebones and not config.fast_dev_run:
            kwargs["callbacks"] = [*_listed(config.callbacks), self.best, self.last]
        if config.logger in (None, True) and not config.fast_dev_run:
            kwargs["logger"] = False
        if config.logger is False or config.barebones:  # there is no folder but the current one to save it to
            self.save_config_callback = None
        trainer = super().instantiate_trainer(**kwargs)
        _heed_sigterm_between_epochs(trainer)
        return trainer

    @contextmanager
    def run_folders(self) -> Iterator[None]:
        """Gives the run `checkpoints/<data>/version_<number>/` and its loggers `logs/<data>/version_<number>/`.

        A dry run (`trainer.fast_dev_run`) has neither.

        Raises:
            OSError: a folder cannot be made, that of `checkpoint.dirpath` included.
        """
        config, name = self.config_init.trainer, self.datamodule.name
        if config.fast_dev_run:
            self.trainer.callbacks = [c for c in self.trainer.callbacks if not isinstance(c, Checkpoint)]
            yield
            return
        root, chosen = Path(config.default_root_dir or "."), self.best.dirpath
        with (
            present(Path(chosen)) if chosen and "://" not in str(chosen) else nullcontext(),
            claimed(root / "checkpoints" / name, "version_", root / "logs" / name) as (folder, number),
        ):
            self.best.dirpath = self.last.dirpath = self.best.dirpath or str(folder.resolve())
            if config.logger in (None, True) and not config.barebones:
                tensorboard = TensorBoardLogger(root / "logs", name, number, default_hp_metric=False)
                self.trainer.loggers = [tensorboard, CSVLogger(root / "logs", name, number)]
            yield


def command_line(args: ArgsType = None) -> TrainingCLI:
    """The network, the data and the trainer that the command line asks for."""
    cli = TrainingCLI(
        ImageClassifier,
        ImageData,
        subclass_mode_data=True,
        trainer_defaults={"precision": "bf16-mixed" if torch.cuda.is_available() else "32-true", "benchmark": True},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "description": __doc__,
            "usage": "python train.py [OPTIONS]",
            "formatter_class": HelpFormatter,
            "default_config_files": [DEFAULT_CONFIG],
            "exit_on_error": False,
            "allow_abbrev": False,
        },
        load_from_checkpoint_support=False,
        run=False,
        args=named_networks(args),
    )
    check_image_size(cli.model, cli.datamodule.image_size)
    check_trainer(cli.trainer)
    if cli.config.lr_scheduler and not cli.config.optimizer:
        raise UserError("--lr_scheduler goes with an --optimizer: without, the network has a schedule of its own")
    if not cli.config.optimizer and cli.trainer.max_epochs == -1 and cli.trainer.max_steps == -1:
        raise UserError("the schedule of the learning rate needs an end: set trainer.max_epochs or trainer.max_steps")
    if str(cli.config_init.trainer.precision) in ("16", "16-mixed") and cli.trainer.precision == "bf16-mixed":
        raise UserError("trainer.precision 16-mixed needs a GPU: on a CPU PyTorch has bf16-mixed")
    return cli


def checkpoint_to_resume(cli: TrainingCLI) -> Path | None:
    """What --ckpt_path names, checked to fit the training. Raises UserError where there is none, or it does not fit."""
    if not cli.config.ckpt_path:
        return None
    if cli.trainer.fast_dev_run:
        raise UserError("trainer.fast_dev_run tries a training of its own: leave --ckpt-path out")
    path = Path(cli.config.ckpt_path)
    if path == Path("last"):
        root = Path(cli.config_init.trainer.default_root_dir or ".")
        path = last_of(Path(cli.best.dirpath or root / "checkpoints" / cli.datamodule.name))
    elif path.is_dir():
        path = last_of(path)
    checkpoint = load(path)
    check_architecture(path, checkpoint, cli.model)
    if not resumes(checkpoint, cli.config.optimizer):
        raise UserError(f"{path} has no state of this optimizer and schedule: it can be evaluated, but not resumed")
    before = checkpoint.get(cli.datamodule.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("batch_size")
    if before not in (None, cli.datamodule.batch_size):
        raise UserError(
            f"{path} was trained with data.batch_size {before}, this is {cli.datamodule.batch_size}: the schedule "
            "counts steps, resume with the same"
        )
    epochs, end = checkpoint["epoch"] + 1, cli.trainer.max_epochs
    if end is not None and 0 <= end < epochs + (path.name == LAST):  # another is of a validation, before its epoch ends
        raise UserError(f"{path} is of the last of {epochs} epochs: nothing is left to train, raise trainer.max_epochs")
    steps = checkpoint["global_step"]
    if 0 <= cli.trainer.max_steps <= steps:
        raise UserError(f"{path} is of the last of {steps} steps: nothing is left to train, raise trainer.max_steps")
    rank_zero_info(f"Resuming {path} of epoch {checkpoint['epoch']}")
    return path


def train(cli: TrainingCLI, resumed: Path | None = None) -> None:
    """Fits, keeping the best and the last checkpoint. Raises Interrupted, saying what was kept, on Ctrl-C."""

    def kept() -> str:
        last = cli.last.best_model_path
        return f"{_short(last)} is kept, resume with --ckpt-path last" if last else "there is no checkpoint yet"

    with interrupted_is_an_error(cli.trainer, kept), val_check_interval_is_an_option():
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resumed, weights_only=True)


def test(cli: TrainingCLI) -> None:
    """Tests the best checkpoint with --evaluation, unless that is null or another is among the trainer's callbacks.

    Raises Interrupted on Ctrl-C.
    """
    if cli.trainer.limit_test_batches == 0:
        rank_zero_info("Testing nothing: trainer.limit_test_batches is 0")
        return
    if cli.config_init.evaluation and not any(isinstance(c, TritonEvaluation) for c in cli.trainer.callbacks):
        cli.trainer.callbacks.append(cli.config_init.evaluation)
    kept = cli.kept
    rank_zero_info(f"Testing {_short(kept) if kept else 'the network as it is in the end: no checkpoint was kept'}")
    with interrupted_is_an_error(cli.trainer, lambda: f"{_short(kept)} is kept" if kept else "nothing was kept"):
        cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=kept or None, weights_only=True)


def _heed_sigterm_between_epochs(trainer: Trainer) -> None:
    """Where there are several processes, Lightning 2.6 has them agree before each batch whether one was asked to end.

    The answer waits for all that the GPU was given, so that the CPU never runs ahead. Once an epoch is enough.
    """
    loop = trainer.fit_loop.epoch_loop
    agree = getattr(loop, "_broadcast_sigterm_tensor", None)
    if agree:
        loop._broadcast_sigterm_tensor = lambda: agree() if loop.batch_idx < 0 else None  # type: ignore[method-assign]


def _short(path: str) -> str:
    """Relative to the current directory where it lies in it."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def main(args: ArgsType = None) -> None:
    """The command. Raises UserError: the command line, the data or the disk is at fault, or Ctrl-C was pressed."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}.*")
    try:
        cli = command_line(args)
        resumed = checkpoint_to_resume(cli)
        evaluation = cli.config_init.evaluation
        if evaluation:
            evaluation.check_device(cli.trainer.strategy.root_device)
            if evaluation.every_n_epochs:
                cli.trainer.callbacks.append(evaluation)
        with cli.run_folders():
            train(cli, resumed)
            test(cli)
    except ArgumentError as error:
        message = TYPES_TRIED.sub(r"\1", str(error))
        if message.startswith('Parser key "data"') and "Expected a path but" in message:
            known = ", ".join(module.__name__ for module in ImageData.__subclasses__())
            message = f"data must be one of {known}, or the import path of another ImageData ({message})"
        raise UserError(message) from error
    except (MisconfigurationException, ModuleNotFoundError, OSError) as error:
        raise UserError(error) from error


if __name__ == "__main__":
    with user_errors_in_one_line():
        main()
