"""Decoded images on disk, so that files are decoded once on a machine and not in every run."""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from tritonnn.ops.conv2d.tables import cache_folder

RULES = 1
"""Goes up where the same files would be decoded to other pixels."""

Images = tuple[Tensor, Tensor]
"""uint8 [N, 3, S, S] and labels int64 [N]."""


def kept(folder: Path, files: Iterable[str], size: int, decode: Callable[[], Images]) -> Images:
    """What `decode` gives for the images of these files, below `folder`, at this size; from disk where it was kept.

    It is kept in the user's cache, one file a folder and size, and holds while the names, sizes and times of all files
    are the same. A cache that cannot be read or written costs time, nothing else.
    """
    identity = hashlib.sha256(f"{folder.resolve()} {size}".encode()).hexdigest()[:16]
    path = cache_folder() / "images" / f"{folder.resolve().parent.name}-{folder.name}-{size}-{identity}.pt"
    key = _key(folder, files, size)
    found = _read(path)
    if found and found["key"] == key:
        return found["images"], found["labels"]
    images, labels = decode()
    _write(path, {"key": key, "images": images, "labels": labels})
    return images, labels


def _key(folder: Path, files: Iterable[str], size: int) -> str:
    digest = hashlib.sha256(f"{RULES} {size}\n".encode())
    for file in files:
        status = os.stat(file)
        digest.update(f"{file[len(str(folder)) + 1 :]} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read(path: Path) -> dict | None:
    try:
        found = torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None  # absent, or the file of a process that was stopped on a disk that does not rename atomically
    return found if isinstance(found, dict) and {"key", "images", "labels"} <= found.keys() else None


def _write(path: Path, content: dict) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, part)
        os.replace(part, path)
    except (OSError, RuntimeError):  # a full or read-only disk, which torch reports as either
        pass
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass
