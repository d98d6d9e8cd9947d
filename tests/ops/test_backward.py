"""The operators of gradients: PyTorch's numbers for every argument that forward takes, to the second order."""

import copy
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.compare import DEVICE, TOLERANCE, assert_close, assert_identical, image, network, tf32
from torch import nn

import tritonnn
from tritonnn.ops import (
    avg_pool2d_backward,
    batch_norm2d_backward,
    batch_norm2d_relu,
    linear_backward,
    max_pool2d_backward,
    relu_backward,
)
from tritonnn.ops import channel_sums as sums
from tritonnn.ops.conv2d import op as forward
from tritonnn.ops.conv2d.backward import choice, input_tma, weight, weight_halo, weight_shares, weight_tma
from tritonnn.ops.conv2d.backward import op as conv2d
from tritonnn.ops.conv2d.backward.input import Taps
from tritonnn.ops.conv2d.forms import few_channels
from tritonnn.ops.window import output_size
from tritonnn.runtime import hardware

CONVOLUTIONS = {
    "3x3": ((2, 8, 6, 7), (5, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": ((2, 17, 3, 5), (33, 17, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3x3/2": ((2, 8, 8, 8), (6, 8, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "3x3/2, odd sides": ((2, 8, 9, 7), (6, 8, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1/2": ((2, 8, 8, 7), (6, 8, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "2x2/2": ((2, 8, 8, 7), (6, 8, 2, 2), (2, 2), (0, 0), (1, 1), 1),
    "7x7/2, 3 channels": ((2, 3, 17, 16), (4, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "4x4/4": ((2, 3, 16, 18), (8, 3, 4, 4), (4, 4), (0, 0), (1, 1), 1),
    "1x1/3": ((2, 4, 10, 11), (6, 4, 1, 1), (3, 3), (0, 0), (1, 1), 1),
    "every number of a pair": ((3, 6, 9, 13), (5, 6, 2, 5), (1, 3), (2, 1), (2, 1), 1),
    "stride 2, dilation 2": ((2, 4, 11, 12), (6, 4, 3, 3), (2, 2), (2, 2), (2, 2), 1),
    "stride 4, dilation 6": ((2, 4, 19, 23), (6, 4, 3, 2), (4, 4), (3, 2), (6, 6), 1),
    "stride 6, dilation 4": ((2, 4, 19, 23), (6, 4, 3, 2), (6, 6), (3, 2), (4, 4), 1),
    "stride 2, dilation 3": ((2, 4, 11, 12), (6, 4, 3, 3), (2, 2), (3, 3), (3, 3), 1),
    "padding wider than the filter": ((2, 4, 5, 6), (6, 4, 3, 1), (1, 1), (4, 2), (1, 1), 1),
    "padding wider than the filter, strided": ((2, 4, 5, 6), (6, 4, 3, 1), (2, 3), (4, 2), (1, 1), 1),
    "filter larger than the image": ((2, 4, 3, 2), (6, 4, 5, 5), (1, 1), (2, 2), (1, 1), 1),
    "groups": ((2, 8, 6, 7), (12, 4, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "groups, strided": ((2, 8, 6, 7), (12, 2, 3, 3), (2, 2), (1, 1), (1, 1), 4),
    "depthwise": ((2, 6, 6, 7), (6, 1, 3, 3), (1, 1), (1, 1), (1, 1), 6),
    "depthwise, two filters a channel, strided": ((2, 6, 9, 9), (12, 1, 3, 3), (2, 2), (2, 2), (2, 2), 6),
}
"""Shapes of x and of the weight, stride, padding, dilation, groups."""
CONVOLUTION = (2, 3, 5, 4), (4, 3, 3, 3), (2, 2), (1, 1), (1, 1), 1
MAX_POOLS = {
    "3x3/1, several strips": ((2, 3, 19, 6), (3, 3), (1, 1), (1, 1), (1, 1), False),
    "3x3/1, not padded on all sides": ((3, 2, 5, 7), (3, 3), (1, 1), (0, 1), (1, 1), False),
    "2x2/2": ((2, 5, 8, 7), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "3x3/1, padding 1": ((2, 5, 6, 7), (3, 3), (1, 1), (1, 1), (1, 1), False),
    "3x3/2, padding 1": ((2, 5, 9, 8), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "ceil_mode": ((2, 5, 9, 8), (3, 2), (2, 3), (1, 0), (1, 1), True),
    "dilated": ((2, 5, 12, 13), (3, 2), (2, 3), (1, 1), (3, 2), True),
    "gaps between windows": ((2, 5, 12, 13), (2, 2), (5, 3), (0, 0), (1, 1), False),
    "a window of the whole image": ((2, 5, 6, 6), (6, 6), (6, 6), (0, 0), (1, 1), False),
}
AVG_POOLS = {
    "4x4/4": ((2, 5, 8, 8), (4, 4), (4, 4), (0, 0), False, True, None),
    "3x3/2, padding 1": ((2, 5, 9, 8), (3, 3), (2, 2), (1, 1), False, True, None),
    "padding not counted": ((2, 5, 9, 8), (3, 3), (2, 2), (1, 1), False, False, None),
    "ceil_mode": ((2, 5, 9, 8), (3, 2), (2, 3), (1, 1), True, True, None),
    "ceil_mode, padding not counted": ((2, 5, 8, 10), (3, 3), (2, 2), (1, 1), True, False, None),
    "divisor": ((2, 5, 8, 10), (3, 3), (3, 3), (0, 0), False, True, -7),
    "gaps between windows": ((2, 5, 12, 13), (2, 2), (5, 3), (0, 0), False, True, None),
}
ADAPTIVE = {"1": (1, 1), "uneven": (3, 5), "larger than the image": (9, 8), "one row": (1, 4)}


def convolution(case: tuple, layout: bool = False, dtype: torch.dtype = torch.float64) -> tuple:
    """g, x, weight, and the window."""
    x_shape, weight_shape, *window = case
    x, weight = image(*x_shape, dtype=dtype, channels_last=layout), image(*weight_shape, dtype=dtype)
    sizes = zip(x_shape[2:], weight_shape[2:], *window[:3])
    g = image(x_shape[0], weight_shape[0], *(output_size(*size) for size in sizes), dtype=dtype, channels_last=layout)
    return g, x, weight, tuple(window)


def assert_formula(actual: object, expected: object) -> None:
    """Float64's sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, layout):
    g, x, weight, window = convolution(CONVOLUTIONS[case], layout)
    arguments = g, weight, tuple(x.shape), layout, *window
    grad_x = conv2d.conv2d_backward_input(*arguments)
    assert_formula(grad_x, conv2d._input_formula(*arguments))
    assert grad_x.is_contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)
    arguments = g, x, tuple(weight.shape), layout, *window
    assert_formula(conv2d.conv2d_backward_weight(*arguments), conv2d._weight_formula(*arguments))
    assert_formula(sums.channel_sums(g), g.sum((0, 2, 3)))


def test_each_tap_reaches_the_pixels_of_one_class():
    """All numbers of a row's window: the taps of all classes are those of the definition, each once."""
    for size, stride, padding, dilation in itertools.product(range(1, 5), range(1, 7), range(4), range(1, 7)):
        for residue in range(stride):
            taps = Taps.of(residue, size, stride, padding, dilation)
            found = [
                (taps.FIRST + t * taps.STEP, i + taps.OFFSET - t * taps.SHIFT)
                for i in range(3)
                for t in range(taps.COUNT)
            ]
            expected = [
                (r, (h + padding - r * dilation) // stride)
                for h in range(residue, residue + 3 * stride, stride)
                for r in range(size)
                if (h + padding - r * dilation) % stride == 0
            ]
            assert found == expected


@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", MAX_POOLS)
def test_max_pool(case, layout):
    shape, *window, ceil_mode = MAX_POOLS[case]
    x = image(*shape, dtype=torch.float64, channels_last=layout)
    y, indices = torch.nn.functional.max_pool2d(x, *window, ceil_mode, return_indices=True)
    arguments = torch.randn_like(y), x, *window, ceil_mode, indices
    actual, expected = max_pool2d_backward.max_pool2d_backward(*arguments), max_pool2d_backward._formula(*arguments)
    assert_formula(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("infinite", [False, True], ids=["", "windows of -inf"])
@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", MAX_POOLS)
def test_max_pool_by_positions_in_windows(case, layout, infinite):
    """Which the layer keeps in place of indices: ties, NaN and -inf are PyTorch's, and so is the second order."""
    shape, kernel_size, stride, padding, dilation, ceil_mode = MAX_POOLS[case]
    layer = nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    x = image(*shape, dtype=torch.float64, channels_last=layout).round()
    x[0, 0, 3, 3] = float("nan")
    if infinite:
        x.fill_(-float("inf"))
    gradients, outputs = [], []
    for swap in (False, True):
        if swap:
            tritonnn.swap(layer, strict=True)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        outputs.append(y.detach())
        (grad,) = torch.autograd.grad(y, leaf, torch.arange(y.numel(), dtype=y.dtype, device=DEVICE).view(y.shape))
        gradients.append(grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert_identical(*outputs[::-1])


@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", AVG_POOLS)
def test_avg_pool(case, layout):
    shape, *arguments = AVG_POOLS[case]
    x = image(*shape, dtype=torch.float64, channels_last=layout)
    g = torch.randn_like(torch.ops.aten.avg_pool2d(x, *arguments))
    actual = avg_pool2d_backward.avg_pool2d_backward(g, x, *arguments)
    expected = torch.ops.aten.avg_pool2d_backward(g, x, *arguments)
    assert_formula(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ADAPTIVE)
def test_adaptive_pool(case, layout):
    g = image(2, 5, *ADAPTIVE[case], dtype=torch.float64)
    arguments = g, (7, 6), layout
    actual = avg_pool2d_backward.adaptive_avg_pool2d_backward(*arguments)
    assert_formula(actual, avg_pool2d_backward._adaptive_formula(*arguments))
    assert actual.is_contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_batch_norm_gives_what_is_wanted(training, mask):
    x = 3 + image(3, 5, 4, 6, dtype=torch.float64)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    weight = image(5, dtype=torch.float64)
    arguments = torch.randn_like(x), x, weight, mean, var, 1e-5, training, mask
    actual = batch_norm2d_backward.batch_norm2d_backward(*arguments)
    for grad, expected in zip(actual, batch_norm2d_backward._formula(*arguments)):
        assert (grad.numel() == 0) == (expected is None)
        if expected is not None:
            assert_formula(grad, expected)


def test_batch_norm_of_a_large_mean():
    """Deviations of 1e-3 of a mean of 100 in float32: as near float64 as PyTorch's."""
    x = (100 + 1e-1 * image(8, 4, 16, 16, dtype=torch.float64)).float()
    g, weight = torch.randn_like(x), image(4)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    exact = batch_norm2d_backward._formula(
        g.double(), x.double(), weight.double(), mean, var, 1e-5, True, (True, True, True)
    )
    errors = []
    for compute in (batch_norm2d_backward.batch_norm2d_backward, batch_norm2d_backward._formula):
        grads = compute(g, x, weight, mean.float(), var.float(), 1e-5, True, (True, True, True))
        errors.append([float((y - e).norm() / e.norm()) for y, e in zip(grads, exact)])
    assert all(ours <= 1.5 * pytorchs + 1e-7 for ours, pytorchs in zip(*errors)), errors


def test_relu_keeps_the_gradient_of_nan():
    y = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf")], device=DEVICE)
    g = torch.tensor([1.0, 2.0, float("nan"), 4.0, float("inf")], device=DEVICE)
    expected = torch.ops.aten.threshold_backward(g, y, 0)
    torch.testing.assert_close(relu_backward.relu_backward(g, y), expected, equal_nan=True, rtol=0, atol=0)


BY_TMA = {
    "rows follow each other": ((3, 64, 8, 16), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "several images a box": ((7, 64, 4, 4), (128, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "parts of a row": ((2, 64, 3, 128), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "dilated": ((5, 64, 8, 8), (64, 64, 3, 3), (1, 1), (2, 2), (2, 2), 1),
    "strided": ((3, 64, 8, 16), (128, 64, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1, any sides": ((3, 128, 7, 5), (64, 128, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, strided": ((3, 64, 8, 16), (128, 64, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "5x4, strided, padding of a pair": ((3, 64, 16, 8), (64, 64, 5, 4), (2, 2), (2, 1), (1, 1), 1),
    "2x2, strided": ((2, 64, 8, 8), (64, 64, 2, 2), (2, 2), (0, 0), (1, 1), 1),
}


@pytest.mark.parametrize("programs", [1, 5, 64, 1000])
@pytest.mark.parametrize("case", BY_TMA)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs Triton's interpreter, which runs the kernels anywhere")
def test_gradient_of_the_weight_by_tma(case, programs, monkeypatch):
    """However many programs share the work: of one tile, or of several."""
    g, x, weight, window = convolution(BY_TMA[case], True, torch.float32)
    gpu = dataclasses.replace(hardware.INTERPRETER, multiprocessors=programs)
    monkeypatch.setattr(hardware, "gpu", lambda device: gpu)
    monkeypatch.setattr(weight_shares, "LEAST_SHARE", 1)
    config = weight_tma.default_config(*weight.shape[:2], weight.shape[2:])._replace(PROGRAMS=1)
    actual = torch.full_like(weight, float("nan"))
    weight_tma.run(g, x, actual, window[:3], config)
    expected = conv2d._weight_formula(g.double(), x.double(), tuple(weight.shape), True, *window)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


OF_FEW_CHANNELS = {
    "7x7/2": ((2, 3, 17, 16), (4, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "5x9, sides apart, dilated rows": ((2, 2, 17, 20), (3, 2, 5, 9), (1, 3), (2, 4), (2, 1), 1),
    "a channel, 11x11": ((3, 1, 12, 15), (5, 1, 11, 11), (1, 1), (5, 0), (1, 1), 1),
}


@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", OF_FEW_CHANNELS)
def test_gradient_of_few_channels_by_rows(case, layout, monkeypatch):
    monkeypatch.setattr(few_channels, "LEAST_PIXELS", 1)
    g, x, filters, window = convolution(OF_FEW_CHANNELS[case], layout, torch.float64)
    assert weight.is_by_rows(g, filters.shape[1:], window, 1)
    actual = torch.full_like(filters, float("nan"))
    weight.run(g, x, actual, window[:3], 1, "ieee")
    expected = conv2d._weight_formula(g, x, tuple(filters.shape), layout, *window)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [case for case, (*_, stride, _, _, _) in BY_TMA.items() if stride == (2, 2)])
@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs Triton's interpreter, which runs the kernels anywhere")
def test_gradient_of_a_strided_input_by_tma(case):
    g, x, weight, window = convolution(BY_TMA[case], True, torch.float32)
    actual = torch.full_like(x, float("nan"))
    input_tma.run(g, weight, actual, window[1])
    rounded = tf32(g).double(), tf32(weight).double()
    expected = conv2d._input_formula(*rounded, tuple(x.shape), True, *window)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_all_boxes_are_shared_out():
    """Each box of each tile to one program, in as many segments as are reckoned with, and all programs about alike."""
    for boxes, tiles, programs in itertools.product((1, 7, 40, 129, 8192), (1, 3, 9, 144, 500), (1, 132, 264)):
        shares = weight_shares.shares_of(boxes, tiles, programs)
        seen = []
        for pid in range(shares.programs):
            first, taken = (pid - shares.FULL) * shares.SHARE, 0
            for segment in range(shares.SEGMENTS):
                tile, begin, end, place, first = share(pid, segment, first, shares, tiles)
                seen += [(tile, begin, end, place)] if begin < end else []
                taken += max(end - begin, 0)
            assert 0 < taken <= shares.SHARE
        for tile in range(tiles):
            pieces = sorted((begin, end) for t, begin, end, _ in seen if t == tile)
            assert [end for _, end in pieces] == [*(begin for begin, _ in pieces[1:]), boxes] and pieces[0][0] == 0
        places = [place for *_, place in seen]
        assert len(set(places)) == len(places) and max(places) < shares.stored
        assert shares.programs <= max(programs, tiles)


@pytest.mark.parametrize(
    "shape", [(512, 64, 32, 32), (64, 256, 14, 14), (64, 512, 7, 7), (3, 64, 1, 5), (1, 64, 100, 3)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_boxes_with_a_halo_fit(shape, stride):
    """Slots of three programs; lines of whole swizzles; and little outside of the image where that can be."""
    n, _, p, q = shape
    config = weight_halo.default_config(shape, stride, 232448)
    pixels = config.TILE_N * config.TILE_P * config.TILE_Q
    assert pixels == 64 and config.TILE_N * config.TILE_Q % 8 == 0 and config.SLOTS >= 2
    assert 3 * (config.SLOTS * weight_halo.bytes_of(config[:3], stride) + weight_halo.BARRIERS) <= 232448
    boxes = -(-n // config.TILE_N) * -(-p // config.TILE_P) * -(-q // config.TILE_Q)
    assert n < 64 or n * p * q > 0.8 * boxes * pixels


def share(pid: int, segment: int, first: int, shares: weight_shares.Shares, tiles: int) -> tuple[int, ...]:
    """What `segment_of` says, without Triton."""
    if pid < shares.FULL:
        begin = pid // tiles * shares.SHARE
        end = min(begin + shares.SHARE, shares.BOXES) if segment == 0 else begin
        return pid % tiles, begin, end, pid, first
    tile = min(first // shares.REST, tiles - 1)
    begin = shares.BOXES - shares.REST - tile * shares.REST
    after = min((tile + 1) * shares.REST, (pid - shares.FULL + 1) * shares.SHARE, tiles * shares.REST)
    return tile, begin + first, begin + after, shares.FULL + (pid - shares.FULL) * shares.SEGMENTS + segment, after


STRIDED = {
    "expanded": lambda t: t.mean((2, 3), keepdim=True).expand_as(t),
    "sliced": lambda t: torch.cat([t, t], 1)[:, ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_strides(name):
    """All tensors may have any strides, those that were saved included."""
    view = STRIDED[name]
    x, g, weight = (view(image(2, 6, 4, 4, dtype=torch.float64)) for _ in range(3))
    window = (1, 1), (1, 1), (1, 1), 1
    filters = view(image(6, 6, 3, 3, dtype=torch.float64))
    for ours, formula, arguments in (
        (relu_backward.relu_backward, relu_backward._formula, (g, x)),
        (conv2d.conv2d_backward_input, conv2d._input_formula, (g, filters, tuple(x.shape), False, *window)),
        (conv2d.conv2d_backward_weight, conv2d._weight_formula, (g, x, tuple(filters.shape), False, *window)),
        (sums.channel_sums, lambda g: g.sum((0, 2, 3)), (g,)),
        (linear_backward.linear_backward_input, torch.matmul, (g[0, 0], weight[0, 1])),
        (linear_backward.linear_backward_weight, lambda g, x: g.T @ x, (g[0, 0], x[1, 2])),
        (
            batch_norm2d_backward.batch_norm2d_backward,
            batch_norm2d_backward._formula,
            (g, x, weight[0, :, 0, 0], x[0, :, 0, 0], x[0, :, 1, 1].abs(), 1e-5, True, (True, True, True)),
        ),
    ):
        assert_formula(ours(*arguments), formula(*arguments))


OPERATORS = {
    "relu_backward": lambda: (image(2, 3, 4, 5), image(2, 3, 4, 5)),
    "batch_norm2d_backward": lambda: (
        image(2, 4, 3, 3),
        image(2, 4, 3, 3),
        image(4),
        image(4),
        image(4).abs(),
        1e-5,
        True,
        (True, True, True),
    ),
    "max_pool2d_backward": lambda: (
        image(2, 3, 2, 2),
        image(2, 3, 4, 4),
        (2, 2),
        (2, 2),
        (0, 0),
        (1, 1),
        False,
        torch.zeros(2, 3, 2, 2, dtype=torch.int64, device=DEVICE),
    ),
    "avg_pool2d_backward": lambda: (
        image(2, 3, 2, 2),
        image(2, 3, 4, 4),
        (2, 2),
        (2, 2),
        (0, 0),
        False,
        True,
        None,
    ),
    "adaptive_avg_pool2d_backward": lambda: (image(2, 3, 2, 2), (4, 4), True),
    "conv2d_backward_input": lambda: (image(2, 4, 3, 2), image(4, 3, 3, 3), (2, 3, 5, 4), True, *CONVOLUTION[2:]),
    "conv2d_backward_weight": lambda: (image(2, 4, 3, 2), image(2, 3, 5, 4), (4, 3, 3, 3), True, *CONVOLUTION[2:]),
    "channel_sums": lambda: (image(2, 3, 4, 5),),
    "linear_backward_input": lambda: (image(5, 4), image(4, 3)),
    "linear_backward_weight": lambda: (image(5, 4), image(5, 3)),
}


@pytest.mark.parametrize("differentiable", [False, True], ids=["", "differentiable"])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, differentiable):
    """With gradients of its own, those of parameters and statistics excepted, of which PyTorch has none."""
    arguments = OPERATORS[name]()
    if differentiable:
        count = 3 if name == "batch_norm2d_backward" else 2
        differentiable = [i for i, arg in enumerate(arguments[:count]) if isinstance(arg, torch.Tensor)]
        for i in differentiable:
            arguments[i].requires_grad_()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if differentiable and name == "conv2d_backward_weight":  # PyTorch's formula does not take symbolic sizes
        checks = checks[:-1]
    torch.library.opcheck(getattr(torch.ops.tritonnn, name), arguments, test_utils=checks)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_outputs_have_the_strides_of_real_ones(name):
    from torch._subclasses import FakeTensorMode

    arguments = OPERATORS[name]()
    op = getattr(torch.ops.tritonnn, name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    real = op(*arguments)
    for f, r in zip(*((y if isinstance(y, tuple) else (y,)) for y in (fake, real))):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


LAYERS = {
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 4)),
    "conv2d, strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 2, 5, 4)),
    "linear": (lambda: nn.Linear(4, 3), (3, 4)),
    "relu": (nn.ReLU, (2, 7)),
    "max_pool2d": (lambda: nn.MaxPool2d(3, 2, 1), (2, 2, 5, 5)),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 2, 5, 5)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(2), (2, 2, 5, 5)),
    "adaptive_avg_pool2d to 1": (lambda: nn.AdaptiveAvgPool2d(1), (2, 2, 5, 5)),
    "batch_norm2d, training": (lambda: nn.BatchNorm2d(2, track_running_stats=False), (2, 2, 3, 3)),
    "batch_norm2d, eval": (lambda: nn.BatchNorm2d(2).eval(), (2, 2, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_to_the_second_order(name):
    """torch.func: gradients of each example, and Hessians by a gradient of a gradient, are PyTorch's."""
    make, shape = LAYERS[name]
    layer = make().to(DEVICE, torch.float64)
    tensors = {name: p.detach() for name, p in layer.named_parameters()}
    x = image(*shape, dtype=torch.float64)

    def loss(tensors, x):
        return torch.func.functional_call(layer, tensors, (x,)).square().square().sum()

    def penalty(tensors, x):
        return torch.func.grad(loss, 1)(tensors, x).square().sum()

    def results():
        each = torch.func.vmap(torch.func.grad(loss, 1), (None, 0))(tensors, torch.stack([x, 2 * x]))
        return torch.func.grad(loss)(tensors, x), each, torch.func.grad(penalty, 1)(tensors, x)

    expected = results()
    tritonnn.swap(layer, strict=True)
    torch.testing.assert_close(results(), expected, rtol=1e-9, atol=1e-10)


def test_a_swapped_network_runs_none_of_pytorchs_gradients():
    model = network().double()  # on a GPU some gradients of float32 are left to PyTorch
    tritonnn.swap(model, strict=True)
    x = image(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    loss = model(x).square().sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    ran = {event.key for event in profile.key_averages()}
    pytorchs = {"aten::convolution_backward", "aten::threshold_backward", "aten::native_batch_norm_backward"}
    pytorchs |= {"aten::max_pool2d_with_indices_backward", "aten::avg_pool2d_backward", "aten::mm", "aten::div"}
    assert not ran & pytorchs
    assert not {key for key in ran if key.startswith("tritonnn::")}  # nobody watches: no dispatcher


LEFT = {
    "64 channels": ((8, 64, 32, 32), (64, 64, 3, 3), (1, 1), 1, torch.bfloat16, (None, None)),
    "strided": ((8, 64, 32, 32), (128, 64, 3, 3), (2, 2), 1, torch.bfloat16, (None, None)),
    "stem": ((8, 3, 32, 32), (64, 3, 3, 3), (1, 1), 1, torch.bfloat16, (None, None)),
    "1x1 of any image": ((8, 64, 7, 7), (64, 64, 1, 1), (1, 1), 1, torch.float16, (None, None)),
    "sides of no power of 2": ((8, 64, 14, 14), (64, 64, 3, 3), (1, 1), 1, torch.bfloat16, (None, None)),
    "sides of no power of 2, strided": (
        *((8, 64, 28, 28), (64, 64, 3, 3), (2, 2), 1, torch.bfloat16),
        (None, "gradient of the weight of this shape"),
    ),
    "sides of no power of 2, 5x5": (
        *((8, 64, 14, 14), (64, 64, 5, 5), (1, 1), 1, torch.bfloat16),
        (None, "gradient of the weight of this shape"),
    ),
    "float32": ((8, 64, 32, 32), (64, 64, 3, 3), (1, 1), 1, torch.float32, (None, "gradient of the weight in float32")),
    "float32, strided": (
        *((8, 64, 32, 32), (64, 64, 3, 3), (2, 2), 1, torch.float32),
        ("gradient of a strided input in float32", "gradient of the weight in float32"),
    ),
    "depthwise": (
        *((8, 64, 32, 32), (64, 1, 3, 3), (1, 1), 64, torch.bfloat16),
        ("gradient of the input of groups", "gradient of the weight of groups"),
    ),
    "float64": ((8, 64, 14, 14), (64, 64, 3, 3), (2, 2), 1, torch.float64, (None, None)),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_pytorch_on_hopper(case, monkeypatch):
    """By sizes and types alone: the tensors are fake, on a GPU that need not be there."""
    x_shape, weight_shape, stride, groups, dtype, expected = LEFT[case]
    monkeypatch.setattr(hardware, "gpu", lambda device: hardware.Gpu((9, 0), 132, 232448))
    monkeypatch.setattr(hardware, "gluon_is_verified", lambda device: True)
    x, weight = (SimpleNamespace(is_cuda=True, device=None, dtype=dtype, shape=s) for s in (x_shape, weight_shape))
    padding = ((weight_shape[2] - 1) // 2,) * 2
    assert choice.reasons_for_pytorch(x, weight, stride, padding, (1, 1), groups) == expected
    x.is_cuda = False
    assert choice.reasons_for_pytorch(x, weight, stride, padding, (1, 1), groups) == (None, None)


def test_what_backward_leaves_to_pytorch_is_counted(monkeypatch):
    """It counts in the layer whose gradient it is, and only that: a second layer's kernels, and the bias, stay."""
    pytorch = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)).to(DEVICE, torch.float64)
    swapped = copy.deepcopy(pytorch)
    report = tritonnn.swap(swapped, strict=True)
    monkeypatch.setattr(forward, "reasons_for_pytorch", lambda x, *_: (None, "slower" if x.shape[1] == 3 else None))
    x = image(2, 3, 8, 8, dtype=torch.float64)
    for model in (pytorch, swapped):
        for _ in range(2):
            model(x).square().sum().backward()
    for p, q in zip(swapped.parameters(), pytorch.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    assert report.fallbacks == {"0": {"slower": 2}}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_gradients(dynamic):
    """AOTAutograd traces the operators of gradients, for any size of the batch."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    model = network().double()
    tritonnn.swap(model, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (2, 3):
        x = image(batch, 3, 8, 8, dtype=torch.float64)
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-10)
    names = ["conv2d_backward_weight", "batch_norm2d_backward", "relu_backward", "max_pool2d_backward"]
    names += ["avg_pool2d_backward", "adaptive_avg_pool2d_backward", "linear_backward_weight", "channel_sums"]
    assert {f"tritonnn.{name}.default" for name in names} <= set(seen)


REAL = {
    "64 to 64, boxes of rows": ((32, 64, 32, 32), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "128 to 128": ((32, 128, 16, 16), (128, 128, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "64 to 128, strided": ((32, 64, 32, 32), (128, 64, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "64 to 128, 1x1, strided": ((32, 64, 32, 32), (128, 64, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "512 to 512, a batch that no box divides": ((37, 512, 4, 4), (512, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "64 to 64, 56x56": ((4, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "256 to 64, 1x1": ((4, 256, 56, 56), (64, 256, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "256 to 256, 14x14": ((5, 256, 14, 14), (256, 256, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "512 to 512, 7x7": ((5, 512, 7, 7), (512, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "64 to 128, 28x28, strided": ((5, 64, 28, 28), (128, 64, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "512 to 512, 14x14, strided": ((37, 512, 14, 14), (512, 512, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "64 to 64, padded by 2 and 0": ((5, 64, 12, 9), (64, 64, 3, 3), (1, 1), (2, 0), (1, 1), 1),
    "dilated": ((5, 64, 16, 16), (64, 64, 3, 3), (1, 1), (2, 2), (2, 2), 1),
    "5x5": ((5, 64, 16, 16), (128, 64, 5, 5), (1, 1), (2, 2), (1, 1), 1),
    "stem": ((32, 3, 32, 32), (64, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "7x7 stem": ((4, 3, 64, 64), (64, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "7x7 stem by rows": ((4, 3, 224, 224), (64, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "groups": ((4, 128, 14, 14), (128, 4, 3, 3), (1, 1), (1, 1), (1, 1), 32),
    "depthwise, strided": ((4, 96, 28, 28), (96, 1, 3, 3), (2, 2), (1, 1), (1, 1), 96),
    "odd channels": ((4, 70, 15, 13), (90, 70, 3, 3), (2, 2), (1, 1), (1, 1), 1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "TF32", "float32"])
@pytest.mark.parametrize("case", REAL)
def test_convolution_on_tensor_cores(case, precision, layout):
    """No further from float64 than PyTorch's, and the same bits twice."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "TF32" else "ieee"
    g, x, weight, window = convolution(REAL[case], layout, dtype)
    for ours, formula, arguments in (
        (conv2d.conv2d_backward_input, conv2d._input_formula, (g, weight, tuple(x.shape), layout, *window)),
        (conv2d.conv2d_backward_weight, conv2d._weight_formula, (g, x, tuple(weight.shape), layout, *window)),
    ):
        exact = formula(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
        first, second = ours(*arguments), ours(*arguments)
        pytorchs = formula(*arguments)
        assert torch.equal(first, second)
        error, noise = (float((y.double() - exact).norm() / exact.norm()) for y in (first, pytorchs))
        assert error <= 1.2 * noise + 1e-7, (ours.__name__ if hasattr(ours, "__name__") else ours, error, noise)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_others_on_real_shapes(dtype, layout):
    """Against PyTorch's formulas of contiguous tensors: that of padded average pooling is off in channels_last."""
    x, g = (image(64, 64, 32, 32, dtype=dtype, channels_last=layout) for _ in range(2))
    statistics = x.float().mean((0, 2, 3)), x.float().var((0, 2, 3), unbiased=False)
    norm = g, x, image(64), *statistics, 1e-5, True, (True, True, True)
    _, indices = torch.nn.functional.max_pool2d(x, 3, 1, 1, return_indices=True)
    pool = (3, 3), (1, 1), (1, 1)
    for ours, formula, arguments in (
        (relu_backward.relu_backward, relu_backward._formula, (g, x)),
        (batch_norm2d_backward.batch_norm2d_backward, batch_norm2d_backward._formula, norm),
        (max_pool2d_backward.max_pool2d_backward, max_pool2d_backward._formula, (g, x, *pool, (1, 1), False, indices)),
        (avg_pool2d_backward.avg_pool2d_backward, torch.ops.aten.avg_pool2d_backward, (g, x, *pool, False, True, None)),
    ):
        contiguous = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
        double = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in contiguous]
        outputs = [y if isinstance(y, tuple) else (y,) for y in (formula(*double), formula(*contiguous))]
        outputs += [y if isinstance(y, tuple) else (y,) for y in (ours(*arguments), ours(*arguments))]
        for exact, pytorchs, first, second in zip(*outputs):
            error, noise = (float((y.double() - exact).norm() / exact.norm()) for y in (first, pytorchs))
            assert torch.equal(first, second)
            assert error <= 1.2 * noise + 1e-7, (error, noise)


@pytest.mark.gpu
def test_gradients_in_a_cuda_graph():
    """Where kernels are launched dependently on each other: the bits of eager launches, at every replay."""
    shapes = {"3x3": REAL["64 to 64, boxes of rows"], "strided": REAL["64 to 128, strided"], "stem": REAL["stem"]}
    operands = {name: convolution(case, True, torch.bfloat16) for name, case in shapes.items()}
    x, g, y, second = (image(32, 64, 32, 32, dtype=torch.bfloat16, channels_last=True) for _ in range(4))
    statistics = [image(64).float() for _ in range(2)] + [image(64).float().abs() for _ in range(3)]

    def gradients():
        outputs = []
        for g_of, x_of, weight_of, window in operands.values():
            outputs.append(conv2d.conv2d_backward_weight(g_of, x_of, tuple(weight_of.shape), True, *window))
            if x_of.shape[1] > 3:
                outputs.append(conv2d.conv2d_backward_input(g_of, weight_of, tuple(x_of.shape), True, *window))
        outputs += batch_norm2d_relu.batch_norm2d_relu(x, y, *statistics[:2], 1e-5)
        outputs += batch_norm2d_relu.batch_norm2d_relu_backward(g, second, x, y, *statistics, 1e-5)
        outputs += batch_norm2d_backward.batch_norm2d_backward(g, x, *statistics[1:4], 1e-5, True, (True, True, True))
        return [*outputs, sums.channel_sums(g)]

    expected = gradients()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        actual = gradients()
    for _ in range(3):
        for t in actual:
            t.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_batch_norm_with_relu(dtype, residual, layout):
    """Values and gradients of the three operations after each other, by PyTorch."""
    x, other = (1 + 2 * image(4, 6, 5, 7, dtype=dtype, channels_last=layout) for _ in range(2))
    parameters = [image(6, dtype=torch.float32 if dtype == torch.bfloat16 else dtype) for _ in range(2)]
    tensors = [t if t is None else t.requires_grad_() for t in (x, other if residual else None, *parameters)]

    def pytorchs(x, residual, weight, bias):
        y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
        return (y if residual is None else y + residual).relu()

    g = image(4, 6, 5, 7, dtype=dtype, channels_last=layout)
    exact_tensors = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    exact = pytorchs(*exact_tensors)
    actual, mean, var, _ = batch_norm2d_relu.batch_norm2d_relu(*tensors, 1e-5)
    assert_close(actual, exact.detach(), dtype)
    assert actual.is_contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)
    assert_close(mean, x.double().mean((0, 2, 3)), dtype)
    safe = exact.detach().abs() + (exact.detach() == 0) > 0.05  # where a rounding does not decide on ReLU's mask
    g = g * safe
    wanted, exact_wanted = ([t for t in of if t is not None] for of in (tensors, exact_tensors))
    grads = torch.autograd.grad(actual, wanted, g)
    for grad, expected in zip(grads, torch.autograd.grad(exact, exact_wanted, g.double())):
        tolerance = 10 * TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_batch_norm_with_relu_to_the_second_order(residual):
    tensors = [image(2, 3, 3, 2, dtype=torch.float64), image(2, 3, 3, 2, dtype=torch.float64) if residual else None]
    tensors += [image(3, dtype=torch.float64), image(3, dtype=torch.float64)]
    tensors = [t if t is None else t.requires_grad_() for t in tensors]

    def first(*tensors):
        return batch_norm2d_relu.batch_norm2d_relu(*tensors, 1e-5)[0]

    assert torch.autograd.gradcheck(first, tensors, fast_mode=True, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(first, tensors, fast_mode=True, atol=1e-7, rtol=1e-6)
