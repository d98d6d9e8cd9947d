"""The outputs of several sides for the same batches, compared with PyTorch's and with those in higher precision."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_modules.agreement import Agreement, AgreementMeter, Numbers, NumbersMeter, Quality, QualityMeter

COMPARED_TOGETHER = 1024
"""Samples, in batches as the last: one by one the metrics of small batches would take as long as the networks."""
KEPT_BYTES = 2**28
"""Bytes of one side's outputs that wait to be compared, at most."""

Outputs = dict[str, Tensor]


@dataclass
class _Batch:
    outputs: dict[str, Outputs]
    labels: Tensor | None
    places: Tensor


class Comparison:
    """Collects, by side: `qualities` and `agreements` of predictions, and `numbers` of each other output.

    Args:
        logits: name of the output that is compared by its predictions, or None.
        reference: the side in higher precision, or None. How far the others are from it is told for predictions only
            where `errors_of_logits`.
        also_numbers: whether logits are compared as numbers too.
    """

    def __init__(self, logits: str | None, reference: str | None, errors_of_logits: bool, also_numbers: bool) -> None:
        self.logits, self.reference = logits, reference
        self.errors_of_logits, self.also_numbers = errors_of_logits, also_numbers
        self.unlike: dict[str, Counter[str]] = defaultdict(Counter)
        """By side, outputs of another shape than PyTorch's or that only one of them has, with the number of batches."""
        self._qualities: dict[str, QualityMeter] = {}
        self._agreements: dict[str, AgreementMeter] = {}
        self._errors: dict[str, AgreementMeter] = {}
        self._differences: dict[tuple[str, str], NumbersMeter] = {}
        self._number_errors: dict[tuple[str, str], NumbersMeter] = {}
        self._pending: list[_Batch] = []

    def add(self, outputs: dict[str, Outputs], labels: Tensor | None, places: Tensor) -> None:
        """Takes each side's outputs of a batch, "pytorch" among them, integer labels, and the samples' places [N]."""
        pytorch = outputs["pytorch"]
        for side, others in outputs.items():
            alike = {name for name, x in others.items() if name in pytorch and pytorch[name].shape == x.shape}
            self.unlike[side].update(others.keys() ^ alike | pytorch.keys() - alike)
        self._pending.append(_Batch(outputs, labels, places))
        kept = sum(x.nbytes for batch in self._pending for x in batch.outputs["pytorch"].values())
        if len(self._pending) * len(places) >= COMPARED_TOGETHER or kept > KEPT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Meters what is pending."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        if self.logits is not None:
            with_logits = [batch for batch in pending if self.logits in batch.outputs["pytorch"]]
            self._compare_predictions(with_logits)
        for side in pending[0].outputs:
            self._compare_numbers(side, [batch.outputs for batch in pending])

    def _compare_predictions(self, batches: Sequence[_Batch]) -> None:
        labels = torch.cat([batch.labels.reshape(-1) for batch in batches])
        places = torch.cat([b.places.repeat_interleave(b.labels.numel() // len(b.places)) for b in batches])
        names = [n for n in batches[0].outputs if not self.unlike[n][self.logits]]
        logits = {name: torch.cat([_rows(batch.outputs[name][self.logits]) for batch in batches]) for name in names}
        pytorch, reference = logits["pytorch"], logits.get(self.reference)
        for name, other in logits.items():
            if name not in self._qualities:
                self._qualities[name] = QualityMeter(other.shape[1], other.device)
            self._qualities[name].update(other, labels)
            if name != "pytorch":
                self._meter(self._agreements, name, other).update(pytorch, other, labels, places)
            if reference is not None and self.errors_of_logits and name not in ("pytorch", "yardstick", self.reference):
                self._meter(self._errors, name, other).update(reference, other, labels, places)

    def _compare_numbers(self, side: str, batches: Sequence[dict[str, Outputs]]) -> None:
        for name in dict.fromkeys(name for outputs in batches for name in outputs["pytorch"]):
            if name == self.logits and not self.also_numbers:
                continue
            alike = [b for b in batches if name in b["pytorch"] and name in b[side]]
            alike = [b for b in alike if b[side][name].shape == b["pytorch"][name].shape]
            if side != "pytorch":
                for expected, other in _together([(b["pytorch"][name], b[side][name]) for b in alike]):
                    self._numbers_meter(self._differences, side, name, other).update(expected, other)
            if self.reference is not None and side != self.reference:
                with_reference = [b for b in alike if name in b.get(self.reference, {})]
                pairs = [(b[self.reference][name], b[side][name]) for b in with_reference]
                for expected, other in _together([(a, b) for a, b in pairs if a.shape == b.shape]):
                    self._numbers_meter(self._number_errors, side, name, other).update(expected, other)

    @staticmethod
    def _meter(meters: dict[str, AgreementMeter], name: str, logits: Tensor) -> AgreementMeter:
        if name not in meters:
            meters[name] = AgreementMeter().to(logits.device)
        return meters[name]

    @staticmethod
    def _numbers_meter(meters: dict[tuple[str, str], NumbersMeter], side: str, name: str, x: Tensor) -> NumbersMeter:
        if (side, name) not in meters:
            meters[side, name] = NumbersMeter().to(x.device)
        return meters[side, name]

    def qualities(self) -> dict[str, Quality]:
        return {name: meter.compute() for name, meter in self._qualities.items()}

    def agreements(self) -> dict[str, Agreement]:
        """With PyTorch's predictions."""
        return {name: meter.agreement() for name, meter in self._agreements.items()}

    def errors(self) -> dict[str, Agreement]:
        """With the predictions in higher precision."""
        return {name: meter.agreement() for name, meter in self._errors.items()}

    def numbers(self) -> dict[str, dict[str, Numbers]]:
        """By side and output. Called on all processes."""
        errors = {key: meter.numbers().difference for key, meter in self._number_errors.items()}
        found: dict[str, dict[str, Numbers]] = defaultdict(dict)
        for (side, name), meter in self._differences.items():
            found[side][name] = meter.numbers(errors.get((side, name)))
        for (side, name), error in errors.items():
            if side == "pytorch":
                values = found["yardstick"][name].values if name in found["yardstick"] else 0
                found[side][name] = Numbers(values, 0.0, 0.0, None, error)
        return dict(found)


def _rows(logits: Tensor) -> Tensor:
    """[N, C, ...] as [N * ..., C]."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def _together(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches one upon the other, where their samples have one shape."""
    if len(pairs) > 1 and pairs[0][0].dim() and len({x.shape[1:] for x, _ in pairs}) == 1:
        expected, other = zip(*pairs)
        yield torch.cat(expected), torch.cat(other)
    else:
        yield from pairs
