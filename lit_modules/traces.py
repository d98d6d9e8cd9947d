"""One batch of each side as a file for Perfetto, a viewer of what ran when, on the host and on the GPU."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = "traces"
SUFFIX = ".pt.trace.json.gz"
WARM_UP_CALLS = 3


def write_traces(folder: Path, calls: Mapping[str, Callable[[], object]]) -> list[Path]:
    """Traces a call of each, after some that are not traced: `<folder>/traces/<name>.pt.trace.json.gz`.

    Raises:
        OSError: the folder cannot be written.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, call in calls.items():
        for _ in range(WARM_UP_CALLS if on_gpu else 0):  # without a GPU nothing is compiled, and a call takes seconds
            call()
        with profile(activities=activities, acc_events=True) as profiler, record_function(f"one batch, {name}"):
            call()
            if on_gpu:
                torch.cuda.synchronize()
        paths.append(folder / FOLDER / f"{name.replace(', ', '-').replace(' ', '-')}{SUFFIX}")
        profiler.export_chrome_trace(str(paths[-1]))
    return paths


def remove_traces(folder: Path) -> None:
    """What an earlier `write_traces` left in a folder; anything else there stays."""
    for path in (folder / FOLDER).glob(f"*{SUFFIX}"):
        path.unlink()
    if (folder / FOLDER).is_dir() and not any((folder / FOLDER).iterdir()):
        (folder / FOLDER).rmdir()


def how_to_open_traces(folder: Path) -> str:
    return f"Traces:       open https://ui.perfetto.dev and drop a file of {shlex.quote(str(folder / FOLDER))} on it"
