"""Offsets past 2^31, by strides or by the number of elements, and more than 65,535 of what a grid may count."""

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers.compare import DEVICE, assert_close, assert_identical, assert_same_layer, image
from torch import nn

import tritonnn

FAR = 2**31
LAYERS = {
    "conv2d": lambda channels: nn.Conv2d(channels, channels, 3, padding=1),
    "depthwise": lambda channels: nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
    "batch_norm2d, training": lambda channels: nn.BatchNorm2d(channels),
    "batch_norm2d, eval": lambda channels: nn.BatchNorm2d(channels).eval(),
    "relu": lambda channels: nn.ReLU(),
    "max_pool2d": lambda channels: nn.MaxPool2d(3, 1, 1),
    "avg_pool2d": lambda channels: nn.AvgPool2d(3, 1, 1),
    "adaptive_avg_pool2d": lambda channels: nn.AdaptiveAvgPool2d((2, 1)),
}
VIEWS = {
    "images": ((2, 3, 4, 5), (FAR, 20, 5, 1)),
    "images, channels_last": ((2, 3, 4, 5), (FAR, 1, 15, 3)),
    "channels": ((2, 3, 4, 5), (20, FAR // 2, 5, 1)),
    "rows": ((2, 3, 4, 5), (60, 20, FAR // 3 + 1, 1)),
    "columns": ((2, 3, 4, 5), (12, 4, 1, FAR // 4)),
}
"""Shapes and strides of small tensors whose last element lies 2^31 elements or more behind the first."""


@pytest.fixture(scope="module")
def storage() -> torch.Tensor:
    """Uninitialised, and on a CPU not even backed by memory where nobody writes."""
    return torch.empty(FAR + 2**20, dtype=torch.float16, device=DEVICE)


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize("name", LAYERS)
def test_strides_past_int32(name, case, storage):
    shape, strides = VIEWS[case]
    x = storage.as_strided(shape, strides)
    x.copy_(image(*shape))
    layer = LAYERS[name](shape[1]).to(DEVICE, torch.float16)
    exact = copy.deepcopy(layer).double()(x.double())
    tritonnn.swap(layer, strict=True)
    assert_close(layer(x), exact, x.dtype)


@pytest.mark.parametrize("strides", [(FAR, 1), (20, FAR // 16)], ids=["rows", "columns"])
def test_strides_of_linear_past_int32(strides, storage):
    x = storage.as_strided((2, 17), strides)
    x.copy_(image(2, 17))
    layer = nn.Linear(17, 5).to(DEVICE, torch.float16)
    exact = copy.deepcopy(layer).double()(x.double())
    tritonnn.swap(layer, strict=True)
    assert_close(layer(x), exact, x.dtype)


def test_inplace_relu_of_strides_past_int32(storage):
    x = storage.as_strided((2, 5), (FAR, 1))
    x.copy_(image(2, 5))
    expected = torch.relu(x)
    assert_identical(tritonnn.TritonReLU(inplace=True)(x), expected)


def test_storage_offset_past_int32(storage):
    x = storage[FAR : FAR + 120].view(2, 3, 4, 5)
    x.copy_(image(2, 3, 4, 5))
    assert_same_layer(nn.MaxPool2d(2), x, gradients=False)


MANY = 70_000
MANY_SHAPES = {
    "images": (MANY, 2, 1, 2),
    "rows": (1, 2, MANY, 1),
    "columns": (1, 2, 1, MANY),
    "channels": (1, MANY, 1, 2),
}


SLOW = [("batch_norm2d, training", "channels")]
"""Thousands of programs, milliseconds each in the interpreter."""


@pytest.mark.parametrize(
    "name, case",
    [
        pytest.param(name, case, marks=pytest.mark.gpu if (name, case) in SLOW else ())
        for name in LAYERS
        for case in MANY_SHAPES
        if name != "conv2d"
    ],
)
def test_more_than_65535(name, case):
    # Float64, because the interpreter sums the 140,000 values of batch norm one after the other.
    x = image(*MANY_SHAPES[case], dtype=torch.float64)
    layer = LAYERS[name](x.shape[1]) if name != "adaptive_avg_pool2d" else nn.AdaptiveAvgPool2d((None, None))
    if name == "adaptive_avg_pool2d":  # PyTorch 2.11 leaves most of so many rows or columns alone on a GPU
        tritonnn.swap(layer, strict=True)
        assert torch.equal(layer(x), x)
        return
    assert_same_layer(layer, x, gradients=False)


@pytest.mark.parametrize(
    "channels, shape",
    {
        "images": ((2, 3), (MANY, 2, 1, 2)),
        "rows": ((2, 3), (1, 2, MANY, 1)),
        "columns": ((2, 3), (1, 2, 1, MANY)),
        "input channels": ((MANY, 3), (1, MANY, 1, 2)),
        "output channels": ((2, MANY), (1, 2, 1, 2)),
    }.values(),
    ids=["images", "rows", "columns", "input channels", "output channels"],
)
def test_convolution_of_more_than_65535(channels, shape):
    assert_same_layer(nn.Conv2d(*channels, 1), image(*shape), gradients=False)


@pytest.mark.parametrize(
    "rows, features",
    [(MANY, (2, 3)), (2, (MANY, 3)), (2, (2, MANY))],
    ids=["rows", "input features", "output features"],
)
def test_linear_of_more_than_65535(rows, features):
    assert_same_layer(nn.Linear(*features), image(rows, features[0]), gradients=False)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Tests run without gradients, and without the memory of the tests before."""
    torch.cuda.empty_cache()
    with torch.no_grad():
        yield
    torch.cuda.empty_cache()


def assert_same_slices(layer: nn.Module, x: torch.Tensor, slices: list[tuple[int | slice, ...]]) -> None:
    """Triton's layer(x) equals, in these slices along the batch, PyTorch's layer applied to them alone."""
    expected = [layer(x[index].clone(memory_format=torch.preserve_format)) for index in slices]
    tritonnn.swap(layer, strict=True)
    y = layer(x)
    assert y.numel() > FAR
    for index, e in zip(slices, expected):
        assert_close(y[index], e.double(), x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "batch_norm2d, training"])
def test_batch_of_more_than_int32_elements(name, channels_last, no_grad):
    N = FAR // (8 * 128 * 64) + 1
    x = torch.empty(N, 8, 128, 64, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.normal_()
    layer = LAYERS[name](8) if name != "adaptive_avg_pool2d" else nn.AdaptiveAvgPool2d((128, 64))
    slices = [slice(0, 1), slice(N // 2, N // 2 + 1), slice(N - 1, N)]
    assert_same_slices(layer.to("cuda", torch.float16), x, slices)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_batch_norm_training_of_more_than_int32_elements(channels_last, no_grad):
    x = torch.empty(FAR // (8 * 128 * 64) + 1, 8, 128, 64, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.normal_(1, 2)
    sums = [torch.zeros(8, dtype=torch.float64, device="cuda") for _ in range(2)]
    for part in x.split(4096):
        part = part.double()
        for power, total in enumerate(sums, 1):
            total += (part**power).sum((0, 2, 3))
    count = x.numel() // 8
    mean = sums[0] / count
    var = sums[1] / count - mean**2
    layer = tritonnn.TritonBatchNorm2d(8, momentum=1.0, device="cuda", dtype=torch.float32)
    layer.strict = True
    y = layer(x)
    assert_close(layer.running_mean, mean, torch.float32)
    assert_close(layer.running_var, var * count / (count - 1), torch.float32)
    for index in (0, -1):
        exact = (x[index].double() - mean[:, None, None]) / (var + layer.eps).sqrt()[:, None, None]
        assert_close(y[index], exact, x.dtype)


@pytest.fixture
def large_image() -> Iterator[torch.Tensor]:
    """One image of one channel and more than 2^31 pixels."""
    torch.cuda.empty_cache()
    with torch.no_grad():
        yield torch.empty(1, 1, 46342, 46342, device="cuda", dtype=torch.float16).normal_()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv2d", "batch_norm2d, eval", "relu", "max_pool2d", "avg_pool2d"])
def test_image_of_more_than_int32_pixels(name, large_image):
    layer = LAYERS[name](1).to("cuda", torch.float16)
    corners = [(slice(0, 8), slice(0, 4)), (slice(-8, None), slice(-4, None))]
    expected = [layer(large_image[..., x, x].contiguous())[..., y, y] for x, y in corners]
    tritonnn.swap(layer, strict=True)
    actual = layer(large_image)
    for (_, y), e in zip(corners, expected):
        assert_close(actual[..., y, y], e.double(), torch.float16)


@pytest.mark.gpu
def test_adaptive_pool_to_more_than_int32_pixels(large_image):
    layer = tritonnn.TritonAdaptiveAvgPool2d(large_image.shape[2:])
    layer.strict = True
    y = layer(large_image)
    for corner in (slice(0, 100), slice(-100, None)):
        assert torch.equal(y[..., corner, corner], large_image[..., corner, corner])


@pytest.mark.gpu
def test_indices_of_max_pool_past_int32(large_image):
    size = large_image.shape[2]
    layer = tritonnn.TritonMaxPool2d(2, return_indices=True)
    layer.strict = True
    indices = layer(large_image)[1][0, 0, -4:, -4:]
    expected = nn.MaxPool2d(2, return_indices=True)(large_image[..., -8:, -8:].contiguous())[1][0, 0]
    rows, columns = expected // 8 + size - 8, expected % 8 + size - 8
    assert torch.equal(indices, rows * size + columns)


@pytest.mark.gpu
@pytest.mark.parametrize("features", [(2, 1), (1, 2)], ids=["input", "output"])
def test_linear_of_more_than_int32_elements(features, no_grad):
    x = torch.empty(FAR // 2 + 100, features[0], device="cuda", dtype=torch.float16).normal_()
    layer = nn.Linear(*features, device="cuda", dtype=torch.float16)
    expected = [layer(x[:100]), layer(x[-100:])]
    tritonnn.swap(layer, strict=True)
    y = layer(x)
    assert max(x.numel(), y.numel()) > FAR
    for actual, e in zip((y[:100], y[-100:]), expected):
        assert_close(actual, e.double(), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [FAR - 100, FAR + 100], ids=["just below", "above"])
def test_linear_of_about_int32_rows(rows, no_grad):
    x = torch.empty(rows, 1, device="cuda", dtype=torch.float16).normal_()
    layer = nn.Linear(1, 1, device="cuda", dtype=torch.float16)
    expected = layer(x[-200:])
    tritonnn.swap(layer, strict=True)
    assert_close(layer(x)[-200:], expected.double(), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True], ids=["beside", "inplace"])
@pytest.mark.parametrize("elements", [FAR - 100, FAR + 100], ids=["just below", "above"])
def test_relu_of_about_int32_elements(elements, inplace, no_grad):
    x = torch.randint(-100, 100, (elements,), device="cuda", dtype=torch.int8)
    expected = [torch.relu(x[:5000]), torch.relu(x[-5000:])]
    y = tritonnn.TritonReLU(inplace)(x)
    assert torch.equal(y[:5000], expected[0]) and torch.equal(y[-5000:], expected[1])
