"""Operands of a convolution with an epilogue, what its y is to be, and chains of convolutions in a CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from helpers.compare import image
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms.form import Form
from tritonnn.ops.conv2d.problem import Product


def product_and_result(
    form: Form,
    channels: tuple[int, int],
    groups: int,
    taps: tuple[int, int],
    window: Sequence[tuple[int, int]],
    channels_last: bool,
    dtype: torch.dtype,
) -> tuple[Product, torch.Tensor]:
    """Two images of 11x13 with scale, bias, residual and ReLU; and in float64 what is to be in y, which is NaN yet.

    channels: of x and of y; window: stride, padding, dilation.
    """
    c, k = channels
    x = image(2, c, 11, 13, dtype=dtype, channels_last=channels_last)
    weight = image(k, c // groups, *taps, dtype=dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = 1 + image(k, dtype=sums).abs(), image(k, dtype=sums)
    exact = F.conv2d(x.double(), weight.double(), None, *window, groups)
    residual = image(*exact.shape, dtype=dtype, channels_last=channels_last)
    exact = exact * scale.double()[:, None, None] + bias.double()[:, None, None] + residual.double()
    y = torch.full_like(residual, float("nan"))
    packed, epilogue = form.pack(weight, "ieee"), Epilogue(scale, bias, residual, "relu")
    return Product(x, packed, y, channels_last, *window, groups, "ieee", False, epilogue), exact.relu()


def assert_graph_repeats(
    chain: Callable[[], None], images: list[torch.Tensor], new: Callable[[], torch.Tensor]
) -> None:
    """A CUDA graph of what reads images[0] and writes the others, images[1] last, does what a call does, five times.

    In a graph a kernel may start before the one ends whose y it reads. `new` gives the next images[0].
    """
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(5):
        images[0].copy_(new())
        chain()
        expected = images[1].clone()
        for written in images[1:]:
            written.fill_(float("nan"))
        graph.replay()
        assert torch.equal(images[1], expected)
