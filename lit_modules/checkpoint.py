"""Finding and loading checkpoints, weights only, with one clear line for whatever may be wrong with them."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_modules.classifier import ImageClassifier
from lit_modules.command_line import UserError
from lit_modules.kept_checkpoints import LAST, BestCheckpoint
from lit_modules.networks import RESNET18

ARCHITECTURE = ("network", "stem", "width", "num_classes", "in_channels")


def newest_run(folder: str | Path = "checkpoints") -> Path:
    """The folder below `folder` to which a training wrote last.

    Raises:
        UserError: there is none yet.
    """
    found = _by_age(Path(folder).rglob("*.ckpt"))
    if not found:
        raise UserError(f"no checkpoint below {folder}/ yet: run train.py first, or name one with --ckpt-path")
    return found[-1].parent


def best_of(run: Path) -> Path:
    """The best checkpoint in a run's folder, or the last where none was scored.

    Raises:
        UserError: the folder has no checkpoint.
    """
    found = _by_age(run.glob("*.ckpt"))
    scored = [path for path in found if not path.name.startswith(Path(LAST).stem)]
    if not found:
        raise UserError(f"{run} has no checkpoint")
    if len(scored) < 2:
        return (scored or found)[-1]
    for key, state in load(found[-1]).get("callbacks", {}).items():  # each names the best at its time
        if key.startswith(BestCheckpoint.__name__) and (best := run / Path(state["best_model_path"]).name) in scored:
            return best
    return scored[-1]


def last_of(folder: Path) -> Path:
    """The newest checkpoint of a last epoch in the folder of a run, or of several.

    Raises:
        UserError: there is none.
    """
    found = _by_age(folder.rglob(LAST))
    if not found:
        raise UserError(f"there is no last checkpoint in {folder}/ to resume: train without --ckpt-path first")
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
    found = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [name for name in ("state_dict", "hyper_parameters") if name not in found]
    if missing:
        raise UserError(f"{path} is not a checkpoint of train.py: it has no {' and no '.join(missing)}")
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


def check_architecture(path: Path, checkpoint: dict[str, Any], classifier: ImageClassifier) -> None:
    """Raises UserError, saying what differs, unless the checkpoint's weights fit the classifier."""
    try:
        classifier.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        theirs, ours = {"network": RESNET18} | checkpoint["hyper_parameters"], classifier.hparams
        differ = [name for name in ARCHITECTURE if theirs.get(name) != ours[name]]
        what = ", ".join(f"{name} {theirs.get(name)}, not {ours[name]}" for name in differ)
        raise UserError(
            f"{path} is of another architecture than the network to train: {what or 'other names or shapes'}"
        ) from error


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _by_age(paths: Any) -> list[Path]:
    """Files from the oldest to the newest."""
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def _what_is_wrong(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    refused = "carries pickled code or objects, not only weights: it is not loaded"
    if start == zipfile.stringFileHeader:
        return refused if isinstance(error, pickle.UnpicklingError) else "is damaged or truncated"
    return refused if start.startswith(pickle.PROTO) else "is not a checkpoint"
