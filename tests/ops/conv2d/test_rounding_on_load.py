"""Tensor descriptors that round float32 to TF32 as they load, with versions of Triton that a GPU has shown to do so."""

import pytest
import torch
import triton
from helpers.gpus import H100
from helpers.problems import product
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonnn.ops.conv2d import dispatch, tables
from tritonnn.ops.conv2d.forms import BY_NAME, tma, tma_halo
from tritonnn.ops.conv2d.forms.tma_halo.config import tile
from tritonnn.ops.conv2d.forms.tma_tiles import config_of
from tritonnn.ops.conv2d.problem import Choice, Problem, Product, problem_of
from tritonnn.ops.conv2d.tables import Entry
from tritonnn.runtime import capabilities
from tritonnn.tuning.harness import Harness


@triton.jit
def copied_by_descriptors_kernel(x_desc, y_desc):
    y_desc.store([0, 0], x_desc.load([0, 0]))


def test_it_takes_a_version_that_was_shown_to_round(monkeypatch):
    monkeypatch.setattr(capabilities, "can_round_on_load", lambda: True)
    monkeypatch.setattr(capabilities, "ROUNDS_ON_LOAD", ("4.1.", "4.2."))
    for version, rounds in {"4.1.3": True, "4.2.0": True, "4.3.0": False}.items():
        monkeypatch.setattr(triton, "__version__", version)
        assert capabilities.rounding_on_load(True) == ({"round_f32_to_tf32": True} if rounds else {})
        assert capabilities.rounding_on_load(False) == {}
    monkeypatch.setattr(triton, "__version__", "4.1.3")
    monkeypatch.setattr(capabilities, "can_round_on_load", lambda: False)
    assert capabilities.rounding_on_load(True) == {}


def tf32(n: int, c: int, side: int, k: int, stride: int, round_x: bool = True) -> Product:
    """A 3x3 convolution whose x is channels_last."""
    return product(n, c, side, k, dtype=torch.float32, stride=(stride, stride), round_x=round_x)


@pytest.fixture
def as_if_on_load(monkeypatch):
    monkeypatch.setattr(capabilities, "ROUNDS_ON_LOAD", ("",))
    monkeypatch.setattr(capabilities, "can_round_on_load", lambda: True)


NETWORK = [(128, 16, 128, 1), (128, 28, 128, 1), (256, 8, 512, 2), (512, 4, 512, 1), (96, 20, 96, 1)]
"""(channels, side, channels of the output, stride)"""


@pytest.mark.usefixtures("on_hopper", "as_if_on_load")
@pytest.mark.parametrize("sizes", NETWORK, ids=str)
def test_x_that_is_rounded_on_load_costs_what_x_does_that_was_rounded(sizes):
    """Nobody copies it to round it, and no kernel is chosen for how it rounds."""
    rounded, as_it_is = tf32(1024, *sizes), tf32(1024, *sizes, round_x=False)
    choice = dispatch.default_choice(rounded)
    assert choice == dispatch.default_choice(as_it_is) and not choice.copies_x
    form = BY_NAME[choice.config.form]
    assert form.loads_by_descriptor
    tried, same = ([*form.candidates(problem_of(p), choice, H100)] for p in (rounded, as_it_is))
    assert tried == same


@pytest.mark.usefixtures("on_hopper")
def test_without_it_x_is_copied_or_rounded_in_the_kernel():
    """What the test above would find for the same convolutions."""
    choices = [dispatch.default_choice(tf32(1024, *sizes)) for sizes in NETWORK]
    others = [dispatch.default_choice(tf32(1024, *sizes, round_x=False)) for sizes in NETWORK]
    assert [a == b for a, b in zip(choices, others)] != [True] * len(NETWORK)
    assert any(choice.copies_x for choice in choices)


