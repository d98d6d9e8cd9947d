"""A form of convolution is one file and one line of FORMS: dispatch, candidates and tables find a new one there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from helpers.compare import DEVICE, image
from helpers.gpus import H100
from helpers.problems import problem, product, product_of
from torch.nn import functional as F

import tritonnn
from tritonnn.ops.conv2d import dispatch, forms, tables
from tritonnn.ops.conv2d.forms.form import Config, Form
from tritonnn.ops.conv2d.forms.in_registers import InRegistersConfig
from tritonnn.ops.conv2d.problem import Choice, Problem, Product
from tritonnn.ops.conv2d.tables import Entry
from tritonnn.runtime.hardware import Gpu
from tritonnn.runtime.launch_plan import forget_plans


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    form: ClassVar[str] = "toy"

    BLOCK_N: int


class ToyForm(Form):
    """Any product of one group, by PyTorch; counts how often it ran."""

    config = ToyConfig
    kernels = ()
    packs_weight = False
    runs = 0

    def fits(self, product: Product) -> bool:
        return product.groups == 1

    def default(self, product: Product) -> Choice | None:
        return Choice(ToyConfig(BLOCK_N=16)) if self.fits(product) else None

    def candidates(self, problem: Problem, default: Choice, gpu: Gpu) -> Iterator[Choice]:
        for block_n in (16, 32, 64):
            yield Choice(ToyConfig(BLOCK_N=block_n))

    def run(self, product: Product, config: ToyConfig) -> None:
        weight = product.packed[-product.y.shape[1] :].permute(0, 3, 1, 2)
        bias = product.epilogue.bias
        product.y.copy_(F.conv2d(product.x, weight, bias, product.stride, product.padding, product.dilation))
        self.runs += 1


@pytest.fixture
def toy(monkeypatch) -> Iterator[ToyForm]:
    """The one line."""
    toy = ToyForm()
    monkeypatch.setattr(dispatch, "FORMS", (toy, *forms.FORMS))
    monkeypatch.setitem(forms.BY_NAME, toy.name, toy)
    forget_plans()
    yield toy
    forget_plans()


def test_dispatch_chooses_it(toy):
    assert dispatch.choose(product(n=2)) == Choice(ToyConfig(BLOCK_N=16))
    assert dispatch.choose(product(n=2, groups=2)).config.form == "pointers"


def test_an_operator_runs_it(toy):
    layer, x = tritonnn.TritonConv2d(4, 8, 3, padding=1, device=DEVICE), image(2, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert toy.runs == 1


def test_tuning_tries_its_candidates(toy):
    choices = dispatch.candidates(product_of(problem()), H100)
    assert [choice.config.BLOCK_N for choice in choices if choice.config.form == "toy"] == [16, 32, 64]
    assert all(dispatch.can_run(product_of(problem()), choice) for choice in choices)


def test_tables_keep_its_choices(toy, tmp_path):
    entries = {problem(): Entry(Choice(ToyConfig(BLOCK_N=32), copies_x=True), 1.0, 2.0)}
    tables.add(tmp_path / "table.json", entries)
    assert tables.read(tmp_path / "table.json") == entries
    assert str(entries[problem()].choice) == "toy 32, x copied"


def test_a_process_without_it_passes_its_entries_over(toy, tmp_path, monkeypatch):
    tables.add(tmp_path / "table.json", {problem(): Entry(Choice(ToyConfig(BLOCK_N=32)), 1.0, 2.0)})
    monkeypatch.delitem(forms.BY_NAME, "toy")
    assert tables.read(tmp_path / "table.json") == {}


def test_configurations_of_two_forms_are_never_equal():
    """Choices are keys of what tuning tried."""
    one, other = (config(BLOCK_N=16, BLOCK_K=16, num_warps=4) for config in (InRegistersConfig, _Another))
    assert one != other and len({Choice(one), Choice(other)}) == 2


@dataclass(frozen=True, kw_only=True)
class _Another(Config):
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


def test_names_are_their_own():
    assert len(forms.BY_NAME) == len(forms.FORMS)
