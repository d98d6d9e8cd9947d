"""What dispatch chooses is what the golden file says; a change that is meant writes it anew (golden.py --write)."""

import runpy
from pathlib import Path

GOLDEN = runpy.run_path(str(Path(__file__).with_name("golden.py")))


def test_dispatch_chooses_as_before():
    golden = GOLDEN["Golden"].read()
    assert len(golden.chosen) >= 2000
    changed = GOLDEN["differences"](golden)
    assert not changed, "\n".join([f"{len(changed)} of {len(golden.chosen)} problems differ:", *changed[:20]])


def test_a_problem_that_differs_is_named():
    golden = GOLDEN["Golden"].read()
    golden.chosen[0] = (golden.chosen[0] + 1) % len(golden.choices)
    (line,) = GOLDEN["differences"](golden)
    assert line.startswith("H100, 1x3x224x224 to 64, 7x7, stride [2, 2]") and " -> " in line


def test_every_form_is_among_the_choices():
    forms = {choice.partition(" ")[0] for choice in GOLDEN["Golden"].read().choices}
    from tritonnn.ops.conv2d.forms import FORMS

    assert forms == {form.name for form in FORMS}
