"""Imports run one way: swap, fusion and tuning to layers to operations to device and runtime. None touches a GPU."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tritonnn").rglob("*.py"))
IN_FOLDERS = [path for path in FILES if path != ROOT / "tritonnn" / "__init__.py"]
"""All but the file that hands out the public names."""
BELOW_LAYERS = {"device", "runtime", "ops"}
MAY_IMPORT = {
    "device": {"device"},
    "runtime": {"runtime"},
    "ops": BELOW_LAYERS,
    "layers": BELOW_LAYERS | {"layers"},
    "swap": BELOW_LAYERS | {"layers", "swap"},
    "clocks": {"clocks"},
    "roofline": {"clocks", "runtime"},
    "latency": BELOW_LAYERS | {"clocks", "layers", "swap", "roofline", "latency"},
    "compile_ahead": BELOW_LAYERS | {"compile_ahead"},
    "compile_swapped": {"compile_ahead", "latency", "runtime", "swap"},
    "fusion": BELOW_LAYERS | {"compile_ahead", "layers", "swap", "fusion"},
    "compiler": BELOW_LAYERS | {"clocks", "compile_ahead", "layers", "fusion", "compiler"},
    "command": {"clocks", "compile_swapped", "runtime", "swap", "latency", "command"},
    "__main__": {"latency", "command"},  # and the public names
    "lightning": set(),  # the door to lit_modules, through which nothing here goes
    "tuning": BELOW_LAYERS | {"clocks", "compile_ahead", "layers", "swap", "latency", "fusion", "tuning"},
}
"""By the folder of `tritonnn`, or the file in it."""


def folder(module: str) -> str | None:
    """The folder, or file, of a module of `tritonnn`; None for the package itself and for others'."""
    package, *names = module.split(".")
    if package != "tritonnn" or not names:
        return None
    return names[0]


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """The full names of the modules, or of what is in them, that a module's source imports anywhere."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def of_file(path: Path) -> tuple[str, list[str]]:
    """A module of the library, and what it imports."""
    names = path.relative_to(ROOT).with_suffix("").parts
    is_package = names[-1] == "__init__"
    module = ".".join(names[:-1] if is_package else names)
    return module, list(imported(path.read_text(), module, is_package))


def is_part_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", IN_FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module, names = of_file(path)
    here = folder(module)
    wrong = [name for name in names if folder(name) and folder(name) not in MAY_IMPORT[here]]
    assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_folder_does_not_import(path):
    module, names = of_file(path)
    forbidden = ["triton"] if folder(module) == "layers" else []
    forbidden += ["torch.nn"] if folder(module) in BELOW_LAYERS else []
    forbidden += ["benchmarks", "train", "evaluate"]
    forbidden += ["lightning", "lit_modules"] if folder(module) != "lightning" else []
    wrong = [name for name in names for package in forbidden if is_part_of(name, package)]
    assert not wrong, f"{module} imports {wrong}"


def test_the_lightning_side_imports_no_command():
    for path in (ROOT / "lit_modules").rglob("*.py"):
        names = imported(path.read_text(), f"lit_modules.{path.stem}", path.stem == "__init__")
        assert not [name for name in names if name.split(".")[0] in ("train", "evaluate", "benchmarks")], path


@pytest.mark.parametrize(
    "source, module, names",
    [
        ("from ..ops.conv2d import op", "tritonnn.runtime.x", ["tritonnn.ops.conv2d.op"]),
        ("from ..layers.relu import TritonReLU as R", "tritonnn.ops.x", ["tritonnn.layers.relu.TritonReLU"]),
        ("def f():\n    from ..... import swap", "tritonnn.ops.conv2d.forms.tma_halo.x", ["tritonnn.swap"]),
        ("from torch import nn", "tritonnn.ops.x", ["torch.nn"]),
        ("import torch.nn.functional as F", "tritonnn.ops.x", ["torch.nn.functional"]),
        ("from . import form", "tritonnn.ops.conv2d.forms.x", ["tritonnn.ops.conv2d.forms.form"]),
    ],
)
def test_what_counts_as_imported(source, module, names):
    assert list(imported(source, module)) == names


def test_importing_tritonnn_does_not_import_lightning():
    code = "import sys, tritonnn; print({'lightning', 'lit_modules', 'torchvision', 'rich'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert output.stdout == "set()\n"


def test_importing_touches_no_gpu():
    """Neither where there is one nor where there is none, nor needs the interpreter."""
    modules = [of_file(path)[0] for path in FILES]
    code = f"""
import importlib, torch
for module in {modules}:
    importlib.import_module(module)
assert not torch.cuda.is_initialized()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    for devices in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=environment | devices, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
