"""A folder of its own for each run, also where several start at once."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only


@contextmanager
def claimed(parent: Path, prefix: str, *others: Path) -> Iterator[tuple[Path, int]]:
    """Makes the next folder `<parent>/<prefix><number>` and gives it and its number, free in the `others` too.

    Folders that are still empty in the end go again. Processes other than the main one make none: what they are given
    is not to be written to.

    Raises:
        OSError: the folder cannot be made.
    """
    number = 1 + max((number for folder in (parent, *others) for number in _numbers(folder, prefix)), default=-1)
    made = _absent(parent)
    if rank_zero_only.rank == 0:
        while not _made(parent / f"{prefix}{number}"):
            number += 1
    folder = parent / f"{prefix}{number}"
    with _gone_if_empty(folder, *made):
        yield folder, number


@contextmanager
def present(folder: Path) -> Iterator[None]:
    """Makes the folder if it is absent. If it is empty in the end, it goes again.

    Raises:
        OSError: the folder cannot be made.
    """
    made = _absent(folder)
    if rank_zero_only.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with _gone_if_empty(*made):
        yield


def _absent(folder: Path) -> list[Path]:
    """It and its parents as far as they are absent, the innermost first."""
    return [absent for absent in (folder, *folder.parents) if not absent.exists()]


@contextmanager
def _gone_if_empty(*folders: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if rank_zero_only.rank == 0:
            with suppress(OSError):  # not empty
                for folder in folders:
                    folder.rmdir()


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():  # it, or a parent, is a file
            raise
        return False
    return True


def _numbers(folder: Path, prefix: str) -> Iterator[int]:
    for path in folder.glob(f"{prefix}*"):
        with suppress(ValueError):
            yield int(path.name.removeprefix(prefix))
