"""The package as a user installs it: the wheel has every module, the tuned tables and the marker for type checkers."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tritonnn

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PACKAGES = ("tritonnn", "lit_modules")
IMPORT_ALL = f"""
import importlib, json, pkgutil
found = {{}}
for name in {PACKAGES}:
    package = importlib.import_module(name)
    found[name] = package.__file__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        found[module.name] = importlib.import_module(module.name).__file__
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel of this source was unpacked; nothing is downloaded, nothing written beside the source."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    command = [*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", str(source), str(source)]
    subprocess.run(command, cwd=folder, check=True)
    with zipfile.ZipFile(*source.glob("*.whl")) as wheel:
        wheel.extractall(folder)
    return folder


def test_every_module_of_the_wheel_can_be_imported_from_another_folder(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    files = [Path(file) for file in json.loads(run.stdout).values()]
    sources = {file.relative_to(ROOT) for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
    assert {file.relative_to(installed) for file in files} == sources


def test_tables_and_marker_for_type_checkers_are_in_the_wheel(installed):
    tables = {file.name for file in (ROOT / "tritonnn" / "tables").glob("*.json")}
    assert tables and {file.name for file in (installed / "tritonnn" / "tables").iterdir()} == tables
    assert all(json.loads((installed / "tritonnn" / "tables" / name).read_text())["choices"] for name in tables)
    assert (installed / "tritonnn" / "py.typed").exists()


def test_the_version_of_the_wheel_is_that_of_the_package(installed):
    assert (installed / f"tritonnn-{tritonnn.__version__}.dist-info").is_dir()
