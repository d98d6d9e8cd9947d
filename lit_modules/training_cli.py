"""What the command line of `train.py` has beside LightningCLI's: short names, help that starts with examples."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import ArgsType, instantiate_class

from lit_modules.classifier import ImageClassifier
from lit_modules.command_line import UserError
from lit_modules.networks import RESNET18, check_images

# Defaults of some of Lightning's callbacks are members of an Enum of strings, which yaml refuses to write.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class HelpFormatter(DefaultHelpFormatter):
    """Leaves the description as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def describe_model(parser: ArgumentParser) -> None:
    """Has the help of `--model` say what `named_networks` makes of it."""
    for action in parser._actions:
        if action.dest == "model":
            action.metavar = "NETWORK | CONFIG"
            action.help = "Short for --model.network; or path to a configuration file."


def named_networks(args: ArgsType) -> ArgsType:
    """Has `--model NAME` stand for `--model.network NAME`, unless it names a file."""
    if args is None:
        args = sys.argv[1:]
    if not isinstance(args, list):
        return args
    plain: list[str] = []
    for arg in args:
        if arg.startswith("--model=") and not Path(arg.removeprefix("--model=")).is_file():
            arg = "--model.network=" + arg.removeprefix("--model=")
        elif plain and plain[-1] == "--model" and not Path(arg).is_file():
            plain[-1] = "--model.network"
        plain.append(arg)
    return plain


def check_image_size(model: ImageClassifier, size: int) -> None:
    """Raises UserError unless the network takes images of this size."""
    hparams = model.hparams
    if hparams.network == RESNET18:
        if model.network.image_size != size:
            raise UserError(
                f"the {hparams.stem} stem takes images of {model.network.image_size}, data.image_size is {size}"
            )
        return
    try:
        check_images(model.network, hparams.network, hparams.num_classes, hparams.in_channels, size)
    except ValueError as error:
        raise UserError(f"{error} (data.image_size is {size})") from error


def check_trainer(trainer: Trainer) -> None:
    """Raises UserError where the Trainer's options train nothing, or Lightning fails over one or passes over it.

    They are those in effect: `fast_dev_run` and `overfit_batches` replace some. Validations and tests may be left out.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise UserError(f"trainer.{name} is 0, which trains nothing: evaluate.py tests what was trained before")
    if any(isinstance(callback, Timer) and callback.time_remaining() == 0 for callback in trainer.callbacks):
        raise UserError("trainer.max_time is 0, which trains nothing")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        count = getattr(trainer, name)
        if count is not None and count < 1:
            raise UserError(f"trainer.{name} must be at least 1, got {count}")
    interval = trainer.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise UserError(f"trainer.val_check_interval must be more than 0, got {interval}")
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        raise UserError(f"trainer.gradient_clip_val must not be negative, got {trainer.gradient_clip_val}")
    for least, most in (("min_epochs", "max_epochs"), ("min_steps", "max_steps")):
        lower, upper = getattr(trainer, least), getattr(trainer, most)
        if None not in (lower, upper) and 0 <= upper < lower:
            raise UserError(f"trainer.{least} must be at most trainer.{most}, got {lower} and {upper}")


@contextmanager
def val_check_interval_is_an_option() -> Iterator[None]:
    """Raises UserError where Lightning, which counts the batches as it begins, finds fewer than the interval."""
    try:
        yield
    except ValueError as error:
        if "`val_check_interval`" in str(error):
            raise UserError(error) from error
        raise


def resumes(checkpoint: dict[str, Any], optimizer: Namespace | None) -> bool:
    """Whether a checkpoint has the state of the optimizer that the command line asks for, or of the network's own."""
    if not optimizer:
        return all("lr_lambdas" in schedule for schedule in checkpoint.get("lr_schedulers") or [{}])
    asked_for = instantiate_class(([torch.nn.Parameter(torch.zeros(1))],), optimizer.as_dict())
    return [_options(state) for state in checkpoint.get("optimizer_states", [])] == [_options(asked_for.state_dict())]


def _options(state: dict[str, Any]) -> list[set[str]]:
    """The options of each group of an optimizer's parameters, without what a schedule adds."""
    return [set(group) - {"initial_lr"} for group in state["param_groups"]]
