"""The networks, their images, and how wrong an output is."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, Case
from lit_modules.resnet import ResNet18

CALIBRATION_PASSES, CALIBRATION_BATCH = 4, 32
CHECKED_IMAGES = 16
# The largest root-mean-square error of a right result: some four times what rounding makes of these networks (3e-6 in
# fp32, 3e-3 in fp16, 2e-2 in bf16), more where cuDNN may choose Winograd or the tensor core truncates to TF32.
LIMITS = {"bf16": 1e-1, "fp16": 2e-2, "tf32": 1e-1, "fp32": 1e-4, "default": 1e-1}
LAYER_LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 4e-3, "fp32": 5e-5, "default": 4e-3}
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}


@lru_cache(maxsize=2)
def _network(task: str, width: int, device: torch.device) -> ResNet18:
    """Random weights; batch norms with the statistics of a few batches and random scale and shift."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet18(stem="imagenet" if task == "imagenet" else "cifar", width=width)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
    model = model.to(device).train()
    generator = torch.Generator(device).manual_seed(1)
    for norm in norms:
        norm.momentum = None  # the running statistics become the mean over the passes
    with torch.no_grad(), cudnn_benchmark(False):
        for _ in range(CALIBRATION_PASSES):
            model(_images(model, CALIBRATION_BATCH, generator))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval().requires_grad_(False)


def _images(model: ResNet18, n: int, generator: torch.Generator) -> Tensor:
    shape = n, model.in_channels, model.image_size, model.image_size
    return torch.randn(shape, generator=generator, device=generator.device)


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Setup:
    """A case's network and images in either layout, in its type, and the logits of some of the images in float64."""

    def __init__(self, case: Case, device: torch.device, width: int = 64) -> None:
        self.case, self.device = case, device
        self._model = copy.deepcopy(_network(case.task, width, device)).to(DTYPES[case.dtype])
        generator = torch.Generator(device).manual_seed(2)
        self._images = _images(self._model, case.batch_size, generator).to(DTYPES[case.dtype])
        self._in_layout: dict[str, tuple[nn.Module, Tensor]] = {}

    def in_layout(self, layout: str) -> tuple[nn.Module, Tensor]:
        """The network and the images; the same ones at every call."""
        if layout not in self._in_layout:
            memory_format = MEMORY_FORMATS[layout]
            model = copy.deepcopy(self._model).to(memory_format=memory_format)
            self._in_layout[layout] = model, self._images.contiguous(memory_format=memory_format)
        return self._in_layout[layout]

    @cached_property
    def reference(self) -> Tensor:
        """The logits of `spread` images, of the same network and images computed in float64."""
        with torch.no_grad(), cudnn_benchmark(False):
            return copy.deepcopy(self._model).double()(self._images[spread(len(self._images))].double())


def spread(n: int, count: int = CHECKED_IMAGES) -> list[int]:
    """Up to `count` of n images, the first and the last among them."""
    count = min(n, count)
    return sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)})


def errors(y: Tensor, reference: Tensor, n: int) -> tuple[float, float]:
    """Largest and root-mean-square error of the `spread` images of y [n, ...], relative to the reference's rms.

    Infinite for another shape, or where anything in y is not finite.
    """
    indices = spread(n)
    if y.shape != (n, *reference.shape[1:]) or not y.isfinite().all():
        return float("inf"), float("inf")
    difference = y[indices].double() - reference
    rms = reference.square().mean().sqrt()
    return (difference.abs().max() / rms).item(), (difference.square().mean().sqrt() / rms).item()
