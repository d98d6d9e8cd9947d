"""Ways to run a whole network: PyTorch's, cuDNN's fused operations, and ours.

A peer takes a `Setup` and returns a call without arguments that gives the logits of its images. A CUDA graph has an
input of its own, into which each call copies the images, as torch.compile and `tritonnn.fuse` do with theirs.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tritonnn
from benchmarks.networks import Setup
from benchmarks.timing import capture
from lit_modules.resnet import BasicBlock, ResNet18
from tritonnn.latency import twin

Call = Callable[[], Tensor]


class Unavailable(Exception):
    """A peer that is not installed: the message says what."""


class FoldedConv2d:
    """A convolution and the batch norm that follows it, as one convolution with bias, channels_last."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = conv.weight.double() * scale[:, None, None, None]
        bias = norm.bias.double() - norm.running_mean.double() * scale
        self.weight = weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(conv.weight.dtype)
        self.geometry = conv.stride, conv.padding, conv.dilation, conv.groups

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, *self.geometry)

    def relu(self, x: Tensor) -> Tensor:
        return torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)

    def add_relu(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.ops.aten.cudnn_convolution_add_relu(x, self.weight, z, 1.0, self.bias, *self.geometry)


class CudnnFused:
    """ResNet18 of cuDNN's fused operations: convolution with folded batch norm, bias, residual and ReLU in one."""

    def __init__(self, model: ResNet18, conv_type: type[FoldedConv2d] = FoldedConv2d) -> None:
        self.pool, self.head = model.stem.pool, model.head
        self.stem = conv_type(model.stem.conv, model.stem.norm)
        self.blocks = [self._block(block, conv_type) for stage in model.stages for block in stage]

    @staticmethod
    def _block(block: BasicBlock, conv_type: type[FoldedConv2d]) -> tuple:
        conv1, conv2 = conv_type(block.conv1, block.norm1), conv_type(block.conv2, block.norm2)
        if not len(block.shortcut):
            return conv1, conv2, None
        shortcut = conv_type(block.shortcut.conv, block.shortcut.norm)
        conv2.bias = conv2.bias + shortcut.bias  # one addition for both
        return conv1, conv2, shortcut

    def __call__(self, images: Tensor) -> Tensor:
        x = self.pool(self.stem.relu(images))
        for conv1, conv2, shortcut in self.blocks:
            x = conv2.add_relu(conv1.relu(x), shortcut(x) if shortcut else x)
        return self.head(x)


def eager(setup: Setup, layout: str | None = None) -> Call:
    model, images = setup.in_layout(layout or setup.case.layout)
    return partial(model, images)


def graph(setup: Setup, layout: str | None = None) -> Call:
    return replayed(*setup.in_layout(layout or setup.case.layout))


def compiled(setup: Setup, mode: str) -> Call:
    model, images = setup.in_layout(setup.case.layout)
    return partial(torch.compile(model, mode=mode, dynamic=False), images)


def cudnn_fused(setup: Setup) -> Call:
    model, images = setup.in_layout("channels-last")
    return replayed(CudnnFused(model), images)


def swapped(setup: Setup) -> Call:
    model, images = setup.in_layout(setup.case.layout)
    model = twin(model)
    return Ours(model, images, tritonnn.swap(model))


def swapped_graph(setup: Setup) -> Call:
    network = swapped(setup)
    call = replayed(network.model, network.images)
    call.note = network.note
    return call


def fused(setup: Setup, **options: bool) -> Call:
    if not hasattr(tritonnn, "fuse"):
        raise Unavailable("tritonnn has no fuse")
    model, images = setup.in_layout(setup.case.layout)
    network = tritonnn.fuse(model, **options)
    return Ours(network, images, network.report)


def replayed(model: Callable[[Tensor], Tensor], images: Tensor) -> Call:
    """The model in a CUDA graph with an input of its own."""
    own = images.clone(memory_format=torch.preserve_format)
    replay, logits = capture(lambda: model(own))
    logits.fill_(float("nan"))  # what the graph does not write is found out

    def call() -> Tensor:
        own.copy_(images)
        replay()
        return logits

    call.model = model  # a graph does not keep the weights that it reads
    return call


class Ours:
    """A call of a network of Triton layers; `note` names those that ran PyTorch's own operation, by its report."""

    def __init__(self, model: nn.Module, images: Tensor, report: object) -> None:
        self.model, self.images, self.report = model, images, report

    def __call__(self) -> Tensor:
        return self.model(self.images)

    @property
    def note(self) -> str:
        names = list(self.report.fallbacks)
        return f"fell back to PyTorch: {', '.join(names)}" if names else ""


PEERS: dict[str, Callable[[Setup], Call]] = {
    "eager-nchw": partial(eager, layout="nchw"),
    "eager-channels-last": partial(eager, layout="channels-last"),
    "graph-nchw": partial(graph, layout="nchw"),
    "graph-channels-last": partial(graph, layout="channels-last"),
    "compile-reduce-overhead": partial(compiled, mode="reduce-overhead"),
    "compile-max-autotune": partial(compiled, mode="max-autotune"),
    "cudnn-fused": cudnn_fused,
    "swapped": swapped,
    "swapped-graph": swapped_graph,
    "fused": fused,
    "fused-graph": partial(fused, cuda_graph=True),
    "fused-graph-in-place": partial(fused, cuda_graph=True, copy_output=False),
}
MAX_AUTOTUNE_PEERS = (
    "eager-channels-last",
    "graph-channels-last",
    "compile-reduce-overhead",
    "compile-max-autotune",
    "cudnn-fused",
    "fused-graph-in-place",
)
DESCRIPTIONS = {
    "eager-nchw": "PyTorch, images and weights NCHW",
    "eager-channels-last": "PyTorch, channels_last",
    "graph-nchw": "eager-nchw in a CUDA graph",
    "graph-channels-last": "eager-channels-last in a CUDA graph",
    "compile-reduce-overhead": 'torch.compile(mode="reduce-overhead")',
    "compile-max-autotune": 'torch.compile(mode="max-autotune")',
    "cudnn-fused": "batch norm folded, aten::cudnn_convolution_relu and _add_relu, channels_last, CUDA graph",
    "swapped": "tritonnn.swap(model): every layer a Triton layer",
    "swapped-graph": "swapped in a CUDA graph",
    "fused": "tritonnn.fuse(model)",
    "fused-graph": "tritonnn.fuse(model, cuda_graph=True): returns a copy of the logits",
    "fused-graph-in-place": "the same with copy_output=False: as with the other graphs, the next call overwrites them",
}
