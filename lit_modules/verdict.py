"""Whether a variant is PyTorch's network but for the speed: by its predictions, other outputs and metrics."""

import math
from collections.abc import Mapping

from lit_modules.agreement import Agreement, Numbers, Quality, Verdict, judge, judge_metric, judge_numbers
from lit_modules.evaluation_result import SideResult


def judge_variant(
    name: str,
    sides: Mapping[str, SideResult],
    qualities: Mapping[str, Quality],
    agreements: Mapping[str, Agreement],
    errors: Mapping[str, Agreement],
    unlike: Mapping[str, int],
    logits: str | None,
    reference: str | None,
    exact: bool,
    resolution: float,
) -> Verdict:
    """All has to hold: predictions by `judge`, other outputs by `judge_numbers`, metrics in strict precision.

    In lower precision a metric moves by what the precision changes at random, so outputs decide; and in any where
    predictions differ within PyTorch's own noise. A NaN on one side only fails everywhere. An output of another shape
    than PyTorch's, such as a number of boxes found, is left to the metrics, or fails where the module logs none.

    Args:
        name: of the variant, among `sides`.
        sides: with "pytorch", "yardstick" and the `reference`, if there is one.
        qualities, agreements, errors: of predictions, by side; empty where there are none.
        unlike: outputs of another shape than PyTorch's, with the number of batches.
        logits: the output that is compared by its predictions; that it has another shape fails in any case.
        exact, resolution: of the precision in which the network runs.
    """
    verdicts = []
    agreement = agreements.get(name)
    if agreement is not None:
        float32 = (agreements["float32"], errors[name]) if name in errors else None
        verdicts.append(
            judge(
                qualities["pytorch"],
                qualities[name],
                agreement,
                agreements["yardstick"],
                float32,
                agreements.get("float64"),
            )
        )
    numbers = _judge_outputs(name, sides, reference, exact, resolution, alone=agreement is None)
    if numbers is not None:
        verdicts.append(numbers)
    strictly = not verdicts or (exact and not (agreement and agreement.differing))
    metrics = _judge_metrics(name, sides, reference, strictly)
    if metrics is not None:
        verdicts.append(metrics)
    if logits in unlike or (unlike and metrics is None):
        output, batches = next(iter(unlike.items()))
        verdicts.append(Verdict(False, f"{output} has another shape than PyTorch's in {batches} batches"))
    return Verdict(all(v.passed for v in verdicts), "; ".join(v.reason for v in verdicts if v.reason))


def _judge_outputs(
    name: str, sides: Mapping[str, SideResult], reference: str | None, exact: bool, resolution: float, alone: bool
) -> Verdict | None:
    """Judges outputs by their errors; whole numbers, such as classes, by how many differ, where they are `alone`."""
    outputs, pytorch, yardstick = sides[name].outputs, sides["pytorch"].outputs, sides["yardstick"].outputs
    same = Numbers(0, 0.0, 0.0, None, None)
    verdicts = [
        judge_numbers(output, pytorch.get(output, same), numbers, yardstick.get(output, same), exact, resolution)
        for output, numbers in outputs.items()
        if numbers.differing is None
    ]
    if not verdicts and alone:
        for output, numbers in outputs.items():
            others = [sides[side].outputs.get(output) for side in ("yardstick", reference) if side]
            allowed = max((other.differing or 0 for other in others if other), default=0)
            reason = f"{numbers.differing} of {numbers.values} values of {output} differ, PyTorch's own: {allowed}"
            verdicts.append(Verdict(numbers.differing <= allowed, reason))
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if not verdicts or failed:
        return Verdict(False, "; ".join(verdict.reason for verdict in failed)) if failed else None
    if len(verdicts) == 1:
        return verdicts[0]
    return Verdict(True, f"all {len(verdicts)} outputs are as precise as PyTorch's")


def _judge_metrics(name: str, sides: Mapping[str, SideResult], reference: str | None, strictly: bool) -> Verdict | None:
    pytorch, other = sides["pytorch"].metrics, sides[name].metrics
    if not pytorch and not other:
        return None
    if pytorch.keys() != other.keys():
        return Verdict(
            False, f"PyTorch logs {', '.join(pytorch) or 'nothing'}; here it is {', '.join(other) or 'nothing'}"
        )
    failed = []
    for metric, value in pytorch.items():
        others = [sides[side].metrics.get(metric, value) for side in ("yardstick", reference) if side]
        noise = max(abs(own - value) for own in others)
        alike = math.isfinite(value) == math.isfinite(other[metric])
        if not (judge_metric(value, other[metric], noise) if strictly else alike):
            failed.append(f"{metric} is {other[metric]:.6g}, PyTorch's {value:.6g} (its own noise {noise:.2g})")
    if failed:
        return Verdict(False, "; ".join(failed))
    return Verdict(
        True, f"{'all' if len(pytorch) > 1 else 'the'} {_count(len(pytorch))} as PyTorch's" if strictly else ""
    )


def _count(metrics: int) -> str:
    return "metric" if metrics == 1 else f"{metrics} metrics"
