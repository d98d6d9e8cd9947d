"""A CPU that poses as a Hopper GPU: Triton compiles for it, in a process of its own without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

from triton.backends.compiler import GPUTarget


class Hopper:
    """What Triton asks of the driver of a machine that has such a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run(file: str, *arguments: str) -> dict:
    """What a file prints in such a process."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests"))),
    }
    result = subprocess.run(
        [sys.executable, file, *arguments], env=environment, cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
