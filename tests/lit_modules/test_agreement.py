"""How well a classifier does, how far two agree, and when that is a proof."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_modules.agreement import (
    Agreement,
    AgreementMeter,
    Numbers,
    NumbersMeter,
    Quality,
    QualityMeter,
    judge,
    judge_metric,
    judge_numbers,
)
from lit_modules.evaluation_result import SideResult
from lit_modules.verdict import judge_variant

QUALITY = Quality(0.9, 1.0, 0.1)


def agreement(differing: int = 0, largest: float = 0.0, margin: float | None = None, non_finite: int = 0) -> Agreement:
    return Agreement(100, differing, non_finite, differing / 100, largest, largest / 2, margin, [])


@pytest.mark.parametrize(
    ("top1", "other", "yardstick", "passed"),
    [
        pytest.param(0.9, agreement(0, 1.0), agreement(), True, id="identical"),
        pytest.param(0.9, agreement(2, 1e-5, margin=1e-6), agreement(0, 1e-5), True, id="below the noise"),
        pytest.param(0.9, agreement(2, 1e-5, margin=1e-5), agreement(0, 1e-5), False, id="at the noise"),
        pytest.param(0.9, agreement(1, 1.0, margin=math.nan), agreement(0, 1.0), False, id="margin NaN"),
        pytest.param(0.9, agreement(1, 1.0, margin=1.0), agreement(1, math.inf, 1.0, 1), False, id="noise infinite"),
    ],
)
def test_verdict(top1: float, other: Agreement, yardstick: Agreement, passed: bool):
    assert judge(QUALITY, Quality(top1, 1.0, 0.1), other, yardstick).passed is passed


@pytest.mark.parametrize(
    ("top1", "error", "noise", "passed"),
    [
        pytest.param(0.88, 1.0, 0.0, True, id="within the share that the precision changes"),
        pytest.param(0.93, 1.0, 0.0, False, id="beyond it"),
        pytest.param(0.9, 1.15, 0.0, False, id="less precise than PyTorch"),
        pytest.param(0.9, 1.15, 0.1, True, id="less precise by less than PyTorch's own noise"),
    ],
)
def test_verdict_in_lower_precision(top1: float, error: float, noise: float, passed: bool):
    float32 = agreement(2, 2.0, 0.1), agreement(9, 2 * error, 1.0)
    verdict = judge(QUALITY, Quality(top1, 1.0, 0.1), agreement(9, 1.0, 1.0), agreement(0, 2 * noise), float32)
    assert verdict.passed is passed


@pytest.mark.parametrize(
    ("margin", "error", "passed"),
    [
        pytest.param(1e-4, 1.0, True, id="below the noise"),
        pytest.param(2e-2, 1.0, False, id="above it"),
        pytest.param(1e-4, 1.2, False, id="below it but less precise"),
    ],
)
def test_verdict_in_lower_precision_that_changes_no_prediction_of_pytorch(margin: float, error: float, passed: bool):
    float32 = agreement(0, 2.0), agreement(1, 2 * error, margin)
    other, yardstick = agreement(1, 1.0, margin), agreement(0, 1e-2)
    assert judge(QUALITY, Quality(0.91, 1.0, 0.1), other, yardstick, float32).passed is passed


def test_losses_are_summed_in_float64_whatever_the_default_type():
    torch.manual_seed(0)
    logits, labels = torch.randn(300, 6), torch.randint(6, (300,))
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for a network in bfloat16
    try:
        meter = QualityMeter(6, torch.device("cpu"))
        for batch in zip(logits.split(1), labels.split(1)):
            meter.update(*batch)
        quality = meter.compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert quality.loss == pytest.approx(cross_entropy(logits.double(), labels).item(), rel=1e-6)


def numbers(error: float | None, difference: float = 0.0) -> Numbers:
    return Numbers(100, difference, difference, None, error)


@pytest.mark.parametrize(
    ("pytorch", "other", "yardstick", "exact", "passed"),
    [
        pytest.param(numbers(1e-6), numbers(3.5e-6), numbers(1e-6), True, True, id="three times and some roundings"),
        pytest.param(numbers(1e-6), numbers(4.5e-6), numbers(1e-6), True, False, id="more"),
        pytest.param(numbers(1e-6), numbers(4.5e-6), numbers(2e-6), True, True, id="of the worse memory format"),
        pytest.param(numbers(1e-2), numbers(1.15e-2), numbers(1e-2), False, False, id="lower precision"),
        pytest.param(numbers(1e-2), numbers(1.15e-2), numbers(1e-2, 1e-3), False, True, id="within its noise"),
        pytest.param(numbers(None), numbers(None, 5e-6), numbers(None, 0), True, True, id="no errors, some roundings"),
        pytest.param(numbers(None), numbers(None, 5e-5), numbers(None, 1e-5), True, False, id="no errors, more"),
        pytest.param(numbers(math.inf), numbers(math.inf, 0.5), numbers(math.inf), False, False, id="overflow"),
        pytest.param(numbers(1e-6), numbers(math.inf, math.inf), numbers(1e-6), True, False, id="not finite"),
    ],
)
def test_verdict_of_an_output(pytorch: Numbers, other: Numbers, yardstick: Numbers, exact: bool, passed: bool):
    assert judge_numbers("y", pytorch, other, yardstick, exact, 2**-23 if exact else 2**-8).passed is passed


@pytest.mark.parametrize(
    ("other", "noise", "passed"),
    [(0.500004, 0.0, True), (0.50002, 0.0, False), (0.50002, 1e-5, True), (math.nan, 1.0, False)],
)
def test_verdict_of_a_metric(other: float, noise: float, passed: bool):
    assert judge_metric(0.5, other, noise) is passed


def test_numbers_of_outputs():
    meter = NumbersMeter()
    meter.update(torch.tensor([3.0, 4.0, math.nan, math.inf]), torch.tensor([3.0, 4.5, math.nan, math.inf]))
    assert meter.numbers(0.1) == Numbers(4, 0.1, 0.5, None, 0.1)
    meter.update(torch.tensor([1.0]), torch.tensor([math.nan]))
    assert meter.numbers().difference == math.inf
    classes = NumbersMeter()
    classes.update(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3]))
    assert classes.numbers().differing == 1


def test_logits_of_another_shape_fail_whatever_is_logged():
    sides = {name: SideResult({"loss": 1.0}, {}) for name in ("pytorch", "yardstick", "all")}

    def passes(unlike: dict[str, int], logits: str | None) -> bool:
        return judge_variant("all", sides, {}, {}, {}, unlike, logits, None, True, 1e-7).passed

    assert passes({}, "forward") and passes({"forward": 1}, None) and not passes({"forward": 1}, "forward")


def test_nan_on_one_side_fails_in_any_precision():
    other, yardstick = agreement(1, math.inf, 0.1, 1), agreement(5, 9.0, 1.0)
    assert not judge(QUALITY, QUALITY, other, yardstick).passed
    assert not judge(QUALITY, QUALITY, other, yardstick, (agreement(9), agreement())).passed


def test_agreement_of_logits_counts_what_differs():
    meter = AgreementMeter()
    pytorch = torch.tensor([[1.0, 3.0], [2.0, 1.5], [math.nan, 0.0], [math.inf, 0.0]])
    other = torch.tensor([[1.0, 3.5], [1.0, 1.5], [math.nan, 0.0], [math.inf, 0.0]])
    meter.update(pytorch, other, torch.tensor([1, 0, 0, 0]), torch.tensor([4, 5, 6, 7]))
    result = meter.agreement()
    assert (result.samples, result.differing, result.non_finite) == (4, 1, 0)
    assert result.largest_logit_difference == 1.0 and result.mean_logit_difference == 1.5 / 8
    assert vars(result.examples[0]) == {"sample": 5, "label": 0, "pytorch": 0, "other": 1, "margin": 0.5}
