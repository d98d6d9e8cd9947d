"""Programs of the form "tma" that share a tile: values in every precision, the same bits each time, what it refuses."""

import pytest
import torch
from helpers.compare import DEVICE, image, tf32, worst_image
from helpers.gpus import H100, posing
from helpers.problems import problem, product
from torch.nn import functional as F

from tritonnn.ops.conv2d.dispatch import can_run, default_choice, run
from tritonnn.ops.conv2d.epilogue import Epilogue
from tritonnn.ops.conv2d.forms import BY_NAME, tma
from tritonnn.ops.conv2d.forms.tma_tiles import best_box, config_of
from tritonnn.ops.conv2d.pack import pack_weight
from tritonnn.ops.conv2d.problem import Choice, Product
from tritonnn.runtime.semaphores import PER_STREAM, semaphores

in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")

LIMITS = {"ieee": 2**-8 if DEVICE.type == "cuda" else 2**-20, "tf32": 2**-17, "tf32x3": 2**-20}
"""Of the error of an image, by precision; on a GPU the first is bfloat16."""
CASES = {
    "2, weight first": (2, "ieee", True, (64, 64), (3, 3), 1),
    "3, of nine steps": (3, "ieee", True, (32, 48), (3, 3), 1),
    "4, of nine steps": (4, "ieee", True, (32, 48), (3, 3), 1),
    "8, of nine steps": (8, "ieee", True, (32, 48), (3, 3), 1),
    "as many as steps": (9, "ieee", True, (32, 48), (3, 3), 1),
    "4, TF32": (4, "tf32", True, (64, 40), (3, 3), 1),
    "4, TF32 in registers": (4, "tf32", False, (64, 40), (3, 3), 1),
    "2, float32": (2, "tf32x3", False, (64, 40), (3, 3), 1),
    "3, float32, sums flushed within a part": (3, "tf32x3", False, (96, 64), (3, 3), 1),
    "4, one tap, channels that end a block": (4, "ieee", True, (232, 40), (1, 1), 1),
    "4, one tap, float32": (4, "tf32x3", False, (200, 40), (1, 1), 1),
    "3, seven taps, channels that end a block": (3, "ieee", True, (40, 64), (1, 7), 1),
    "2, seven taps, float32, channels that end a block": (2, "tf32x3", False, (40, 64), (7, 1), 1),
    "4, by parity": (4, "ieee", True, (64, 64), (3, 3), 2),
    "4, by parity, float32": (4, "tf32x3", False, (64, 64), (3, 3), 2),
}
"""Splits, precision, whether the weight comes first, channels of x and y, taps, and stride."""


def operands(name: str, channels_last: bool) -> tuple[Product, Choice, torch.Tensor]:
    """Three images under the whole epilogue, a split choice, and y in float64."""
    splits, input_precision, swap_ab, (c, k), taps, stride = CASES[name]
    half = DEVICE.type == "cuda" and input_precision == "ieee"
    dtype, block_k = (torch.bfloat16, 64) if half else (torch.float32, 32)
    if half and c * taps[0] * taps[1] < splits * 64:
        block_k = 32
    x, weight = image(3, c, 8, 6, dtype=dtype, channels_last=True), image(k, c, *taps, dtype=dtype)
    scale, bias = image(k), image(k)
    rounded = (tf32(x), tf32(weight)) if input_precision == "tf32" else (x, weight)
    padding = taps[0] // 2, taps[1] // 2
    exact = F.conv2d(*(t.double() for t in rounded), None, stride, padding) * scale.double()[:, None, None]
    residual = image(*exact.shape, dtype=dtype, channels_last=True) if channels_last else None
    exact = (exact + bias.double()[:, None, None] + (residual.double() if channels_last else 0)).relu()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.full_like(exact, float("nan"), dtype=dtype).contiguous(memory_format=layout)
    window = (stride, stride), padding, (1, 1), 1, input_precision, input_precision == "tf32"
    epilogue = Epilogue(scale, bias, residual, "relu")
    given = Product(x, pack_weight(weight, input_precision), y, channels_last, *window, epilogue)
    stages = 1 if DEVICE.type == "cpu" else 3
    return given, Choice(config_of(best_box(3, *y.shape[2:], 64), 64, block_k, swap_ab, 4, stages, splits)), exact


