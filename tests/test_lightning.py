"""The callback as other projects import it."""

import os
import subprocess
import sys
from pathlib import Path

import tritonnn
import tritonnn.lightning
from lit_modules.triton_evaluation import TritonEvaluation

ROOT = Path(tritonnn.__file__).parents[1]


def test_is_the_one_of_the_commands():
    assert tritonnn.lightning.TritonEvaluation is TritonEvaluation


def test_another_package_of_the_name_is_told(tmp_path):
    (tmp_path / "lit_modules").mkdir()
    (tmp_path / "lit_modules" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    as_in_a_wheel = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
    command = [sys.executable, "-c", as_in_a_wheel + "import tritonnn.lightning"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: tritonnn.lightning needs the package lit_modules")
    assert f"found {tmp_path}/lit_modules/__init__.py: a package of one's own needs another name" in last
