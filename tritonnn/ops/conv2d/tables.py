"""Tables of tuned choices, one for each GPU and Triton version, and the look-up in them.

What `tritonnn.tune` found, in the user's cache folder, precedes what the package brings (`tritonnn/tables`). They are
read at the first launch on a GPU and once more after `tune`, so that a process does not change its choices by itself.
"""

import json
import os
import re
import tempfile
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ...runtime.capabilities import rounds_on_load
from ...runtime.launch_plan import forget_plans
from .forms import BY_NAME
from .problem import Choice, Problem, Product, problem_of

SHIPPED = Path(__file__).parents[2] / "tables"
FORMER_NAMES = {
    "held": "in_registers",
    "split": "sliced_k",
    "rows": "few_channels",
    "halo": "tma_halo",
    "descriptors": "tma",
    "SWAPPED": "SWAP_AB",
}
"""What forms and sizes were called in tables of earlier versions, which are read as well."""
SAME_CHIP = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}
"""GPUs that differ in memory only, to the GPU whose choices count where it has none of its own."""

_tables: dict[int, ChainMap[Problem, Choice]] = {}
_recorded: list[Problem] | None = None


class Entry(NamedTuple):
    """A choice, and the microseconds of GPU time that it and the default took."""

    choice: Choice
    us: float
    default_us: float


def tuned_choice(product: Product) -> Choice | None:
    """The choice that the tables have for a product; None where they have none."""
    choices = tuned_choices(product.x.get_device())
    if not choices and _recorded is None:
        return None
    problem = problem_of(product)
    if problem is None:
        return None
    if _recorded is not None:
        _recorded.append(problem)
    return choices.get(problem)


def tuned_choices(device: int) -> ChainMap[Problem, Choice]:
    """By the index of a GPU: what was tuned on such a GPU, before what was with another Triton or on another GPU.

    -1, the CPU, has none.
    """
    choices = _tables.get(device)
    if choices is None:
        _tables[device] = choices = ChainMap({}, {})
        if device >= 0:
            gpu = torch.cuda.get_device_name(device)
            own, others = choices.maps
            for folder in (SHIPPED, cache_folder()):
                own.update(_choices(folder / file_name(gpu)))
            for name in (SAME_CHIP.get(gpu), gpu):
                for path in sorted(SHIPPED.glob(file_name(name, "*"))) if name else ():  # of every version of Triton
                    others.update((p, c) for p, c in _choices(path).items() if not _is_of_other_costs(p, c))
    return choices


def _is_of_other_costs(problem: Problem, choice: Choice) -> bool:
    """Whether a choice was found where rounding to TF32 cost what it does not here: a copy, or work in the kernel."""
    rounded = problem.round_x and (choice.copies_x or BY_NAME[choice.config.form].loads_by_descriptor)
    return rounded and rounds_on_load()


def _choices(path: Path) -> dict[Problem, Choice]:
    return {problem: entry.choice for problem, entry in read(path).items()}


def forget() -> None:
    """Has the tables read again."""
    forget_plans()
    _tables.clear()


@contextmanager
def recording() -> Iterator[list[Problem]]:
    """Lists the problems of the products launched inside, in any thread."""
    global _recorded
    forget_plans()
    _recorded = problems = []
    try:
        yield problems
    finally:
        _recorded = None


def cache_folder() -> Path:
    """`TRITONNN_CACHE_DIR`, or `tritonnn` in the user's cache."""
    if folder := os.environ.get("TRITONNN_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritonnn"


def file_name(gpu: str, version: str | None = None) -> str:
    """The name of a GPU's table for a version of Triton; by default for the one that runs."""
    return f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}-triton-{version or triton.__version__}.json"


def read(path: Path) -> dict[Problem, Entry]:
    """The entries of a table that this version can use. A file that is no table counts as empty, with a warning."""
    try:
        rows = json.loads(path.read_text())["choices"]
        entries = [_from_json(row) for row in rows]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"tritonnn: {path} is ignored: {type(error).__name__}: {error}", stacklevel=2)
        return {}
    return dict(entry for entry in entries if entry is not None)


def add(path: Path, entries: Mapping[Problem, Entry]) -> None:
    """Writes entries into a table that may exist, in one step.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    rows = [json.dumps(_to_json(*item)) for item in (read(path) | dict(entries)).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write('{"choices": [\n' + ",\n".join(rows) + "\n]}\n")
    try:
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


def _to_json(problem: Problem, entry: Entry) -> dict:
    config, copies_x = entry.choice
    return {
        "problem": problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")},
        "form": config.form,
        "config": config.constants,
        "copies_x": copies_x,
        "us": round(entry.us, 2),
        "default_us": round(entry.default_us, 2),
    }


def _from_json(row: dict) -> tuple[Problem, Entry] | None:
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in row["problem"].items()}
        problem = Problem(**fields | {"dtype": getattr(torch, fields["dtype"])})
        form = BY_NAME[FORMER_NAMES.get(row["form"], row["form"])]
        sizes = row["config"] if "config" in row else row["blocks"]
        config = form.config(**{FORMER_NAMES.get(name, name): size for name, size in sizes.items()})
        entry = Entry(Choice(config, row["copies_x"]), float(row["us"]), float(row["default_us"]))
        hash(problem)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    usable = isinstance(problem.dtype, torch.dtype) and config.is_usable() and type(row["copies_x"]) is bool
    return (problem, entry) if usable else None
