"""What was measured of chains on a GPU, in the user's cache folder: later processes measure nothing twice."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ..ops.conv2d.tables import cache_folder, file_name

PACKAGE = Path(__file__).parents[1]


class Times(NamedTuple):
    """Microseconds of a chain as one kernel of this package, and as Inductor would compute it."""

    ours: float
    theirs: float

    @property
    def ours_is_no_slower(self) -> bool:
        return self.ours <= self.theirs


def path_of(device: torch.device) -> Path:
    """The file of a GPU: another one for each version of PyTorch, Triton and this package, with its tuned tables."""
    gpu = torch.cuda.get_device_name(device)
    return cache_folder() / "chains" / f"{_slug(gpu)}-{_digest(gpu)}.jsonl"


@cache
def _digest(gpu: str) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {triton.__version__} {torch.backends.cudnn.version()}".encode())
    sources = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json"))
    for path in (*sources, cache_folder() / file_name(gpu)):
        with suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def read(path: Path) -> dict[str, Times]:
    """The times by kind. Lines that cannot be read, such as one that another process is writing, are left out."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            found[row["kind"]] = Times(float(row["ours_us"]), float(row["theirs_us"]))
    return found


def add(path: Path, kind: str, times: Times) -> None:
    """Where the folder cannot be written, later processes measure again."""
    row = {"kind": kind, "ours_us": round(times.ours, 3), "theirs_us": round(times.theirs, 3)}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def measuring_alone(device: torch.device) -> Iterator[None]:
    """One process at a time on a GPU. They wait for each other by a lock on a file, where there are such locks."""
    with ExitStack() as stack:
        if device.type == "cuda":
            with suppress(ImportError, OSError):
                import fcntl  # not on Windows

                file = stack.enter_context(_lock_file(device).open("a"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_file(device: torch.device) -> Path:
    path = cache_folder() / "chains" / f"{torch.cuda.get_device_properties(device).uuid}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