def test_choices_of_a_triton_that_did_not_round_on_load_are_left_out(tables_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(capabilities, "can_round_on_load", lambda: True)
    monkeypatch.setattr(capabilities, "ROUNDS_ON_LOAD", ())
    by_tma = Entry(Choice(config_of((1, 8, 16), 128, 32, True, 8, 3)), 1.0, 2.0)
    copied = by_tma._replace(choice=by_tma.choice._replace(copies_x=True))
    rounded, as_it_is = (problem_of(tf32(8, 64, 8, 64, 1, round_x)) for round_x in (True, False))
    entries = {rounded: copied, rounded._replace(n=7): by_tma, as_it_is: by_tma, as_it_is._replace(n=7): copied}
    tables.add(tables.SHIPPED / tables.file_name("GPU", "3.0.0"), entries)
    tables.add(tables.SHIPPED / tables.file_name("GPU"), {rounded._replace(n=6): copied})
    assert len(tables.tuned_choices(0)) == 5
    tables.forget()
    monkeypatch.setattr(capabilities, "ROUNDS_ON_LOAD", ("",))
    assert set(tables.tuned_choices(0)) == {as_it_is, as_it_is._replace(n=7), rounded._replace(n=6)}


OPERANDS = "x", "packed", "y"


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("form", [tma, tma_halo], ids=["tma", "tma_halo"])
@pytest.mark.parametrize("stride", [1, 2])
def test_both_forms_ask_the_descriptors_of_x_alone(form, stride, rounds_on_load, monkeypatch):
    """The descriptors that round are x's, and the kernel rounds nothing."""
    launched = []
    monkeypatch.setattr(form, "launch", lambda kernel, grid, *args, **constants: launched.append((args, constants)))
    given = tf32(8, 64, 16, 64, stride)
    given = given._replace(**{name: torch.empty_like(getattr(given, name), device="cpu") for name in OPERANDS})
    config = config_of((1, 8, 8), 64, 32, True, 4, 3)
    if form is tma_halo:
        config = tile((1, 8, 8), 64, 4, slots=(2, 4), store="registers", num_warps=4, programs=1)
    for round_x in (True, False):
        BY_NAME[config.form].run(given._replace(round_x=round_x), config)
    for round_x, (args, constants) in zip((True, False), launched):
        descriptors = [arg for arg in args if hasattr(arg, "block_shape")]
        x, others = given.x.data_ptr(), [d for d in descriptors if d.base.data_ptr() != given.x.data_ptr()]
        assert others and not any(d.round_f32_to_tf32 for d in others)
        assert {d.round_f32_to_tf32 for d in descriptors if d.base.data_ptr() == x} == {round_x}
        assert not constants["ROUND_X"]


@pytest.fixture
def rounds_on_load(monkeypatch):
    if not capabilities.can_round_on_load():
        pytest.skip("descriptors round from triton 3.7 on")
    monkeypatch.setattr(capabilities, "ROUNDS_ON_LOAD", ("",))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper", "rounds_on_load")
class TestOnAGpu:
    def test_descriptors_round_to_nearest(self):
        """A value becomes the nearer of its two neighbours in TF32, either of them where both are as near."""
        bits = torch.randint(2**23, 2**31 - 2**24, (64, 64), dtype=torch.int32, device="cuda")
        bits[0] = (bits[0] & -0x2000) | 0x1000  # halfway
        x = bits.view(torch.float32) * torch.where(torch.rand(64, 64, device="cuda") < 0.5, -1, 1)
        y = torch.empty_like(x)
        x_desc = TensorDescriptor.from_tensor(x, [64, 64], **capabilities.rounding_on_load(True))
        copied_by_descriptors_kernel[1,](x_desc, TensorDescriptor.from_tensor(y, [64, 64]))
        down = (x.view(torch.int32) & -0x2000).view(torch.float32)
        up = (down.view(torch.int32) + 0x2000).view(torch.float32)
        nearest = torch.where((x - down).abs() < (up - x).abs(), down, up)
        assert torch.equal(y[1:], nearest[1:])
        assert ((y[0] == down[0]) | (y[0] == up[0])).all()

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("form", ["tma", "tma_halo"])
    def test_convolutions_are_as_near(self, form, stride):
        window = (stride, stride), (1, 1), (1, 1)
        problem = Problem(
            40, 64, 32, 32, 128, 3, 3, *window, 1, torch.float32, "tf32", True, True, True, ("bias", "relu")
        )
        config = config_of((1, 8, 16), 128, 32, True, 8, 3)
        if form == "tma_halo":
            slots = (3, 7) if stride == 2 else (3, 6)
            config = tile((1, 8, 16), 128, 4, slots=slots, store="registers", num_warps=8, programs=1)
        # 4.7e-4 where the tensor core truncates
        Harness(problem, torch.device("cuda")).check(Choice(config), limit=3.5e-4)
