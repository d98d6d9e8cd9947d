"""Random networks, seeded: fused, swapped and in CUDA graphs they give what PyTorch gives (see random_programs.py)."""

import time

import pytest
import torch
from helpers.compare import DEVICE
from helpers.random_programs import check, random_program, source_of, without_kernels

SECONDS = 15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "PyTorch's operations"])
def test_random_programs(kernels, monkeypatch):
    """Always the same programs, as many as there is time for; those without kernels try `fuse` alone, which is fast."""
    if not kernels:
        without_kernels(monkeypatch.setattr)
    deadline, seed, ran = time.perf_counter() + SECONDS, 0, 0
    while time.perf_counter() < deadline:
        try:
            ran += check(seed, DEVICE, cuda_graph=torch.cuda.is_available())
        except Exception as error:
            raise AssertionError(f"seed {seed}:\n{source_of(random_program(seed))}") from error
        seed += 1
    assert ran > 0.9 * seed > 0


def test_a_seed_is_a_program():
    assert source_of(random_program(3)) == source_of(random_program(3)) != source_of(random_program(4))
