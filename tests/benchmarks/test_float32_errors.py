"""The errors of a network's layers, in small."""

import copy

import torch
from helpers.compare import DEVICE
from torch import nn

from benchmarks import float32_errors


def test_a_share_is_told_from_chance():
    exact = torch.randn(10_000, dtype=torch.float64)
    error, share = float32_errors.error_and_share(exact * 0.99, exact)
    assert abs(error - 0.01) < 1e-9 and abs(share + 0.01) < 1e-9
    noise = torch.randn(10_000, dtype=torch.float64)
    error, share = float32_errors.error_and_share(exact + 0.01 * noise, exact)
    assert 0.009 < error < 0.011 and abs(share) < 1e-3


def test_each_layer_has_a_row():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    network.eval().to(DEVICE)
    images = torch.randn(2, 3, 4, 4, device=DEVICE)
    with torch.inference_mode():
        rows = list(float32_errors.layers(network, copy.deepcopy(network).double(), images, torch.channels_last))
    assert [row.split(" | ")[0] for row in rows] == ["| 0", "| 1", "| 4"]
