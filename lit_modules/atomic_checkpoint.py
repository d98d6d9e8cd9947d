"""Checkpoint files that are whole or absent."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO


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
