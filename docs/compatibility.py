"""Writes compatibility.md from compatibility_table.py and the results of the tests that it names.

    python docs/compatibility.py                        # runs those tests
    python docs/compatibility.py --junit *.xml          # takes those of runs: pytest --junit-xml a.xml, on this machine

Exits with 1, and writes nothing, where a test of the table is missing, failed, or was skipped without a reason.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
sys.path.insert(0, str(ROOT / "docs"))

import versions  # noqa: E402
from compatibility_table import SECTIONS, Row  # noqa: E402


class Result(NamedTuple):
    """The outcome of one case, "passed", "failed" or "skipped", and why."""

    outcome: str
    reason: str = ""


def results_of(junit: Path) -> dict[str, Result]:
    """Results by "file::test[case]"."""
    results = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        names = case.get("classname", "").split(".")  # folders, file, and the class where there is one
        file = next((name for name in names if name.startswith("test_")), "")
        results[f"{file}::{case.get('name')}"] = result_of(case)
    return results


def result_of(case: ElementTree.Element) -> Result:
    children = {child.tag: child for child in case}
    if "failure" in children or "error" in children:
        return Result("failed")
    if "skipped" in children:
        return Result("skipped", children["skipped"].get("message", ""))
    return Result("passed")


def belongs(case: str, test: str) -> bool:
    """Whether "file::test[a-b-c]" is a case of `test`: "file::test" or "file::test[b]"."""
    name, _, parameters = case.partition("[")
    wanted, _, part = test.partition("[")
    return (
        name == wanted and f"-{part.removesuffix(']')}-" in f"-{parameters.removesuffix(']')}-"
        if part
        else name == wanted
    )


def summary(row: Row, results: dict[str, Result]) -> str:
    """ "12 passed" or the like.

    Raises:
        ValueError: a test is missing, failed, or was skipped without a reason.
    """
    outcomes: Counter[str] = Counter()
    for test in row.tests:
        found = {case: result for case, result in results.items() if belongs(case, test)}
        if not found:
            raise ValueError(f"{row.feature}: no such test: {test}")
        for case, (outcome, reason) in found.items():
            if outcome == "failed" or (outcome == "skipped" and not reason):
                raise ValueError(f"{row.feature}: {outcome}: {case}")
            outcomes["passed" if outcome == "passed" else f"skipped: {reason}"] += 1
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))


def cells(row: Row) -> str:
    """The part of a row that does not depend on the results."""
    tests = ", ".join(f"`{test}`" for test in row.tests)
    return f"| {row.feature} | {row.status}{f': {row.note}' if row.note else ''} | {tests} |"


def page(results: dict[str, Result], where: str) -> str:
    """Raises ValueError with all that is wrong, a line each."""
    wrong, lines = [], []
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", "| feature | Triton layer | tests | result |", "|---|---|---|---|"]
        for row in rows:
            try:
                lines.append(f"{cells(row)} {summary(row, results)} |")
            except ValueError as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    head = [
        "# Compatibility",
        "",
        'What PyTorch\'s layers can do, and whether the Triton layers do the same. "yes" means with a Triton kernel,',
        '"falls back" means with PyTorch\'s own operation, which the swap\'s report counts, and "no" says what happens',
        "instead. `python docs/compatibility.py` writes this page from the results of the tests that it names, and",
        "`python docs/versions.py` what it says of [versions](#versions) and [cards](#cards).",
        "",
        f"Run on: {where}.",
        "",
        *versions.section(),
    ]
    return "\n".join(head + lines) + "\n"


def where() -> str:
    import torch
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU, in Triton's interpreter"
    return f"{device}; torch {torch.__version__.partition('+')[0]}, triton {triton.__version__}"


def run_tests(junit: Path) -> None:
    tests = sorted({test.partition("[")[0] for rows in SECTIONS.values() for row in rows for test in row.tests})
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    nodes = [f"{files[file]}::{name}" for file, name in (test.split("::") for test in tests)]
    subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junit-xml={junit}", *nodes], cwd=ROOT, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", nargs="+", type=Path, help="results of runs of the tests, instead of a new one")
    runs = parser.parse_args().junit
    with tempfile.TemporaryDirectory() as folder:
        if runs is None:
            runs = [Path(folder) / "results.xml"]
            run_tests(*runs)
        try:
            PAGE.write_text(page({case: result for run in runs for case, result in results_of(run).items()}, where()))
        except (ValueError, FileNotFoundError, ElementTree.ParseError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
