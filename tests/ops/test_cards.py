"""What dispatch would launch on other cards compiles for them and fits their memory; cards.py tells of all of it."""

import pytest
import triton
from helpers.hopper import run

from tritonnn.runtime.hardware import GLUON_VERSIONS

CARDS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "gfx942"]
EVERYWHERE = {
    "avg_pool2d_forward_kernel",
    "avg_pool2d_large_forward_kernel",
    "batch_norm2d_combine_statistics_kernel",
    "batch_norm2d_normalize_kernel",
    "batch_norm2d_partial_statistics_kernel",
    "batch_norm2d_update_kernel",
    "channels_last_kernel",
    "conv2d_depthwise_forward_kernel",
    "conv2d_pointers_forward_kernel",
    "max_pool2d_forward_kernel",
    "pooled_linear_forward_kernel",
    "relu_forward_kernel",
}
OF_TENSOR_CORES = {"conv2d_sliced_k_forward_kernel", "padded_rows_kernel"}
OF_CARDS = {name: EVERYWHERE | OF_TENSOR_CORES for name in CARDS[:-1]} | {"gfx942": EVERYWHERE}
OF_CARDS["10.0"] = OF_CARDS["12.0"] = OF_CARDS["8.0"] | {"conv2d_tma_forward_kernel"}
IN_GLUON = {"conv2d_tma_halo_forward_kernel", "conv2d_in_registers_forward_kernel"}
OF_CARDS["9.0"] = OF_CARDS["10.0"] | (IN_GLUON if triton.__version__.startswith(GLUON_VERSIONS) else set())
"""The kernels by card: TMA from Hopper on; what needs wgmma, and what only Hopper has run, there alone."""


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_for_a_card_and_fit_its_shared_memory(card):
    """Each kernel, and one in thirty of the kinds; memory of the others that cards.json has. cards.py compiles all."""
    found = run("tests/ops/cards.py", "--cards", card, "--every", "30", "--json")
    assert OF_CARDS[card] <= set(found["kernels"])
    assert found["compiled"] >= len(OF_CARDS[card]) and 0 < max(found["memory"].values()) <= found["limit"]
    assert found["too_large"] == found["failed"] == []
