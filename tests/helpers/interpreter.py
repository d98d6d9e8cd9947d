"""Tests whose processes run kernels in Triton's interpreter, also where there is a GPU."""

import pytest

from tritonnn.runtime.capabilities import check_interpreter


def _reason() -> str:
    try:
        check_interpreter()
    except RuntimeError as error:
        return str(error)
    return ""


needs_interpreter = pytest.mark.skipif(bool(_reason()), reason=_reason() or "the interpreter runs")
