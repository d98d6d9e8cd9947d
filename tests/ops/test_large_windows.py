"""Average pooling of large windows by many threads and programs, against float64."""

import pytest
import torch
from torch import nn

import tritonnn
from tritonnn.ops import avg_pool2d
from tritonnn.runtime import hardware

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMIT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The largest error, relative to the largest result: of a type one rounding."""
POOLS = {
    "whole image": ((2, 5, 14, 13), nn.AdaptiveAvgPool2d(1)),
    "whole image of 16 x 16": ((3, 20, 16, 16), nn.AdaptiveAvgPool2d(1)),
    "split among programs": ((1, 3, 120, 121), nn.AdaptiveAvgPool2d(1)),
    "a fixed window that is the image": ((2, 6, 12, 12), nn.AvgPool2d(12)),
    "as large, but padded": ((2, 6, 8, 8), nn.AvgPool2d(8, 9, 1)),
    "overlapping": ((2, 40, 13, 11), nn.AvgPool2d((7, 6), (2, 3), (3, 1))),
    "ceil_mode": ((2, 4, 13, 13), nn.AvgPool2d(6, 5, 3, ceil_mode=True)),
    "padding not counted": ((2, 4, 13, 13), nn.AvgPool2d(6, 5, 3, ceil_mode=True, count_include_pad=False)),
    "another divisor": ((2, 4, 9, 9), nn.AvgPool2d((9, 4), 1, divisor_override=-7)),
    "windows of two sizes": ((2, 6, 14, 13), nn.AdaptiveAvgPool2d((2, 2))),
    "columns": ((2, 6, 20, 13), nn.AdaptiveAvgPool2d((1, 3))),
    "rows": ((2, 6, 20, 13), nn.AdaptiveAvgPool2d((3, 1))),
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> list[avg_pool2d.LargeWindows]:
    """Every window counts as large, and the GPU as an H100; lists how windows were laid out."""
    laid_out, lay_out = [], avg_pool2d.large_windows
    monkeypatch.setattr(avg_pool2d, "is_large", lambda window: True)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(hardware, "gpu", lambda device: hardware.Gpu((9, 0), 132, 232448))
    monkeypatch.setattr(avg_pool2d, "large_windows", lambda *sizes: laid_out.append(lay_out(*sizes)) or laid_out[-1])
    return laid_out


def image(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x[..., ::2, 1:] if layout == "strided" else x


FLOAT32 = [(name, layout, torch.float32) for name in POOLS for layout in ("contiguous", "channels_last", "strided")]
OTHERS = ["whole image", "split among programs", "windows of two sizes", "ceil_mode"]


@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [*FLOAT32, *((name, "channels_last", dtype) for name in OTHERS for dtype in LIMIT if dtype != torch.float32)],
    ids=str,
)
def test_against_float64(name, layout, dtype, large):
    (n, c, h, w), pool = POOLS[name]
    x = image((n, c, 2 * h, w + 1) if layout == "strided" else (n, c, h, w), dtype, layout)
    exact = pool(x.double())
    tritonnn.swap(pool := nn.Sequential(pool), strict=True)
    y = pool(x)
    tritonnn.restore(pool)
    assert large and y.shape == exact.shape and y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"
    assert float((y.double() - exact).abs().max() / exact.abs().max()) <= LIMIT[dtype]
    assert large[0].SPLITS > 1 or name != "split among programs"


def test_nan_and_infinity_stay_in_their_window(large):
    x = torch.ones(1, 2, 12, 12, device=DEVICE)
    x[0, 0, 3, 3], x[0, 1, 9, 9] = float("nan"), float("inf")
    y = tritonnn.TritonAdaptiveAvgPool2d(2)(x)
    assert y[0, 0].isnan().tolist() == [[True, False], [False, False]]
    assert y[0, 1].isposinf().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("outputs, c, window", [(64, 32, 112 * 112), (64, 2048, 49), (1, 3, 10**6), (1, 4096, 49)])
def test_the_gpu_is_filled(outputs, c, window, channels_last):
    """By programs, as far as there are pixels; a tile is no larger than its window needs."""
    gpu = hardware.Gpu((9, 0), 132, 232448)
    splits, unroll, block_w, block_c = avg_pool2d.large_windows(outputs, c, window, 2, channels_last, gpu)
    programs = splits * outputs * -(-c // block_c)
    assert programs >= gpu.multiprocessors / 4 or splits * block_w >= window / 4 or splits == avg_pool2d.MOST_SPLITS
    assert (
        block_w < 2 * window and block_c < 2 * c and block_w * block_c * 2 <= 2 * avg_pool2d.TILE_BYTES[channels_last]
    )


@pytest.mark.gpu
def test_the_same_bits_every_time():
    x = torch.randn(64, 32, 112, 112, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    pool = tritonnn.TritonAdaptiveAvgPool2d(1)
    first = pool(x)
    assert all(torch.equal(pool(x), first) for _ in range(20))
