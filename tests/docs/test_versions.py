"""What the pages say of versions and cards is what was recorded, and says what ran where and what was only compiled."""

import json
import runpy
from pathlib import Path

import pytest

from tritonnn.runtime.hardware import GLUON_VERSIONS

ROOT = Path(__file__).parents[2]
COMMAND = runpy.run_path(str(ROOT / "docs" / "versions.py"))
SUITES = COMMAND["record"]()["suites"]


@pytest.mark.parametrize("page", COMMAND["PAGES"], ids=lambda page: page.name)
def test_a_page_is_up_to_date(page):
    """If not: python docs/versions.py."""
    text = page.read_text()
    assert COMMAND["put"](text, COMMAND["PAGES"][page]()) == text
    assert text.count(COMMAND["BEGIN"]) == text.count(COMMAND["END"]) == 1


def test_every_version_has_a_row_and_no_failure_is_hidden():
    rows = [row for row in COMMAND["versions"](COMMAND["record"]())[2:]]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == sorted({s["triton"] for s in SUITES})
    failed = [suite for suite in SUITES if suite["failed"]]
    assert sum(row.count("failed") for row in rows) == len(failed)


def test_gluon_runs_where_a_gpu_has_checked_it():
    on_gpus = {suite["triton"] for suite in SUITES if suite["device"] != "CPU" and not suite["failed"]}
    assert all(any(triton.startswith(version) for triton in on_gpus) for version in GLUON_VERSIONS)


def test_a_run_is_recorded(tmp_path, monkeypatch):
    cases = '<testcase classname="tests.a.test_a" name="{}">{}</testcase>'
    first, second = tmp_path / "first.xml", tmp_path / "second.xml"
    kinds = "", "<failure/>", '<skipped message="needs a CUDA GPU"/>', ""
    first.write_text(f"<testsuite>{''.join(cases.format(i, kind) for i, kind in enumerate(kinds))}</testsuite>")
    second.write_text(f"<testsuite>{cases.format(1, '')}</testsuite>")  # mended
    known = {"suites": [], "times": []}
    COMMAND["add_suite"](known, [first], "all")
    COMMAND["add_suite"](known, [first], "a part")
    COMMAND["add_suite"](known, [first, second], "all")
    found = [(s["of"], s["passed"], s["failed"], s["skipped"]) for s in known["suites"]]
    assert found == [("all", 3, 0, 1)], "a whole run stands for its parts"
    COMMAND["add_suite"](known, [first], "a part")
    assert COMMAND["counts"](known["suites"][1]).endswith("a part, 2 passed, 1 failed")
    json.dumps(known)