@pytest.fixture
def on_a_card_with_tma():
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.usefixtures("on_a_card_with_tma")
@pytest.mark.parametrize("name", CASES)
def test_values(name):
    given, choice, exact = operands(name, channels_last=True)
    run(given, choice)
    assert worst_image(given.y, exact) < LIMITS[given.input_precision]


@pytest.mark.usefixtures("on_a_card_with_tma")
@pytest.mark.parametrize("name", ["2, weight first", "4, TF32 in registers"])
def test_contiguous_outputs(name):
    given, choice, exact = operands(name, channels_last=False)
    run(given, choice)
    assert worst_image(given.y, exact) < LIMITS[given.input_precision]


@in_the_interpreter
def test_semaphores_are_zero_for_the_next_launch(monkeypatch):
    counts = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(tma, "launch_semaphores", lambda *_: counts)
    given, choice, exact = operands("4, of nine steps", channels_last=True)
    for _ in range(2):
        given.y.fill_(float("nan"))
        run(given, choice)
        assert worst_image(given.y, exact) < LIMITS[given.input_precision] and not counts.any()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_a_card_with_tma")
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_each_time_and_semaphores_are_zero_again(name):
    """Whichever program is the last to arrive."""
    given, choice, exact = operands(name, channels_last=True)
    run(given, choice)
    first = given.y.clone()
    for _ in range(20):
        given.y.fill_(float("nan"))
        run(given, choice)
        assert torch.equal(given.y, first)
    assert worst_image(first, exact) < LIMITS[given.input_precision]
    assert not semaphores(DEVICE, 1).any()


def split(splits: int, box: tuple[int, int, int] = (1, 4, 16)) -> Choice:
    return Choice(config_of(box, 64, 64, True, 4, 4, splits))


@pytest.mark.usefixtures("on_hopper")
class TestWhatIsSplit:
    def test_no_part_is_empty(self):
        given = product(n=1, c=128, side=14, taps=1)  # two steps
        assert can_run(given, split(2)) and not can_run(given, split(3))

    def test_all_tiles_have_semaphores(self):
        most = product(n=PER_STREAM, c=64, side=8)  # a tile an image
        more = product(n=PER_STREAM + 1, c=64, side=8)
        assert can_run(most, split(2, (1, 8, 8))) and not can_run(more, split(2, (1, 8, 8)))
        assert can_run(more, split(1, (1, 8, 8)))

    @pytest.mark.parametrize(
        "sizes, splits",
        {
            "four programs a tile": (dict(n=1, c=512, side=14), 4),
            "at most six": (dict(n=1, c=1024, side=7), 6),
            "two, of tiles of twice as many channels": (dict(n=1, c=512, side=28), 2),
            "18 steps": (dict(n=1, c=128, side=8), 1),
            "one and a half of few rows": (dict(n=64, c=4096, side=1, taps=1), 3),
            "many images": (dict(n=128, c=512, side=14), 1),
        }.values(),
        ids=str,
    )
    def test_default(self, sizes, splits):
        assert BY_NAME["tma"].default(product(**sizes)).config.SPLITS == splits

    @pytest.mark.parametrize(
        "sizes, form",
        {
            "much is read": (dict(n=1, c=512, side=14), "tma"),
            "less is read": (dict(n=1, c=512, side=7), "sliced_k"),
            "64 rows": (dict(n=64, c=4096, side=1, taps=1), "tma"),
            "one row": (dict(n=1, c=25088, k=4096, side=1, taps=1), "sliced_k"),
            "few features": (dict(n=64, c=2048, k=1000, side=1, taps=1), "in_registers"),
        }.values(),
        ids=str,
    )
    def test_other_forms_leave_it_what_they_would_read_often(self, sizes, form):
        with posing(H100):
            assert default_choice(product(**sizes)).config.form == form

    def test_tuning_tries_splits_where_tiles_are_few(self):
        def tried(given):
            return [c.config.SPLITS for c in BY_NAME["tma"].candidates(given, None, H100)]

        half = dict(dtype=torch.bfloat16)
        assert tried(problem(1, 512, 14, 512, **half))[:3] == [4, 8, 1]
        assert set(tried(problem(128, 512, 14, 512, **half))) == {1}
