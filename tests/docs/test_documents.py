"""What the pages say: the README's code runs as printed, its numbers are those of the results, links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.results import load

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("benchmarks/results/**/*.md"),
]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


COMMAND = re.compile(r"(?:^    |`)(?:\.venv/bin/)?(?:python|torchrun) ((?:-m )?[^`\n#]+)", re.MULTILINE)
OPTION = re.compile(r"(?<=\s)--([a-z][\w-]*)")
OF_LIGHTNING = {"data", "model", "trainer", "evaluation", "config", "help", "print_config"}
"""What follows them behind a dot is an argument of a class."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_files_and_options_that_exist(page):
    for command in COMMAND.findall(page.read_text()):
        if "benchmarks/blocks.py" in command:  # of older commits, as that page says
            continue
        names = [word for word in command.split() if word.endswith(".py")]
        if command.startswith("-m "):
            names = [f"{command.split()[1].replace('.', '/')}/__main__.py"]
        for name in names:
            assert (ROOT / name).exists(), command
        folders = {(ROOT / name).parent for name in names} | {ROOT / "lit_modules", ROOT / "tritonnn" / "command"}
        code = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
        options = OPTION.findall(command.partition(names[0])[2] if names else "")
        unknown = [option for option in options if option not in OF_LIGHTNING and f'"--{option}"' not in code]
        assert not unknown, command


def test_the_code_of_the_readme_runs_as_printed(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # as the page says
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert "swapped to Triton: 1 avg_pool2d, 20 batch_norm2d, 20 conv2d" in run.stdout
    assert "PASS" in run.stdout and "FAIL" not in run.stdout


def test_the_code_of_the_page_on_lightning_runs_as_printed(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lightning.md").read_text(), re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert "\nforward['out'] against batch['mask']\n" in run.stdout and "PASS" in run.stdout
    assert (tmp_path / "here" / "results.json").exists()


def test_the_readme_fits_a_screen_and_its_picture_is_small():
    assert len(README.splitlines()) <= 120
    assert (ROOT / "docs" / "speed.png").stat().st_size < 100_000


def test_the_first_numbers_of_the_readme_are_those_of_the_results():
    results = load(ROOT / "benchmarks" / "results" / "h100" / "compare" / "results.json")
    networks = {result.case: result.peers for result in results.networks}

    def ms(case: str, *peers: str) -> float:
        return min(networks[case][peer].timing.median for peer in peers)

    for case, digits in (("cifar-bf16-1024", 2), ("cifar-bf16-1", 4)):
        fused = ms(case, "fused-graph-in-place")
        pytorch, compiled = ms(case, "graph-nchw", "graph-channels-last"), ms(case, "compile-reduce-overhead")
        (line,) = [line for line in README.splitlines() if line.startswith(f"- **{fused:.{digits}f} ms**")]
        assert f"{pytorch / fused:.1f} times as fast as PyTorch in a CUDA graph" in line
        assert f"{compiled / fused:.1f} times as fast as `torch.compile`" in line
    case = "cifar-fp32-1024"
    fused, pytorch = ms(case, "fused-graph-in-place"), ms(case, "graph-nchw", "graph-channels-last")
    assert f"1,024 images take {fused:.1f} ms and PyTorch takes {pytorch:.1f}" in " ".join(README.split())


def test_files_over_400_lines_are_named_with_a_reason():
    """By their names alone."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no clone of the repository")
    paths = [ROOT / name for name in listed.stdout.split() if (ROOT / name).exists()]
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Long files")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {Path(name).name for row in rows for name in re.findall(r"`(.*?)`", row)}
    assert named <= {path.name for path in paths}
    assert {path.name for path in paths if path.read_text().count("\n") > 400} <= named


def test_pre_commit_runs_the_ruff_that_is_pinned():
    (pinned,) = re.findall(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()
