"""How far two sides agree in their predictions, in other outputs and in what they log, and when that is a proof."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_modules.classifier import MeanLoss, accuracies
from tritonnn.command.proof import FACTOR, STRICT_FACTOR, STRICT_FLOOR

EXAMPLES = 100
DIFFERENCE_FLOOR = 80
"""Roundings by which two orders of the same sums may lie apart where PyTorch's own noise happens to be 0."""
METRIC_RELATIVE, METRIC_ABSOLUTE = 1e-5, 1e-6
"""What a metric may differ by in strict precision, where a test set's float32 numbers are summed in another order."""


@dataclass(frozen=True)
class Quality:
    """Shares of 1, and the mean cross-entropy."""

    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class Difference:
    """A sample, by its place in the test set, on which two sides disagree; `margin` of PyTorch's two best logits."""

    sample: int
    label: int
    pytorch: int
    other: int
    margin: float


@dataclass(frozen=True)
class Agreement:
    """Two sides compared on the same samples.

    `non_finite` counts the samples in which a NaN or an infinity stands on one side only; they count as differing, and
    as an infinite difference of logits. `examples` are those with the largest margins, at most 100.
    """

    samples: int
    differing: int
    non_finite: int
    share_differing: float
    largest_logit_difference: float
    mean_logit_difference: float
    largest_margin: float | None
    examples: list[Difference]


@dataclass(frozen=True)
class Numbers:
    """One output of one side, over all samples.

    `difference` is the root mean square of its differences from PyTorch's, relative to PyTorch's output, `largest` the
    largest of them; `error` is as `difference`, from the same network in higher precision, None where there is none.
    `differing` counts the values that differ, of outputs that are whole numbers or truth values; None of others.
    """

    values: int
    difference: float
    largest: float
    differing: int | None
    error: float | None


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str


class QualityMeter:
    """Top-1, top-5 (or top-C with fewer classes) and loss of one side; reduced over the processes when computed.

    Labels that are no class, as those of pixels to be ignored, are left out.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.accuracies = accuracies(num_classes).to(device)
        self.loss = MeanLoss().to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Takes logits [N, C] and labels [N]."""
        labelled = (labels >= 0) & (labels < logits.shape[1])
        if not labelled.all():
            logits, labels = logits[labelled], labels[labelled]
        if not len(labels):
            return
        labels = labels.long()
        self.accuracies.update(logits, labels)
        self.loss.update(cross_entropy(logits.float(), labels, reduction="none"))

    def compute(self) -> Quality:
        shares = {name: share.item() for name, share in self.accuracies.compute().items()}
        return Quality(loss=self.loss.compute().item(), **shares)


