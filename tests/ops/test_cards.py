"""What dispatch would launch on other cards compiles for them and fits their memory; cards.py tells of all of it."""

import pytest
from helpers.hopper import run

CARDS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "gfx942"]


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_for_a_card_and_fit_its_shared_memory(card):
    found = run("tests/ops/cards.py", "--cards", card, "--every", "30", "--json")
    assert found["compiled"] >= 3 and 0 < found["most"] <= found["limit"]
    assert found["too_large"] == found["failed"] == []
