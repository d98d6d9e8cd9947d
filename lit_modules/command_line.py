"""What `train.py` and `evaluate.py` share as commands: where Triton runs, and how a user's mistake is reported."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # Lightning imports torch and triton
    from lightning.pytorch import Trainer


class UserError(Exception):
    """Something the user can put right: the message says in one line what was wrong and what to do."""

    status = 2


class Interrupted(UserError):
    """Ctrl-C: the message says what was kept."""

    status = 128 + signal.SIGINT


@contextmanager
def user_errors_in_one_line() -> Iterator[None]:
    """Ends the process with `error: <message>` on stderr: with 2 on a UserError of the block, with 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        _end(Interrupted("interrupted"))
    except UserError as error:
        _end(error)


@contextmanager
def interrupted_is_an_error(trainer: "Trainer", kept: Callable[[], str]) -> Iterator[None]:
    """Raises Interrupted, saying what was `kept`, where Lightning would end the process with 1 on Ctrl-C."""
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise Interrupted(f"interrupted: {kept()}") from None


def _end(error: UserError) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(error.status)


def notice(message: str) -> None:
    """Says something beside the results, on stderr: stdout may be kept in a file."""
    print(message, file=sys.stderr)


def start_command() -> None:
    """A command calls it before it imports anything else, which takes seconds: Ctrl-C is one line then, too.

    Selects Triton's interpreter where there is no GPU, and says so: triton reads the choice as it is imported.
    """
    sys.excepthook = _one_line_on_interrupt
    sys.path.append(os.getcwd())  # for networks by class path
    import torch

    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        notice("No GPU: Triton kernels run in Triton's interpreter (correct, but their times say nothing about speed).")


def _one_line_on_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # Python ends with the signal then, which a shell shows as 130
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
