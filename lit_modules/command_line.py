"""What `train.py` and `evaluate.py` share as commands: where Triton runs, and how a user's mistake is reported."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """Something the user can put right: the message says in one line what was wrong and what to do."""


@contextmanager
def user_errors_in_one_line() -> Iterator[None]:
    """Ends the process with status 2 and `error: <message>` on stderr when the block raises UserError."""
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def interpret_triton_without_gpu() -> None:
    """Selects Triton's interpreter where there is no GPU, and says so. Call it before anything imports triton."""
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        os.environ["TRITON_INTERPRET"] = "1"
        print("No GPU: Triton kernels run in Triton's interpreter (correct, but their times say nothing about speed).")
