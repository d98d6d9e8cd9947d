"""How well a classifier does, how far a second one agrees with it, and when that counts as a proof."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_modules.classifier import MeanLoss, accuracies

EXAMPLES = 100


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
class Verdict:
    passed: bool
    reason: str


class QualityMeter:
    """Top-1, top-5 (or top-C with fewer classes) and loss of one side; reduced over the processes when computed."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.accuracies = accuracies(num_classes).to(device)
        self.loss = MeanLoss().to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.accuracies.update(logits, labels)
        self.loss.update(cross_entropy(logits.float(), labels, reduction="none"))

    def compute(self) -> Quality:
        shares = {name: share.item() for name, share in self.accuracies.compute().items()}
        return Quality(loss=self.loss.compute().item(), **shares)


class AgreementMeter(Metric):
    """Collects what `Agreement` holds; `agreement` reduces it over the processes."""

    full_state_update = False
    samples: Tensor
    non_finite: Tensor
    logits: Tensor
    total: Tensor
    largest: Tensor
    differing: list[Tensor]
    margins: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("non_finite", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("logits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="max")
        self.add_state("differing", [], dist_reduce_fx="cat")  # [D, 4]: sample, label, PyTorch's class, the other's
        self.add_state("margins", [], dist_reduce_fx="cat")  # [D]

    def update(self, pytorch: Tensor, other: Tensor, labels: Tensor, samples: Tensor) -> None:
        """Takes logits [N, C] of both sides, labels [N] and the samples' places in the test set [N]."""
        pytorch, other = pytorch.double(), other.double()
        same = (pytorch == other) | (pytorch.isnan() & other.isnan())
        difference = torch.where(same, 0.0, (pytorch - other).abs()).nan_to_num(math.inf, math.inf)
        non_finite = difference.isinf().any(dim=1)
        classes, other_classes = pytorch.argmax(dim=1), other.argmax(dim=1)
        differs = (classes != other_classes) | non_finite
        best = pytorch.topk(2, dim=1).values
        self.samples += len(labels)
        self.non_finite += non_finite.sum()
        self.logits += difference.numel()
        self.total += difference.sum()
        self.largest = torch.maximum(self.largest, difference.amax())
        self.differing.append(torch.stack([samples, labels, classes, other_classes], dim=1)[differs])
        self.margins.append((best[:, 0] - best[:, 1])[differs])

    def compute(self) -> dict[str, Tensor]:
        states = {name: getattr(self, name) for name in ("samples", "non_finite", "logits", "total", "largest")}
        return states | {"differing": dim_zero_cat(self.differing), "margins": dim_zero_cat(self.margins)}

    def agreement(self) -> Agreement:
        state = self.compute()
        samples, margins = int(state["samples"]), state["margins"].reshape(-1)
        order = margins.argsort(descending=True)  # NaN first
        differing = state["differing"].reshape(-1, 4)[order[:EXAMPLES]].tolist()
        examples = [Difference(*row, margins[i].item()) for row, i in zip(differing, order[:EXAMPLES], strict=True)]  # type: ignore[call-arg]
        return Agreement(
            samples=samples,
            differing=len(margins),
            non_finite=int(state["non_finite"]),
            share_differing=len(margins) / samples,
            largest_logit_difference=float(state["largest"]),
            mean_logit_difference=float(state["total"]) / int(state["logits"]),
            largest_margin=examples[0].margin if examples else None,
            examples=examples,
        )


def judge(
    pytorch: Quality,
    other: Quality,
    agreement: Agreement,
    yardstick: Agreement,
    float32: tuple[Agreement, Agreement] | None = None,
) -> Verdict:
    """Whether the other side does what PyTorch does; the yardstick: PyTorch against itself in its other memory format.

    No prediction may differ, unless PyTorch's own margin there lies below the yardstick's largest difference of logits.
    In lower precision, `float32` being how far PyTorch and the other side agree with PyTorch in strict float32, others
    may differ if top-1 does by no more than the share of predictions that the precision changes in PyTorch itself; but
    the mean error of the logits may never exceed PyTorch's by more than a tenth and the yardstick.
    (Two memory formats in one precision often run the same kernels, and then agree by construction.)
    """
    if agreement.non_finite > yardstick.non_finite:
        return Verdict(False, f"{agreement.non_finite} samples have a NaN or an infinity on one side only")
    noise = yardstick.largest_logit_difference if math.isfinite(yardstick.largest_logit_difference) else 0.0
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
        within = round(change * float32[0].samples) <= float32[0].differing
        reason += (
            f"; top-1 differs by {change:.3%}, the precision itself changes {float32[0].share_differing:.3%} of "
            "PyTorch's predictions"
        )
    reason += f"; mean error against float32 {error:.2g}, PyTorch's {exact:.2g}"
    return Verdict(within and error <= 1.1 * exact + yardstick.mean_logit_difference, reason)
