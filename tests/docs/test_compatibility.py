"""The page of compatibility: its tests exist, it is what its table says, and its command tells a failure."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = runpy.run_path(str(ROOT / "docs" / "compatibility.py"))
VERSIONS = runpy.run_path(str(ROOT / "docs" / "versions.py"))
ROWS = [row for rows in COMMAND["SECTIONS"].values() for row in rows]


def test_every_test_of_the_table_exists():
    for row in ROWS:
        assert row.tests and row.status in ("yes", "falls back", "no")
        for test in row.tests:
            file, _, name = test.partition("::")
            name, _, case = name.partition("[")
            (path,) = (ROOT / "tests").rglob(f"{file}.py")
            source = path.read_text()
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), test
            if file != "test_pytorch_suites":  # whose cases are PyTorch's
                assert case.removesuffix("]") in source, test


def test_the_page_is_what_the_table_says():
    page = VERSIONS["put"](COMMAND["PAGE"].read_text(), []).splitlines()  # which has tables of its own
    written = [line for line in page if line.startswith("| ") and not line.startswith("| feature ")]
    assert [re.sub(r"[^|]*\|$", "", line).strip() for line in written] == [COMMAND["cells"](row) for row in ROWS]
    assert all(re.search(r"\| \d+ (passed|(passed, \d+ )?skipped: .+) \|$", line) for line in written)


@pytest.mark.parametrize(
    "test, cases",
    [
        ("a::test_b", {"a::test_b", "a::test_b[x]", "a::test_b[x-y]", "a::test_b[x, y-z]"}),
        ("a::test_b[x]", {"a::test_b[x]", "a::test_b[x-y]"}),
        ("a::test_b[x, y]", {"a::test_b[x, y-z]"}),
    ],
    ids=["whole test", "part", "part with a comma"],
)
def test_which_cases_belong_to_a_test(test, cases):
    every = [
        "a::test_b",
        "a::test_b[x]",
        "a::test_b[x-y]",
        "a::test_b[x, y-z]",
        "a::test_bb",
        "c::test_b",
        "a::test_bb[x]",
    ]
    assert {case for case in every if COMMAND["belongs"](case, test)} == cases


@pytest.mark.parametrize(
    "child, expected",
    {
        "passed": ("", "1 passed"),
        "skipped": ('<skipped message="needs a CUDA GPU"/>', "1 skipped: needs a CUDA GPU"),
        "failed": ("<failure/>", None),
        "error": ("<error/>", None),
        "skipped without a reason": ("<skipped/>", None),
        "missing": (None, None),
    }.values(),
    ids=["passed", "skipped", "failed", "error", "skipped without a reason", "missing"],
)
def test_results_of_a_run(child, expected, tmp_path):
    case = "" if child is None else f'<testcase classname="tests.layers.test_a" name="test_b[x]">{child}</testcase>'
    junit = tmp_path / "results.xml"
    junit.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    row = COMMAND["Row"]("feature", "yes", ("test_a::test_b",))
    if expected is not None:
        assert COMMAND["summary"](row, COMMAND["results_of"](junit)) == expected
        return
    with pytest.raises(ValueError, match="feature: (no such test|failed|skipped)"):
        COMMAND["summary"](row, COMMAND["results_of"](junit))
