"""Finding and loading checkpoints, weights only, with one clear line for whatever may be wrong with them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_modules.classifier import ImageClassifier
from lit_modules.command_line import UserError


def newest_best(folder: str | Path = "checkpoints") -> Path:
    """The best checkpoint of the latest training below `folder`.

    Raises:
        UserError: there is none yet.
    """
    found = sorted(Path(folder).rglob("best*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no checkpoint below {folder}/ yet: run train.py first, or name one with --ckpt-path")
    return found[-1]


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint of train.py's, on the CPU; only tensors and plain values are unpickled.

    Raises:
        UserError: the file is absent, unreadable, damaged, no checkpoint of a LightningModule, or carries code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the unpickler raises whatever the bytes of a file that is none lead to
        raise UserError(f"{path} {_what_is_wrong(path, error)}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of train.py: it has no state_dict and hyper_parameters")
    return checkpoint


def load_classifier(path: str | Path) -> tuple[ImageClassifier, dict[str, Any]]:
    """The network of a checkpoint and the checkpoint itself, on the CPU.

    Raises:
        UserError: as `load`, or the checkpoint is of another architecture.
    """
    checkpoint = load(path)
    try:
        classifier = ImageClassifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is of another architecture: {error}") from error
    return classifier, checkpoint


def _what_is_wrong(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    refused = "carries pickled code or objects, not only weights: it is not loaded"
    if start == zipfile.stringFileHeader:  # type: ignore[attr-defined]
        return refused if isinstance(error, pickle.UnpicklingError) else "is damaged or truncated"
    return refused if start.startswith(pickle.PROTO) else "is not a checkpoint"
