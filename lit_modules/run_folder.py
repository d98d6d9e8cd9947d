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
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    if rank_zero_only.rank == 0:
        while not _made(parent / f"{prefix}{number}"):
            number += 1
    folder = parent / f"{prefix}{number}"
    try:
        yield folder, number
    finally:
        if rank_zero_only.rank == 0:
            with suppress(OSError):  # not empty
                for empty in (folder, *made):
                    empty.rmdir()


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
