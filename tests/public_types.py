"""The types that a program which uses the package sees: `mypy` reads this file, nothing runs it."""

from collections import Counter

import torch
from torch import nn
from typing_extensions import assert_type

import tritonnn


def types(model: nn.Module, images: torch.Tensor) -> None:
    report = tritonnn.swap(model, layers=["conv2d", "linear"], strict=True)
    assert_type(report, tritonnn.SwapReport)
    assert_type(report.swapped, dict[str, str])
    assert_type(report.fallbacks, dict[str, dict[str, int]])
    assert_type(tritonnn.restore(model), None)
    with tritonnn.swapped(model, "all") as report:
        assert_type(report, tritonnn.SwapReport)
    fast = tritonnn.fuse(model, cuda_graph=True, copy_output=False)
    assert_type(fast, tritonnn.FusedNetwork)
    assert_type(fast.report, tritonnn.FusionReport)
    assert_type(tritonnn.tune(model, images), tritonnn.TuningReport)
    assert_type(tritonnn.kind_of(model), str | None)
    assert_type(tritonnn.KINDS, tuple[str, ...])

    convolution: nn.Conv2d = tritonnn.TritonConv2d(64, 128, 3, padding=1)
    assert_type(tritonnn.TritonConv2d(64, 128, 3).fallbacks, Counter[str])
    layers: list[nn.Module] = [
        convolution,
        tritonnn.TritonAdaptiveAvgPool2d(1),
        tritonnn.TritonAvgPool2d(2),
        tritonnn.TritonBatchNorm2d(64),
        tritonnn.TritonLinear(64, 10),
        tritonnn.TritonMaxPool2d(3, stride=2),
        tritonnn.TritonReLU(inplace=True),
    ]
    nn.Sequential(*layers)
