"""Checkpoint files that are whole or absent, written beside the training."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes `<path>.part` and renames it, so that a full disk leaves an earlier checkpoint at `path` as it was.

    Lightning stages the file in the system's temporary folder, which may be another disk: moving it then overwrites
    `path` byte by byte.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Copies what is to be saved and returns; a thread writes, and removes, in the order of the calls.

    A checkpoint that is overwritten or removed before its turn has come is not written at all, so that a slow disk
    holds up nothing. Reading and the end of a training wait until all is written. An error of the thread is raised by
    the next call, at the latest there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: dict[str, tuple] = {}  # by path, what has not begun to be written
        self._lock = Lock()
        self._last: Future | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        self._raise_error()
        copied = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().clone())
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        with self._lock:
            self._waiting[str(path)] = copied, ready, storage_options
        self._submit(self._write, str(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        with self._lock:
            self._waiting.pop(str(path), None)
        self._submit(super().remove_checkpoint, path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._finish()
        return super().load_checkpoint(path, *args, **kwargs)

    def teardown(self) -> None:
        self._finish()
        super().teardown()

    def _write(self, path: str) -> None:
        with self._lock:
            waiting = self._waiting.pop(path, None)
        if waiting is None:
            return  # a later call has written it, or it was removed
        checkpoint, ready, storage_options = waiting
        if ready:  # copied beside what the GPU computes meanwhile
            stream = torch.cuda.Stream(ready.device)
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.cpu())
        super().save_checkpoint(checkpoint, path, storage_options)

    def _submit(self, task: Any, path: str | Path) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last = self._thread.submit(self._after, self._last, task, path)

    @staticmethod
    def _after(before: Future | None, task: Any, path: str | Path) -> None:
        """The task, unless an earlier one has failed, whose error then is this one's too."""
        if before:
            before.result()
        task(path)

    def _raise_error(self) -> None:
        if self._last and self._last.done():
            self._last.result()

    def _finish(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        last, self._last = self._last, None
        if last:
            last.result()