class AgreementMeter(Metric):
    """Collects what `Agreement` holds; `agreement` reduces it over the processes."""

    full_state_update = False
    samples: Tensor
    differing: Tensor
    non_finite: Tensor
    logits: Tensor
    total: Tensor
    largest: Tensor
    examples: list[Tensor]
    margins: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("differing", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("non_finite", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("logits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("examples", [], dist_reduce_fx="cat")  # [D, 4]: sample, label, PyTorch's class, the other's
        self.add_state("margins", [], dist_reduce_fx="cat")  # [D]

    def update(self, pytorch: Tensor, other: Tensor, labels: Tensor, samples: Tensor) -> None:
        """Takes logits [N, C] of both sides, labels [N] and the samples' places in the test set [N]."""
        difference = differences(pytorch, other)
        pytorch, other = pytorch.double(), other.double()
        non_finite = difference.isinf().any(dim=1)
        classes, other_classes = pytorch.argmax(dim=1), other.argmax(dim=1)
        differs = (classes != other_classes) | non_finite
        best = pytorch.topk(2, dim=1).values
        self.samples += len(labels)
        self.differing += differs.sum()
        self.non_finite += non_finite.sum()
        self.logits += difference.numel()
        self.total += difference.sum()
        self.largest = torch.maximum(self.largest, difference.amax())
        margins = (best[:, 0] - best[:, 1])[differs]
        kept = margins.argsort(descending=True)[:EXAMPLES]  # NaN first
        self.examples.append(torch.stack([samples, labels, classes, other_classes], dim=1)[differs][kept])
        self.margins.append(margins[kept])

    def compute(self) -> dict[str, Tensor]:
        counts = ("samples", "differing", "non_finite", "logits", "total", "largest")
        lists = {name: dim_zero_cat(getattr(self, name)) for name in ("examples", "margins")}
        return {name: getattr(self, name) for name in counts} | lists

    def agreement(self) -> Agreement:
        state = self.compute()
        samples, differing, margins = int(state["samples"]), int(state["differing"]), state["margins"].reshape(-1)
        order = margins.argsort(descending=True)[:EXAMPLES]
        rows = state["examples"].reshape(-1, 4)[order].tolist()
        examples = [Difference(*row, margins[i].item()) for row, i in zip(rows, order, strict=True)]  # type: ignore[call-arg]
        return Agreement(
            samples=samples,
            differing=differing,
            non_finite=int(state["non_finite"]),
            share_differing=differing / samples,
            largest_logit_difference=float(state["largest"]),
            mean_logit_difference=float(state["total"]) / int(state["logits"]),
            largest_margin=examples[0].margin if examples else None,
            examples=examples,
        )


class NumbersMeter(Metric):
    """How far tensors of any shape are from others: what `Numbers` holds, reduced over the processes when computed."""

    full_state_update = False
    values: Tensor
    differing: Tensor
    squares: Tensor
    scale: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("differing", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("scale", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="max")
        self.whole = True

    def update(self, expected: Tensor, other: Tensor) -> None:
        """Takes two tensors of one shape; NaN on both sides, and equal infinities, are equal."""
        if not expected.numel():
            return
        self.whole = not (expected.is_floating_point() or expected.is_complex())
        difference = differences(expected, other)
        self.values += difference.numel()
        self.differing += (difference != 0).sum()
        self.squares += difference.square().sum()
        self.scale += _real(expected).nan_to_num(0, 0, 0).square().sum()
        self.largest = torch.maximum(self.largest, difference.amax())

    def compute(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("values", "differing", "squares", "scale", "largest")}

    def numbers(self, error: float | None = None) -> Numbers:
        state = self.compute()
        squares, scale = float(state["squares"]), float(state["scale"])
        return Numbers(
            values=int(state["values"]),
            difference=math.sqrt(squares / scale) if scale else math.inf if squares else 0.0,
            largest=float(state["largest"]),
            differing=int(state["differing"]) if self.whole else None,
            error=error,
        )


def differences(expected: Tensor, other: Tensor) -> Tensor:
    """Absolute, in float64; infinite where a NaN or an infinity stands on one side only."""
    expected, other = _real(expected), _real(other)
    same = (expected == other) | (expected.isnan() & other.isnan())
    return torch.where(same, 0.0, (expected - other).abs()).nan_to_num(math.inf, math.inf)


def _real(x: Tensor) -> Tensor:
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double()


def judge(
    pytorch: Quality,
    other: Quality,
    agreement: Agreement,
    yardstick: Agreement,
    float32: tuple[Agreement, Agreement] | None = None,
    float64: Agreement | None = None,
) -> Verdict:
    """Whether the other side does what PyTorch does; the yardstick: PyTorch against itself in its other memory format.

    No prediction may differ, unless PyTorch's own margin there lies below the yardstick's largest difference of logits.
    Where it is known how far PyTorch agrees with itself in `float64`, as where a sample has very many predictions, the
    margin may be four times the largest difference there: two logits of either side may be off by as much.
    In lower precision, `float32` being how far PyTorch and the other side agree with PyTorch in strict float32, others
    may differ if top-1 does by no more than the share of predictions that the precision changes in PyTorch itself; but
    the mean error of the logits may never exceed PyTorch's by more than a tenth and the yardstick.
    (Two memory formats in one precision often run the same kernels, and then agree by construction.)
    """
    if agreement.non_finite > yardstick.non_finite:
        return Verdict(False, f"{agreement.non_finite} samples have a NaN or an infinity on one side only")
    noises = [yardstick.largest_logit_difference, 4 * float64.largest_logit_difference if float64 else 0.0]
    noise = max(noise if math.isfinite(noise) else 0.0 for noise in noises)
    within = not agreement.differing or agreement.largest_margin < noise
    if not agreement.differing:
        reason = f"all {agreement.samples} predictions identical"
    else:
        reason = (
            f"{agreement.differing} of {agreement.samples} predictions differ, PyTorch's margin there is at most "
            f"{agreement.largest_margin:.2g}, {'below' if within else 'not below'} its own noise of {noise:.2g}"
        )
    if float32 is None:
        return Verdict(within, reason)
    exact, error = (side.mean_logit_difference for side in float32)
    if not within:
        change = abs(other.top1 - pytorch.top1)
        within = change * float32[0].samples < float32[0].differing + 0.5
        reason += (
            f"; top-1 differs by {change:.3%}, the precision itself changes {float32[0].share_differing:.3%} of "
            "PyTorch's predictions"
        )
    reason += f"; mean error against float32 {error:.2g}, PyTorch's {exact:.2g}"
    return Verdict(within and error <= 1.1 * exact + yardstick.mean_logit_difference, reason)


def judge_numbers(
    name: str, pytorch: Numbers, other: Numbers, yardstick: Numbers, exact: bool, resolution: float
) -> Verdict:
    """Whether an output is no worse than PyTorch's; `pytorch.error` is None where no higher precision could be run.

    In strict precision (`exact`) an error may be three times PyTorch's, in the worse of its two memory formats, and a
    few roundings; in lower precision 1.1 times that, and PyTorch's own noise, by which its memory formats lie apart.
    Without errors, or where PyTorch's is not finite, the difference from PyTorch's output may be three times the noise,
    and 80 roundings, which are of the size `resolution`, or in lower precision one.
    """
    errors = [side.error for side in (pytorch, yardstick, other)]
    if None in errors or not all(map(math.isfinite, errors[:2])):
        what, reached, own = "differs from PyTorch's by", other.difference, yardstick.difference
        limit = STRICT_FACTOR * own + (DIFFERENCE_FLOOR * resolution if exact else resolution)
    else:
        what, reached, own = "has an error of", other.error, max(pytorch.error, yardstick.error)
        limit = STRICT_FACTOR * own + STRICT_FLOOR if exact else FACTOR * own + yardstick.difference
    passed = reached <= limit
    against = "PyTorch's two memory formats by" if "differs" in what else "PyTorch's is"
    beyond = "" if passed else f": at most {limit:.2g} would be no worse"
    return Verdict(passed, f"{name} {what} {reached:.2g} (relative), {against} {own:.2g}{beyond}")


def judge_metric(pytorch: float, other: float, noise: float) -> bool:
    """In strict precision: it may differ by three times PyTorch's `noise` in it, and by what float32 sums differ."""
    if not (math.isfinite(pytorch) and math.isfinite(other)):
        return pytorch == other or (math.isnan(pytorch) and math.isnan(other))
    tolerance = METRIC_RELATIVE * abs(pytorch) + METRIC_ABSOLUTE
    return abs(other - pytorch) <= STRICT_FACTOR * (noise if math.isfinite(noise) else 0.0) + tolerance
