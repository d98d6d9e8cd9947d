"""How Triton lays out what it loads, where that differs from version to version."""

import re

import triton
import triton.language as tl

LANES_ALONG_LAST = tl.constexpr(tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= (3, 7))
"""Whether lanes load along the last dimension where nothing is contiguous, as from 3.7 on; before, along the first."""
